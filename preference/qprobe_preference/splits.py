"""From pairs to the core's splits and pipeline: pairs to train and measure probes on, and the prompts that a policy answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qprobe.cli import composition
from qprobe.pipeline.pipeline import Pipeline
from qprobe.run.pools import RewardBatch, RewardRow, Split
from qprobe_preference.pairs import PairSet


class PairLabel:
    """A reward stage for pairs: 1 for the chosen answer, 0 for the rejected one."""

    name = "label"

    def identity(self) -> dict[str, Any]:
        return {"reward": "label of the pair"}

    def check(self) -> None:
        """Nothing can fail: the order of a pair's answers is its label."""

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, [RewardRow(0.0, "rejected") if s else RewardRow(1.0, "chosen") for _, s, _ in batch.rows]


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


def prompts_split(pairs: PairSet, style: str) -> Split:
    """The prompts of the pairs, each once, for a policy to answer; a task id is that of the prompt's first pair.

    Args:
        style: of conversations, `chat` or `text`.
    """
    first = [pair for pair in pairs.pairs if pair.pair_id.endswith(".000")]
    return Split(
        f"{pairs.name}-prompts",
        [pair.as_prompt(style) for pair in first],
        {"pairs": pairs.identity(), "prompts": style, "limit": None},  # as tables of before have it
        clusters={pair.pair_id: pair.cluster for pair in first},
    )


def folder_of_run(config: dict[str, Any]) -> Path:
    """Where the run of a configuration is: a quick look at forty pairs must not meet the tables of all of them."""
    run, limit = Path(config["paths"]["run"]), config["dataset"]["limit"]
    return run if limit is None else run.with_name(f"{run.name}-limit{limit}")


def pipeline(
    config: dict[str, Any], tested: Split, training: PairSet | None, style: str, stop: Sequence[str] = ()
) -> Pipeline:
    """The core's pipeline of a configuration.

    Args:
        tested: what is reported on.
        training: pairs to train on; None cross-validates over what is tested.
        style: of conversations, `chat` or `text`.
        stop: texts that end a completion.
    """
    limit = config["dataset"]["limit"]
    return composition.pipeline(
        config,
        run=folder_of_run(config),
        title=config["title"] + ("" if limit is None else f", first {limit} pairs"),
        tests=[tested],
        training_split=None if training is None else pairs_split(training, style),
        reward=PairLabel(),
        stop=stop,
        use={"prompts": style} | {name: config[name] for name in ("model", "sampler", "embedder")},
    )
