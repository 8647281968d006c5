"""Prompts, and cutting completions to programs: nothing that holds code is emptied."""

import ast

import pytest

from qprobe.sampling.base import stop_position
from qprobe_code_gen.problems import Problem
from qprobe_code_gen.problems.humaneval import load, problem_from_row
from qprobe_code_gen.prompts import STYLES, PromptStyle

HALF = problem_from_row(
    {
        "task_id": "T/1",
        "prompt": "import math\n\n\ndef half(x: int) -> int:\n    ''' Half of x. '''\n",
        "entry_point": "half",
        "canonical_solution": "    return x // 2\n",
        "test": "def check(candidate):\n    assert candidate(4) == 2\n",
    }
)
OPENED = PromptStyle("chat_opened")
CHAT = PromptStyle("chat")
PLAIN = PromptStyle("zero_shot")


def half_of_eight(program: str) -> object:
    """Runs a program that this file wrote itself."""
    namespace: dict[str, object] = {"__name__": "program"}
    exec(program, namespace)
    half = namespace["half"]
    assert callable(half)
    return half(8)


def test_chat_opened_opens_the_answer_with_fence_and_signature() -> None:
    prompt = OPENED.prompt(HALF)
    assert prompt.opening == "```python\nimport math\n\n\ndef half(x: int) -> int:"
    assert prompt.messages[0]["content"].endswith("def half(x: int) -> int:\n    ''' Half of x. '''")


def test_zero_shot_is_the_problem_itself() -> None:
    assert PLAIN.prompt(HALF).text == HALF.code_prompt


def test_few_shot_shows_the_solutions_and_then_the_problem() -> None:
    example = load().problems[0]
    text = PromptStyle("few_shot", examples=[example]).prompt(HALF).text
    assert text == example.solution.strip() + "\n\n\n" + HALF.code_prompt


@pytest.mark.parametrize(
    ("style", "completion"),
    [
        (OPENED, "\n    return x // 2"),
        (OPENED, "\n    return x // 2\n```\nThis halves x."),
        (OPENED, "\n    # integers only\n    return x // 2\nprint(half(2))"),
        (PLAIN, "    return x // 2\n"),
        (PLAIN, "    return x // 2\n\n\ndef other():\n    pass"),
        (PLAIN, "\n    return x // 2\n```"),
        (PLAIN, "def half(x):\n    return x // 2\n"),
        (PLAIN, "\n\ndef half(x):\n    return x // 2\nThis halves x."),
        (PLAIN, "```python\ndef half(x):\n    return x // 2\n```\nThis halves x."),
        (PLAIN, "```\n    return x // 2\n```"),
        (PLAIN, "import os\n\ndef helper(x):\n    return x // 2\n\ndef half(x):\n    return helper(x)\n"),
        (CHAT, "Here it is:\n```python\ndef half(x):\n    return x // 2\n```\nIt halves."),
        (CHAT, "Here it is:\n\n```py\nimport math\n\ndef half(x):\n    return math.floor(x / 2)\n```"),
        (CHAT, "def half(x):\n    return x // 2"),
        (CHAT, "```def half(x): return x // 2```"),
        (OPENED, "```python\ndef half(x):\n    return x // 2\n```"),
    ],
)
def test_a_completion_with_right_code_becomes_a_right_program(style: PromptStyle, completion: str) -> None:
    assert half_of_eight(style.program(HALF, completion)) == 4


def test_code_after_the_function_is_cut() -> None:
    assert "print" not in OPENED.program(HALF, "\n    return x // 2\nprint(half(2))")


def test_a_program_that_parses_nowhere_is_kept_whole() -> None:
    assert PLAIN.program(HALF, "def half(x) return x").endswith("def half(x) return x")


@pytest.mark.parametrize("name", ["zero_shot", "chat_opened"])
def test_every_canonical_solution_survives_as_a_completion(name: str) -> None:
    style = PromptStyle(name)
    for problem in load().problems:
        given = problem.code_prompt if name == "zero_shot" else problem.header + problem.signature.rstrip()
        whole = problem.header + problem.solution[problem.solution.index(problem.signature) :]
        completion = whole[len(given) :]
        kept = completion[: stop_position(completion, style.stop([problem]))]
        assert ast.dump(ast.parse(style.program(problem, kept))) == ast.dump(ast.parse(whole)), problem.task_id


@pytest.mark.parametrize("style", [PLAIN, OPENED])
@pytest.mark.parametrize(
    "completion", ["\n\ndef half(x):\n    return x // 2", "```python\ndef half(x):\n    return x // 2"]
)
def test_stop_texts_do_not_empty_a_completion_that_begins_anew(style: PromptStyle, completion: str) -> None:
    assert stop_position(completion, style.stop([HALF])) == len(completion)


@pytest.mark.parametrize(
    "behind", ["\n```\nTalk", "\n\ndef other():", "\nprint(half(1))", "\n\n# Test", "\nif __name__ =="]
)
def test_stop_texts_end_a_finished_function(behind: str) -> None:
    body = "    return x // 2"
    assert stop_position(body + behind, PLAIN.stop([HALF])) == len(body)


def test_a_free_answer_has_no_stop_texts() -> None:
    assert CHAT.stop([HALF]) == ()


def test_unknown_style_and_examples_out_of_place_are_refused() -> None:
    with pytest.raises(ValueError, match="'socratic' is unknown: choose one of chat_opened"):
        PromptStyle("socratic")
    with pytest.raises(ValueError, match="0 examples"):
        PromptStyle("few_shot")
    with pytest.raises(ValueError, match="1 examples"):
        PromptStyle("chat", examples=[HALF])
    assert len(STYLES) == 4


def test_problem_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="T/1 has no tests"):
        Problem(**{**vars(HALF), "tests": ""})
