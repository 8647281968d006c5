"""Named blocks of features and untrained scores: the best that left-out scores can choose, and an honest report of it.

    rows = Rows({"layer 18": states, "likelihood": columns}, rewards, prompts, anchors={"mean log-probability": logprobs})
    solution = auto(rows)                # loss, blocks, anchor and L2 chosen, then fitted on all rows
    found = cross_validated(rows)        # all of that within the training part of every fold, reported on the other part
    print(found.table()); print(found.verdict())
    found = transferred(rows, others)         # the same, trained on one table and reported on another

Untrained scores are rivals and candidates: the end of an anchored path is the score itself, so that "use it as it is" can be
what is chosen. The control of a report is the untrained score that was best on the training prompts, never on the reported ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qprobe.probe.intervals import Interval, paired_difference
from qprobe.probe.metrics import best_of_k
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.solvers import Rows, Solution, solve
from qprobe.probe.solvers.work import SolvedLoss

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Losses that `auto` compares: both solved in closed form; within prompts first, which is what a choice among candidates needs.
AUTO_LOSSES: tuple[SolvedLoss, ...] = ("centred_mse", "reward_mse")
# Untrained scores that L2 is pulled towards: more of them would be chosen among by noise.
ANCHORS = 2
FOLDS = 5


@dataclass(frozen=True)
class Assessed:
    """What one way to score candidates earned, by prompt.

    Args:
        name: of the score.
        aucs: (M,) AUC within prompts, of the M prompts with good and bad rows.
        rewards: (P,) reward of the highest score's row among all rows of the prompt, ties shared.
    """

    name: str
    aucs: Floats
    rewards: Floats


@dataclass(frozen=True)
class Report:
    """A probe on prompts that it did not see, beside every untrained score.

    Args:
        probe: the probe.
        control: the untrained score that was best on the training prompts (of each fold); None where there are none.
        untrained: all of them.
        one: (P,) mean reward of the prompt's rows: what one candidate earns.
        best: (P,) their highest reward.
        clusters: (P,) what a resample takes together.
        mixed: (P,) bool, prompts with good and bad rows.
        solutions: of every fold.
        controls: name of the control of every fold.
        seed: of the bootstrap.
    """

    probe: Assessed
    control: Assessed | None
    untrained: list[Assessed]
    one: Floats
    best: Floats
    clusters: Integers
    mixed: NDArray[np.bool_]
    solutions: list[Solution]
    controls: list[str]
    seed: int

    def auc(self, score: Assessed, than: Assessed | None = None) -> Interval:
        """AUC within prompts, or how much more than another score's, with its 95 % interval."""
        other = np.zeros_like(score.aucs) if than is None else than.aucs
        return paired_difference(score.aucs, other, self.clusters[self.mixed], rng=np.random.default_rng(self.seed))

    def gain(self, score: Assessed, than: Assessed | None = None, mixed: bool = False) -> Interval:
        """Reward of the chosen row over one row's, or over another score's choice, with its 95 % interval.

        Args:
            mixed: over prompts with good and bad rows alone.
        """
        other = self.one if than is None else than.rewards
        own = self.mixed if mixed else np.ones_like(self.mixed)
        rng = np.random.default_rng(self.seed)
        return paired_difference(score.rewards[own], other[own], self.clusters[own], rng=rng)

    def table(self) -> str:
        """Rows of text: every score with its AUC and gains, and the probe's distance to it."""
        lines = [
            f"{len(self.one)} prompts, {int(self.mixed.sum())} with good and bad candidates; one candidate "
            f"{self.one.mean():.3f}, the best of all {self.best.mean():.3f}",
            f"{'score':34s} {'AUC':22s} {'gain, all prompts':26s} {'gain, mixed prompts':26s} "
            "probe's AUC and gain over it (mixed)",
        ]
        for score in (self.probe, *([self.control] if self.control else []), *self.untrained):
            cells = [_text(self.auc(score), 22), _text(self.gain(score), 26), _text(self.gain(score, mixed=True), 26)]
            if score is not self.probe:
                cells.append(
                    _text(self.auc(self.probe, score), 26) + _text(self.gain(self.probe, score, mixed=True), 26)
                )
            lines.append(f"{score.name:34s} " + " ".join(cells))
        return "\n".join(line.rstrip() for line in lines)

    @property
    def learnt(self) -> bool:
        """Whether the probe orders unseen prompts' rows better than chance, by the interval of its AUC."""
        return self.auc(self.probe).low > 0.5

    def verdict(self) -> str:
        """What one would use, by these prompts."""
        auc = self.auc(self.probe)
        if not self.learnt:
            return (
                f"Nothing was learnt that holds on other prompts: AUC within prompts {_text(auc)} on {int(self.mixed.sum())} "
                "prompts, where chance has .5. More prompts with good and bad candidates, or other features, are needed."
            )
        gain = self.gain(self.probe)
        said = f"The probe earns {_text(gain)} over one candidate, AUC within prompts {_text(auc)}."
        if self.control is None:
            return said
        by_auc, by_gain = self.auc(self.probe, self.control), self.gain(self.probe, self.control)
        beside = f"{self.control.name}: AUC {_text(by_auc)}, reward {_text(by_gain)}"
        if by_gain.low > 0:
            return f"{said} It beats the best untrained score, {beside}."
        if by_auc.low > 0:
            return (
                f"{said} It orders better than the best untrained score and earns as much within the noise, {beside}."
            )
        if by_gain.high < 0 or by_auc.high < 0:
            return f"{said} The best untrained score is better: use it as it is, {beside}."
        return f"{said} That is a tie with the best untrained score: use that one, which needs no training, {beside}."


