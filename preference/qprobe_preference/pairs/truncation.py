"""Dialogues that are too long for a token budget, cut from the left by whole messages, never inside an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from qprobe_preference.pairs.base import Pair, PairSet, collect


def fitted(pairs: PairSet, max_tokens: int, tokens: Callable[[Pair], int]) -> PairSet:
    """The pairs within a budget; the set's source says it, and how many dialogues were cut.

    A system message stays, and what is left begins with a user. A pair whose last message with the longer answer is too long
    by itself is dropped and counted.

    Args:
        max_tokens: of a prompt with its longer answer, 1 or more.
        tokens: counts them for a pair as it is embedded.
    """
    if max_tokens < 1:
        raise ValueError(f"dataset.max_tokens is {max_tokens}: at least 1, or null for no limit.")
    fitting = [next((v for v in _versions(pair) if tokens(v) <= max_tokens), None) for pair in pairs.pairs]
    cut = sum(short is not None and short is not pair for short, pair in zip(fitting, pairs.pairs, strict=True))
    source = {**pairs.source, "max_tokens": max_tokens, "dialogues_cut": cut}
    return collect(pairs.name, (short or "too_long" for short in fitting), source, pairs.dropped)


def _versions(pair: Pair) -> Iterator[Pair]:
    """The pair, then with fewer and fewer messages of its prompt, each time from a user on."""
    yield pair
    if isinstance(messages := pair.prompt, str):
        return
    system = messages[:1] if messages[0]["role"] == "system" else ()
    for start in range(len(system) + 1, len(messages)):
        if messages[start]["role"] == "user":
            yield dataclasses.replace(pair, prompt=(*system, *messages[start:]))
