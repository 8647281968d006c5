"""Win rates at equal lengths: a judge that prefers longer answers rewards a policy for writing more."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit

from qprobe.probe.columns import Floats
from qprobe.probe.intervals import Interval

# Precision of the normal prior on the slope of length, standard deviation 5: without it wins decided by length alone have
# no finite slope. 5 logits from one end of tanh to its middle leave any slope that is seen in practice alone.
SLOPE_PRECISION = 1 / 5**2


def length_controlled(
    wins: ArrayLike, differences: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None
) -> Interval | None:
    """The win rate that a logistic regression predicts for answers as long as those they are judged against.

    P(win) = sigmoid(a + b tanh(d / s)), d the difference in length, s its standard deviation; the rate is sigmoid(a). Wins
    may be soft. b has a weak normal prior (SLOPE_PRECISION), a has none, so that without an effect of length the rate is the
    plain one. Its interval is the sandwich estimate over groups. It is a model's answer: where nearly all
    candidates are longer (or shorter) it is an extrapolation, and a judge that takes the longer answer by however little is
    no such curve: the rate then stays off one half, towards the side that has more answers.

    Args:
        wins: (N,) float in [0, 1].
        differences: (N,) float, length of the candidate minus that of its reference.
        groups: (N,) int, ids of what is independent: prompts, or clusters of them.
        weights: (N,) float >= 0, such as a policy's law; None weighs all alike.

    Returns:
        The rate; None where the data do not say: no win or no loss at all, one difference other than 0 throughout, fewer than
        3 groups.

    Source: "length_controlled_minimal" of AlpacaEval 2 (arXiv 2404.04475), with the prior in place of none. Its published
        leaderboard also has a difficulty of each instruction, fitted over many models, which two policies do not give.
    """
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    taken = w > 0
    y, d, w = y[taken], d[taken], w[taken]
    clusters = np.unique(np.asarray(groups)[taken], return_inverse=True)[1]
    spread = float(np.sqrt(np.cov(d, aweights=w, ddof=0))) if len(d) > 1 else 0.0
    if clusters.max() < 2 or y.max() == 0 or y.min() == 1 or (spread == 0 and d.any()):
        return None
    x = np.stack([np.ones(len(y)), np.tanh(d / (spread or 1.0))], axis=1)
    prior = np.diag([0.0, SLOPE_PRECISION])

    def loss(at: Floats) -> tuple[float, Floats]:
        logits = x @ at
        value = w @ (np.logaddexp(0, logits) - y * logits) + at @ prior @ at / 2
        return float(value), x.T @ (w * (expit(logits) - y)) + prior @ at

    def curvature(at: Floats) -> Floats:
        p = expit(x @ at)
        return np.asarray((x.T * (w * p * (1 - p))) @ x + prior)

    found = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10}).x
    # The last digits, which a loss cannot show.
    found = found - np.linalg.solve(curvature(found), loss(found)[1])
    scores = np.zeros((clusters.max() + 1, 2))
    np.add.at(scores, clusters, x * (w * (y - expit(x @ found)))[:, None])
    inverse = np.linalg.inv(curvature(found))
    error = float(np.sqrt((inverse @ scores.T @ scores @ inverse)[0, 0]))
    z = NormalDist().inv_cdf(0.975)
    value, low, high = expit(found[0] + np.array([0.0, -z, z]) * error)
    return Interval(float(value), float(low), float(high))
