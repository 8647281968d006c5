"""A prompt before it is rendered for a model: a conversation, or plain text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One prompt x of the paper.

    Args:
        task_id: unique in its split; the key of everything that is made from this prompt.
        messages: a conversation, rendered by the model's own chat template. Either this or `text`.
        text: plain text, continued as it stands.
        opening: the beginning of the answer, put into the model's mouth (conversations only).
    """

    task_id: str
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None
    opening: str = ""

    def __post_init__(self) -> None:
        if not self.task_id:
            raise ValueError("A prompt has an empty task_id: every prompt needs a name of its own.")
        if bool(self.messages) == (self.text is not None):
            raise ValueError(f"Prompt {self.task_id}: give either messages or text.")
        if self.text is not None and self.opening:
            raise ValueError(
                f"Prompt {self.task_id}: an opening belongs to a conversation; append it to the text instead."
            )
        if self.text == "":
            raise ValueError(f"Prompt {self.task_id} is empty: there is nothing to continue.")
