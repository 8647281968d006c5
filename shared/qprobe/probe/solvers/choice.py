"""Choosing among left-out scores: AUC within prompts, the simplest within one standard error, then the temperature by reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qprobe.probe.solvers.rows import Floats, Integers
from qprobe.probe.solvers.smooth import ordered_pairs

# Temperatures that are compared, as shares of the deviation of scores within prompts; 0 is argmax.
BETA_SHARES = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
RESAMPLES = 1000
PAIRS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Candidate:
    """One way to fit.

    Args:
        weighting: relative weights of the blocks.
        anchor: the untrained score that L2 pulls towards; empty where that is nothing.
        strength: of L2, as a share of the largest variance; infinity is the end of the path.
        freedom: effective degrees of freedom, >= 0: what it takes to call one candidate simpler than another.
        loss: what is minimised.
    """

    weighting: dict[str, float]
    anchor: str
    strength: float
    freedom: float
    loss: str = ""

    @property
    def untrained(self) -> bool:
        """Whether it is the anchor itself."""
        return bool(self.anchor) and bool(np.isinf(self.strength))

    @property
    def simplicity(self) -> tuple[float, ...]:
        """Smaller is simpler: fewer degrees of freedom, then fewer blocks. The ends of all paths have none."""
        return (self.freedom, len(self.weighting) if self.freedom else 0)


@dataclass(frozen=True)
class Chosen:
    """A choice, and how sure it was.

    Args:
        candidate: what was chosen.
        auc: its left-out AUC within prompts, the mean over prompts with good and bad rows, in [0, 1].
        error: standard error of that, over clusters; NaN for a single one.
        best_auc: the highest AUC among the candidates, which is too good to believe for having been picked.
        within: how many of the candidates are within one standard error of the best.
        candidates: how many there were.
        chance: probability that the best of as many candidates does as well where nothing can be learnt, by turning the
            signs of whole clusters' deviations from 1/2.
        agreement: share of resamples of clusters in which the blocks and anchor of the chosen one, at their best strength,
            lie within one standard error of the best.
        against_anchor: mean and standard error of the AUC less that of the best untrained anchor; None without anchors.
        prompts: with good and bad rows.
        averaged: how many candidates the solution is the mean of; `auc` and `against_anchor` are of that mean.
    """

    candidate: Candidate
    auc: float
    error: float
    best_auc: float
    within: int
    candidates: int
    chance: float
    agreement: float
    against_anchor: tuple[float, float] | None
    prompts: int
    averaged: int = 1

    def averaged_to(
        self, count: int, own: Floats, candidates: Sequence[Candidate], aucs: Floats, within: WithinPrompts
    ) -> Chosen:
        """The same choice where the mean of `count` candidates is taken, whose left-out AUCs are `own` (P,)."""
        against = None
        if (top := _best_anchor(candidates, aucs)) is not None:
            against = (float(own.mean() - aucs[top].mean()), float(within.error(own - aucs[top])))
        auc, error = float(own.mean()), float(within.error(own))
        return dataclasses.replace(self, auc=auc, error=error, against_anchor=against, averaged=count)

    @property
    def learnt(self) -> bool:
        """Whether the left-out scores tell good from bad by more than chance, at the 5 % level."""
        return self.chance < 0.05

    def sentence(self) -> str:
        """What was chosen and how sure that was."""
        if not self.learnt:
            return (
                f"Nothing to learn was found: the best of {self.candidates} candidates orders {100 * self.best_auc:.0f} % of "
                f"the left-out pairs rightly on {self.prompts} prompts, which chance does {100 * self.chance:.0f} % of the time."
            )
        c = self.candidate
        blocks = " + ".join(name if w == 1 else f"{w:g} x {name}" for name, w in c.weighting.items())
        what = (
            c.anchor + " as it is, untrained"
            if c.untrained
            else blocks + (f", anchored at {c.anchor}" if c.anchor else "")
        )
        also = f", in the mean with {self.averaged - 1} candidates as good" if self.averaged > 1 else ""
        sentence = (
            f"Chosen by left-out scores: {what}{also}; AUC within prompts {self.auc:.3f} +- {self.error:.3f} on {self.prompts} "
            f"prompts; {self.within} of {self.candidates} candidates are within one standard error of the best; the same "
            f"blocks and anchor hold in {100 * self.agreement:.0f} % of resamples."
        )
        if self.against_anchor is not None and not c.untrained:
            mean, error = self.against_anchor
            verdict = "ahead of" if mean > 2 * error else "not surely ahead of"
            sentence += f" It is {verdict} the best untrained score ({mean:+.3f} +- {error:.3f})."
        return sentence


class WithinPrompts:
    """AUC within prompts of many scores on the same rows.

    Args:
        rewards: (N,) float.
        groups: (N,) int64, equal ids next to each other.
        clusters: (N,) int64.
    """

    def __init__(self, rewards: Floats, groups: Integers, clusters: Integers) -> None:
        self._better, self._worse = ordered_pairs(rewards, groups)
        self._mixed, prompt_of_pair = np.unique(groups[self._better], return_inverse=True)
        self._starts = np.flatnonzero(np.r_[True, np.diff(prompt_of_pair) != 0])
        self._sizes = np.bincount(prompt_of_pair)
        cluster_of = np.zeros(int(groups.max()) + 1, dtype=np.int64)
        cluster_of[groups] = clusters
        self.clusters = np.unique(cluster_of[self._mixed], return_inverse=True)[1]
        self.prompts = len(self._mixed)

    def auc(self, scores: Floats) -> Floats:
        """(P,) of the prompts with good and bad rows: the share of pairs with r_i > r_j in that order, ties half."""
        found = np.empty(len(self._better))
        # What rounding alone tells apart is a tie: a score that knows nothing within prompts must not rank by it.
        least = 1e-9 * float(np.abs(scores).max(initial=0))
        for first in range(0, len(found), PAIRS_AT_A_TIME):
            own = slice(first, first + PAIRS_AT_A_TIME)
            margin = scores[self._better[own]] - scores[self._worse[own]]
            found[own] = 0.5 + 0.5 * np.sign(np.where(np.abs(margin) > least, margin, 0.0))
        return np.asarray(np.add.reduceat(found, self._starts) / self._sizes)

    def by_cluster(self, values: Floats) -> Floats:
        """(..., C) sums of (..., P) over clusters."""
        count = int(self.clusters.max()) + 1
        flat = values.reshape(-1, values.shape[-1])
        sums = np.stack([np.bincount(self.clusters, row, minlength=count) for row in flat])
        return np.asarray(sums.reshape(*values.shape[:-1], count), dtype=np.float64)

    def error(self, values: Floats) -> Floats:
        """Standard errors of the means over prompts of (..., P), clusters being drawn."""
        sizes = np.bincount(self.clusters)
        if len(sizes) < 2:
            return np.full(values.shape[:-1], np.nan)
        deviations = self.by_cluster(values) - values.mean(-1, keepdims=True) * sizes
        spread = np.square(deviations).sum(-1) * len(sizes) / (len(sizes) - 1)
        return np.asarray(np.sqrt(spread) / values.shape[-1])


def choose(candidates: Sequence[Candidate], aucs: Floats, within: WithinPrompts, seed: int = 0) -> tuple[int, Chosen]:
    """The simplest candidate whose AUC is within one standard error (of the paired difference) of the best one's.

    Args:
        candidates: C of them.
        aucs: (C, P) float, of every prompt with good and bad rows.
        within: what made them.
        seed: of the resamples that say how sure the choice is.

    Returns: the number of the chosen one, and the choice.
    """
    means = aucs.mean(axis=1)
    best = int(means.argmax())
    short = means[best] - means
    errors = np.nan_to_num(within.error(aucs[best] - aucs))
    eligible = np.flatnonzero(short <= errors)
    number = min(eligible.tolist(), key=lambda c: (*candidates[c].simplicity, -means[c]))
    chosen = candidates[number]
    against = None
    if (top := _best_anchor(candidates, aucs)) is not None:
        against = (float(means[number] - means[top]), float(within.error(aucs[number] - aucs[top])))
    chance, agreement = _resampled(candidates, aucs, within, chosen, errors, seed)
    found = Chosen(
        chosen,
        float(means[number]),
        float(within.error(aucs[number])),
        float(means[best]),
        len(eligible),
        len(candidates),
        chance,
        agreement,
        against,
        within.prompts,
    )
    return number, found


def _best_anchor(candidates: Sequence[Candidate], aucs: Floats) -> int | None:
    """Number of the untrained candidate of the highest mean AUC; None where there is none."""
    anchors = [c for c, candidate in enumerate(candidates) if candidate.untrained]
    return max(anchors, key=lambda c: float(aucs[c].mean())) if anchors else None


def near_best(candidates: Sequence[Candidate], aucs: Floats, within: WithinPrompts, chosen: Candidate) -> list[int]:
    """Numbers of the trained candidates within one standard error of the best, one of each loss, weights and anchor: the best
    of its strengths. Their anchor is the chosen one's, or none. The first is of the chosen one's kind."""
    means = aucs.mean(axis=1)
    best = int(means.argmax())
    near = means[best] - means <= np.nan_to_num(within.error(aucs[best] - aucs))
    kinds: dict[tuple[object, ...], int] = {}
    for number in sorted(np.flatnonzero(near).tolist(), key=lambda c: -means[c]):
        candidate = candidates[number]
        if not candidate.untrained and candidate.anchor in ("", chosen.anchor):
            kinds.setdefault((candidate.loss, *candidate.weighting.items(), candidate.anchor), number)
    of_chosen = kinds[(chosen.loss, *chosen.weighting.items(), chosen.anchor)]
    return [of_chosen, *sorted(number for number in kinds.values() if number != of_chosen)]


def _resampled(
    candidates: Sequence[Candidate], aucs: Floats, within: WithinPrompts, chosen: Candidate, errors: Floats, seed: int
) -> tuple[float, float]:
    """(chance, agreement) of `Chosen`."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(within.clusters).astype(np.float64)
    sums = within.by_cluster(aucs - 0.5)
    observed = sums.sum(axis=1).max()
    signs = rng.choice([-1.0, 1.0], size=(len(sizes), RESAMPLES))
    chance = (1 + int(((sums @ signs).max(axis=0) >= observed - 1e-12).sum())) / (1 + RESAMPLES)
    drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES).T.astype(np.float64)
    means = (sums @ drawn) / (sizes @ drawn)
    alike = [c for c, other in enumerate(candidates) if _same_kind(other, chosen)]
    tolerance = float(np.median(errors[errors > 0])) if (errors > 0).any() else 0.0
    agreement = float((means[alike].max(axis=0) >= means.max(axis=0) - tolerance).mean())
    return chance, agreement


