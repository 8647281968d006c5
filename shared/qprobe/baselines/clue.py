"""CLUE: the best candidate is the one whose hidden state is nearest to the centroid of successes.

Liang, Li, Zhou, Song, Yu, Du, Mi and Yu (2025), "CLUE: Non-parametric Verification from Experience via Hidden-State Clustering",
arXiv 2510.01591. No parameter is trained by a gradient.

The paper's: the centroid is the mean over training successes (equation 2); a candidate's distance to it is Euclidean, the mean
over layers (3); of a prompt's candidates the nearest one is taken (4). Its centroid of failures says whether a candidate is right
by itself, and has no part in that choice.

Not the paper's:
- It reads, in all layers, how a state changed from the beginning of the reasoning (`<think>`) to its end, so as to take out what
  the prompt put there. A run holds states at the end of a completion alone. Those of a prompt's candidates share their beginning,
  but a distance to a centroid of other prompts depends on it; so the mean over the prompt's candidates, which they share as well,
  stands in its place, and a candidate's score depends on what else was drawn.
- It reads the layers that were embedded: of a recorded run perhaps one.
- Its successes are right answers. Rewards here are any numbers, and a success earned `success` or more.
- It draws as many failures as successes, 10,000 each, and votes among the nearest; here every training completion counts, and
  the nearest is taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qprobe.baselines.base import Fitted, Floats, Integers, Score
from qprobe.probe.solvers import NothingToLearn


class CLUE(Fitted):
    """Rank candidates by how near their states are to the centroid of training successes, the mean of each prompt taken out.

    Args:
        success: least reward of a success.
    """

    name = "clue"
    method = "CLUE"
    every_layer = True
    of_all = True

    def __init__(self, success: float = 1.0) -> None:
        self.success = success

    def identity(self) -> dict[str, Any]:
        return {"clue": "prompt means", "success": self.success}

    def fit(self, states: Floats, rewards: Floats, groups: Integers) -> Score:
        successes = rewards >= self.success
        if not successes.any():
            raise NothingToLearn(
                f"CLUE was not run: of its training completions none earned {self.success:g}, the highest {rewards.max():g}; "
                "set baselines.clue.success, the least reward of a success."
            )
        centroid = within(states, groups)[successes].mean(axis=0)
        return lambda tested, prompts: -np.linalg.norm(within(tested, prompts) - centroid, axis=1)


def within(states: Floats, groups: Integers) -> Floats:
    """(N, D) states less the mean of their prompt; (N,) groups, rows of a prompt together."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    counts = np.diff(np.r_[starts, len(groups)])
    means: Floats = np.add.reduceat(states, starts, axis=0) / counts[:, None]
    return states - np.repeat(means, counts, axis=0)
