"""Prompts of every style."""

import pytest

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


def test_chat_continued_opens_the_answer_with_the_whole_prompt() -> None:
    opening = PromptStyle("chat_continued").prompt(HALF).opening
    assert opening == "```python\nimport math\n\n\ndef half(x: int) -> int:\n    ''' Half of x. '''"


def test_unknown_style_and_examples_out_of_place_are_refused() -> None:
    with pytest.raises(ValueError, match="'socratic' is unknown: choose one of chat_continued"):
        PromptStyle("socratic")
    with pytest.raises(ValueError, match="0 examples"):
        PromptStyle("few_shot")
    with pytest.raises(ValueError, match="1 examples"):
        PromptStyle("chat", examples=[HALF])
    assert len(STYLES) == 5


def test_problem_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="T/1 has no tests"):
        Problem(**{**vars(HALF), "tests": ""})
