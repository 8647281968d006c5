"""A solved probe in the place of a trained one: the same rows in, the same kind of network out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from qprobe.probe.blocks import AUTO_LOSSES
from qprobe.probe.calibration import Calibration, calibrate
from qprobe.probe.losses import AUTO
from qprobe.probe.metrics import reward_grid
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.solvers import CLOSED_FORM, STRENGTHS, Rows, Solution, solve
from qprobe.probe.solvers.choice import BETA_SHARES
from qprobe.probe.solvers.work import SolvedLoss
from qprobe.probe.training import Data

# Coordinates that a solver holds at once, 2 GiB of float32; larger tables are for stochastic steps, which read them in pieces.
MOST_COORDINATES = 2**29
DRAWS = 200

SOLVERS = ("auto", "closed_form", "lbfgs", "steps")


@dataclass(frozen=True)
class SolvedProbe:
    """A probe that was solved.

    Args:
        network: linear, on plain features.
        beta: that earned most on left-out scores.
        solution: what was chosen and how sure that was.
        calibration: how likely its choices are right, of "auto"; None where there is too little to say so.
    """

    network: ProbeNetwork
    beta: float
    solution: Solution
    calibration: Calibration | None


def solver_of(loss: str, solver: str) -> str:
    """Which solver a loss has: the one asked for, or its own for "auto".

    Raises:
        ValueError: there is no such solver, or the loss has another.
    """
    own = "closed_form" if loss in (*CLOSED_FORM, AUTO) else "lbfgs"
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver {solver!r}: choose one of {', '.join(SOLVERS)}.")
    if solver not in ("auto", "steps", own):
        raise ValueError(f"The loss {loss} is not solved by {solver}: use {own}, auto or steps.")
    return own if solver == "auto" else solver


def fits_memory(data: Data) -> bool:
    """Whether a solver may hold the rows in their own space."""
    rows, columns = data.features.shape
    return rows * min(rows, columns) <= MOST_COORDINATES


def solved(data: Data, loss: str, *, l2: float | None, k: int, seed: int) -> SolvedProbe:
    """Solve a loss on all rows, with L2 and beta chosen on left-out scores.

    Args:
        data: rows to learn from.
        loss: a name of `losses.LOSSES`.
        l2: as a share of the largest variance along an axis of the rows, > 0; None chooses it.
        k: candidates at use, for the choice of beta; capped at the smallest group.
        seed: of folds and draws.

    Raises:
        NothingToLearn: no prompt has rewards that differ, or no feature does.
    """
    features = (
        data.features.float() if data.features.dtype == torch.bfloat16 else data.features
    )  # numpy has no bfloat16
    groups = data.groups.numpy()
    rows = Rows(features.numpy(), data.rewards.numpy(), groups, clusters=data.prompt_of_group[data.groups].numpy())
    strengths = STRENGTHS if l2 is None else (l2,)
    several = AUTO_LOSSES if loss == AUTO else cast(SolvedLoss, loss)
    solution = solve(rows, several, strengths=strengths, seed=seed, average=loss == AUTO)
    network = ProbeNetwork(rows.blocks["features"].shape[1])
    with torch.no_grad():
        network.weights[0].copy_(torch.from_numpy(solution.coefficients["features"])[None])
        network.biases[0].fill_(solution.bias)
    beta = _best_beta(solution, rows, data.sizes.numpy(), k, seed)
    return SolvedProbe(network, beta, solution, calibrate(rows, solution.left_out) if loss == AUTO else None)


def _best_beta(solution: Solution, rows: Rows, sizes: NDArray[np.int64], k: int, seed: int) -> float:
    """The temperature that earns most on left-out scores at k candidates; the smallest of equals."""
    if solution.choice is None:
        return 0.0
    own = rows.mixed
    scores, groups = solution.left_out[own], rows.groups[own]
    means = (np.bincount(groups, scores) / np.maximum(np.bincount(groups), 1))[groups]
    deviation = float(np.sqrt(np.mean(np.square(scores - means))))
    betas = [share * deviation for share in BETA_SHARES]
    fewest = int(sizes[np.unique(groups)].min())
    rng = np.random.default_rng(seed)
    grid = reward_grid(scores, rows.rewards[own], groups, [min(k, fewest)], betas, draws=DRAWS, rng=rng)
    return betas[int(grid.values[0].mean(axis=1).argmax())]
