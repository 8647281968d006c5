"""Prompts of every style."""

import pytest

from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.humaneval import load
from qprobe_code_gen.programs.prompts import PromptStyle


@pytest.mark.parametrize(("style", "docstring"), [("chat_opened", ""), ("chat_continued", "\n    ''' Half of x. '''")])
def test_an_answer_is_opened_with_fence_and_signature_or_the_whole_prompt(
    style: str, docstring: str, half: Problem
) -> None:
    prompt = PromptStyle(style).prompt(half)
    assert prompt.opening == f"```python\nimport math\n\n\ndef half(x: int) -> int:{docstring}"
    assert prompt.messages[0]["content"].endswith("def half(x: int) -> int:\n    ''' Half of x. '''")


def test_zero_shot_is_the_problem_itself_and_few_shot_shows_solutions_before_it(half: Problem) -> None:
    assert PromptStyle("zero_shot").prompt(half).text == half.code_prompt
    example = load().problems[0]
    text = PromptStyle("few_shot", examples=[example]).prompt(half).text
    assert text == f"{example.solution.strip()}\n\n\n{half.code_prompt}"


def test_unknown_style_and_examples_out_of_place_are_refused(half: Problem) -> None:
    with pytest.raises(ValueError, match="socratic"):
        PromptStyle("socratic")
    with pytest.raises(ValueError, match="0 examples"):
        PromptStyle("few_shot")
    with pytest.raises(ValueError, match="1 examples"):
        PromptStyle("chat", examples=[half])
