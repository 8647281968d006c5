"""What a probe's choices are worth: pass@k, best-of-k, reward at every (k, beta), ranking within prompts, intervals.

One pool of scored samples per prompt answers every question about k: a candidate set is a random k-subset of the pool,
without replacement. Arrays are NumPy; per-prompt results follow the sorted prompt ids. Random numbers come from the
generator that is passed in.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qprobe.probe.selection import ALL_SUBSETS, best_of_law

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Of the largest reward: what two rewards may differ by and be one.
ROUNDING = 1e-6
# Elements of the largest array that a Monte Carlo step holds: 32 MB of int64.
BLOCK = 4_000_000


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Floats:
    """Probability that k of n samples, drawn without replacement, hold one of the c correct ones.

    Args:
        n: int, samples of a problem; n, c and k broadcast.
        c: int, correct samples, 0..n.
        k: int, samples drawn, 1..n.

    Returns:
        float64 of the broadcast shape, 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: c is not in 0..n, or k not in 1..n.

    Source: the unbiased estimator of Chen et al. (arXiv 2107.03374).
    """
    n, c, k = np.broadcast_arrays(np.asarray(n), np.asarray(c), np.asarray(k))
    if not all(np.issubdtype(x.dtype, np.integer) for x in (n, c, k)):
        raise ValueError("n, c and k count samples: give integers")
    if np.any((k < 1) | (k > n)):
        at = np.argmax((k < 1) | (k > n))
        raise ValueError(f"k is {k.flat[at]} where there are {n.flat[at]} samples: pass@k needs 1 <= k <= n")
    if np.any((c < 0) | (c > n)):
        at = np.argmax((c < 0) | (c > n))
        raise ValueError(
            f"c is {c.flat[at]} where there are {n.flat[at]} samples: correct samples are counted from 0 to n"
        )
    failure = np.ones(n.shape)
    for drawn in range(int(k.max(initial=0))):
        # A factor is 0 before any is negative, so the product never leaves [0, 1].
        wrong_left = (n - c - drawn) / np.maximum(n - drawn, 1)
        failure *= np.where(drawn < k, wrong_left, 1.0)
    return np.asarray(1.0 - failure)


def best_of_k(scores: ArrayLike, rewards: ArrayLike, ks: Sequence[int]) -> Floats:
    """Exact expected reward of the best-scored of k random samples of one prompt, ties shared equally.

    Args:
        scores: (n,) float.
        rewards: (n,) float.
        ks: K integers in 1..n.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the lengths differ, a value is NaN, or a k is not in 1..n.
    """
    scores, rewards = _columns(scores=scores, rewards=rewards)
    return _best_of_k(scores[None], rewards[None], ks)[:, 0]


@dataclass(frozen=True)
class RewardGrid:
    """Expected reward of the policy for every k, beta and prompt.

    Args:
        values: (K, B, P) float64.
        errors: (K, B, P) float64, Monte Carlo standard errors; 0 where the value is exact.
        prompts: (P,) int64, sorted prompt ids.
    """

    values: Floats
    errors: Floats
    prompts: Integers


def reward_grid(
    scores: ArrayLike,
    rewards: ArrayLike,
    groups: ArrayLike,
    ks: Sequence[int],
    betas: Sequence[float],
    *,
    draws: int,
    rng: np.random.Generator,
) -> RewardGrid:
    """Expected reward of the softmax policy at every (k, beta), from one pass over the scores.

    Exact where a closed form exists (beta = 0, k = 1, and k = the size of the pool) and where the k-subsets are at most
    `policy.ALL_SUBSETS`, as in `policy.kl_to_base`. Elsewhere the mean over random permutations of the pool: the first k of
    one are a random k-subset, for every k at once and every beta alike.

    Args:
        scores: (N,) float.
        rewards: (N,) float.
        groups: (N,) int, prompt ids; pools may differ in size.
        ks: K numbers of candidates, >= 1, in any order.
        betas: B temperatures >= 0; 0 is argmax.
        draws: random permutations per prompt, >= 2.
        rng: source of the permutations.

    Returns:
        The grid, prompts in sorted order.

    Raises:
        ValueError: lengths differ, a value is NaN, a k is below 1 or above a pool's size, a beta is negative, or draws
            is below 2.
    """
    scores, rewards = _columns(scores=scores, rewards=rewards)
    prompts, rows = _rows_by_prompt(groups, len(scores))
    sizes = np.array([len(r) for r in rows])
    ks_array, betas_array = np.asarray(ks, dtype=np.int64), np.asarray(betas, dtype=np.float64)
    if ks_array.size == 0 or ks_array.min() < 1:
        raise ValueError(f"ks is {list(ks)}: give at least one number of candidates, all of them 1 or more")
    if ks_array.max() > sizes.min():
        raise ValueError(
            f"prompt {prompts[sizes.argmin()]} has {sizes.min()} samples, k is {ks_array.max()}: "
            "draw more samples for it, leave it out or ask for a smaller k"
        )
    if betas_array.size == 0 or not np.all(betas_array >= 0):
        raise ValueError(f"betas is {list(betas)}: give at least one temperature, all of them 0 (argmax) or more")
    if draws < 2:
        raise ValueError(f"draws is {draws}: a standard error needs at least two permutations per prompt")

    values = np.empty((len(ks_array), len(betas_array), len(prompts)))
    errors = np.zeros_like(values)
    argmax, soft = betas_array == 0, betas_array > 0
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        step = max(1, BLOCK // (draws * int(size)))
        order = rng.permuted(np.broadcast_to(np.arange(size), (draws, size)), axis=1)
        for block in np.split(same, range(step, len(same), step)):
            pool = np.stack([rows[p] for p in block])
            s, r = scores[pool], rewards[pool]
            values[np.ix_(np.arange(len(ks_array)), argmax, block)] = _best_of_k(s, r, ks_array)[:, None]
            if soft.any():
                mean, error = _softmax_of_k(s, r, ks_array, betas_array[soft], order, rng)
                values[np.ix_(np.arange(len(ks_array)), soft, block)] = mean
                errors[np.ix_(np.arange(len(ks_array)), soft, block)] = error
    return RewardGrid(values, errors, prompts)


def partition_reward(
    scores: ArrayLike,
    rewards: ArrayLike,
    groups: ArrayLike,
    k: int,
    beta: ArrayLike,
    *,
    rng: np.random.Generator,
) -> Floats:
    """Expected reward of the softmax policy on one random partition of every prompt's samples into sets of k: the paper's
    estimate. What is left over is not used. `reward_grid` is its expectation, without the noise of the partition. (Whether the
    authors drew one completion of a set or took its expectation, as here, is not known; it changes no mean.)

    Args:
        scores, rewards: (N,) float.
        groups: (N,) int, prompt ids.
        k: candidates, at least 1 and at most the samples of any prompt.
        beta: temperature >= 0 of every prompt, (P,), or one for all; 0 is argmax, ties shared.
        rng: source of the partitions.

    Returns: (P,) float64, prompts in sorted order.

    Raises:
        ValueError: lengths differ, a value is NaN, k is out of its range, or a temperature is negative.
    """
    scores, rewards = _columns(scores=scores, rewards=rewards)
    prompts, rows = _rows_by_prompt(groups, len(scores))
    betas = np.broadcast_to(np.asarray(beta, dtype=np.float64), len(prompts))
    if not 1 <= k <= min(map(len, rows)):
        raise ValueError(f"k is {k}: between 1 and {min(map(len, rows))}, the samples of the prompt that has fewest")
    if not np.all(betas >= 0):
        raise ValueError("a temperature is negative: 0 (argmax) or more")
    values = np.empty(len(prompts))
    for place, (own, temperature) in enumerate(zip(rows, betas, strict=True)):
        sets = rng.permutation(own)[: len(own) // k * k].reshape(-1, k)
        below = scores[sets] - scores[sets].max(axis=1, keepdims=True)
        weights = np.exp(below / temperature) if temperature > 0 else (below == 0).astype(float)
        values[place] = ((weights * rewards[sets]).sum(axis=1) / weights.sum(axis=1)).mean()
    return values


def choice_law(
    scores: ArrayLike, groups: ArrayLike, k: int, beta: ArrayLike, *, draws: int, rng: np.random.Generator
) -> Floats:
    """Probability that the policy takes each sample of its prompt's pool, from k of them drawn without replacement.

    Its sum with rewards is what `reward_grid` gives; the law itself serves what no mean of a reward says. Exact at beta = 0
    (ties share equally), k = 1, k = the size of the pool and where the subsets are few (`policy.ALL_SUBSETS`), elsewhere a mean
    over random subsets.

    Args:
        scores: (N,) float.
        groups: (N,) int, prompt ids; pools may differ in size.
        k: candidates, from 1 to the size of the smallest pool.
        beta: temperature >= 0 of the softmax, 0 is argmax; one, or one a prompt (P,) by sorted id.
        draws: random subsets per prompt, >= 1.
        rng: source of the subsets.

    Returns:
        (N,) float64, sums to 1 within each prompt.

    Raises:
        ValueError: lengths differ, a score is NaN, k is below 1 or above a pool's size, a beta is negative, or draws is
            below 1.
    """
    (scores,) = _columns(scores=scores)
    prompts, rows = _rows_by_prompt(groups, len(scores))
    smallest = min(len(row) for row in rows)
    if not 1 <= k <= smallest:
        raise ValueError(f"k is {k}, the smallest pool has {smallest} samples: give 1 <= k <= {smallest}")
    betas = np.broadcast_to(np.asarray(beta, dtype=np.float64), len(prompts))
    if not np.all(betas >= 0):
        raise ValueError(f"beta is {betas.min()}: a temperature is 0 (argmax) or more")
    if draws < 1:
        raise ValueError(f"draws is {draws}: a mean over random subsets needs at least one")
    law = np.empty(len(scores))
    for row, temperature in zip(rows, betas, strict=True):
        pool, size = scores[row], len(row)
        if temperature == 0 or k == 1:
            tie, count = np.unique(pool, return_inverse=True, return_counts=True)[1:]
            law[row] = (np.bincount(np.sort(tie), best_of_law(size, k).numpy()) / count)[tie]
            continue
        if math.comb(size, k) <= ALL_SUBSETS:
            subsets = _all_subsets(size, k)
        else:
            subsets = rng.permuted(np.broadcast_to(np.arange(size), (draws, size)), axis=1)[:, :k]
        with np.errstate(over="ignore"):
            weights = np.exp((pool[subsets] - pool[subsets].max(axis=1, keepdims=True)) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        law[row] = np.bincount(subsets.ravel(), weights.ravel(), minlength=size) / len(subsets)
    return law


def within_prompt_auc(scores: ArrayLike, rewards: ArrayLike, groups: ArrayLike) -> Floats:
    """Probability that a random pair of one prompt's samples with r_i > r_j is scored in that order, ties half.

    For rewards of 0 and 1 this is the area under the ROC curve within the prompt. Rewards that differ by a millionth of the
    largest, which is the rounding of arithmetic, are equal. Memory is n^2 for a prompt of n.

    Args:
        scores: (N,) float.
        rewards: (N,) float.
        groups: (N,) int, prompt ids.

    Returns:
        (P,) float64 by sorted prompt id; NaN where all rewards of the prompt are equal.

    Raises:
        ValueError: the lengths differ or a value is NaN.
    """
    scores, rewards = _columns(scores=scores, rewards=rewards)
    prompts, rows = _rows_by_prompt(groups, len(scores))
    auc, least = np.full(len(prompts), np.nan), ROUNDING * np.abs(rewards).max()
    for p, row in enumerate(rows):
        s, r = scores[row], rewards[row]
        ordered = r[:, None] - r[None, :] > least
        if ordered.any():
            auc[p] = 0.5 + 0.5 * np.sign(s[:, None] - s[None, :])[ordered].mean()
    return auc


def mixed_prompts(rewards: ArrayLike, groups: ArrayLike) -> NDArray[np.bool_]:
    """Which prompts have good and bad samples: where there is something to choose.

    Args:
        rewards: (N,) float, of all prompts: they say what a difference is (`least_difference`).
        groups: (N,) int, prompt ids.

    Returns:
        (P,) bool by sorted prompt id.

    Raises:
        ValueError: the lengths differ or a reward is NaN.
    """
    (rewards,) = _columns(rewards=rewards)
    _, rows = _rows_by_prompt(groups, len(rewards))
    least = least_difference(rewards)
    return np.array([np.ptp(rewards[row]) > least for row in rows])


def least_difference(rewards: ArrayLike) -> float:
    """What two rewards must differ by, more than that, for one to be good and the other bad.

    A soft judge hardly ever gives the same number twice: .5003 and .5004 are one verdict, and the rounding of a model's
    arithmetic is none. So a difference is more than a hundredth of the range that the rewards have, and more than a
    ten-thousandth of the largest.

    Args:
        rewards: (N,) float, of all prompts together.

    Raises:
        ValueError: there is none, or one is NaN.
    """
    (rewards,) = _columns(rewards=rewards)
    return max(0.01 * float(np.ptp(rewards)), 1e-4 * float(np.abs(rewards).max()))


@dataclass(frozen=True)
class Distinct:
    """The different completions of every prompt: copies of one are no pair and no choice.

    Args:
        row: (N,) int64, the completion that a sample is a copy of, numbered from 0 as they are first met.
        groups: (M,) int64, the prompt of each completion.
    """

    row: Integers
    groups: Integers

    @classmethod
    def of(cls, completions: Sequence[str], groups: ArrayLike) -> "Distinct":
        """Find the copies.

        Args:
            completions: N texts.
            groups: (N,) int, prompt ids.
        """
        numbers: dict[tuple[int, str], int] = {}
        own = zip(np.asarray(groups).tolist(), completions, strict=True)
        row = np.array([numbers.setdefault(key, len(numbers)) for key in own], dtype=np.int64)
        return cls(row, np.array([group for group, _ in numbers], dtype=np.int64))

    def mean(self, values: ArrayLike) -> Floats:
        """(M,) the mean of (N,) values over the copies of each completion: a judge may give two copies two rewards."""
        return np.asarray(np.bincount(self.row, np.asarray(values, dtype=np.float64)) / np.bincount(self.row))


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


def _best_of_k(scores: Floats, rewards: Floats, ks: Sequence[int] | Integers) -> Floats:
    """(K, P) expected rewards of argmax for P pools (P, n) of one size."""
    order = np.argsort(scores, axis=1)
    ranked = np.take_along_axis(scores, order, axis=1)
    # Samples that tie share the probability of their ranks, which is to say: each rank earns their mean reward.
    starts = np.ones(scores.shape, dtype=bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    tie = np.cumsum(starts) - 1
    mean = np.bincount(tie, np.take_along_axis(rewards, order, axis=1).ravel()) / np.bincount(tie)
    law = np.stack([best_of_law(scores.shape[1], int(k)).numpy() for k in ks])
    return np.asarray(law @ mean[tie].reshape(scores.shape).T)


def _softmax_of_k(
    scores: Floats, rewards: Floats, ks: Integers, betas: Floats, order: Integers, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """(K, B, P) expected rewards of softmax and their standard errors for P pools (P, n) of one size, betas > 0.

    The permutations `order` (draws, n) serve all prompts, each of which is shuffled by one of its own first: a prompt's
    permutations are then uniform and independent, and the errors of two prompts uncorrelated, as if each had a set of its own.
    """
    (prompts, n), draws = scores.shape, len(order)
    shape = (len(betas), prompts)
    values, errors = np.empty((len(ks), *shape)), np.zeros((len(ks), *shape))
    with np.errstate(over="ignore"):
        below = (scores - scores.max(axis=1, keepdims=True)) / betas[:, None, None]
    whole = np.exp(below)
    values[ks == 1] = rewards.mean(axis=1)
    values[ks == n] = (whole * rewards).sum(axis=2) / whole.sum(axis=2)
    sampled = (ks > 1) & (ks < n)
    for at in np.flatnonzero(sampled):
        if math.comb(n, int(ks[at])) <= ALL_SUBSETS:
            values[at] = _over_all_subsets(scores, rewards, int(ks[at]), betas)
            sampled[at] = False
    if not sampled.any():
        return values, errors

    shuffle = rng.permuted(np.broadcast_to(np.arange(n), (prompts, n)), axis=1)
    scores, rewards = (np.take_along_axis(values, shuffle, axis=1) for values in (scores, rewards))
    # A softmax over a growing prefix, relative to the prefix's own maximum: relative to the pool's, a prefix of poor
    # samples would underflow to 0 / 0.
    top = np.full(prompts * draws, -np.inf)
    mass, earned = np.zeros((2, len(betas), prompts * draws))
    for k in range(1, int(ks[sampled].max()) + 1):
        score, reward = (values[:, order[:, k - 1]].ravel() for values in (scores, rewards))
        with np.errstate(over="ignore"):
            ratio = np.exp(-np.abs(score - top) / betas[:, None])
        higher = score > top
        keep, add = np.where(higher, ratio, 1.0), np.where(higher, 1.0, ratio)
        mass = mass * keep + add
        earned = earned * keep + add * reward
        top = np.maximum(top, score)
        if k in ks[sampled]:
            drawn = (earned / mass).reshape(*shape, draws)
            values[ks == k] = drawn.mean(axis=2)
            errors[ks == k] = drawn.std(axis=2, ddof=1) / math.sqrt(draws)
    return values, errors


def _over_all_subsets(scores: Floats, rewards: Floats, k: int, betas: Floats) -> Floats:
    """(B, P) expected rewards of softmax over every k-subset of P pools (P, n) of one size, betas > 0."""
    prompts, n = scores.shape
    subsets = _all_subsets(n, k)
    values = np.empty((len(betas), prompts))
    step = max(1, BLOCK // subsets.size)
    for start in range(0, prompts, step):
        own = slice(start, start + step)
        s, r = scores[own][:, subsets], rewards[own][:, subsets]
        s = s - s.max(axis=2, keepdims=True)
        for place, beta in enumerate(betas):
            with np.errstate(over="ignore"):
                weights = np.exp(s / beta)
            values[place, own] = ((weights * r).sum(axis=2) / weights.sum(axis=2)).mean(axis=1)
    return values


def _all_subsets(n: int, k: int) -> Integers:
    """(C, k) places of every k-subset of n."""
    return np.array(list(itertools.combinations(range(n), k)), dtype=np.int64)


def _columns(**columns: ArrayLike) -> list[Floats]:
    """The columns as float64 arrays of one length, none empty, no NaN."""
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    first, length = next((name, array.size) for name, array in arrays.items())
    for name, array in arrays.items():
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{name} has shape {array.shape}: give one dimension with at least one value")
        if array.size != length:
            raise ValueError(f"{name} has {array.size} rows, {first} has {length}: give one of each per row")
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array)))
            raise ValueError(f"{name} holds {array[row]} in row {row}: drop such rows first, knowingly")
    return list(arrays.values())


def _rows_by_prompt(groups: ArrayLike, length: int) -> tuple[Integers, list[Integers]]:
    """Sorted prompt ids and the row numbers of each."""
    ids = np.asarray(groups)
    if ids.shape != (length,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"groups is {ids.dtype} of shape {ids.shape}: give one integer prompt id for each of {length} rows"
        )
    prompts, starts = np.unique(np.sort(ids), return_index=True)
    return prompts.astype(np.int64), np.split(np.argsort(ids, kind="stable"), starts[1:])


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: a coverage lies between 0 and 1, such as 0.95")
