"""What a preference pair is, whatever data set it comes from, and which pairs are of no use.

A reader of a format yields what it finds: a `Found` for a pair, or the reason why there is none. `collect` checks it, numbers
the pairs, and counts what is dropped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qprobe.files import fingerprint
from qprobe.prompts import Prompt

Conversation = tuple[dict[str, str], ...]

# How a conversation is written for a model without a chat template: as HH-RLHF writes it.
_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Found:
    """A pair as a reader found it, not checked yet.

    Args:
        prompt: plain text to be continued, or a conversation.
        chosen, rejected: the answers.
        cluster: what must never be on both sides of a split, such as SHP's post; None: the conversation that the prompt is of,
            told by how it begins (`_opening_key`).
        opening: the beginning of both answers, given to the model (conversations only).
    """

    prompt: Any
    chosen: Any
    rejected: Any
    cluster: str | None = None
    opening: str = ""


@dataclass(frozen=True, kw_only=True)
class Pair(Found):
    """Two answers to one prompt, of which the first was preferred: neither is empty, and they differ.

    Args:
        pair_id: unique in its set, NUMBER OF THE PROMPT.NUMBER OF THE PAIR; pairs are in the order of their ids.
        cluster: equal for pairs that share a prompt.
    """

    prompt: str | Conversation
    chosen: str
    rejected: str
    cluster: str
    pair_id: str

    @property
    def prompt_id(self) -> str:
        """Equal for the pairs of one prompt."""
        return self.pair_id.rpartition(".")[0]

    def as_prompt(self, style: str) -> Prompt:
        """The prompt for a model.

        Args:
            style: of conversations: `chat` (the model's chat template) or `text` (a transcript, as HH-RLHF writes it).
        """
        if isinstance(self.prompt, str):
            return Prompt(self.pair_id, text=self.prompt)
        if style == "chat":
            return Prompt(self.pair_id, messages=self.prompt, opening=self.opening)
        return Prompt(self.pair_id, text=_transcript(self.prompt) + (f" {self.opening}" if self.opening else ""))

    def answers(self, style: str) -> list[str]:
        """Chosen and rejected answer, as they follow the prompt in this style."""
        # In a transcript a space follows the colon; the prompt ends before it, where a tokenizer would cut.
        space = " " if style == "text" and not isinstance(self.prompt, str) and not self.opening else ""
        return [space + self.chosen, space + self.rejected]


@dataclass(frozen=True)
class PairSet:
    """Pairs that belong together, in order.

    Args:
        name: short, used in paths and tables.
        pairs: ids unique and rising.
        dropped: reason -> how many were of no use.
        source: where they are from and what was asked for, JSON-able.
    """

    name: str
    pairs: list[Pair]
    dropped: Mapping[str, int] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What decides the pairs: their source and the content of each."""
        rows = [[p.pair_id, p.prompt, p.opening, p.chosen, p.rejected, p.cluster] for p in self.pairs]
        counted = {"pairs": len(rows), "dropped": dict(sorted(self.dropped.items()))}
        return {"name": self.name, **counted, "content": fingerprint(rows), **self.source}

    def summary(self) -> str:
        """How many pairs, prompts and clusters of these there are, what was dropped and why, as sentences."""
        prompts = len({pair.prompt_id for pair in self.pairs})
        clusters = len({pair.cluster for pair in self.pairs})
        joined = f", which make {clusters} clusters" if clusters < prompts else ""
        return f"{len(self.pairs)} pairs of {prompts} prompts{joined}. {_dropped_words(self.dropped)}"


def collect(
    name: str,
    found: Iterable[Found | str],
    source: dict[str, Any],
    dropped: Mapping[str, int] | None = None,
    limit: int | None = None,
) -> PairSet:
    """Pairs out of what a reader found.

    Args:
        name: of the set.
        found: pairs, or the reasons why there is none.
        source: where they are from.
        dropped: what was dropped already.
        limit: ends with so many pairs, and what comes after is neither read nor counted; None takes all.

    Raises:
        ValueError: no pair is left.
    """
    counts = Counter(dropped or {})
    kept: dict[str, Found] = {}
    for one in found:
        reason = one if isinstance(one, str) else _reason(one)
        if isinstance(one, str) or reason is not None:
            counts[str(reason)] += 1
            continue
        key = json.dumps([one.prompt, one.opening, one.chosen, one.rejected])
        if key in kept:
            counts["duplicate"] += 1
        else:
            kept[key] = one
        if len(kept) == limit:
            break
    if not kept:
        raise ValueError(f"{name} has no pair that can be used. {_dropped_words(counts)}")
    return PairSet(name, _numbered(list(kept.values())), dict(counts), source)


def conversation(messages: Iterable[Any]) -> Conversation:
    """Messages with the keys that are read; what is no text stays as it is and is counted by `collect`."""
    # Parquet gives every message every key of any message, null where it has none.
    plain = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
    return tuple(plain)


def prompt_key(prompt: str | Conversation, opening: str = "") -> str:
    """Of a prompt, but for case and white space."""
    spoken = [("", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
    return fingerprint([[role, " ".join(text.casefold().split())] for role, text in [*spoken, ("", opening)]])


def _transcript(messages: Conversation) -> str:
    """A conversation as plain text, ending where the assistant speaks."""
    said = "".join(f"\n\n{_SPEAKERS.get(m['role'], m['role'].title())}: {m['content']}" for m in messages)
    return f"{said}\n\nAssistant:"


def _opening_key(prompt: str | Conversation, opening: str) -> str:
    """Of how a conversation begins, up to what its user says first: its later turns, and other branches of its tree, begin alike.

    A plain prompt is all of its conversation.
    """
    if isinstance(prompt, str):
        return prompt_key(prompt, opening)
    first = next((place for place, message in enumerate(prompt) if message["role"] == "user"), len(prompt) - 1)
    return prompt_key(prompt[: first + 1], opening)


def _numbered(found: list[Found]) -> list[Pair]:
    """Ids by prompt, in the order in which prompts are first met, and clusters."""
    prompts: dict[str, list[tuple[Found, str]]] = {}
    for one, cluster in zip(found, _clusters(found), strict=True):
        prompts.setdefault(json.dumps([one.prompt, one.opening]), []).append((one, cluster))
    return [
        Pair(**vars(one) | {"pair_id": f"{at:06d}.{number:03d}", "cluster": cluster})
        for at, of_prompt in enumerate(prompts.values())
        for number, (one, cluster) in enumerate(of_prompt)
    ]


def _clusters(found: list[Found]) -> list[str]:
    """The cluster of each; clusters that share a prompt or a conversation are one, as two posts of one text are."""
    above: dict[str, str] = {}

    def root(cluster: str) -> str:
        while (up := above.setdefault(cluster, cluster)) != cluster:
            cluster = up
        return cluster

    own = []
    for one in found:
        conversation = _opening_key(one.prompt, one.opening)
        own.append(one.cluster or conversation)
        above[root(conversation)] = root(own[-1])
    return [root(cluster) for cluster in own]


def _reason(found: Found) -> str | None:
    """Why a pair is of no use."""
    prompt = found.prompt
    texts = [prompt] if isinstance(prompt, str) else _contents(prompt)
    if texts is None or not all(map(_is_text, [*texts, found.chosen, found.rejected])):
        return "not_text"
    if not texts or not all(text.strip() for text in [texts[-1], found.chosen, found.rejected]):
        return "empty"
    return "identical" if found.chosen.strip() == found.rejected.strip() else None


def _contents(messages: Any) -> list[Any] | None:
    """The contents of a conversation; None where it is none."""
    keys = {"role", "content"}
    if not isinstance(messages, tuple) or not all(isinstance(m, dict) and set(m) == keys for m in messages):
        return None
    return [m["content"] for m in messages] if all(isinstance(m["role"], str) for m in messages) else None


def _is_text(value: Any) -> bool:
    # A lone surrogate is half of a character: no tokenizer and no file takes it.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _dropped_words(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    return f"Dropped: {reasons}." if reasons else "None was dropped."
