"""From pairs to the core's splits: pairs to train and measure probes on, and the prompts that a policy is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from qprobe.run.stages import RewardBatch, RewardRow, Split
from qprobe_preference.pairs import Pair, PairSet


class PairLabel:
    """A reward stage for pairs: 1 for the chosen answer, 0 for the rejected one."""

    name = "label"

    def identity(self) -> dict[str, Any]:
        return {"reward": "label of the pair"}

    def check(self) -> None:
        """Nothing can fail: the order of a pair's answers is its label."""

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield (
                batch,
                [RewardRow(0.0, "rejected") if sample else RewardRow(1.0, "chosen") for _, sample, _ in batch.rows],
            )


def pairs_split(pairs: PairSet, style: str) -> Split:
    """A prompt a pair, with both answers as its completions: with k=2 and beta=0 the core's reward is the pair accuracy.

    Args:
        style: of conversations, `chat` or `text`.
    """
    return Split(
        pairs.name,
        [pair.as_prompt(style) for pair in pairs.pairs],
        {"pairs": pairs.identity(), "prompts": style},
        recorded={pair.pair_id: pair.answers(style) for pair in pairs.pairs},
        reward=PairLabel(),
        clusters={pair.pair_id: pair.cluster for pair in pairs.pairs},
    )


def prompts_split(pairs: PairSet, style: str, limit: int | None = None) -> Split:
    """The prompts of the pairs, each once, for a policy to answer; a task id is that of the prompt's first pair.

    Args:
        style: of conversations, `chat` or `text`.
        limit: the first so many; None takes all.
    """
    first = first_pairs(pairs)[:limit]
    return Split(
        f"{pairs.name}-prompts",
        [pair.as_prompt(style) for pair in first],
        {"pairs": pairs.identity(), "prompts": style, "limit": limit},
        clusters={pair.pair_id: pair.cluster for pair in first},
    )


def first_pairs(pairs: PairSet) -> list[Pair]:
    """The first pair of every prompt: it holds the prompt's task id in `prompts_split` and a chosen answer."""
    return [pair for pair in pairs.pairs if pair.pair_id.endswith(".000")]
