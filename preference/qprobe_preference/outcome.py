"""What a policy experiment came to: judged pools and probes in; win rates, agreement of judges, Figs 5 and 6, one example out."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qprobe.cli import composition
from qprobe.evaluation import layer_choice
from qprobe.evaluation.scoring import Scored
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.setup import BEST
from qprobe.probe.intervals import Interval
from qprobe.probe.losses import find_loss
from qprobe.run import joined, rewarding, stages
from qprobe.run.joined import Joined
from qprobe.run.pools import Pool, Reward, Split
from qprobe_preference import report, winrates
from qprobe_preference.agreement import agreement
from qprobe_preference.comparison import Variant
from qprobe_preference.judges import AgainstReference
from qprobe_preference.policy import Experiment, Truth, paper_values
from qprobe_preference.report import Method, WinTable
from qprobe_preference.winrates import Judgements, WinRate

_KS = (1, 2, 3, 5, 10, 20, 30, 40, 48)
_FEW = 30  # prompts below which a note warns of the intervals


def _policy_pools(experiment: Experiment) -> dict[str, Pool]:
    """One answer to every prompt by each of the other policies, by their name."""
    config, pipeline, pools = experiment.config, experiment.pipeline, {}
    split = dataclasses.replace(experiment.split, recorded=None, reward=experiment.reward)
    for policy in experiment.settings.policies:
        name, model = policy["name"], policy["model"]
        own = model if isinstance(model, dict) else {"name": model, "revision": None}
        changed = {"sampler": {**config["sampler"], "n": 1, "greedy": False}, "model": {**config["model"], **own}}
        ends = composition.back_ends({**config, **changed}, stop=pipeline.sampler.settings.stop)
        folder = pipeline.run / "policies" / re.sub(r"[^\w.-]+", "-", name)
        pools[name] = Pool(folder, split, "sample", ends.sampler, config["seed"], ends.batch_rows)
    return pools


def _label_pool(experiment: Experiment) -> Pool | None:
    """Chosen answers, to be judged against the rejected ones: how far the judge agrees with the labels. None: not asked for."""
    count, pairs, pipeline = experiment.settings.label_pairs, experiment.pairs.pairs, experiment.pipeline
    if not count:
        return None
    drawn = sorted(random.Random(experiment.config["seed"]).sample(range(len(pairs)), min(count, len(pairs))))
    asked, style = [pairs[place] for place in drawn], experiment.style
    prompts = [pair.as_prompt(style) for pair in asked]
    answers = {pair.pair_id: pair.answers(style) for pair in asked}
    split = Split(
        f"{experiment.pairs.name}-labels",
        prompts,
        {**experiment.split.source, "labels": count},
        recorded={key: [chosen] for key, (chosen, _) in answers.items()},
        reward=AgainstReference(experiment.reward.judge, prompts, {key: bad for key, (_, bad) in answers.items()}),
        clusters={pair.pair_id: pair.cluster for pair in asked},
    )
    return Pool(pipeline.run, split, "sample", pipeline.sampler, pipeline.seed, pipeline.batch_rows)


def _further_pools(experiment: Experiment) -> list[Pool]:
    """The pools that the core's pipeline does not know."""
    labels = _label_pool(experiment)
    return [*_policy_pools(experiment).values(), *([] if labels is None else [labels])]


def make(experiment: Experiment, names: Sequence[str]) -> None:
    """What the core's pipeline does not do: the other policies' answers, the other judges' verdicts, the labels."""
    pipeline, pools = experiment.pipeline, _further_pools(experiment)
    if "sample" in names:
        for pool in pools:
            stages.sample(pool, pipeline.progress)
            stages.give_back(pool.sampler)
    if "reward" in names:
        experiment.reward.check()
        if pipeline.reward_of(experiment.split) is not experiment.reward:  # else the pipeline has asked
            rewarding.reward(pipeline.test_pools[0], experiment.reward, pipeline.progress)
        for pool in pools:
            rewarding.reward(pool, pipeline.reward_of(pool.split), pipeline.progress)
        for reward in experiment.further_rewards():
            reward.check()
            rewarding.reward(pipeline.test_pools[0], reward, pipeline.progress)