def _same_kind(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates read the same blocks and anchor, at any strength between its ends."""
    same = (one.weighting, one.anchor, one.untrained) == (other.weighting, other.anchor, other.untrained)
    return same if not (one.untrained and other.untrained) else one.anchor == other.anchor


def best_beta(scores: Floats, rewards: Floats, groups: Integers) -> tuple[float, Floats]:
    """The temperature whose policy earns most on left-out scores, all rows of a prompt being its candidates.

    Args:
        scores: (N,) float.
        rewards: (N,) float.
        groups: (N,) int64, equal ids next to each other.

    Returns: beta >= 0, the smallest of equals, and (B,) the mean reward over prompts at each of `BETA_SHARES`.
    """
    starts = np.flatnonzero(np.r_[True, np.diff(groups) != 0])
    sizes = np.diff(np.r_[starts, len(groups)])
    of_row = np.repeat(np.arange(len(starts)), sizes)
    mean = (np.add.reduceat(scores, starts) / sizes)[of_row]
    deviation = float(np.sqrt(np.mean(np.square(scores - mean))))
    top = np.maximum.reduceat(scores, starts)[of_row]
    earned = []
    for share in BETA_SHARES:
        odds = _odds(scores - top, share * deviation)
        law = odds / np.add.reduceat(odds, starts)[of_row]
        earned.append(float(np.add.reduceat(law * rewards, starts).mean()))
    best = int(np.argmax(np.array(earned) >= max(earned) - 1e-12))
    return BETA_SHARES[best] * deviation, np.array(earned)


def _odds(below: Floats, beta: float) -> NDArray[np.float64]:
    if beta == 0:
        return np.asarray(below == 0, dtype=np.float64)
    return np.asarray(np.exp(below / beta))
