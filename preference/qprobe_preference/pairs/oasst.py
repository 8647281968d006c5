"""OpenAssistant (Köpf et al. 2023, hub `OpenAssistant/oasst1`): ranked answers to one message of a conversation tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qprobe_preference.pairs.base import Conversation, Found
from qprobe_preference.pairs.rows import Row, needed

_COLUMNS = ("message_id", "parent_id", "text", "role", "rank", "lang", "deleted")
_ROLES = {"prompter": "user", "assistant": "assistant"}


def pairs(rows: Iterable[Row], which: str = "all", languages: Sequence[str] = ()) -> Iterator[Found | str]:
    """Pairs of ranked siblings, the better first, or why there is none.

    Args:
        which: "all" pairs of siblings, or "adjacent" ones by rank.
        languages: of the answers, such as en; none takes all.

    Raises:
        ValueError: an unknown choice, a message that is there twice, or a role that is none.
    """
    if which not in ("all", "adjacent"):
        raise ValueError(f"dataset.options.which is {which!r}: choose all or adjacent.")
    messages: dict[str, dict[str, Any]] = {}
    children: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        message = dict(zip(_COLUMNS, needed(row, _COLUMNS), strict=True))
        if message["role"] not in _ROLES:
            raise ValueError(f"{row.place}: role is {message['role']!r}; OpenAssistant has {' and '.join(_ROLES)}.")
        if messages.setdefault(message["message_id"], message) is not message:
            raise ValueError(f"{row.place}: the message {message['message_id']} is there twice; keep one.")
        if message["parent_id"] is not None and message["role"] == "assistant":
            children.setdefault(message["parent_id"], []).append(message)
    for parent, answers in children.items():
        yield from _siblings(messages, parent, answers, which, languages)


def _siblings(
    messages: dict[str, dict[str, Any]],
    parent: str,
    answers: list[dict[str, Any]],
    which: str,
    languages: Sequence[str],
) -> Iterator[Found | str]:
    usable = []
    for answer in answers:
        if answer["deleted"]:
            yield "deleted"
        elif languages and answer["lang"] not in languages:
            yield "other_language"
        elif answer["rank"] is None:
            yield "unranked"
        else:
            usable.append(answer)
    if len(usable) < 2:
        yield from ["alone"] * len(usable)
        return
    prompt = _path(messages, parent)
    usable.sort(key=lambda answer: answer["rank"])  # 0 is the best
    chosen = itertools.combinations(usable, 2) if which == "all" else itertools.pairwise(usable)
    for better, worse in chosen:
        if prompt is None:
            yield "unsplittable"
        elif better["rank"] == worse["rank"]:
            yield "equal_rank"
        else:
            yield Found(prompt, better["text"], worse["text"])


def _path(messages: dict[str, dict[str, Any]], message_id: str | None) -> Conversation | None:
    """The conversation down to a message; None where one of its messages is missing or deleted, or it ends with no user."""
    path: list[dict[str, str]] = []
    while message_id is not None:
        message = messages.get(message_id)
        if message is None or message["deleted"] or len(path) > len(messages):  # more than there are: a circle
            return None
        path.insert(0, {"role": _ROLES[message["role"]], "content": message["text"]})
        message_id = message["parent_id"]
    return tuple(path) if path[-1]["role"] == "user" else None
