"""The completions that a table is about, and how values of them are summed up: means over prompts with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.probe.intervals import Interval, bootstrap_mean, paired_difference
from qprobe.probe.metrics import partition_reward, reward_grid
from qprobe.probe.ranking import Distinct, mixed_prompts, within_prompt_auc
from qprobe.report.results import Band
from qprobe.run.joined import Joined

# Numbers of candidates that a curve shows beyond the first eight, as far as there are candidates.
LARGER_KS = (10, 12, 16, 24, 32, 48, 64, 100, 150)


class Tested:
    """A pool's completions and rewards under one way of measuring.

    Args:
        joined: the rows.
        settings: how values are measured.
        k: candidates at use.
        seed: of the resamples and of random candidate sets.

    Raises:
        ValueError: a prompt has fewer than k completions.
    """

    def __init__(self, joined: Joined, settings: EvaluationSettings, k: int, seed: int) -> None:
        self.joined, self.settings, self.k, self.seed = joined, settings, k, seed
        self.by_prompt = np.split(np.arange(len(joined.groups)), np.flatnonzero(np.diff(joined.groups)) + 1)
        self.smallest, self.largest = (bound(len(rows) for rows in self.by_prompt) for bound in (min, max))
        if k > self.smallest:
            raise ValueError(
                f"k is {k}, but a prompt of this pool has {self.smallest} samples: lower evaluation.k or sample more."
            )
        self.distinct = Distinct.of(joined.completions, joined.groups)
        self.rewards = self.distinct.mean(joined.rewards)  # (M,) of the distinct completions
        self.mixed = mixed_prompts(self.rewards, self.distinct.groups)
        self.base = np.array([joined.rewards[rows].mean() for rows in self.by_prompt])
        shown = {*range(1, 9), *LARGER_KS, k, self.smallest}
        self.ks = sorted(value for value in shown if value <= self.smallest)

    def rng(self) -> np.random.Generator:
        """The same resamples for every row, so that rows are compared on the same prompts."""
        return np.random.default_rng([self.seed, len(self.base)])

    def interval(self, values: np.ndarray, prompts: np.ndarray | None = None) -> Interval:
        """The mean of (P,) values over all prompts, or over those of a (P,) mask, whose values are given."""
        clusters = self.joined.clusters
        if clusters is not None and prompts is not None:
            clusters = clusters[prompts]
        return bootstrap_mean(values, clusters, draws=self.settings.bootstrap, rng=self.rng())

    def difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        """The paired difference a - b over prompts, or over clusters where there are any."""
        return paired_difference(a, b, self.joined.clusters, draws=self.settings.bootstrap, rng=self.rng())

    def band(self, values: np.ndarray) -> Band:
        """(X, P) values of a line's points -> the line with its intervals."""
        return self.band_of(list(values), [None] * len(values))

    def band_of(self, values: Sequence[np.ndarray], prompts: Sequence[np.ndarray | None]) -> Band:
        """The same where every point is about some of the prompts: its values, and the (P,) mask of these."""
        intervals = [self.interval(at, own) for at, own in zip(values, prompts, strict=True)]
        return Band(
            value=[interval.value for interval in intervals],
            low=[finite(interval.low) for interval in intervals],
            high=[finite(interval.high) for interval in intervals],
        )

    def earned(self, scores: Scored, ks: list[int], settings: EvaluationSettings) -> tuple[np.ndarray, np.ndarray]:
        """(S, K, P) expected reward at every k, each prompt at its own probe's temperature, and its simulation error."""
        values, errors = [], []
        rewards, groups = self.joined.rewards, self.joined.groups
        for seed, (q, beta) in enumerate(zip(scores.q, scores.beta, strict=True)):
            if settings.partition:
                # Every seed draws a partition of its own for every k, whichever others are asked for.
                lots = {k: np.random.default_rng([self.seed, seed, k, len(self.base)]) for k in ks}
                values.append(np.stack([partition_reward(q, rewards, groups, k, beta, rng=lots[k]) for k in ks]))
                errors.append(np.zeros_like(values[-1]))
                continue
            betas = sorted(set(beta.tolist()))
            grid = reward_grid(q, rewards, groups, ks, betas, draws=settings.draws, rng=self.rng())
            own = (slice(None), np.searchsorted(betas, beta), np.arange(len(self.base)))
            values.append(grid.values[own])
            errors.append(grid.errors[own])
        return np.stack(values), np.stack(errors)

    def best_of(self, scores: np.ndarray) -> np.ndarray:
        """(S, P) reward of the candidate that scores (S, N) put highest among k."""
        arguments = self.joined.rewards, self.joined.groups, [self.k], [0.0]
        return np.stack([reward_grid(q, *arguments, draws=2, rng=self.rng()).values[0, 0] for q in scores])

    def auc(self, scores: np.ndarray) -> Interval | None:
        """Within-prompt AUC of (S, N) scores over the mixed prompts, of distinct completions, mean over seeds."""
        if not self.mixed.any():
            return None
        groups = self.distinct.groups
        each = np.stack([within_prompt_auc(self.distinct.mean(q), self.rewards, groups) for q in scores])
        return self.interval(each[:, self.mixed].mean(axis=0), self.mixed)


def finite(end: float) -> float | None:
    """An end of an interval; None where it is infinite (a single prompt says nothing of others)."""
    return end if math.isfinite(end) else None
