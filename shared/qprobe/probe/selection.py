"""The policy of a Q-probe: which of k candidates to take, what that earns, and how far it is from the base policy.

A candidate set is always the last axis of `scores`. The base policy p0 is the law that the completions were sampled
from, temperature and nucleus included.
"""

import math

import torch
from torch import Tensor

# Subsets of a pool that are taken all, one by one, where a law over them has no closed form.
ALL_SUBSETS = 2000


def selection_weights(scores: Tensor, beta: float) -> Tensor:
    """Probability of each candidate, softmax(scores / beta); at beta = 0 the best candidates share it equally.

    Args:
        scores: (..., k) float, finite Q values.
        beta: temperature >= 0.

    Returns:
        (..., k), sums to 1 over the last axis.

    Raises:
        ValueError: beta is negative or NaN, there is no candidate, or a score is not finite.

    Source: the policy of Q-Probe (arXiv 2402.14688).
    """
    _check_beta(beta)
    _check_candidates(scores)
    # The maximum leaves before the division: scores / beta may overflow, their differences only go to -infinity.
    below = scores - scores.detach().amax(-1, keepdim=True)
    if beta == 0:
        best = (below == 0).to(scores.dtype)
        return best / best.sum(-1, keepdim=True)
    return torch.softmax(below / beta, dim=-1)


def select(scores: Tensor, beta: float, generator: torch.Generator) -> int:
    """Draw one of k candidates with probability softmax(scores / beta).

    Args:
        scores: (k,) float, finite Q values.
        beta: temperature >= 0; 0 takes the best, ties by lot.
        generator: source of the random number.

    Returns:
        Index of the candidate, 0..k-1.

    Raises:
        ValueError: scores is not one candidate set, or see `selection_weights`.
    """
    if scores.ndim != 1:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}: select takes one candidate set (k,); use select_batch"
        )
    return int(select_batch(scores, beta, generator))


def select_batch(scores: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Draw one candidate from each of many sets of k.

    Args:
        scores: (..., k) float, finite Q values.
        beta: temperature >= 0; 0 takes the best, ties by lot.
        generator: source of the random numbers, on any device.

    Returns:
        (...) int64, index of the candidate in each set.

    Raises:
        ValueError: see `selection_weights`.
    """
    weights = selection_weights(scores, beta).to(generator.device)
    drawn = torch.multinomial(weights.reshape(-1, scores.shape[-1]), 1, generator=generator)
    return drawn.reshape(scores.shape[:-1]).to(scores.device)


def expected_reward(scores: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Reward that the policy expects from a candidate set, its own draw averaged out.

    Args:
        scores: (..., k) float, finite Q values.
        rewards: (..., k) float.
        beta: temperature >= 0.

    Returns:
        (...) float.

    Raises:
        ValueError: the shapes differ, or see `selection_weights`.
    """
    if scores.shape != rewards.shape:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}, rewards has {tuple(rewards.shape)}: "
            "each candidate has one score and one reward"
        )
    return (selection_weights(scores, beta) * rewards).sum(-1)


def limit_policy(p0: Tensor, q: Tensor, beta: float) -> Tensor:
    """Law of the selected completion as k grows, p0 exp(Q / beta) / E_p0[exp(Q / beta)].

    It maximises E_pi[Q] - beta KL(pi || p0). At beta = 0 it is p0 restricted to the best completions that p0 can give.

    Args:
        p0: (A,) float, probabilities of the base policy.
        q: (A,) float, finite Q values.
        beta: temperature >= 0.

    Returns:
        (A,) float, sums to 1.

    Raises:
        ValueError: p0 is no probability vector, the shapes differ, beta is negative or NaN, or a Q value is not finite.

    Source: the limit theorem of Q-Probe (arXiv 2402.14688).
    """
    _check_beta(beta)
    _check_candidates(q)
    if p0.shape != q.shape or p0.ndim != 1:
        raise ValueError(f"p0 has shape {tuple(p0.shape)}, q has {tuple(q.shape)}: give both as (A,)")
    if not bool((p0 >= 0).all()) or abs(float(p0.sum()) - 1) > 1e-4:
        raise ValueError(f"p0 sums to {float(p0.sum()):g}: give probabilities, all >= 0 with sum 1")
    reachable = torch.where(p0 > 0, q, -torch.inf)
    below = reachable - reachable.max()
    mass = p0 * ((below == 0) if beta == 0 else torch.exp(below / beta))
    return mass / mass.sum()


