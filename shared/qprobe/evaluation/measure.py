"""From scores on unseen prompts to results: what probes and controls earn, and what may be believed of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qprobe.evaluation import comparisons
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.probe import selection
from qprobe.probe.losses import find_loss
from qprobe.probe.metrics import (
    Distinct,
    Interval,
    best_of_k,
    bootstrap_mean,
    mixed_prompts,
    paired_difference,
    partition_reward,
    reward_grid,
    within_prompt_auc,
)
from qprobe.probe.training import BETAS
from qprobe.report.results import (
    Band,
    Curve,
    LayerCurve,
    LearningCurve,
    PromptScore,
    PromptScores,
    Results,
    Row,
    TradeOff,
    TradeOffPoint,
)
from qprobe.run.joined import Joined

# Temperatures of the curve of reward against KL, besides those that training may choose.
CURVE_BETAS = (*BETAS, 2.0, 5.0)
# Random subsets a sample for the KL curve where they are too many to take them all.
KL_DRAWS = 100
# Prompts with good and bad completions below which a probe is hardly trained and hardly measured.
FEW_MIXED = 20


@dataclass(frozen=True)
class Authors:
    """Probes of the paper's procedure: rows beside ours.

    Args:
        scored: loss -> scores.
        settings: how they are measured.
    """

    scored: dict[str, Scored]
    settings: EvaluationSettings


def evaluate(
    title: str,
    protocol: str,
    pool: str,
    joined: Joined,
    greedy: np.ndarray | None,
    scored: dict[float, dict[str, Scored]],
    settings: EvaluationSettings,
    *,
    k: int,
    seed: int,
    plain: dict[str, Scored] | None = None,
    rivals: Mapping[str, np.ndarray | None] | None = None,
    controls: Mapping[str, np.ndarray | None] | None = None,
    by_layer: Mapping[int, dict[str, Scored]] | None = None,
    authors: Authors | None = None,
    apart: Mapping[str, frozenset[str]] | None = None,
    paper: dict[str, float] | None = None,
    made_from: str = "",
) -> Results:
    """Everything that the tables and figures say of one pool.

    Args:
        greedy: (P,) rewards of greedy decoding, prompts as in `joined`; None where it was not run.
        scored: share of the training prompts -> loss -> scores; the table is about the share 1.
        k: candidates at use.
        plain: loss -> scores by probes of all training prompts that learned as those of smaller shares had to
            (`SweepProbe.plain`), for the learning curve; None: those of the table did.
        rivals: method -> (P,) rewards of another policy's one completion a prompt, a row of the table each; None: not run.
        controls: method -> (S, N) scores that no probe made, a row of the table each; None: not run.
        by_layer: layer -> loss -> scores, where probes could choose among layers.
        authors: probes of the paper's procedure, beside ours.
        apart: see `Pipeline.apart`: task ids without which every row is reported once more.
        paper: published values by method, only where the set-up is the paper's.
        made_from: identity of the inputs, kept with the results.
    """
    evaluation = _Evaluation(joined, greedy, settings, k, seed, paper or {})
    return evaluation.results(
        title,
        protocol,
        pool,
        scored,
        plain,
        rivals or {},
        controls or {},
        by_layer or {},
        authors,
        apart or {},
        made_from,
    )


class _Evaluation:
    def __init__(
        self,
        joined: Joined,
        greedy: np.ndarray | None,
        settings: EvaluationSettings,
        k: int,
        seed: int,
        paper: dict[str, float],
    ) -> None:
        self.joined = joined
        self.greedy = greedy
        self.settings = settings
        self.k = k
        self.seed = seed
        self.paper = paper
        self.by_prompt = np.split(np.arange(len(joined.groups)), np.flatnonzero(np.diff(joined.groups)) + 1)
        self.smallest = min(len(rows) for rows in self.by_prompt)
        if k > self.smallest:
            raise ValueError(
                f"k is {k}, but a prompt of this pool has {self.smallest} samples: lower evaluation.k or sample more."
            )
        self.distinct = Distinct.of(joined.completions, joined.groups)
        self.rewards = self.distinct.mean(joined.rewards)  # (M,) of the distinct completions
        self.mixed = mixed_prompts(self.rewards, self.distinct.groups)
        self.earned_by: dict[str, np.ndarray] = {}  # method -> (P,) of every row
        self.base = np.array([joined.rewards[rows].mean() for rows in self.by_prompt])
        self.ks = [
            value
            for value in range(1, self.smallest + 1)
            if value <= 8 or value in (10, 12, 16, 24, 32, 48, 64, 100, 150)
        ]
        self.ks = sorted({*self.ks, k, self.smallest} - {value for value in self.ks if value > self.smallest})

    def rng(self) -> np.random.Generator:
        """The same resamples for every row, so that rows are compared on the same prompts."""
        return np.random.default_rng([self.seed, len(self.base)])

    def interval(self, values: np.ndarray, prompts: np.ndarray | None = None) -> Interval:
        """The mean over all prompts, or over those of a mask."""
        clusters = self.joined.clusters
        if clusters is not None and prompts is not None:
            clusters = clusters[prompts]
        return bootstrap_mean(values, clusters, draws=self.settings.bootstrap, rng=self.rng())

    def row(self, method: str, values: np.ndarray, samples: int, **more: Any) -> Row:
        """A row of the table from a value a prompt."""
        self.earned_by[method] = values
        reward = self.interval(values)
        over_base = self.paired(values, self.base) if method != "pass@1" else {}
        if self.greedy is not None and method not in ("pass@1", "greedy"):
            more |= self.paired(values, self.greedy, "over_greedy")
        return Row(
            method=method,
            value=reward.value,
            low=_finite(reward.low),
            high=_finite(reward.high),
            prompts=len(values),
            samples_per_prompt=samples,
            paper=self.paper.get(method),
            **over_base,
            **more,
        )

    def difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        """The paired difference a - b over prompts, or over clusters where there are any."""
        return paired_difference(a, b, self.joined.clusters, draws=self.settings.bootstrap, rng=self.rng())

    def paired(self, a: np.ndarray, b: np.ndarray, name: str = "difference") -> dict[str, Any]:
        """The same as fields of a row."""
        return _fields(name, self.difference(a, b))

    def results(
        self,
        title: str,
        protocol: str,
        pool: str,
        by_share: dict[float, dict[str, Scored]],
        plain: dict[str, Scored] | None,
        rivals: Mapping[str, np.ndarray | None],
        controls: Mapping[str, np.ndarray | None],
        by_layer: Mapping[int, dict[str, Scored]],
        authors: Authors | None,
        apart: Mapping[str, frozenset[str]],
        made_from: str,
    ) -> Results:
        scored, curve = by_share[1.0], by_share | ({} if plain is None else {1.0: plain})
        samples = max(len(rows) for rows in self.by_prompt)
        skyline = np.stack(
            [best_of_k(self.joined.rewards[r], self.joined.rewards[r], self.ks) for r in self.by_prompt], axis=1
        )
        at_k = self.ks.index(self.k)
        rows = [self.row("pass@1", self.base, samples, fewest_samples=self.smallest if self.smallest < samples else 0)]
        for name, rewards in {"greedy": self.greedy, **rivals}.items():
            rows.append(Row(method=name) if rewards is None else self.row(name, rewards, 1))
        by_control = {name: None if q is None else self.best_of(q) for name, q in controls.items()}
        rows += [self.control(name, by_control[name], controls[name]) for name in controls]
        run = {name: earned.mean(axis=0) for name, earned in by_control.items() if earned is not None}
        best = max(run, key=lambda name: float(run[name].mean()), default="")
        curves, trade_offs, prompt_scores = {}, {}, {}
        at_use: dict[str, np.ndarray] = {}
        over_control: dict[str, Interval] = {}
        for loss, scores in scored.items():
            method = _method(loss)
            earned, errors = self.earned(scores, self.ks, self.settings)  # (S, K, P)
            # Where the paper's procedure has rows of its own, its values stand beside those.
            published = None if authors else self.paper.get(method)
            at_use[method] = earned[:, at_k].mean(axis=0)
            more: dict[str, Any] = {}
            if best:
                over_control[method] = self.difference(at_use[method], run[best])
                more = _fields("over_control", over_control[method])
            rows.append(self.probe(method, scores, earned[:, at_k], errors[:, at_k], published, **more))
            curves[method] = self.band(earned.mean(axis=0))
            trade_offs[method] = self.trade_off(scores)
            prompt_scores[method] = self.prompt_scores(scores)
        curve_rewards = {
            _method(loss): {
                share: at_use[_method(loss)]
                if own is scored
                else self.earned(own[loss], [self.k], self.settings)[0][:, 0].mean(axis=0)
                for share, own in curve.items()
            }
            for loss in scored
        }
        theirs = {}
        their_scores, their_settings = (authors.scored, authors.settings) if authors else ({}, self.settings)
        for loss, scores in their_scores.items():
            earned, errors = self.earned(scores, [self.k], their_settings)
            method = f"{_method(loss)}, paper's procedure"
            rows.append(self.probe(method, scores, earned[:, 0], errors[:, 0], self.paper.get(_method(loss))))
            theirs[method] = earned[:, 0].mean(axis=0)
        rows.append(self.row(f"skyline pass@{self.k}", skyline[at_k], self.k))
        notes = self.notes(scored, curve, rows, at_use, over_control, best, len(run), theirs)
        notes += [
            note
            for method, own in curve_rewards.items()
            for note in comparisons.more_prompts(method, own, self.difference)
        ]
        notes += comparisons.layers(scored, by_layer) + self.without(apart)
        curves["skyline pass@k"] = self.band(skyline)
        return Results(
            title=title,
            protocol=protocol,
            pool=pool,
            k=self.k,
            prompts=len(self.base),
            samples=len(self.joined.rewards),
            samples_per_prompt=samples,
            mixed_prompts=int(self.mixed.sum()),
            seeds=self.settings.seeds,
            rows=rows,
            reward_against_k=Curve(k=self.ks, series=curves),
            reward_against_kl=TradeOff(series=trade_offs) if self.smallest > 1 else None,
            reward_against_prompts=self.learning_curve(curve, curve_rewards) if len(curve) > 1 else None,
            reward_against_layer=self.layer_curve(scored, by_layer) if by_layer else None,
            scores_per_prompt=PromptScores(series=prompt_scores),
            notes=notes,
            best_control=best,
            made_from=made_from,
        )

    def probe(
        self, method: str, scores: Scored, earned: np.ndarray, errors: np.ndarray, paper: float | None, **more: Any
    ) -> Row:
        """The row of a loss's probes from (S, P) rewards at use and their simulation errors."""
        row = self.row(
            method,
            earned.mean(axis=0),
            self.k,
            seeds=len(earned),
            seed_spread=float(earned.mean(axis=1).std(ddof=1)) if len(earned) > 1 else None,
            beta=float(np.median(scores.beta)),
            # All seeds choose from the same random sets, so over seeds errors do not cancel: at most their mean.
            simulation_error=float(np.sqrt((errors.mean(axis=0) ** 2).sum()) / errors.shape[1]),
            **self.auc(scores.q),
            **more,
        )
        return dataclasses.replace(row, paper=paper)

    def earned(self, scores: Scored, ks: list[int], settings: EvaluationSettings) -> tuple[np.ndarray, np.ndarray]:
        """(S, K, P) expected reward at every k, each prompt at its own probe's temperature, and its simulation error."""
        values, errors = [], []
        rewards, groups = self.joined.rewards, self.joined.groups
        for seed, (q, beta) in enumerate(zip(scores.q, scores.beta, strict=True)):
            if settings.partition:
                # Every seed draws a partition of its own for every k, whichever others are asked for.
                lots = {k: np.random.default_rng([self.seed, seed, k, len(self.base)]) for k in ks}
                values.append(np.stack([partition_reward(q, rewards, groups, k, beta, rng=lots[k]) for k in ks]))
                errors.append(np.zeros_like(values[-1]))
                continue
            betas = sorted(set(beta.tolist()))
            grid = reward_grid(q, rewards, groups, ks, betas, draws=settings.draws, rng=self.rng())
            own = (slice(None), np.searchsorted(betas, beta), np.arange(len(self.base)))
            values.append(grid.values[own])
            errors.append(grid.errors[own])
        return np.stack(values), np.stack(errors)

    def layer_curve(self, scored: dict[str, Scored], by_layer: Mapping[int, dict[str, Scored]]) -> LayerCurve:
        """Reward at use by layer, and how many probes of the table took each."""
        series, taken = {}, {}
        for loss, scores in scored.items():
            method = _method(loss)
            own = [
                self.earned(of_layer[loss], [self.k], self.settings)[0][:, 0].mean(axis=0)
                for of_layer in by_layer.values()
            ]
            series[method] = self.band(np.stack(own))
            taken[method] = [sum(probe.layer == layer for probe in scores.probes) for layer in by_layer]
        return LayerCurve(layers=list(by_layer), series=series, taken=taken)

    def best_of(self, scores: np.ndarray) -> np.ndarray:
        """(S, P) reward of the candidate that scores (S, N) put highest among k."""
        grids = [
            reward_grid(q, self.joined.rewards, self.joined.groups, [self.k], [0.0], draws=2, rng=self.rng())
            for q in scores
        ]
        return np.stack([grid.values[0, 0] for grid in grids])

    def control(self, method: str, earned: np.ndarray | None, scores: np.ndarray | None) -> Row:
        """The row of scores that no probe made."""
        if earned is None or scores is None:
            return Row(method=method)
        random = (
            {"seeds": len(earned), "seed_spread": float(earned.mean(axis=1).std(ddof=1))} if len(earned) > 1 else {}
        )
        return self.row(method, earned.mean(axis=0), self.k, beta=0.0, **random, **self.auc(scores))

    def learning_curve(
        self, scored: Mapping[float, dict[str, Scored]], at_use: dict[str, dict[float, np.ndarray]]
    ) -> LearningCurve:
        """Reward at use against the number of training prompts (its mean over probes, which differ by a fold's rounding)."""
        shares = sorted(scored)
        counts = [
            round(float(np.mean([p.prompts for scores in scored[share].values() for p in scores.probes])))
            for share in shares
        ]
        bands = {m: self.band(np.stack([by_share[share] for share in shares])) for m, by_share in at_use.items()}
        return LearningCurve(prompts=counts, series=bands)

    def auc(self, scores: np.ndarray) -> dict[str, float | None]:
        """Within-prompt AUC over the mixed prompts, of distinct completions, mean over seeds."""
        if not self.mixed.any():
            return {}
        groups = self.distinct.groups
        each = np.stack([within_prompt_auc(self.distinct.mean(q), self.rewards, groups) for q in scores])
        interval = self.interval(each[:, self.mixed].mean(axis=0), self.mixed)
        return {"auc": interval.value, "auc_low": _finite(interval.low), "auc_high": _finite(interval.high)}

    def band(self, values: np.ndarray) -> Band:
        intervals = [self.interval(at_k) for at_k in values]
        return Band(
            value=[interval.value for interval in intervals],
            low=[_finite(interval.low) for interval in intervals],
            high=[_finite(interval.high) for interval in intervals],
        )

    @property
    def curve_k(self) -> int:
        """Candidates of the KL curve: at most half a pool, whose finite size would otherwise show as divergence."""
        return min(self.k, max(2, self.smallest // 2))

    def trade_off(self, scores: Scored) -> list[TradeOffPoint]:
        """Reward and KL at every temperature, first seed, mean over prompts."""
        if self.smallest < 2:
            return []
        grid = reward_grid(
            scores.q[0],
            self.joined.rewards,
            self.joined.groups,
            [self.curve_k],
            CURVE_BETAS,
            draws=self.settings.draws,
            rng=self.rng(),
        )
        generator = torch.Generator().manual_seed(self.seed)
        points = []
        for place, beta in enumerate(CURVE_BETAS):
            kl = [
                selection.kl_to_base(
                    torch.from_numpy(scores.q[0][rows]), self.curve_k, beta, draws=KL_DRAWS, generator=generator
                )
                for rows in self.by_prompt
            ]
            reward = self.interval(grid.values[0, place])
            points.append(
                TradeOffPoint(
                    beta=beta,
                    kl=float(np.mean(kl)),
                    reward=reward.value,
                    low=_finite(reward.low),
                    high=_finite(reward.high),
                )
            )
        return points

    def prompt_scores(self, scores: Scored) -> list[PromptScore]:
        """The paper's Fig. 4: where each prompt's scores lie, against how often the base model solves it."""
        mean = scores.q.mean(axis=0)
        mean = mean - mean.mean()
        return [
            PromptScore(task_id=task, base=float(base), score=float(mean[rows].mean()))
            for task, base, rows in zip(self.joined.task_ids, self.base, self.by_prompt, strict=True)
        ]

    def notes(
        self,
        scored: dict[str, Scored],
        curve: Mapping[float, dict[str, Scored]],
        rows: list[Row],
        at_use: Mapping[str, np.ndarray],
        over_control: Mapping[str, Interval],
        best: str,
        controls: int,
        theirs: Mapping[str, np.ndarray],
    ) -> list[str]:
        """What a reader must know before believing the table, and why a probe does not help where it does not."""
        mixed = int(self.mixed.sum())
        notes = []
        if mixed == 0:
            notes.append("No prompt has both good and bad completions: there is nothing to choose, by any probe.")
        elif mixed < FEW_MIXED:
            notes.append(
                f"There are only {mixed} prompts, each with both good and bad completions: use more."
                if mixed == len(self.base)
                else f"Only {mixed} of {len(self.base)} prompts have both good and bad completions, and only on these can "
                "choosing matter: use more prompts, more samples a prompt, or a model that is neither too weak nor too strong."
            )
        if self.joined.clusters is not None:
            notes.append(
                f"The {len(self.base)} prompts make {self.joined.clusters.max() + 1} clusters: folds and held-out sets tear none "
                "apart, and intervals resample clusters."
            )
        trained = [probe.trained for scores in scored.values() for probe in scores.probes]
        defaults = [probe for probe in trained if not probe.chosen]
        if defaults:
            held = np.mean([probe.held_out_mixed for probe in defaults])
            notes.append(
                f"{len(defaults)} of {len(trained)} probes use the default stopping step, learning rate and beta: holding out "
                f"prompts would have left them {held:.3g} with both good and bad completions on average, too few to choose on."
            )
        if any(probe.plain for scores in curve[1.0].values() for probe in scores.probes):
            notes.append(
                "Every probe of the learning curve, also of all training prompts, uses the default stopping step, learning rate "
                "and beta: of the smaller shares too few prompts could be held out to choose on. Those of the table chose theirs."
            )
        for method, scores in zip(at_use, scored.values(), strict=True):
            if scores.beta.min() < scores.beta.max():
                notes.append(
                    f"{method}: its probes have temperatures from {scores.beta.min():.3g} to {scores.beta.max():.3g}, each the "
                    "one that it chose; the table says their median."
                )
        for row in (row for row in rows if row.method in at_use):
            if row.auc_low is None or row.auc_high is None:
                continue
            if round(row.auc_low, comparisons.DIGITS) <= 0.5 <= round(row.auc_high, comparisons.DIGITS):
                notes.append(
                    f"{row.method}: its within-prompt AUC cannot be told from chance (0.5) on {mixed} prompts."
                )
        if mixed:
            notes += comparisons.against_controls(over_control, best, controls)
            notes += comparisons.ordering(at_use, self.difference)
            notes += comparisons.ordering(theirs, self.difference)
            notes += comparisons.procedures(at_use, theirs, self.difference) if theirs else []
        worst = max((row.simulation_error or 0.0 for row in rows), default=0.0)
        if worst > 0:
            notes.append(
                f"Softmax rows are means over random sets of {self.k} candidates: standard error at most {worst:.1g}."
            )
        notes.append(f"The figure of reward against KL is for k={self.curve_k} candidates.")
        return notes

    def without(self, apart: Mapping[str, frozenset[str]]) -> list[str]:
        """Every row once more over the prompts that nothing is wrong with."""
        notes = []
        for why, task_ids in apart.items():
            kept = np.array([task not in task_ids for task in self.joined.task_ids])
            if kept.all():
                continue
            counted = f"Without the {int((~kept).sum())} of {len(kept)} prompts that {why}"
            if not kept.any():
                notes.append(f"{counted} none is left.")
                continue
            found = {method: self.interval(values[kept], kept) for method, values in self.earned_by.items()}
            notes.append(f"{counted}: {'; '.join(f'{method} {_reward(value)}' for method, value in found.items())}.")
        return notes


def _reward(found: Interval) -> str:
    ends = f" [{found.low:.3f}, {found.high:.3f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.3f}{ends}"


def _fields(name: str, found: Interval) -> dict[str, Any]:
    """An interval as fields of a row."""
    return {name: found.value, f"{name}_low": _finite(found.low), f"{name}_high": _finite(found.high)}


def _method(loss: str) -> str:
    return f"Q-probe {find_loss(loss).symbol}"


def _finite(end: float) -> float | None:
    """An end of an interval; None where it is infinite (a single prompt says nothing of others)."""
    return end if math.isfinite(end) else None


@dataclass(frozen=True)
class Example:
    """Two completions of one prompt: the one a probe prefers, and the one it likes least. A reward without a word on why is
    its own verdict.
    """

    task_id: str
    preferred: str
    preferred_verdict: str
    other: str
    other_verdict: str


def example(joined: Joined, scored: dict[str, Scored], loss: str) -> Example | None:
    """Of the mixed prompts, the one whose best and worst score lie furthest apart, whatever their verdicts are."""
    q = scored[loss].q.mean(axis=0)
    distinct = Distinct.of(joined.completions, joined.groups)
    mixed = np.flatnonzero(mixed_prompts(distinct.mean(joined.rewards), distinct.groups))
    if len(mixed) == 0:
        return None
    rows = max((np.flatnonzero(joined.groups == p) for p in mixed), key=lambda r: float(np.ptp(q[r])))
    best, worst = rows[q[rows].argmax()], rows[q[rows].argmin()]
    verdicts = [joined.verdicts[row] or f"reward {joined.rewards[row]:.3g}" for row in (best, worst)]
    return Example(
        joined.task_ids[joined.groups[best]],
        joined.completions[best],
        verdicts[0],
        joined.completions[worst],
        verdicts[1],
    )
