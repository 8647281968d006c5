"""Directions from wrong to right completions of the same prompt: the principal one (Code-LAT), and the mean.

Ribeiro and others (2026), "On LLMs' Internal Representation of Code Correctness", ICSE, arXiv 2512.07404: from the states at the
last token of a right and a wrong program for one task, the first principal component of their differences, and candidates are
ranked by their projection on it; linear artificial tomography of Zou and others (2023), "Representation Engineering", arXiv
2310.01405. The mean of such differences is the other usual direction: Marks and Tegmark (2023), "The Geometry of Truth", arXiv
2310.06824.

Not the paper's: its pairs are chosen, one a task, and a validation set says which layer is read. Here every pair of a prompt's
candidates whose rewards differ counts, every prompt for one altogether, and the layer is that of the table's probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qprobe.baselines.base import Fitted, Floats, Integers, Score
from qprobe.probe.ranking import least_difference, within_prompt_auc
from qprobe.probe.solvers import NothingToLearn


class PairedDifferences(Fitted):
    """Rank candidates by their projection on the mean difference of a better and a worse completion of a prompt."""

    name = "paired_differences"
    method = "mean paired difference"

    def identity(self) -> dict[str, Any]:
        return {"direction": self.name}

    def fit(self, states: Floats, rewards: Floats, groups: Integers) -> Score:
        pairs = list(pairs_of(rewards, groups))
        if not pairs:
            raise NothingToLearn(
                f"{self.method} was not run: no training prompt has completions whose rewards differ; it needs more prompts or "
                "more samples of each."
            )
        direction = self.direction(states, pairs)
        # Which way a principal component points says nothing: by the training pairs, most projections rise with reward.
        if np.nanmean(within_prompt_auc(states @ direction, rewards, groups)) < 0.5:
            direction = -direction
        return lambda tested, _: tested @ direction

    def direction(self, states: Floats, pairs: list[tuple[Integers, Floats]]) -> Floats:
        """(D,) any length, of (N, D) states and `pairs_of` them."""
        weights = np.zeros(len(states))
        for rows, better in pairs:
            weights[rows] = (better.sum(axis=1) - better.sum(axis=0)) / better.sum()
        return weights @ states


class CodeLAT(PairedDifferences):
    """Rank candidates by their projection on the principal direction of such differences.

    Not centred: the result does not depend on which of a pair is taken from the other, as in LAT, which shuffles them.
    """

    name = "code_lat"
    method = "Code-LAT"

    def direction(self, states: Floats, pairs: list[tuple[Integers, Floats]]) -> Floats:
        from scipy.sparse.linalg import LinearOperator, eigsh

        # The sum over a prompt's pairs of (h_i - h_j)(h_i - h_j)^T is H^T L H, L the Laplacian of the graph of its pairs.
        product = np.zeros_like(states)
        for rows, better in pairs:
            joined = (better + better.T) / better.sum()
            product[rows] = joined.sum(axis=1)[:, None] * states[rows] - joined @ states[rows]
        width = states.shape[1]
        if width < 3:  # Lanczos wants more
            return np.asarray(np.linalg.eigh(states.T @ product)[1][:, -1])
        moment = LinearOperator((width, width), matvec=lambda v: states.T @ (product @ v), dtype=np.float64)
        start = np.random.default_rng(0).normal(size=width)
        return np.asarray(eigsh(moment, k=1, which="LA", v0=start)[1][:, 0])


def pairs_of(rewards: Floats, groups: Integers) -> Iterator[tuple[Integers, Floats]]:
    """Of every prompt with any pairs: its n rows, and (n, n) 1 where the first earned more than the second, else 0."""
    least = least_difference(rewards)
    for rows in np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1):
        better = (rewards[rows][:, None] - rewards[rows][None, :] > least).astype(np.float64)
        if better.any():
            yield rows, better
