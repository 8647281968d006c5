"""CLUE: the best candidate is the one whose hidden state is nearer to the centroid of successes than to that of failures.

Liang, Li, Zhou, Song, Yu, Du, Mi and Yu (2025), "CLUE: Non-parametric Verification from Experience via Hidden-State Clustering",
arXiv 2510.01591. No parameter is trained by a gradient.

The paper's: centroids are the means over training successes and failures (equation 2), distances are Euclidean, the mean over
layers (3), and what is nearer to successes is taken for right.

Not the paper's:
- It reads, in all layers, how a state changed from the beginning of the reasoning (`<think>`) to its end, so as to take out what
  the prompt put there. A run holds states at the end of a completion alone. Those of a prompt's candidates share their beginning,
  but a distance to a centroid of other prompts depends on it; so the mean over the prompt's candidates, which they share as well,
  stands in its place, and a candidate's score depends on what else was drawn.
- Of a prompt's candidates it takes the one nearest to successes (4). Without the means of prompts that is hardly more than the
  one nearest to its own prompt's mean (the same one in 97 % of HumanEval's problems; trained on MBPP, Qwen2.5-Coder-1.5B, layer
  18). So the score uses both centroids: the distance to failures less the distance to successes.
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
    """Rank candidates by how much nearer their states are to the centroid of training successes than to that of failures.

    The mean of each prompt is taken out of its states.

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
        return {"clue": "difference of distances", "success": self.success}

    def fit(self, states: Floats, rewards: Floats, groups: Integers) -> Score:
        successes = rewards >= self.success
        if not 0 < successes.sum() < len(rewards):
            raise NothingToLearn(
                f"CLUE was not run: it needs successes and failures, and {successes.sum()} of {len(rewards)} training "
                f"completions earned {self.success:g} or more (from {rewards.min():g} to {rewards.max():g}); set "
                "baselines.clue.success."
            )
        own = within(states, groups)
        right, wrong = own[successes].mean(axis=0), own[~successes].mean(axis=0)

        def score(tested: Floats, prompts: Integers) -> Floats:
            found = within(tested, prompts)
            return np.asarray(np.linalg.norm(found - wrong, axis=1) - np.linalg.norm(found - right, axis=1))

        return score


def within(states: Floats, groups: Integers) -> Floats:
    """(N, D) states less the mean of their prompt; (N,) groups, rows of a prompt together."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    counts = np.diff(np.r_[starts, len(groups)])
    means: Floats = np.add.reduceat(states, starts, axis=0) / counts[:, None]
    return states - np.repeat(means, counts, axis=0)