def write(experiment: Experiment, variants: Sequence[Variant]) -> str:
    """Write tables/win_rates.* and the figures; returns what a run prints at its end."""
    pipeline = experiment.pipeline
    run, loss = pipeline.run, pipeline.shown_loss
    probes = [variant.of(pipeline) for variant in variants] or [pipeline]
    several = len({one.layer for one in probes}) > 1
    scored: dict[str, Scored] = {}
    by_share: dict[str, dict[float, Scored]] = {}
    for one in probes:
        at = functools.partial(_with_layer, experiment, one)
        scores = layer_choice.score_over(one.sweep(one.training_pools[0]), at, one.probe_layers, one.settings, one.seed)
        name = f"Q-probe {find_loss(loss).symbol} {_named(one, several)}"
        scored[name] = scores.by_share[1.0][loss]
        by_share[_named(one, several)] = {share: by_loss[loss] for share, by_loss in sorted(scores.curve.items())}
    pool = joined.join(pipeline.test_pools[0], experiment.reward)
    judged = judgements(experiment, pool)
    tables = [_table(experiment, pool, judged, scored), *_truth_table(experiment, scored)]
    for each in tables:
        report.write_tables(each, run / "tables")
    ks = sorted({k for k in _KS if k <= pipeline.k} | {pipeline.k})
    curves = {name: winrates.curve(judged, scores.q, ks, 0.0) for name, scores in scored.items()}
    curves["skyline"] = winrates.curve(judged, judged.wins, ks, 0.0)
    depths = {}
    for name, own in by_share.items():
        laws = (judged.probe_law(scores.q, pipeline.k, 0.0) for scores in own.values())
        depths[name] = winrates.band([winrates.win_rate(judged, law).rate for law in laws])
    shares = [round(100 * share) for share in next(iter(by_share.values()))]
    heading = [pipeline.title, f"judge {experiment.reward.judge.name}"]
    figures = report.write_figures(heading, run / "figures", ks, curves, shares, depths if len(shares) > 1 else {})
    places = [f"tables:   {run / 'tables'}", *(f"figure:   {path}" for path in figures if path.suffix == ".png")]
    parts = [*_unread(experiment), *map(report.to_text, tables), _example(pool, next(iter(scored.values())))]
    return "\n\n".join([*parts, "\n".join([*places, f"run:      {run}"])])


def _unread(experiment: Experiment) -> list[str]:
    """What is said before the tables: which of a judge's replies could not be read, where that is many."""
    pipeline, reward, tested = experiment.pipeline, experiment.reward, experiment.pipeline.test_pools[0]
    asked: list[tuple[Pool, Reward]] = [(tested, reward)]
    asked += [(pool, reward) for pool in pipeline.pools if pool.kind == "greedy"]
    asked += [(pool, pipeline.reward_of(pool.split)) for pool in _further_pools(experiment)]
    asked += [(tested, further) for further in experiment.further_rewards()]
    return [said for pool, stage in asked if (said := rewarding.unread_words(pool, stage))]


def _with_layer(experiment: Experiment, pipeline: Pipeline, layer: int) -> Joined:
    """The tested candidates with the features of a layer."""
    return joined.join(pipeline.test_pools[0], experiment.reward, pipeline.embedder, layer)


def _named(pipeline: Pipeline, several: bool) -> str:
    """A probe by its depth, and by its layer where there are several."""
    hidden = pipeline.training.hidden
    layer = "best layer" if pipeline.layer == BEST else f"layer {pipeline.layer}"
    return (f"{len(hidden) + 1} layers" if hidden else "linear") + (f", {layer}" if several else "")


def judgements(experiment: Experiment, pool: Joined) -> Judgements:
    """A pool's rewards as verdicts against the references; lengths in characters."""
    openings, references = experiment.reward.openings, experiment.reward.references
    keys = [pool.task_ids[group] for group in pool.groups]
    # As a judge reads them.
    shown = [(openings[key] + text).strip() for key, text in zip(keys, pool.completions, strict=True)]
    against = [(openings[key] + references[key]).strip() for key in keys]
    itself = [candidate == reference for candidate, reference in zip(shown, against, strict=True)]
    clusters, lengths = pool.cluster_of_prompt[pool.groups], list(map(len, shown))
    return Judgements(pool.rewards, pool.groups, pool.verdicts, lengths, list(map(len, against)), itself, clusters)


def _table(experiment: Experiment, pool: Joined, judged: Judgements, probes: dict[str, Scored]) -> WinTable:
    pipeline, reward, paper = experiment.pipeline, experiment.reward, paper_values(experiment)
    base = _rate(pipeline, judged, judged.base_law())
    rows = [Method("base", base, paper=paper.get("base"))]
    greedy = [("greedy", pool) for pool in pipeline.pools if pool.kind == "greedy"]
    for name, single in [*greedy, *_policy_pools(experiment).items()]:
        own = judgements(experiment, joined.join(single, reward))
        found = _rate(pipeline, own, own.base_law())
        rows.append(Method(name, found, _over(pipeline, found, base), paper=paper.get(name)))
    rows += _choices(pipeline, judged, base, probes, paper)
    notes = _agreements(experiment, judged)
    prompts = len(pool.task_ids)
    if prompts < _FEW:
        notes.append(f"Only {prompts} prompts: the intervals are wide, and the bootstrap's own are too narrow.")
    trained = "prompts of other folds"
    if pipeline.training_split is not None:
        trained = f"{len(pipeline.training_split.prompts):,} pairs of other prompts"
    against = f"judge {reward.judge.name}, against {experiment.against}"
    setting = f"{against}; {len(judged.wins):,} candidates; probes trained on {trained}"
    return WinTable(pipeline.title, setting, "win_rates", rows, tuple(notes))