def untrained_aucs(rows: Rows) -> dict[str, float]:
    """Mean AUC within prompts of every untrained score of a table, the best first.

    Raises:
        ValueError: no prompt has good and bad rows.
    """
    found = {name: float(np.nanmean(_aucs(values, rows))) for name, values in rows.anchors.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def auto(
    rows: Rows,
    losses: Sequence[SolvedLoss] = AUTO_LOSSES,
    *,
    weightings: Sequence[Mapping[str, float]] | None = None,
    anchors: int = ANCHORS,
    average: bool = True,
    seed: int = 0,
) -> Solution:
    """Choose loss, relative weights of the blocks, anchor and L2 by left-out AUC within prompts, and fit on all rows.

    The simplest candidate within one standard error of the best is taken, and an untrained score is the simplest there is;
    where a trained one is, the mean of it with those of other losses and weights that are as good (`solve`, `average`).

    Args:
        rows: blocks, rewards and untrained scores (`anchors`, higher is better).
        losses: that are compared.
        weightings: of the blocks; None: `qprobe.probe.solvers.block_weightings`.
        anchors: how many of the untrained scores are candidates, those of the highest AUC on these rows.
        average: whether that mean is taken.
        seed: of folds and resamples.

    Raises:
        NothingToLearn: no prompt has rewards that differ, or no column does.
    """
    best = list(untrained_aucs(rows))[:anchors] if rows.mixed.any() else []
    kept = Rows(
        rows.blocks,
        rows.rewards,
        rows.groups,
        clusters=rows.clusters,
        weights=rows.weights,
        anchors={name: rows.anchors[name] for name in best},
    )
    return solve(kept, losses, weightings=weightings, average=average, seed=seed)


def cross_validated(
    rows: Rows,
    losses: Sequence[SolvedLoss] = AUTO_LOSSES,
    *,
    weightings: Sequence[Mapping[str, float]] | None = None,
    anchors: int = ANCHORS,
    average: bool = True,
    folds: int = FOLDS,
    repeats: int = 1,
    seed: int = 0,
) -> Report:
    """`auto` within the training part of every fold, reported on the other part: no prompt took part in a choice about itself.

    Args:
        rows, losses, weightings, anchors, average: as of `auto`.
        folds: parts of the clusters, >= 2.
        repeats: other divisions into folds; what a prompt earned is the mean over them.
        seed: of folds, resamples and bootstrap.
    """
    solutions, controls, probes, of_control = [], [], [], []
    for repeat in range(repeats):
        order = np.random.default_rng(seed + repeat).permutation(int(rows.clusters.max()) + 1)
        fold = (order % folds)[rows.clusters]
        scores, untrained = np.empty(len(rows)), np.empty(len(rows))
        for number in range(folds):
            out = fold == number
            training, other = rows.take(~out), rows.take(out)
            solution = auto(training, losses, weightings=weightings, anchors=anchors, average=average, seed=seed)
            solutions.append(solution)
            scores[out] = solution.score(other.blocks, other.anchors)
            if rows.anchors:
                controls.append(next(iter(untrained_aucs(training))))
                untrained[out] = other.anchors[controls[-1]]
        probes.append(_assessed("probe", scores, rows))
        of_control.append(_assessed("best untrained on training", untrained, rows) if rows.anchors else None)
    known = [control for control in of_control if control is not None]
    return _report(rows, _mean(probes), _mean(known) if known else None, solutions, controls, seed)


def transferred(
    rows: Rows,
    others: Rows,
    losses: Sequence[SolvedLoss] = AUTO_LOSSES,
    *,
    weightings: Sequence[Mapping[str, float]] | None = None,
    anchors: int = ANCHORS,
    average: bool = True,
    seed: int = 0,
) -> Report:
    """`auto` on one table, reported on another with the same blocks and untrained scores; the other table chooses nothing."""
    solution = auto(rows, losses, weightings=weightings, anchors=anchors, average=average, seed=seed)
    probe = _assessed("probe", solution.score(others.blocks, others.anchors), others)
    controls = [next(iter(untrained_aucs(rows)))] if rows.anchors else []
    control = _assessed("best untrained on training", others.anchors[controls[0]], others) if controls else None
    return _report(others, probe, control, [solution], controls, seed)


def _report(
    rows: Rows, probe: Assessed, control: Assessed | None, solutions: list[Solution], controls: list[str], seed: int
) -> Report:
    of_prompt = np.unique(rows.groups, return_index=True)[1]
    prompts = len(of_prompt)
    sizes = np.bincount(rows.groups)
    highest = np.full(prompts, -np.inf)
    np.maximum.at(highest, rows.groups, rows.rewards)
    return Report(
        probe,
        control,
        [_assessed(name, values, rows) for name, values in rows.anchors.items()],
        np.bincount(rows.groups, rows.rewards) / sizes,
        highest,
        rows.clusters[of_prompt],
        ~np.isnan(_aucs(rows.rewards, rows)),
        solutions,
        controls,
        seed,
    )


def _assessed(name: str, scores: Floats, rows: Rows) -> Assessed:
    order = np.argsort(rows.groups, kind="stable")
    of_prompt = np.split(order, np.flatnonzero(np.diff(rows.groups[order])) + 1)
    chosen = [float(best_of_k(scores[own], rows.rewards[own], [len(own)])[0]) for own in of_prompt]
    aucs = _aucs(scores, rows)
    return Assessed(name, aucs[~np.isnan(aucs)], np.array(chosen))


def _aucs(scores: Floats, rows: Rows) -> Floats:
    """(P,) AUC within each prompt; NaN where its rewards do not differ."""
    return within_prompt_auc(scores, rows.rewards, rows.groups)


def _mean(parts: Sequence[Assessed]) -> Assessed:
    aucs = np.mean([part.aucs for part in parts], axis=0)
    return Assessed(parts[0].name, aucs, np.mean([part.rewards for part in parts], axis=0))


def _text(interval: Interval, width: int = 0) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]".ljust(width)
