"""Means over prompts, differences and shares with their intervals. Random numbers come from the generator that is passed in."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from qprobe.probe.columns import BLOCK, _columns


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval about it.

    Args:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Mean over prompts with an expanded percentile bootstrap interval (`tails`).

    Args:
        values: (P,) float, one value per prompt.
        clusters: (P,) int, what a resample takes or leaves together; None: every prompt by itself.
        draws: resamples, >= 1.
        level: coverage, in (0, 1).
        rng: source of the resamples.

    Returns:
        The interval, within the range of the values; its ends are infinite for a single prompt or cluster, which says nothing
        about others.

    Raises:
        ValueError: there is no prompt, a value is NaN, lengths differ, draws is below 1 or level is not in (0, 1).
    """
    (values,) = _columns(values=values)
    _check_level(level)
    if draws < 1:
        raise ValueError(f"draws is {draws}: a bootstrap needs at least one resample")
    mean = float(values.mean())
    sums, sizes = values, np.ones(1, dtype=np.int64)
    if clusters is not None:
        ids = np.unique(np.asarray(clusters), return_inverse=True)[1]
        if ids.shape != values.shape:
            raise ValueError(f"clusters has shape {ids.shape}, values has {len(values)} rows: give one id for each")
        sums, sizes = np.bincount(ids, values).astype(np.float64), np.bincount(ids).astype(np.int64)
    count = len(sums)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    means = np.empty(draws)
    for part in np.split(means, range(max(1, BLOCK // count), draws, max(1, BLOCK // count))):
        taken = rng.integers(count, size=(len(part), count))
        # A resample of clusters has its own number of prompts.
        part[:] = sums[taken].mean(axis=1) if clusters is None else sums[taken].sum(axis=1) / sizes[taken].sum(axis=1)
    low, high = np.quantile(means, tails(count, level))
    return Interval(mean, float(low), float(high))


def tails(count: int, level: float = 0.95) -> tuple[float, float]:
    """Which quantiles of a bootstrap distribution are the ends of an interval: the expanded percentile interval.

    The plain percentiles are those of a normal distribution with the plug-in variance, both too narrow where prompts are few:
    of 95 % intervals over 30 prompts 92 to 93 in 100 hold the truth. Wider by Student's t and by the root of n / (n - 1), they
    hold it as often as they say, and still lie within the range of the values (benchmarks/coverage.py).

    Args:
        count: of what is resampled, prompts or clusters, >= 2.
        level: coverage, in (0, 1).

    Source: Hesterberg, The American Statistician 69 (2015), section 4.1.1.
    """
    from scipy.special import stdtrit

    low = NormalDist().cdf(math.sqrt(count / (count - 1)) * float(stdtrit(count - 1, (1 - level) / 2)))
    return low, 1 - low


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> Interval:
    """Mean of a - b over prompts with its bootstrap interval; a resample takes the same prompts of both.

    Args:
        a: (P,) float, one value per prompt.
        b: (P,) float, the same prompts in the same order.
        clusters: (P,) int, what a resample takes or leaves together; None: every prompt by itself.
        draws: resamples, >= 1.
        level: coverage, in (0, 1).
        rng: source of the resamples.

    Returns:
        The interval of the difference.

    Raises:
        ValueError: the lengths differ, or see `bootstrap_mean`.
    """
    a, b = _columns(a=a, b=b)
    return bootstrap_mean(a - b, clusters, draws=draws, level=level, rng=rng)


def wilson(successes: float, trials: int, level: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval.

    Args:
        successes: 0..trials. It may hold parts of a success, such as a tie as half of one: of all values in [0, 1] with one
            mean, those of 0 and 1 vary most, so the interval is then wider than it need be, never too narrow.
        trials: >= 1.
        level: coverage, in (0, 1).

    Returns:
        The share and its interval within [0, 1].

    Raises:
        ValueError: successes is not in 0..trials, there is no trial, or level is not in (0, 1).

    Source: Wilson, JASA 22 (1927).
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: give 0 <= successes <= trials with trials >= 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / (1 + z * z / trials)
    # At 0 and at all successes the interval ends there exactly; rounding must not carry it past the estimate.
    return Interval(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: a coverage lies between 0 and 1, such as 0.95")
