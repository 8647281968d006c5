"""Solve a linear probe: every choice by left-out scores, and the probe fitted on all rows.

The choice is among relative weights of the blocks, anchors and strengths of L2. No prompt is held out for good: each is scored
by fits that never saw it (in closed form where there is one, by folds elsewhere), the choice is made on these scores, and the
probe is fitted on all. Scores of prompts that took part in no choice about themselves come from `cross_fitted`, which does all
of this within each training part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from qprobe.probe.solvers.choice import Candidate, Chosen, best_beta, choose, near_best
from qprobe.probe.solvers.rows import Floats, Rows
from qprobe.probe.solvers.space import block_weightings
from qprobe.probe.solvers.work import CLOSED_FORM, SolvedLoss, Work, prompt_means, trained_rows

# Strengths of L2 that are compared, as shares of the largest variance along an axis; infinity is the end of the path.
STRENGTHS: tuple[float, ...] = (np.inf, *(float(s) for s in np.logspace(1.5, -4, 12)))
FOLDS = 5


@dataclass(frozen=True)
class Solution:
    """A solved probe, Q = sum over blocks of X_b theta_b, + weight x anchor + bias.

    Args:
        loss: what was minimised.
        coefficients: (D_b,) float64 of every block's plain columns.
        bias: float; losses within prompts leave it open, and it makes the mean score 0.
        anchor: name of the untrained score that L2 pulled towards; empty where that is nothing.
        anchor_weight: of its plain values.
        beta: temperature that earned most on left-out scores, >= 0.
        left_out: (N,) float64, what every row is scored by fits that did not see it; within prompts less their mean. Prompts
            without a difference teach losses within prompts nothing, so that their scores are the probe's own.
        choice: what was chosen and how sure that was; None where a single prompt has a difference and nothing can be left out.
        aucs: mean left-out AUC within prompts of every candidate, with the candidate.
    """

    loss: str
    coefficients: dict[str, Floats]
    bias: float
    anchor: str
    anchor_weight: float
    beta: float
    left_out: Floats
    choice: Chosen | None
    aucs: list[tuple[Candidate, float]]

    def score(
        self, blocks: Mapping[str, ArrayLike] | ArrayLike, anchors: Mapping[str, ArrayLike] | None = None
    ) -> Floats:
        """(N,) Q of rows.

        Args:
            blocks: the named blocks (N, D_b) that it was solved on; one array where that was one.
            anchors: values (N,) of its anchor, where it has one.

        Raises:
            ValueError: a block or the anchor is missing, or has another width.
        """
        named = blocks if isinstance(blocks, Mapping) else {next(iter(self.coefficients)): blocks}
        total: Floats | float = self.bias
        for name, own in self.coefficients.items():
            if not own.any():
                continue
            values = np.asarray(named.get(name, np.empty((0, 0))))
            if values.ndim == 1 and len(own) == 1:
                values = values[:, None]
            if values.ndim != 2 or values.shape[1] != len(own):
                raise ValueError(f"The block {name} has shape {values.shape}: this solution reads (N, {len(own)}).")
            total = total + values.astype(np.float64) @ own
        if self.anchor:
            if self.anchor not in (anchors or {}):
                raise ValueError(f"This solution is anchored at {self.anchor}: give its values.")
            total = total + self.anchor_weight * np.asarray((anchors or {})[self.anchor], dtype=np.float64)
        return np.broadcast_to(total, (len(np.asarray(next(iter(named.values())))),)).astype(np.float64)

    def sentence(self) -> str:
        """What was chosen and how sure that was."""
        if self.choice is None:
            return "Nothing was chosen: a single prompt (or cluster) has rewards that differ, and cannot be left out."
        return self.choice.sentence()


def solve(
    rows: Rows,
    loss: SolvedLoss | Sequence[SolvedLoss],
    *,
    weightings: Sequence[Mapping[str, float]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    anchor: str = "auto",
    folds: int = FOLDS,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    average: bool = False,
) -> Solution:
    """Choose loss, blocks, anchor and strength of L2 by left-out AUC within prompts, and fit on all rows.

    Args:
        rows: what to learn from.
        loss: "reward_mse" (L_Q), "centred_mse" (L_Q within prompts), "reward_cross_entropy" (L_CE), "policy_gradient" (L_PG at
            beta 1, a prompt's rows being one chunk), "pairwise_logistic" or "bradley_terry" (pairs that the rewards imply). Of
            several one is chosen.
        weightings: relative weights >= 0 of the blocks that are compared; None: `block_weightings`.
        strengths: of L2 that are compared, > 0, as shares of the largest variance; infinity is the difference of means,
            or the anchor itself.
        anchor: one of the rows' anchors, "none", or "auto", which compares all of them and none.
        folds: that losses without a closed form are left out by, >= 2; at most one a cluster. The others leave out every
            cluster by itself.
        seed: of folds and resamples.
        dtype: of the large products; None: float64, and float32 above `space.MOST_IN_FLOAT64`.
        average: take the mean of every kind of candidate (loss and weights of blocks, with the chosen one's anchor or none) that
            is within one standard error of the best, each at its best strength; a choice among equals is noise, their mean is
            not. An untrained score that is chosen stays as it is.

    Raises:
        NothingToLearn: no prompt has rewards that differ, or no column does.
        ValueError: rewards outside [0, 1] for the cross-entropy, an unknown name.
    """
    losses = [loss] if isinstance(loss, str) else list(loss)
    given = [dict(w) for w in (weightings or block_weightings(list(rows.blocks)))]
    if not losses or not given or not strengths or not all(s > 0 for s in strengths):
        raise ValueError("There is nothing to choose from: give losses, strengths above 0, and weightings.")
    works: dict[SolvedLoss, Work] = {}
    candidates: list[Candidate] = []
    left_out: list[Floats] = []
    for name in losses:
        kept = trained_rows(rows, name)
        low, spread = (0.0, 1.0) if name == "reward_cross_entropy" else (rows.rewards.min(), np.ptp(rows.rewards))
        fitted = rows if kept.all() else rows.take(kept)
        works[name] = Work.of(fitted, name, (fitted.rewards - low) / spread, anchor, folds, seed, dtype)
        found, scores = works[name].candidates(given, list(strengths), known=candidates)
        candidates += found
        left_out += scores
    choice: Chosen | None = None
    chosen_number, aucs = 0, np.full((len(candidates), 1), np.nan)
    if works[losses[0]].can_leave_out:
        aucs = np.stack(
            [works[cast(SolvedLoss, c.loss)].within.auc(own) for c, own in zip(candidates, left_out, strict=True)]
        )
        chosen_number, choice = choose(candidates, aucs, works[losses[0]].within, seed)
    chosen = candidates[chosen_number]
    numbers = [chosen_number]
    if average and choice is not None and not chosen.untrained:
        numbers = near_best(candidates, aucs, works[losses[0]].within, chosen)
    parts = [
        _solution(rows, works[cast(SolvedLoss, candidates[n].loss)], candidates[n], left_out[n] if left_out else None)
        for n in numbers
    ]
    solution = parts[0] if len(parts) == 1 else _mean(rows, parts, chosen)
    if choice is not None and len(parts) > 1:
        work = works[losses[0]]
        own = work.within.auc(solution.left_out[rows.order[trained_rows(rows, losses[0])[rows.order]]])
        choice = choice.averaged_to(len(parts), own, candidates, aucs, work.within)
    means = [(candidate, float(auc)) for candidate, auc in zip(candidates, aucs.mean(axis=1), strict=True)]
    return dataclasses.replace(solution, choice=choice, aucs=means)


def _mean(rows: Rows, parts: Sequence[Solution], chosen: Candidate) -> Solution:
    """The mean of solutions, each at the same deviation within prompts: that of the first."""
    own = rows.order[rows.mixed[rows.order]]
    deviations = []
    for part in parts:
        within = part.left_out - prompt_means(part.left_out, rows)
        deviations.append(float(np.sqrt(np.mean(np.square(within[own])))))
    shares = [deviations[0] / (deviation * len(parts)) if deviation else 0.0 for deviation in deviations]
    left_out = np.sum([share * part.left_out for share, part in zip(shares, parts, strict=True)], axis=0)
    coefficients = {
        name: np.sum([share * part.coefficients[name] for share, part in zip(shares, parts, strict=True)], axis=0)
        for name in rows.blocks
    }
    return Solution(
        chosen.loss,
        coefficients,
        sum(share * part.bias for share, part in zip(shares, parts, strict=True)),
        chosen.anchor,
        sum(share * part.anchor_weight for share, part in zip(shares, parts, strict=True)),
        best_beta(left_out[own], rows.rewards[own], rows.groups[own])[0],
        left_out,
        None,
        [],
    )


def _solution(rows: Rows, work: Work, chosen: Candidate, left_out: Floats | None) -> Solution:
    """The chosen candidate fitted on all rows, in the units of the rewards.

    Args:
        left_out: its left-out scores in the order of the design; None where nothing can be left out.
    """
    kept = trained_rows(rows, work.loss)
    coefficients, bias, anchor_weight = work.final(chosen)
    regression = work.loss in CLOSED_FORM
    low, spread = (rows.rewards.min(), np.ptp(rows.rewards)) if regression else (0.0, 1.0)
    beta = 0.0 if left_out is None else best_beta(left_out, work.rewards, work.design.groups)[0]
    solution = Solution(
        work.loss,
        {name: own * spread for name, own in coefficients.items()},
        float(bias * spread + low),
        chosen.anchor,
        float(anchor_weight * spread),
        beta * spread,
        np.empty(0),
        None,
        [],
    )
    scores = solution.score(rows.blocks, rows.anchors)
    if work.design.within:
        scores -= prompt_means(scores, rows)
    if left_out is not None:
        own = work.design.unordered(left_out) * spread
        scores[kept] = own + (low if work.loss == "reward_mse" else 0.0)
    return dataclasses.replace(solution, left_out=scores)


def cross_fitted(
    rows: Rows, loss: SolvedLoss | Sequence[SolvedLoss], folds: ArrayLike, **options: Any
) -> tuple[Floats, dict[int, Solution]]:
    """Scores of rows by probes that did not see them, nor made a choice on them.

    Args:
        rows: all rows.
        folds: (N,) int, the fold of each row, whole clusters; each is scored by the solution of the others.
        options: of `solve`.

    Returns: (N,) float64, and the solution of every fold. Scores of different folds have scales of their own: compare within
        prompts.
    """
    of_row = np.asarray(folds)
    if of_row.shape != (len(rows),):
        raise ValueError(f"folds has shape {of_row.shape}: give one number for each of the {len(rows)} rows.")
    if len(np.unique(np.stack([rows.clusters, of_row]), axis=1).T) != rows.clusters.max() + 1:
        raise ValueError("A cluster is in two folds: a fold holds whole clusters.")
    scores, solutions = np.empty(len(rows)), {}
    for fold in np.unique(of_row):
        out = of_row == fold
        solution = solve(rows.take(~out), loss, **options)
        solutions[int(fold)] = solution
        scores[out] = solution.score(
            {name: block[out] for name, block in rows.blocks.items()},
            {name: values[out] for name, values in rows.anchors.items()},
        )
    return scores, solutions
