"""What a probe's choices are worth: pass@k, best-of-k, reward at every (k, beta).

One pool of scored samples per prompt answers every question about k: a candidate set is a random k-subset of the pool,
without replacement. Arrays are NumPy; per-prompt results follow the sorted prompt ids. Random numbers come from the
generator that is passed in.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qprobe.probe.columns import BLOCK, Floats, Integers, _columns, _rows_by_prompt
from qprobe.probe.selection import ALL_SUBSETS, best_of_law


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
