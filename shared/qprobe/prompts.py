"""A prompt before it is rendered for a model: a conversation, or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qprobe.settings import meant

# Whose words a message of a conversation may be, as models' chat templates know them.
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """One prompt x of the paper.

    Args:
        task_id: unique in its split; the key of everything that is made from this prompt.
        messages: a conversation, rendered by the model's own chat template. Either this or `text`. Where the last words are the
            assistant's own, they are the beginning of the answer, which is continued: they become the `opening`, where none is
            given.
        text: plain text, continued as it stands.
        opening: the beginning of the answer, which the model continues (conversations only).
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
        if why := wrong_messages(self.messages):
            raise ValueError(f"Prompt {self.task_id}: {why}.")
        if self.messages and self.messages[-1]["role"] == "assistant" and not self.opening:
            object.__setattr__(self, "opening", self.messages[-1]["content"])
            object.__setattr__(self, "messages", self.messages[:-1])
        if self.text is not None and self.opening:
            raise ValueError(
                f"Prompt {self.task_id}: an opening belongs to a conversation; append it to the text instead."
            )
        if self.text == "":
            raise ValueError(f"Prompt {self.task_id} is empty: there is nothing to continue.")


def wrong_messages(messages: Sequence[Mapping[str, str]]) -> str | None:
    """What is wrong with a conversation, as the end of a sentence; None where nothing is."""
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            return f'a message is {message!r:.60}; give {{"role": ..., "content": ...}}'
        role = message["role"]
        if role not in ROLES:
            return f"the role of a message is {role!r}{meant(str(role), ROLES)}; choose from {', '.join(ROLES)}"
    if messages and all(message["role"] == "assistant" for message in messages):
        return "the conversation holds the assistant's words only; begin it with a user's"
    return None
