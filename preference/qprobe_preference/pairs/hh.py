"""HH-RLHF (Bai et al. 2022, hub `Anthropic/hh-rlhf`): two transcripts that part at the assistant's last answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from qprobe_preference.pairs.base import Conversation, Found
from qprobe_preference.pairs.rows import Row, needed

_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_LAST = "\n\nAssistant:"


def pairs(rows: Iterable[Row]) -> Iterator[Found | str]:
    """A pair of each row's columns `chosen` and `rejected`, or why there is none."""
    for row in rows:
        texts = needed(row, ("chosen", "rejected"))
        if not all(isinstance(text, str) for text in texts):
            yield "not_text"
            continue
        chosen, rejected = map(_split, texts)
        if chosen is None or rejected is None:
            yield "unsplittable"
        elif chosen[0] != rejected[0]:
            yield "prompts_differ"
        else:
            yield Found(chosen[0], chosen[1], rejected[1])


def _split(text: str) -> tuple[Conversation, str] | None:
    """Prompt and last answer of a transcript; None where it does not end with a human's turn and an answer to it.

    A few speakers speak twice in a row; chat templates want them to take turns, so these turns are made one.
    """
    before, _, answer = text.rpartition(_LAST)
    start, *parts = _TURN.split(before)
    if start.strip() or not parts or parts[-2] != "Human" or _TURN.search(answer):
        return None
    messages: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == _ROLES[speaker]:
            messages[-1]["content"] += f"\n\n{said.strip()}"
        else:
            messages.append({"role": _ROLES[speaker], "content": said.strip()})
    return tuple(messages), answer.strip()