def _choices(
    pipeline: Pipeline, judged: Judgements, base: WinRate, probes: dict[str, Scored], paper: dict[str, float]
) -> list[Method]:
    """The rows of what chooses among k: probes at argmax, and each at the temperature that its held-out pairs chose where these
    are not all 0; the skyline.
    """
    k, rows = pipeline.k, []
    for name, scores in probes.items():
        found = _rate(pipeline, judged, judged.probe_law(scores.q, k, 0.0, seed=pipeline.seed))
        published = paper.get("Q-probe") if name.endswith("linear") else None
        rows.append(Method(name, found, _over(pipeline, found, base), k, 0.0, published))
        lowest, highest = float(scores.beta.min()), float(scores.beta.max())
        if highest > 0:
            own = name if lowest == highest else f"{name}, own beta ({lowest:.3g} to {highest:.3g})"
            found = _rate(pipeline, judged, judged.probe_law(scores.q, k, scores.beta, seed=pipeline.seed))
            beta = lowest if lowest == highest else None
            rows.append(Method(own, found, _over(pipeline, found, base), k, beta))
    best = _rate(pipeline, judged, judged.skyline_law(k))
    return [*rows, Method("skyline", best, _over(pipeline, best, base), k, 0.0, paper.get("skyline"))]


def _truth_table(experiment: Experiment, probes: dict[str, Scored]) -> list[WinTable]:
    """The same choices by the rewards of the recorded candidates; no table where these are not known."""
    if experiment.truth is None:
        return []
    pipeline, true = experiment.pipeline, _true_judgements(experiment.truth)
    base = _rate(pipeline, true, true.base_law())
    title = f"{pipeline.title}: the true verdicts"
    setting = f"win: the candidate's recorded label is higher than that of {experiment.against}; no judge"
    return [WinTable(title, setting, "truth", [Method("base", base), *_choices(pipeline, true, base, probes, {})])]


def _true_judgements(truth: Truth) -> Judgements:
    keys = sorted(truth.labels)
    wins = [(1 + np.sign(np.asarray(truth.labels[key]) - truth.references[key])) / 2 for key in keys]
    return Judgements(np.concatenate(wins), np.repeat(np.arange(len(keys)), list(map(len, wins))))


def _agreements(experiment: Experiment, judged: Judgements) -> list[str]:
    """How far the judge agrees with the labels of pairs, with the true verdicts, and with further judges."""
    pipeline, notes, name = experiment.pipeline, [], experiment.reward.judge.name
    if (pool := _label_pool(experiment)) is not None:
        rows = joined.join(pool, pipeline.reward_of(pool.split))
        own = Judgements(rows.rewards, rows.groups, rows.verdicts, clusters=rows.cluster_of_prompt[rows.groups])
        rate = _rate(pipeline, own, own.base_law()).rate
        notes.append(
            f"{name} prefers the chosen answer of {100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}] "
            f"of {len(rows.verdicts)} labelled test pairs, ties half; a coin gives 50."
        )
    others = {} if experiment.truth is None else {"the true verdicts": _true_judgements(experiment.truth)}
    for reward in experiment.further_rewards():
        others[reward.name] = judgements(experiment, joined.join(pipeline.test_pools[0], reward))
    for second, other in others.items():
        if (judged.compared & other.compared).any():
            notes.append(agreement(judged, other).sentence(name, second))
        else:
            notes.append(f"{name} and {second}: on no two answers have both given a verdict: no agreement is known.")
    return notes


def _rate(pipeline: Pipeline, judged: Judgements, law: Any) -> WinRate:
    return winrates.win_rate(judged, law, draws=pipeline.settings.bootstrap, seed=pipeline.seed)


def _over(pipeline: Pipeline, found: WinRate, base: WinRate) -> Interval:
    return winrates.difference(found, base, draws=pipeline.settings.bootstrap, seed=pipeline.seed)


def _example(pool: Joined, scores: Scored) -> str:
    """The prompt whose best and worst score lie furthest apart, with both answers, their scores and their verdicts."""
    q = scores.q.mean(axis=0)
    rows = max((np.flatnonzero(pool.groups == p) for p in range(len(pool.task_ids))), key=lambda r: float(np.ptp(q[r])))
    parts = [f"One example, {pool.task_ids[pool.groups[rows[0]]]}:"]
    for words, row in (("likes best", rows[q[rows].argmax()]), ("likes least", rows[q[rows].argmin()])):
        text = "\n".join(f"    | {line}" for line in pool.completions[row].strip().splitlines()) or "    | (empty)"
        parts.append(f"  the probe {words}, Q = {q[row]:+.3f}, judged a {pool.verdicts[row]}:\n{text}")
    return "\n".join(parts)
