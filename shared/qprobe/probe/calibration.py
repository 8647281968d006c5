"""How likely the chosen answer is right: what a score that only orders the candidates of a prompt does not say.

A second linear score, the level, is fitted to the rewards themselves across prompts (ridge, L2 by left-out squared error). From
the level of the chosen candidate and the mean level of all candidates of its prompt a logistic regression makes a probability,
fitted on choices by left-out scores: no prompt says how sure its own choice is (Platt 1999, with two inputs instead of one).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qprobe.files import write_whole

if TYPE_CHECKING:
    from qprobe.probe.solvers import Rows

Floats = NDArray[np.float64]
CALIBRATION_FILE = "calibration.safetensors"
# Choices that were right, and wrong, below which three coefficients are not to be had: ten for each is the rule of thumb of
# logistic regression (Peduzzi et al. 1996), of the rarer kind.
FEWEST_OF_A_KIND = 10


@dataclass(frozen=True)
class Calibration:
    """Probability that a candidate is right, if it is the one that is chosen.

    Args:
        weights, bias: (D,) float64 and a number, of the level.
        intercept, own, others: of the logistic regression: its constant, and what it multiplies the level of the candidate and
            the mean level of all candidates of the prompt by.
    """

    weights: Floats
    bias: float
    intercept: float
    own: float
    others: float

    def probabilities(self, features: ArrayLike, groups: ArrayLike | None = None) -> Floats:
        """Of candidates.

        Args:
            features: (N, D) float, all candidates of the prompts.
            groups: (N,) int, the prompt of each; None: they are one prompt's.

        Returns: (N,) float64 in [0, 1].

        Raises:
            ValueError: features of another width.
        """
        rows = np.asarray(features)
        if rows.ndim != 2 or rows.shape[1] != len(self.weights):
            raise ValueError(f"features has shape {rows.shape}: this calibration reads (N, {len(self.weights)}).")
        level = rows @ self.weights + self.bias
        means = _means(level, np.zeros(len(level), dtype=np.int64) if groups is None else np.asarray(groups))
        return _sigmoid(self.intercept + self.own * level + self.others * means)

    def packed(self) -> Floats:
        """(D + 4,) float64: all of it in one array, for a file."""
        return np.concatenate([self.weights, [self.bias, self.intercept, self.own, self.others]])

    @classmethod
    def of_packed(cls, values: ArrayLike) -> Calibration:
        array = np.asarray(values, dtype=np.float64)
        return cls(array[:-4], *array[-4:].tolist())


def calibrate(rows: Rows, scores: ArrayLike) -> Calibration | None:
    """Fit it.

    Args:
        rows: blocks of columns that the level reads; rewards in [0, 1], of which fractions count as that share of a right one.
        scores: (N,) float that the choices are made by, each row's by a probe that did not learn from its prompt.

    Returns: None where there is too little to fit it on: fewer than `FEWEST_OF_A_KIND` choices right or wrong, rewards outside
        [0, 1], a single cluster, or columns that differ nowhere.
    """
    from qprobe.probe.solvers import STRENGTHS, NothingToLearn, Rows  # scipy, which `import qprobe` does without
    from qprobe.probe.solvers.solve import FOLDS
    from qprobe.probe.solvers.work import Work

    if rows.rewards.min() < 0 or rows.rewards.max() > 1 or len(np.unique(rows.clusters)) < 2:
        return None
    order = np.lexsort((-np.asarray(scores, dtype=np.float64), rows.groups))
    chosen = order[np.r_[True, np.diff(rows.groups[order]) != 0]]
    earned = rows.rewards[chosen]
    if min(earned.sum(), (1 - earned).sum()) < FEWEST_OF_A_KIND:
        return None
    plain = Rows(rows.blocks, rows.rewards, rows.groups, clusters=rows.clusters)
    work = Work.of(plain, "reward_mse", plain.rewards, "none", FOLDS, 0, None)
    try:
        candidates, left_out = work.candidates([dict.fromkeys(plain.blocks, 1.0)], list(STRENGTHS))
    except NothingToLearn:
        return None
    best = min(range(len(candidates)), key=lambda n: float(np.square(left_out[n] - work.rewards).sum()))
    level = work.design.unordered(left_out[best])
    coefficients, bias, _ = work.final(candidates[best])
    inputs = np.stack([level[chosen], _means(level, rows.groups)[chosen]], axis=1)
    intercept, own, others = _logistic(inputs, earned)
    return Calibration(np.concatenate([coefficients[name] for name in rows.blocks]), bias, intercept, own, others)


def save_calibration(calibration: Calibration | None, folder: Path) -> None:
    """Write it to a probe's folder, whole or not at all; None removes that of a probe that was there before."""
    if calibration is None:
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    else:
        write_whole(folder / CALIBRATION_FILE, save({"calibration": calibration.packed()}))


def load_calibration(folder: Path, dimension: int) -> Calibration | None:
    """That of a probe's folder; None where it has none.

    Args:
        dimension: features that the probe reads.

    Raises:
        ValueError: the file is damaged, or another probe's.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        found = Calibration.of_packed(load(path.read_bytes())["calibration"])
        if len(found.weights) != dimension:
            raise ValueError(f"it reads {len(found.weights)} features, the probe {dimension}")
        return found
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no calibration of a probe ({error}): save the probe anew.") from error


def _sigmoid(margin: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -margin)))


def _means(values: Floats, groups: np.ndarray) -> Floats:
    """(N,) the mean of each row's prompt."""
    _, dense = np.unique(groups, return_inverse=True)
    return np.asarray((np.bincount(dense, values) / np.bincount(dense))[dense])


def _logistic(inputs: Floats, rewards: Floats) -> list[float]:
    """Constant and coefficients >= 0 (1 + C,) of a logistic regression with a standard normal prior on standardised inputs.

    A level that knows nothing is, left out, the mean of all other prompts, which falls where the own prompt's is high: only
    coefficients above 0 are knowledge.
    """
    from scipy.optimize import minimize

    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    deviation[deviation == 0] = np.inf  # the same for all: it says nothing
    z = np.c_[np.ones(len(inputs)), (inputs - mean) / deviation]
    free = np.r_[0.0, np.ones(inputs.shape[1])]

    def loss(w: Floats) -> tuple[float, Floats]:
        margin = z @ w
        value = float((np.logaddexp(0, margin) - rewards * margin).sum() + free @ np.square(w) / 2)
        return value, z.T @ (_sigmoid(margin) - rewards) + free * w

    bounds = [(None, None), *[(0.0, None)] * inputs.shape[1]]
    found = minimize(loss, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    slopes = found[1:] / deviation
    return [float(found[0] - slopes @ mean), *map(float, slopes)]
