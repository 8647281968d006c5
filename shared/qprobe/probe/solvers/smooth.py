"""Losses without a closed form, with L2, by L-BFGS in the rows' own space: cross-entropy, pairs, and the policy gradient.

In that space the second derivative of a loss is close to a multiple of the variances along the axes, so that axes which are
scaled by the root of it let L-BFGS arrive in some ten steps. Along a path from strong to weak L2 each fit starts from the one
before, and the first from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts are imported as they are used: a probe in use needs none
from numpy.typing import NDArray

from qprobe.probe.solvers.ridge import RidgeFit
from qprobe.probe.solvers.rows import ROUNDING, Array, Floats, Integers

SmoothLoss = Literal["reward_cross_entropy", "policy_gradient", "pairwise_logistic", "bradley_terry"]

# A loss as (value, derivative (N,) by the scores), both weighted means over what it is read from.
Evaluate = Callable[[Floats], tuple[float, Floats]]

# What the second derivative by the scores is at most, as a share of a row's weight; for the policy gradient at equal scores.
CURVATURE = {"reward_cross_entropy": 0.25, "policy_gradient": 0.25, "pairwise_logistic": 0.5, "bradley_terry": 0.5}
# The anchor's coefficient has next to no L2: the policy gradient may otherwise run away with it.
FREE_L2 = 1e-6
STEPS = 300


@dataclass(frozen=True)
class SmoothRows:
    """Rows as the losses read them, prompts next to each other.

    Args:
        coordinates: (N, R) float64, along axes on which L2 is the sum of squares.
        free: (N, q) float64, columns that have no L2.
        rewards: (N,) float64.
        groups: (N,) int64.
        weights: (N,) float64 > 0.
        variances: (R,) float64, the weighted mean square of each coordinate.
    """

    coordinates: Array
    free: Floats
    rewards: Floats
    groups: Integers
    weights: Floats
    variances: Floats

    def take(self, rows: NDArray[np.bool_]) -> SmoothRows:
        """Some prompts of these."""
        return SmoothRows(
            self.coordinates[rows],
            self.free[rows],
            self.rewards[rows],
            self.groups[rows],
            self.weights[rows],
            self.variances,
        )

    def scores(self, fit: RidgeFit) -> Floats:
        """(N,) Q."""
        z = self.coordinates
        return np.asarray(z @ fit.direction.astype(z.dtype), dtype=np.float64) + self.free @ fit.free


def path(
    loss: SmoothLoss, rows: SmoothRows, strengths: Sequence[float], anchored: bool = False, tolerance: float = 1e-6
) -> list[RidgeFit]:
    """Minimise loss + l |theta|^2 for every strength l.

    Args:
        loss: its mean is over rows (cross-entropy, weighted) or over prompts, as in `qprobe.probe.losses`.
        rows: what is learnt from.
        strengths: l > 0, in any order; infinity is minus the gradient at 0, in a length of the rewards' range, and where
            L2 pulls towards an anchor the free columns alone.
        anchored: whether one of the free columns is an anchor.
        tolerance: of the gradient, relative to the gradient at 0.
    """
    evaluate = evaluation(loss, rows)
    order = np.argsort([-strength for strength in strengths])
    start = RidgeFit(np.zeros(rows.coordinates.shape[1]), np.zeros(rows.free.shape[1]))
    start = _minimised(evaluate, rows, np.inf, start, CURVATURE[loss], tolerance)
    found: dict[int, RidgeFit] = {}
    for index in order:
        strength = strengths[index]
        if np.isinf(strength):
            found[index] = start if anchored else _end(evaluate, rows, start)
            continue
        start = _minimised(evaluate, rows, strength, start, CURVATURE[loss], tolerance)
        found[index] = start
    return [found[index] for index in range(len(strengths))]


def _end(evaluate: Evaluate, rows: SmoothRows, fit: RidgeFit) -> RidgeFit:
    """Minus the gradient where L2 holds theta at 0."""
    _, slope = evaluate(rows.scores(fit))
    z = rows.coordinates
    direction = -np.asarray(z.T @ slope.astype(z.dtype), dtype=np.float64)
    along = np.asarray(z @ direction.astype(z.dtype), dtype=np.float64)
    spread = np.sqrt(rows.weights @ np.square(along) / rows.weights.sum())
    return RidgeFit(direction * (np.ptp(rows.rewards) / spread if spread > 0 else 0.0), fit.free)


def _minimised(
    evaluate: Evaluate, rows: SmoothRows, strength: float, start: RidgeFit, curvature: float, tolerance: float
) -> RidgeFit:
    """One fit; an infinite strength fits the free columns alone."""
    z, free = rows.coordinates, rows.free
    held = np.isinf(strength)
    length = 0 if held else z.shape[1]
    penalty = np.full(length + free.shape[1], FREE_L2)
    mean_squares = np.maximum(np.average(np.square(free), axis=0, weights=rows.weights), 1e-12)
    stretch = np.sqrt(curvature * mean_squares + 2 * FREE_L2)
    if not held:
        penalty[:length] = strength
        stretch = np.r_[np.sqrt(curvature * rows.variances + 2 * strength), stretch]
    if len(stretch) == 0:
        return start

    def objective(values: Floats) -> tuple[float, Floats]:
        own = values / stretch
        fit = RidgeFit(own[:length] if length else np.zeros(z.shape[1]), own[length:])
        value, slope = evaluate(rows.scores(fit) if length else free @ fit.free)
        by_free = free.T @ slope
        gradient = by_free if held else np.r_[np.asarray(z.T @ slope.astype(z.dtype), dtype=np.float64), by_free]
        return value + float(penalty @ np.square(own)), (gradient + 2 * penalty * own) / stretch

    first = (start.free if held else np.r_[start.direction, start.free]) * stretch
    scale = float(np.abs(objective(np.zeros_like(first))[1]).max())
    if scale == 0:
        return start
    options = {"maxiter": STEPS, "maxcor": 20, "ftol": 1e-15, "gtol": tolerance}
    solved = scipy.optimize.minimize(
        lambda v: _scaled(objective(v), scale), first, jac=True, method="L-BFGS-B", options=options
    )
    own = solved.x / stretch
    return RidgeFit(np.zeros(z.shape[1]) if held else own[:length], own[length:])


def _scaled(value: tuple[float, Floats], scale: float) -> tuple[float, Floats]:
    return value[0] / scale, value[1] / scale


def evaluation(loss: SmoothLoss, rows: SmoothRows) -> Evaluate:
    """A loss of `qprobe.probe.losses` on fixed rows, and its derivative by the scores."""
    if loss == "reward_cross_entropy":
        return _cross_entropy(rows)
    if loss == "policy_gradient":
        return _policy_gradient(rows)
    return _pairs(rows)


def _cross_entropy(rows: SmoothRows) -> Evaluate:
    share, rewards = rows.weights / rows.weights.sum(), rows.rewards

    def evaluate(scores: Floats) -> tuple[float, Floats]:
        return float(share @ (np.logaddexp(0, scores) - rewards * scores)), share * (
            scipy.special.expit(scores) - rewards
        )

    return evaluate


def _policy_gradient(rows: SmoothRows) -> Evaluate:
    """-sum_i (r_i - b) rho_i, the mean over prompts; rho_i = w_i exp(Q_i) / sum_j w_j exp(Q_j)."""
    starts, of_row = _segments(rows.groups)
    sizes = np.diff(np.r_[starts, len(of_row)])
    mass = np.add.reduceat(rows.weights, starts) / sizes
    share = mass / mass.sum()
    least = np.minimum.reduceat(rows.rewards, starts)[of_row]
    gains = rows.rewards - least  # the baseline moves the value only; numbers near 0 are summed more exactly

    def evaluate(scores: Floats) -> tuple[float, Floats]:
        top = np.maximum.reduceat(scores, starts)[of_row]
        odds = rows.weights * np.exp(scores - top)
        rho = odds / np.add.reduceat(odds, starts)[of_row]
        expected = np.add.reduceat(gains * rho, starts)
        return -float(share @ expected), -share[of_row] * rho * (gains - expected[of_row])

    return evaluate


def _pairs(rows: SmoothRows) -> Evaluate:
    """-log sigma(Q_i - Q_j) over pairs of a prompt with r_i > r_j, the mean over its pairs, then over prompts with pairs."""
    better, worse = ordered_pairs(rows.rewards, rows.groups)
    pair_weights = rows.weights[better] * rows.weights[worse]
    count = int(rows.groups.max()) + 1
    totals = np.bincount(rows.groups[better], pair_weights, minlength=count)
    sizes = np.bincount(rows.groups, minlength=count)
    mass = np.bincount(rows.groups, rows.weights, minlength=count) / np.maximum(sizes, 1) * (totals > 0)
    share = (mass / mass.sum() / np.where(totals > 0, totals, 1))[rows.groups[better]] * pair_weights

    def evaluate(scores: Floats) -> tuple[float, Floats]:
        margin = scores[better] - scores[worse]
        slope = share * scipy.special.expit(-margin)
        derivative = np.bincount(worse, slope, minlength=len(scores)) - np.bincount(
            better, slope, minlength=len(scores)
        )
        return float(share @ np.logaddexp(0, -margin)), derivative.astype(np.float64)

    return evaluate


def ordered_pairs(rewards: Floats, groups: Integers) -> tuple[Integers, Integers]:
    """Row numbers (i, j) of all pairs of a prompt with r_i > r_j by more than rounding.

    Args:
        rewards: (N,) float.
        groups: (N,) int64, equal ids next to each other.
    """
    least = ROUNDING * float(np.abs(rewards).max(initial=0))
    starts, _ = _segments(groups)
    better, worse = [], []
    for start, end in zip(starts, np.r_[starts[1:], len(groups)], strict=True):
        own = rewards[start:end]
        i, j = np.nonzero(own[:, None] - own[None, :] > least)
        better.append(i + start)
        worse.append(j + start)
    return np.concatenate(better).astype(np.int64), np.concatenate(worse).astype(np.int64)


def _segments(groups: Integers) -> tuple[Integers, Integers]:
    """Where each prompt's rows start, and the prompt of each row by its place."""
    starts = np.flatnonzero(np.r_[True, np.diff(groups) != 0]).astype(np.int64)
    return starts, np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(groups)]))