def argmax_kl(k: int) -> float:
    """KL divergence from the base policy to best-of-k without ties, log k - (k - 1) / k.

    Args:
        k: number of candidates, >= 1.

    Returns:
        The divergence in nats.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: a candidate set has at least one completion")
    return math.log(k) - (k - 1) / k


def best_of_law(n: int, k: int) -> Tensor:
    """Probability of each rank to be the best of a random k-subset of n, C(j - 1, k - 1) / C(n, k) for rank j.

    Args:
        n: size of the pool, >= 1.
        k: size of the subset, 1..n.

    Returns:
        (n,) float64, the lowest rank first; sums to 1.

    Raises:
        ValueError: k is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, the pool holds {n} samples: k must lie between 1 and {n}")
    # From the top rank, k / n, downwards: a product of factors in [0, 1] has no binomial that could overflow.
    ranks = torch.arange(n - 1, 0, -1, dtype=torch.float64)
    factors = ((ranks - k + 1) / ranks).clamp_min(0)
    return (torch.cat([torch.ones(1, dtype=torch.float64), factors]).cumprod(0) * (k / n)).flip(0)


def kl_to_base(scores: Tensor, k: int, beta: float, *, draws: int, generator: torch.Generator) -> float:
    """KL divergence of the k-candidate policy from the base policy, estimated from a pool of its samples.

    With g(a) = E over the other k - 1 candidates of [k rho(a; others)], KL = E_p0[g log g]. The candidates are random
    k-subsets of the pool: all of them at beta = 0 (in closed form, ties shared) and where they are at most 2,000, `draws`
    of them for each a otherwise.
    For an endless pool, beta = 0 and no ties this is `argmax_kl(k)`.

    Two biases, both upwards. A finite pool lends its candidates without replacement: about k / 2n, as measured at
    beta = 0 (0.12 nats at k = 48, n = 200). Finite draws: g log g is convex, so noise in g adds about
    mean(Var(g) / 2g), which falls as 1 / draws.

    Args:
        scores: (n,) float, Q values of n samples of p0 for one prompt.
        k: number of candidates, 1..n.
        beta: temperature >= 0.
        draws: random subsets for each sample, >= 1; not used where all subsets are taken.
        generator: source of the random subsets, on the CPU.

    Returns:
        The divergence in nats.

    Raises:
        ValueError: k is not in 1..n, draws is below 1, scores is not (n,), or see `selection_weights`.

    Source: the policy of Q-Probe (arXiv 2402.14688); g is the density of the selected completion against p0.
    """
    _check_beta(beta)
    _check_candidates(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: give the scores of one prompt's samples, (n,)")
    if draws < 1:
        raise ValueError(f"draws is {draws}: at least one random subset per sample is needed")
    scores = scores.detach().to("cpu", torch.float64)
    n = len(scores)
    law = best_of_law(n, k)
    if beta == 0:
        _, tie, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
        tied_mass = law.new_zeros(len(sizes)).index_add(0, tie.sort().values, law)
        density = n * (tied_mass / sizes)[tie]
    else:
        if math.comb(n, k) <= ALL_SUBSETS:
            chosen = torch.combinations(torch.arange(n), k)
            weights = selection_weights(scores[chosen], beta)
        else:
            shuffled = torch.rand(draws, n, generator=generator).argsort(1)
            # The last chunk is filled up from the front and read only where it is new: each sample once per draw.
            chosen = torch.cat([shuffled, shuffled[:, : -n % k]], dim=1).reshape(-1, k)
            weights = selection_weights(scores[chosen], beta).reshape(draws, -1)[:, :n]
            chosen = shuffled
        density = torch.zeros_like(scores).index_add(0, chosen.flatten(), weights.flatten())
        density /= density.mean()
    return float(torch.xlogy(density, density).mean())


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise ValueError(f"beta is {beta}: a temperature is 0 (argmax) or more")


def _check_candidates(scores: Tensor) -> None:
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: there is no candidate to choose from")
    if not scores.is_floating_point() or not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be floating-point numbers, none of them NaN or infinite: check the features")
