"""Where completions end while they are drawn: nothing that a program needs is cut off, and what follows it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.ending import ProgramEnd
from qprobe_code_gen.programs.mbpp import problem_from_row
from qprobe_code_gen.programs.prompts import PromptStyle

BODY = "    return x // 2"
Ended = Callable[..., str]


@pytest.fixture
def listed(mbpp_row: Callable[..., dict[str, Any]]) -> Problem:
    """The same function as a problem of MBPP."""
    return problem_from_row(mbpp_row(3, text="Halve.", code="def half(x): ...", test_list=["assert half(4) == 2"]))


@pytest.fixture
def ended(half: Problem, listed: Problem) -> Ended:
    """What is kept when a completion comes character by character; `last`: whether it ends with its last character."""

    def kept(completion: str, name: str = "zero_shot", problem: Problem = half, last: bool = True) -> str:
        style = PromptStyle(name)
        rule = style.rule([half, listed])
        assert isinstance(rule, ProgramEnd)
        prompt = style.prompt(problem)
        asked = prompt.text
        if asked is None:
            asked = f"<user>{prompt.messages[0]['content']}\n<answer>{prompt.opening}"
        for end in range(1, len(completion) + 1):
            if rule.may_end(completion[max(0, end - 40) : end]):
                at = rule.end(asked, completion[:end], last=False)
                if at is not None:
                    assert rule.end(asked, completion, last=True) == at  # what follows does not move it
                    return completion[:at]
        at = rule.end(asked, completion, last=True) if last else None
        return completion if at is None else completion[:at]

    return kept


@pytest.mark.parametrize(
    "behind",
    [
        "\n```\nTalk",
        "\n\ndef other(x):",
        "\nclass A:",
        "\n\nimport os",
        "\nprint(half(1))",
        "\nhalf(1)",
        "\nresult = half(1)",
        "\nif __name__ == '__main__':",
        "\nassert half(2) == 1",
        '\n"""Next problem',
    ],
)
def test_a_finished_function_ends_at_what_begins_behind_it(behind: str, ended: Ended) -> None:
    assert ended(BODY + behind).rstrip("\n") == BODY
    assert ended("\n" + BODY + behind, "chat_opened").rstrip("\n") == "\n" + BODY


@pytest.mark.parametrize(
    "completion",
    [
        "    return times(x)\n\n\ndef times(x):\n    return x // 2",
        "    return x // TWO\n\n\nTWO = 2",
        "    return floor(x / 2)\n\nfrom math import floor",
        "    s = '''\n```\n\ndef other(x):\nprint(1)\n'''\n    return x // 2",
        "    s = [\nprint,\n]\n    return x // 2",
        "    x += 0\n# now\n\n# then\n    return x // 2",
        "import os\n\ndef times(x):\n    return x // 2\n\ndef half(x):\n    return times(x)",
        "```python\nimport os\n\ndef half(x):\n    return x // 2",
        "### Solution\n\n```python\ndef half(x):\n    return x // 2",
        "    return x // 3\n\n\ndef half(x):\n    return x // 2",
    ],
)
def test_what_belongs_to_the_program_is_not_cut_off(completion: str, ended: Ended) -> None:
    assert ended(completion, last=False) == completion
    assert ended(completion + "\n\ndef next_problem(x):\n    pass") == completion + "\n"


@pytest.mark.parametrize("name", ["chat_opened", "chat_continued", "zero_shot"])
def test_a_closing_fence_ends_code_that_is_broken_too(name: str, ended: Ended) -> None:
    assert ended("\n    return (x\n```\nTalk", name) == "\n    return (x"
    assert ended("\n    return x // 2\n```", name) == "\n    return x // 2"


def test_a_block_of_its_own_ends_with_its_fence(ended: Ended) -> None:
    answer = "```python\ndef half(x):\n    '''\n```\n    '''\n    return x // 2"
    assert ended(f"{answer}\n```\nIt halves.") == answer


def test_a_program_of_several_functions_is_not_ended_before_the_one_that_is_asked_for(
    ended: Ended, listed: Problem
) -> None:
    program = "\ndef times(x):\n    return x // 2\n\ndef half(x):\n    return times(x)"
    assert ended(f"{program}\n\ndef check():", "chat_continued", listed) == program + "\n"


def test_a_free_answer_has_no_rule(half: Problem) -> None:
    assert PromptStyle("chat").rule([half]) is None
    assert PromptStyle("chat").stop() == ()
