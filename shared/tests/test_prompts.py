"""A prompt before it is rendered: whose words its messages are, and how a conversation that ends with the assistant's goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt

ASKED = {"role": "user", "content": "Count."}
BEGUN = {"role": "assistant", "content": "One, two,"}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_that_was_begun_is_continued(make_model: Callable[..., ModelSpec]) -> None:
    tokenizer = models.load_tokenizer(make_model(CHATML))
    text, ids = tokenizer.render_prompt(Prompt("a", messages=(ASKED, BEGUN)))
    # The library's own way of the same is the second implementation.
    rendered = tokenizer.tokenizer.apply_chat_template([ASKED, BEGUN], tokenize=False, continue_final_message=True)
    assert text == rendered
    assert text.endswith("One, two,")
    assert ids == tokenizer.encode_prompt(rendered, templated=True)


def test_earlier_words_of_the_assistant_are_part_of_the_conversation(tiny_model: ModelSpec) -> None:
    text, _ = models.load_tokenizer(tiny_model).render_prompt(Prompt("a", messages=(ASKED, BEGUN, ASKED)))
    assert "One, two,<|end|>" in text
    assert text.endswith("<|assistant|>\n")


@pytest.mark.parametrize("role", ["wizard", "USER", "bot", "", "human"])
def test_words_of_nobody_that_a_template_knows_are_refused(role: str) -> None:
    with pytest.raises(ValueError, match="role"):
        Prompt("a", messages=({"role": role, "content": "x"},))


def test_a_conversation_needs_words_to_answer() -> None:
    with pytest.raises(ValueError, match="assistant"):
        Prompt("a", messages=(BEGUN,))


def test_an_answer_begun_without_a_chat_template_is_refused_as_any_conversation(
    make_model: Callable[..., ModelSpec],
) -> None:
    with pytest.raises(ValueError, match="chat template"):
        models.load_tokenizer(make_model(None)).render_prompt(Prompt("a", messages=(ASKED, BEGUN)))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"task_id": "", "text": "a"}, "task_id"),
        ({"task_id": "t"}, "either"),
        ({"task_id": "t", "text": "a", "messages": (ASKED,)}, "either"),
        ({"task_id": "t", "text": "a", "opening": "b"}, "opening"),
        ({"task_id": "t", "text": ""}, "empty"),
    ],
)
def test_a_prompt_that_says_nothing_or_too_much_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Prompt(**values)
