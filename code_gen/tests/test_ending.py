"""Where completions end while they are drawn: nothing that a program needs is cut off, and what follows it is."""

from __future__ import annotations

import pytest

from qprobe_code_gen.ending import ProgramEnd
from qprobe_code_gen.problems import Problem
from qprobe_code_gen.problems.humaneval import problem_from_row
from qprobe_code_gen.problems.mbpp import problem_from_row as mbpp_problem
from qprobe_code_gen.prompts import PromptStyle

HALF = problem_from_row(
    {
        "task_id": "T/1",
        "prompt": "import math\n\n\ndef half(x: int) -> int:\n    ''' Half of x. '''\n",
        "entry_point": "half",
        "canonical_solution": "    return x // 2\n",
        "test": "def check(candidate):\n    assert candidate(4) == 2\n",
    }
)
LISTED = mbpp_problem(
    {"task_id": 3, "text": "Halve.", "code": "def half(x):\n    return x", "test_list": ["assert half(4) == 2"]}
)
BODY = "    return x // 2"


def prompt(style: PromptStyle, problem: Problem) -> str:
    put = style.prompt(problem)
    return put.text if put.text is not None else f"<user>{put.messages[0]['content']}\n<answer>{put.opening}"


def ended(completion: str, name: str = "zero_shot", problem: Problem = HALF, last: bool = True) -> str:
    """What is kept when the completion comes character by character; `last`: whether it ends with its last character."""
    style = PromptStyle(name)
    rule = style.rule([HALF, LISTED])
    assert isinstance(rule, ProgramEnd)
    asked = prompt(style, problem)
    for end in range(1, len(completion) + 1):
        if rule.may_end(completion[max(0, end - 40) : end]):
            at = rule.end(asked, completion[:end], last=False)
            if at is not None:
                assert rule.end(asked, completion, last=True) == at  # what follows does not move it
                return completion[:at]
    at = rule.end(asked, completion, last=True) if last else None
    return completion if at is None else completion[:at]


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
def test_a_finished_function_ends_at_what_begins_behind_it(behind: str) -> None:
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
def test_what_belongs_to_the_program_is_not_cut_off(completion: str) -> None:
    assert ended(completion, last=False) == completion
    assert ended(completion + "\n\ndef next_problem(x):\n    pass") == completion + "\n"


@pytest.mark.parametrize("name", ["chat_opened", "chat_continued", "zero_shot"])
def test_a_closing_fence_ends_code_that_is_broken_too(name: str) -> None:
    assert ended("\n    return (x\n```\nTalk", name) == "\n    return (x"
    assert ended("\n    return x // 2\n```", name) == "\n    return x // 2"


def test_a_block_of_its_own_ends_with_its_fence() -> None:
    answer = "```python\ndef half(x):\n    '''\n```\n    '''\n    return x // 2"
    assert ended(f"{answer}\n```\nIt halves.") == answer


def test_a_program_of_several_functions_is_not_ended_before_the_one_that_is_asked_for() -> None:
    program = "\ndef times(x):\n    return x // 2\n\ndef half(x):\n    return times(x)"
    assert ended(f"{program}\n\ndef check():", "chat_continued", LISTED) == program + "\n"


def test_a_free_answer_has_no_rule() -> None:
    assert PromptStyle("chat").rule([HALF]) is None
    assert PromptStyle("chat").stop() == ()
