"""Training and test pairs that share no prompt: whole clusters are drawn, never pairs."""

from __future__ import annotations

import dataclasses
import random

from qprobe_preference.pairs.base import PairSet, prompt_key


def train_and_test(pairs: PairSet, test_share: float, seed: int = 0) -> tuple[PairSet, PairSet]:
    """Two sets, named NAME-train and NAME-test, drawn over clusters.

    Args:
        test_share: of the clusters, in (0, 1).

    Raises:
        ValueError: a share that leaves one side empty.
    """
    test = _drawn(pairs, test_share, seed)
    sides = [p for p in pairs.pairs if p.cluster not in test], [p for p in pairs.pairs if p.cluster in test]
    if not all(sides):
        raise ValueError(
            f"dataset.test_share is {test_share}: of the {len({p.cluster for p in pairs.pairs})} prompts of {pairs.name} one "
            "side gets none; choose a share between 0 and 1, or take more pairs."
        )
    source = {**pairs.source, "cut": {"test_share": test_share, "seed": seed}}
    training, tests = (
        dataclasses.replace(pairs, name=f"{pairs.name}-{name}", pairs=side, source=source)
        for name, side in zip(("train", "test"), sides, strict=True)
    )
    return training, tests


def share_of(pairs: PairSet, share: float, seed: int = 0) -> PairSet:
    """A share of the clusters, drawn at random, at least one; a smaller share is part of a larger one.

    Args:
        share: in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"dataset.train_share is {share}: a share in (0, 1].")
    drawn = _drawn(pairs, share, seed)
    kept = [pair for pair in pairs.pairs if pair.cluster in drawn]
    return dataclasses.replace(pairs, pairs=kept, source={**pairs.source, "share": {"share": share, "seed": seed}})


def without_shared(training: PairSet, test: PairSet) -> PairSet:
    """The training pairs without those whose prompt or cluster is among the test pairs; these are counted.

    Raises:
        ValueError: none is left.
    """
    clusters = {pair.cluster for pair in test.pairs}
    prompts = {prompt_key(pair.prompt, pair.opening) for pair in test.pairs}
    in_test = (p.cluster in clusters or prompt_key(p.prompt, p.opening) in prompts for p in training.pairs)
    shared = {pair.cluster for pair, also in zip(training.pairs, in_test, strict=True) if also}
    kept = [pair for pair in training.pairs if pair.cluster not in shared]
    if not kept:
        raise ValueError(f"Every prompt of {training.name} is among those of {test.name}: nothing is left to train on.")
    dropped = dict(training.dropped)
    if count := len(training.pairs) - len(kept):
        dropped["shared_with_test"] = count
    return dataclasses.replace(training, pairs=kept, dropped=dropped)


def _drawn(pairs: PairSet, share: float, seed: int) -> set[str]:
    clusters = sorted({pair.cluster for pair in pairs.pairs})
    random.Random(seed).shuffle(clusters)
    return set(clusters[: max(1, round(len(clusters) * share))])
