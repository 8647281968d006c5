"""What a reader must know before believing a table, and why a probe does not help where it does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from qprobe.evaluation import comparisons
from qprobe.evaluation.best_control import BestControl
from qprobe.evaluation.curves import kl_candidates
from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.methods import Kind, Method, name_of
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.tested import Tested
from qprobe.probe.intervals import Interval
from qprobe.probe.losses import AUTO
from qprobe.report.results import Row

# Prompts with good and bad completions below which a probe is hardly trained and hardly measured.
FEW_MIXED = 20


def of_table(
    tested: Tested,
    methods: Sequence[Method],
    rows: Sequence[Row],
    scores: Scores,
    over_control: Mapping[str, Interval],
    best: BestControl | None,
    apart: Mapping[str, frozenset[str]],
) -> list[str]:
    """All sentences below a table.

    Args:
        rows: of the methods.
        scores: of our probes.
        over_control: name of a probe's row -> what it earns over the best control.
        best: that control; None where none was run.
        apart: why -> task ids without which every row is reported once more.
    """
    scored = scores.by_share[1.0]
    ours = {m.name: m.rewards for m in methods if m.kind == Kind.PROBE}
    papers = {m.name: m.rewards for m in methods if m.kind == Kind.PAPER}
    found = [*_of_prompts(tested), *_of_training(scored, scores.curve), *_of_temperatures(scored, list(ours))]
    found += _of_chance(tested, [row for row in rows if row.method in ours])
    if tested.mixed.any():
        found += comparisons.against_controls(over_control, best) if best else []
        in_order = {name: rewards for name, rewards in ours.items() if name != name_of(AUTO)}
        found += comparisons.ordering(in_order, tested.difference)
        found += comparisons.ordering(papers, tested.difference)
        found += comparisons.procedures(ours, papers, tested.difference) if papers else []
        baselines = [m for m in methods if m.kind in (Kind.RIVAL, Kind.RANKING) and m.by_seed is not None]
        shown = name_of(AUTO) if name_of(AUTO) in ours else next(reversed(ours))  # of no `auto` the last loss
        of_baselines = {m.name: m.rewards for m in baselines}
        found += comparisons.against_baselines(shown, ours[shown], of_baselines, tested.difference)
    worst = max((row.simulation_error or 0.0 for row in rows), default=0.0)
    if worst > 0:
        found.append(
            f"Softmax rows are means over random sets of {tested.k} candidates: standard error at most {worst:.1g}."
        )
    found.append(f"The figure of reward against KL is for k={kl_candidates(tested)} candidates.")
    for method in methods:
        if method.kind == Kind.PROBE:
            found += comparisons.more_prompts(method.name, method.by_share, tested.difference)
    return found + comparisons.layers(scored, scores.by_layer) + _without(tested, methods, apart)


def _of_prompts(tested: Tested) -> list[str]:
    """How many prompts there are to choose on, and what belongs together among them."""
    found, mixed, prompts = [], int(tested.mixed.sum()), len(tested.base)
    if mixed == 0:
        found.append("No prompt has both good and bad completions: there is nothing to choose, by any probe.")
    elif mixed < FEW_MIXED:
        found.append(
            f"There are only {mixed} prompts, each with both good and bad completions: use more."
            if mixed == prompts
            else f"Only {mixed} of {prompts} prompts have both good and bad completions, and only on these can "
            "choosing matter: use more prompts, more samples a prompt, or a model that is neither too weak nor too strong."
        )
    if tested.joined.clusters is not None:
        found.append(
            f"The {prompts} prompts make {tested.joined.clusters.max() + 1} clusters: folds and held-out sets tear none "
            "apart, and intervals resample clusters."
        )
    return found


def _of_training(scored: Mapping[str, Scored], curve: Mapping[float, Mapping[str, Scored]]) -> list[str]:
    """Which probes could choose nothing on held-out prompts."""
    found = []
    found += [f"Q-probe auto: {note}" for note in _choices(scored)]
    trained = [probe.trained for loss, scores in scored.items() if loss != AUTO for probe in scores.probes]
    if defaults := [probe for probe in trained if not probe.chosen]:
        held = np.mean([probe.held_out_mixed for probe in defaults])
        found.append(
            f"{len(defaults)} of {len(trained)} probes use the default stopping step, learning rate and beta: holding out "
            f"prompts would have left them {held:.3g} with both good and bad completions on average, too few to choose on."
        )
    if any(probe.plain for scores in curve[1.0].values() for probe in scores.probes):
        found.append(
            "Every probe of the learning curve, also of all training prompts, uses the default stopping step, learning rate "
            "and beta: of the smaller shares too few prompts could be held out to choose on. Those of the table chose theirs."
        )
    return found


def _choices(scored: Mapping[str, Scored]) -> list[str]:
    """What the probes of `auto` chose, each as often as it was."""
    counted = Counter(probe.trained.note for probe in (scored[AUTO].probes if AUTO in scored else []))
    return [
        f"{note} ({count} of {counted.total()} probes)" if counted.total() > 1 else note
        for note, count in counted.items()
    ]


def _of_temperatures(scored: Mapping[str, Scored], names: Sequence[str]) -> list[str]:
    """Which rows hold several temperatures."""
    return [
        f"{name}: its probes have temperatures from {scores.beta.min():.3g} to {scores.beta.max():.3g}, each the "
        "one that it chose; the table says their median."
        for name, scores in zip(names, scored.values(), strict=True)
        if scores.beta.min() < scores.beta.max()
    ]


def _of_chance(tested: Tested, rows: Sequence[Row]) -> list[str]:
    """Which probes rank no better than chance, as their interval is printed."""
    digits = comparisons.DIGITS
    return [
        f"{row.method}: its within-prompt AUC cannot be told from chance (0.5) on {int(tested.mixed.sum())} prompts."
        for row in rows
        if row.auc_low is not None
        and row.auc_high is not None
        and round(row.auc_low, digits) <= 0.5 <= round(row.auc_high, digits)
    ]


def _without(tested: Tested, methods: Sequence[Method], apart: Mapping[str, frozenset[str]]) -> list[str]:
    """Every row once more over the prompts that nothing is wrong with."""
    found = []
    for why, task_ids in apart.items():
        kept = np.array([task not in task_ids for task in tested.joined.task_ids])
        if kept.all():
            continue
        counted = f"Without the {int((~kept).sum())} of {len(kept)} prompts that {why}"
        if not kept.any():
            found.append(f"{counted} none is left.")
            continue
        run = {m.name: tested.interval(m.rewards[kept], kept) for m in methods if m.by_seed is not None}
        found.append(f"{counted}: {'; '.join(f'{name} {_in_words(value)}' for name, value in run.items())}.")
    return found


def _in_words(found: Interval) -> str:
    ends = f" [{found.low:.3f}, {found.high:.3f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.3f}{ends}"
