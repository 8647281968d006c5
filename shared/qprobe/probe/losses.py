"""The training losses of a Q-probe, as pure functions of tensors.

Every loss takes `scores` of shape (N,) for one probe or (N, M) for M probes that train together, and returns a scalar
or (M,): probe m's value depends on column m alone. `weights` says how often a row counts, per row or per row and probe:
a row of weight 2 acts like the same row given twice, a row of weight 0 is not there. In the losses that compare the
rows of one group (a prompt's completions) a group counts by the mean weight of its rows, so every group counts alike
when there are no weights, whatever its size. A probe whose weights are all 0 has the loss 0 and the gradient 0.

Shapes are checked on every call. What costs a pass over the values (`check_rewards`, `check_finite`) is left to the
caller, once per data set.

The softmax within groups of unequal size lives here and not in `policy`: only training sees many prompts in one flat
batch; a policy always chooses from one set of candidates, the last axis of its scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_mse(scores: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance between score and reward, E (Q - r)^2.

    Args:
        scores: (N,) or (N, M) float, Q values.
        rewards: (N,) float, any range.
        weights: (N,) or (N, M) float >= 0, or None.

    Returns:
        Scalar or (M,), the weighted mean over rows.

    Raises:
        ValueError: the shapes do not fit.

    Source: L_Q of Q-Probe (arXiv 2402.14688).
    """
    _check_rows(scores, weights, rewards=rewards)
    return _weighted_mean((scores - _column(rewards, scores)).square(), weights)


def reward_cross_entropy(scores: Tensor, rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of the reward under sigma(Q), -E [r log sigma(Q) + (1 - r) log(1 - sigma(Q))].

    Args:
        scores: (N,) or (N, M) float, Q values, read as log-odds.
        rewards: (N,) float in [0, 1].
        weights: (N,) or (N, M) float >= 0, or None.

    Returns:
        Scalar or (M,), the weighted mean over rows.

    Raises:
        ValueError: the shapes do not fit.

    Source: L_CE of Q-Probe (arXiv 2402.14688).
    """
    _check_rows(scores, weights, rewards=rewards)
    target = _column(rewards, scores).expand_as(scores)
    return _weighted_mean(F.binary_cross_entropy_with_logits(scores, target, reduction="none"), weights)


def policy_gradient(
    scores: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    beta: float = 1.0,
    baseline: float | Tensor = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Minus the reward that the softmax policy expects in a group, -sum_i (r_i - b) rho_i.

    rho sums to 1 in a group, so a baseline that is constant within groups moves the value and never the gradient, and a
    group whose rewards are all equal has no gradient.

    Args:
        scores: (N,) or (N, M) float, Q values.
        rewards: (N,) float, any range.
        groups: (N,) int64, the prompt of each row, ids 0..G-1 in any order; groups may differ in size.
        beta: temperature > 0 of the policy.
        baseline: b, one number or (N,).
        weights: (N,) or (N, M) float >= 0, or None.

    Returns:
        Scalar or (M,), the weighted mean over groups.

    Raises:
        ValueError: the shapes do not fit, or beta is not positive.

    Source: L_PG and rho of Q-Probe (arXiv 2402.14688), summed over all members of a chunk.
    """
    columns = {"baseline": baseline} if isinstance(baseline, Tensor) else {}
    _check_rows(scores, weights, rewards=rewards, groups=groups, **columns)
    gain = _column(rewards, scores) - (_column(baseline, scores) if isinstance(baseline, Tensor) else baseline)
    shares = _shares(scores, groups, weights)
    group_weights = _group_sum(shares, groups)
    values = _group_sum(-gain * group_softmax(scores, groups, beta, weights), groups)
    return _weighted_mean(values, group_weights)


def bradley_terry(chosen: Tensor, rejected: Tensor, weights: Tensor | None = None) -> Tensor:
    """Log-loss of preferring the chosen completion, -E log sigma(Q(chosen) - Q(rejected)).

    Args:
        chosen: (P,) or (P, M) float, Q values of the preferred completions.
        rejected: the shape of `chosen`, Q values of the others.
        weights: (P,) or (P, M) float >= 0, or None.

    Returns:
        Scalar or (M,), the weighted mean over pairs.

    Raises:
        ValueError: the shapes do not fit.

    Source: L_QP of Q-Probe (arXiv 2402.14688).
    """
    _check_rows(chosen, weights)
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)}, rejected has {tuple(rejected.shape)}: "
            "row i of both is the same pair, so the shapes must be equal"
        )
    return _weighted_mean(-F.logsigmoid(chosen - rejected), weights)


