"""One loss on one table: the left-out scores of every candidate, and the fit of the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qprobe.probe.solvers.choice import Candidate, WithinPrompts
from qprobe.probe.solvers.ridge import Ridge, RidgeFit
from qprobe.probe.solvers.rows import Floats, NothingToLearn, Rows
from qprobe.probe.solvers.smooth import SmoothLoss, SmoothRows, path
from qprobe.probe.solvers.space import Design, OwnSpace

SolvedLoss = Literal[
    "reward_mse", "centred_mse", "reward_cross_entropy", "policy_gradient", "pairwise_logistic", "bradley_terry"
]
CLOSED_FORM = ("reward_mse", "centred_mse")
WITHIN_PROMPTS = ("centred_mse", "policy_gradient", "pairwise_logistic", "bradley_terry")


@dataclass
class Work:
    """One loss on one table, in the order of its design."""

    loss: SolvedLoss
    design: Design
    rewards: Floats
    anchors: dict[str, Floats]  # standardised within prompts, by row
    named: list[str]  # the anchors that are compared, "" for none
    scales: dict[str, tuple[float, float]]
    within: WithinPrompts
    folds: NDArray[np.int64]

    @classmethod
    def of(
        cls, rows: Rows, loss: SolvedLoss, rewards: Floats, anchor: str, folds: int, seed: int, dtype: DTypeLike | None
    ) -> Work:
        within = loss in WITHIN_PROMPTS
        sizes = np.bincount(rows.groups)
        row_weights = rows.weights / sizes[rows.groups] if within else rows.weights
        design = Design(rows, within=within, row_weights=row_weights, dtype=dtype)
        named, anchors, scales = standardised_anchors(rows, anchor)
        order = design.order
        fold_of_cluster = np.random.default_rng(seed).permutation(int(rows.clusters.max()) + 1) % max(2, folds)
        return cls(
            loss,
            design,
            rewards[order],
            {name: values[order] for name, values in anchors.items()},
            named,
            scales,
            WithinPrompts(rewards[order], design.groups, design.clusters),
            fold_of_cluster[design.clusters],
        )

    @property
    def can_leave_out(self) -> bool:
        return len(np.unique(self.within.clusters)) > 1

    def candidates(
        self, weightings: Sequence[dict[str, float]], strengths: Sequence[float], known: Sequence[Candidate] = ()
    ) -> tuple[list[Candidate], list[Floats]]:
        """All candidates, with the left-out scores (N,) of each in the order of the design; none of these if none can be.

        Args:
            known: candidates of other losses: the anchors themselves are the same at the end of every path.
        """
        candidates: list[Candidate] = []
        scores: list[Floats] = []
        if not self.can_leave_out:
            every = dict.fromkeys(self.design.rows.blocks, 1.0)
            return [
                Candidate(weightings[0] if len(weightings) == 1 else every, self.named[0], np.inf, 0.0, self.loss)
            ], []
        for weighting in weightings:
            space = self.design.space(weighting)
            if not space.largest:
                continue  # its columns differ nowhere
            for name, own in zip(self.named, self._left_out(space, strengths), strict=True):
                for strength, values in zip(strengths, own, strict=True):
                    end = bool(name) and np.isinf(strength)
                    if end and any(c.untrained and c.anchor == name for c in (*known, *candidates)):
                        continue
                    freedom = Ridge(space, np.zeros(0)).freedom(strength * space.largest) if not end else 0.0
                    candidates.append(Candidate({} if end else weighting, name, strength, freedom, self.loss))
                    scores.append(values)
            del space  # before the next is made
        if not candidates and not known:
            raise NothingToLearn(f"No column differs between {'rows of a prompt' if self.design.within else 'rows'}.")
        return candidates, scores

    def _left_out(self, space: OwnSpace, strengths: Sequence[float]) -> list[list[Floats]]:
        """Left-out scores (N,) by anchor and strength."""
        absolute = [strength * space.largest for strength in strengths]
        if self.loss in CLOSED_FORM:
            ridge = Ridge(space, self.design.column(self.design.unordered(self.rewards)))
            weighted = ridge.left_out(absolute, [self._free(name) for name in self.named])
            for a, name in enumerate(self.named):
                for s, strength in enumerate(strengths):
                    if not name and np.isinf(strength):
                        weighted[a, s] = ridge.ends(self._free(""))
            return [[self.design.plain(values) for values in own] for own in weighted]
        found = [[np.empty(len(self.rewards)) for _ in strengths] for _ in self.named]
        for a, name in enumerate(self.named):
            rows = self._smooth_rows(space, name)
            for fold in np.unique(self.folds):
                out = self.folds == fold
                fits = path(cast(SmoothLoss, self.loss), rows.take(~out), absolute, anchored=bool(name))
                own = rows.take(out)
                for s, fit in enumerate(fits):
                    found[a][s][out] = own.scores(fit)
        return found

    def _free(self, name: str) -> Floats:
        """(M, q) columns without L2 as the design has them: the intercept, the anchor."""
        columns = [] if self.design.within else [self.design.root]
        if name:
            columns.append(self.design.column(self.design.unordered(self.anchors[name])))
        return np.column_stack(columns) if columns else np.empty((self.design.size, 0))

    def _smooth_rows(self, space: OwnSpace, name: str) -> SmoothRows:
        columns = [] if self.design.within else [np.ones(len(self.rewards))]
        if name:
            columns.append(self.anchors[name])
        free = np.column_stack(columns) if columns else np.empty((len(self.rewards), 0))
        weights = self.design.rows.weights[self.design.order]
        z = self.design.plain(space.coordinates)
        return SmoothRows(z, free, self.rewards, self.design.groups, weights, space.variances)

    def final(self, chosen: Candidate) -> tuple[dict[str, Floats], float, float]:
        """Coefficients, bias and weight of the anchor, on plain columns, of the fit on all rows."""
        design = self.design
        weighting = chosen.weighting or dict.fromkeys(design.rows.blocks, 1.0)
        space = design.space(weighting)
        fit = self._fit(space, chosen)
        if chosen.untrained:
            fit = RidgeFit(np.zeros(len(space.variances)), fit.free)
        coefficients = space.columns(fit.direction)
        bias = -sum(float(design.scales[name].mean @ own) for name, own in coefficients.items())
        anchor_weight = 0.0
        if chosen.anchor:
            mean, deviation = self.scales[chosen.anchor]
            anchor_weight = float(fit.free[-1]) / deviation
            bias -= anchor_weight * mean
        if not design.within:
            bias += float(fit.free[0])
        return coefficients, bias, anchor_weight

    def _fit(self, space: OwnSpace, chosen: Candidate) -> RidgeFit:
        strength = chosen.strength * (space.largest or 1.0)
        if self.loss in CLOSED_FORM:
            target = self.design.column(self.design.unordered(self.rewards))
            return Ridge(space, target).fit(strength, self._free(chosen.anchor))
        rows = self._smooth_rows(space, chosen.anchor)
        return path(cast(SmoothLoss, self.loss), rows, [strength], anchored=bool(chosen.anchor))[0]


def trained_rows(rows: Rows, loss: SolvedLoss) -> NDArray[np.bool_]:
    """(N,) bool, the rows that a loss learns from; raises where there are none."""
    if loss not in (*CLOSED_FORM, *WITHIN_PROMPTS, "reward_cross_entropy"):
        raise ValueError(f"There is no solver for the loss {loss!r}.")
    if loss == "reward_cross_entropy" and (rows.rewards.min() < 0 or rows.rewards.max() > 1):
        raise ValueError("rewards lie outside [0, 1]: the cross-entropy reads them as probabilities; rescale them.")
    mixed = rows.mixed
    if not mixed.any():
        raise NothingToLearn(
            f"No prompt has rewards that differ ({int(rows.groups.max()) + 1} prompts): there is nothing to learn from; "
            "draw more completions of each, or other prompts."
        )
    return mixed if loss in WITHIN_PROMPTS else np.ones(len(rows), dtype=bool)


def standardised_anchors(
    rows: Rows, anchor: str
) -> tuple[list[str], dict[str, Floats], dict[str, tuple[float, float]]]:
    """(names that are compared, their values standardised within prompts, (mean, deviation) of each)."""
    if anchor not in ("auto", "none", *rows.anchors):
        raise ValueError(
            f"There is no anchor {anchor!r}: give auto, none or one of {', '.join(rows.anchors) or '(none)'}."
        )
    wanted = {"none": [], "auto": list(rows.anchors)}.get(anchor, [anchor])
    values, scales = {}, {}
    for name in wanted:
        own = rows.anchors[name]
        within = own - prompt_means(own, rows)
        deviation = float(np.sqrt(np.mean(np.square(within))))
        if deviation > ROUNDED * float(np.abs(own).max()):
            scales[name] = (float(own.mean()), deviation)
            values[name] = (own - own.mean()) / deviation
        elif anchor == name:
            raise ValueError(f"The anchor {name} is the same for all rows of a prompt: it says nothing there.")
    names = list(values)
    return (names if anchor == "none" or anchor in rows.anchors else ["", *names]) or [""], values, scales


# An anchor whose deviation within prompts is below this share of its largest value differs by rounding alone.
ROUNDED = 1e-9


def prompt_means(values: Floats, rows: Rows) -> Floats:
    sums = np.bincount(rows.groups, values * rows.weights)
    return np.asarray((sums / np.bincount(rows.groups, rows.weights))[rows.groups])