def centred_mse(scores: Tensor, rewards: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance between score and reward after both lose their group's mean.

    A control for L_PG: it ignores how hard a prompt is, as L_PG does, but stays a regression.

    Args:
        scores: (N,) or (N, M) float, Q values.
        rewards: (N,) float, any range.
        groups: (N,) int64, the prompt of each row, ids 0..G-1 in any order; groups may differ in size.
        weights: (N,) or (N, M) float >= 0, or None.

    Returns:
        Scalar or (M,): the weighted mean within each group, then over groups.

    Raises:
        ValueError: the shapes do not fit.

    Source: L_Q of Q-Probe (arXiv 2402.14688), within prompts.
    """
    _check_rows(scores, weights, rewards=rewards, groups=groups)
    used = _row_weights(scores, weights)
    error = scores - _column(rewards, scores)
    means = _ratio(_group_sum(used * error, groups), _group_sum(used, groups))
    centred = error - means.index_select(0, groups)
    return _weighted_mean(centred.square(), _shares(scores, groups, weights))


def pairwise_logistic(scores: Tensor, rewards: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """Bradley-Terry loss over all pairs of a group with r_i > r_j.

    A control for L_PG: contrastive within prompts, but no policy gradient. A group of n rows forms up to n^2 / 2 pairs,
    all held in memory at once; a pair weighs the product of its rows' weights.

    Args:
        scores: (N,) or (N, M) float, Q values.
        rewards: (N,) float, any range.
        groups: (N,) int64, the prompt of each row, ids 0..G-1 in any order; groups may differ in size.
        weights: (N,) or (N, M) float >= 0, or None.

    Returns:
        Scalar or (M,): the mean over a group's pairs, then the weighted mean over the groups that have a pair.

    Raises:
        ValueError: the shapes do not fit.

    Source: L_QP of Q-Probe (arXiv 2402.14688), on the pairs that the rewards imply.
    """
    _check_rows(scores, weights, rewards=rewards, groups=groups)
    better, worse = _ordered_pairs(rewards, groups)
    used = _row_weights(scores, weights)
    pair_weights = used[better] * used[worse]
    pair_losses = -F.logsigmoid(scores.index_select(0, better) - scores.index_select(0, worse))
    size = _group_count(groups)
    totals = _group_sum(pair_weights, groups[better], size)
    values = _ratio(_group_sum(pair_weights * pair_losses, groups[better], size), totals)
    group_weights = _group_sum(_shares(scores, groups, weights), groups)
    return _weighted_mean(values, group_weights * (totals > 0))


def group_softmax(scores: Tensor, groups: Tensor, beta: float, weights: Tensor | None = None) -> Tensor:
    """Softmax of scores / beta within each group, rho_i = w_i f_i / sum_j w_j f_j with f = exp(Q / beta).

    Args:
        scores: (N,) or (N, M) float, Q values.
        groups: (N,) int64, the prompt of each row, ids 0..G-1 in any order; groups may differ in size.
        beta: temperature > 0.
        weights: (N,) or (N, M) float >= 0, or None for 1.

    Returns:
        The shape of `scores`; sums to 1 in each group that has a row of positive weight, and is 0 in the others.

    Raises:
        ValueError: the shapes do not fit, or beta is not positive.

    Source: rho of Q-Probe (arXiv 2402.14688).
    """
    _check_rows(scores, weights, groups=groups)
    if not beta > 0:
        raise ValueError(f"beta is {beta}: the softmax of a loss needs a temperature above 0, such as beta=1.0")
    used = _row_weights(scores, weights)
    # An unused row must not be its group's maximum: the rows that are used would underflow to 0 beside it.
    present = scores.masked_fill(used == 0, -torch.inf)
    top = present.new_full((_group_count(groups), *scores.shape[1:]), torch.finfo(scores.dtype).min)
    index = groups.reshape(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
    top = top.scatter_reduce(0, index, present.detach(), "amax")
    mass = used * torch.exp((present - top.index_select(0, groups)) / beta)
    return _ratio(mass, _group_sum(mass, groups).index_select(0, groups))


@dataclass(frozen=True)
class Loss:
    """What a trainer must know of a loss.

    Args:
        symbol: the name in tables and figures; L_Q, L_CE, L_PG and L_QP are the paper's.
        function: the loss itself.
        reads: "rows" for (scores, rewards), "groups" for (scores, rewards, groups), "pairs" for (chosen, rejected);
            each takes `weights` as a keyword.
        unit_rewards: whether rewards must lie in [0, 1].
    """

    symbol: str
    function: Callable[..., Tensor]
    reads: Literal["rows", "groups", "pairs"]
    unit_rewards: bool = False


LOSSES: dict[str, Loss] = {
    "reward_mse": Loss("L_Q", reward_mse, "rows"),
    "reward_cross_entropy": Loss("L_CE", reward_cross_entropy, "rows", unit_rewards=True),
    "policy_gradient": Loss("L_PG", policy_gradient, "groups"),
    "bradley_terry": Loss("L_QP", bradley_terry, "pairs"),
    "centred_mse": Loss("L_Q (centred)", centred_mse, "groups"),
    "pairwise_logistic": Loss("L_QP (within prompt)", pairwise_logistic, "groups"),
}


# Rewards above this are refused: gradients are larger than rewards by as much as features are, and optimisers square them.
MOST_REWARD = 1e12


# Not a loss but a choice of one, with blocks, anchor and L2, by left-out scores: `qprobe.probe.blocks.auto`.
AUTO = "auto"
_CHOSEN = Loss("auto", centred_mse, "groups")


def find_loss(name: str) -> Loss:
    """Look a loss up by its name.

    Args:
        name: a key of `LOSSES`, or "auto".

    Returns:
        The loss.

    Raises:
        ValueError: there is no such loss.
    """
    if name == AUTO:
        return _CHOSEN
    if name not in LOSSES:
        raise ValueError(f"there is no loss named {name!r}: choose one of {', '.join((AUTO, *LOSSES))}")
    return LOSSES[name]


def check_rewards(rewards: Tensor, loss_name: str) -> None:
    """Refuse rewards that the loss cannot read; call it once per data set.

    Args:
        rewards: (N,) float.
        loss_name: a key of `LOSSES`.

    Raises:
        ValueError: a reward is NaN or infinite, outside [0, 1] where the loss reads it as a probability, or so large that
            its square comes near the end of float32 where the loss reads more than the order of rewards.
    """
    check_finite(rewards, "rewards")
    if loss_name not in ("bradley_terry", "pairwise_logistic") and float(rewards.abs().max()) > MOST_REWARD:
        raise ValueError(
            f"rewards reach {rewards[rewards.abs().argmax()].item():g}: training squares them in float32, which overflows; "
            "divide them by a constant, to a range of about 1"
        )
    if not find_loss(loss_name).unit_rewards:
        return
    outside = (rewards < 0) | (rewards > 1)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"rewards holds {rewards[row].item():g} in row {row} ({int(outside.sum())} such rows): {loss_name} reads a "
            "reward as a probability in [0, 1]; rescale the rewards or choose another loss"
        )


def check_finite(values: Tensor, name: str) -> None:
    """Refuse NaN and infinity; call it once per data set.

    Args:
        values: (N, ...) float.
        name: what the values are called in the message.

    Raises:
        ValueError: a value is not finite.
    """
    # The minimum and the maximum are NaN or infinite where any value is; no (N, ...) mask is made for good data.
    if values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        return
    finite = [torch.isfinite(part).reshape(len(part), -1).all(dim=1) for part in values.split(4096)]
    rows = (~torch.cat(finite)).nonzero()[:, 0]
    raise ValueError(
        f"{name} holds NaN or infinity in row {int(rows[0])} ({len(rows)} such rows): remove or repair them first"
    )


def _check_rows(scores: Tensor, weights: Tensor | None, **columns: Tensor) -> None:
    if scores.ndim not in (1, 2) or scores.shape[0] == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: give (N,) or (N, M) with at least one row")
    for name, column in columns.items():
        if column.shape != scores.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)}, scores has {tuple(scores.shape)}: "
                f"{name} needs one value for each of the {scores.shape[0]} rows"
            )
    if "groups" in columns and columns["groups"].dtype != torch.int64:
        raise ValueError(
            f"groups is {columns['groups'].dtype}: group ids are int64, from 0 to the number of groups - 1"
        )
    if weights is not None and weights.shape not in (scores.shape[:1], scores.shape):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, scores has {tuple(scores.shape)}: "
            "give one weight per row, or one per row and probe"
        )


def _column(rows: Tensor, scores: Tensor) -> Tensor:
    rows = rows.to(scores.dtype)
    return rows[:, None] if scores.ndim > rows.ndim else rows


def _row_weights(scores: Tensor, weights: Tensor | None) -> Tensor:
    return _column(scores.new_ones(scores.shape[0]) if weights is None else weights, scores)


def _shares(scores: Tensor, groups: Tensor, weights: Tensor | None) -> Tensor:
    """Weight of a row over its group's size: sums to the mean weight in a group, so that groups count alike."""
    used = _row_weights(scores, weights)
    sizes = _group_sum(torch.ones_like(used), groups)
    return used / sizes.index_select(0, groups)


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean(0)
    weights = _column(weights, values)
    return _ratio((weights * values).sum(0), weights.sum(0))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of two sums that are both 0 where nothing was summed; the quotient and its gradient are 0 there."""
    return numerator / torch.where(denominator > 0, denominator, 1.0)


def _group_count(groups: Tensor) -> int:
    return int(groups.max()) + 1


def _group_sum(values: Tensor, groups: Tensor, size: int | None = None) -> Tensor:
    size = _group_count(groups) if size is None else size
    return values.new_zeros((size, *values.shape[1:])).index_add(0, groups, values)


def _ordered_pairs(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices (i, j) of all pairs in one group with r_i > r_j."""
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    # Every row of a group meets all rows of the group: partner number t of a row sits at the group's start + t.
    partners = sizes[groups]
    first = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), partners)
    number = torch.arange(len(first), device=groups.device) - (partners.cumsum(0) - partners)[first]
    second = order[starts[groups[first]] + number]
    better = rewards[first] > rewards[second]
    return first[better], second[better]
