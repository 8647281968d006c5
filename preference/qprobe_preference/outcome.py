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
from qprobe.probe.losses import find_loss
from qprobe.probe.metrics import Interval
from qprobe.report import Band
from qprobe.run import joined, stages
from qprobe.run.joined import Joined
from qprobe.run.stages import Pool, Reward, Split
from qprobe_preference import comparison, report, winrates
from qprobe_preference.comparison import Variant
from qprobe_preference.judges import AgainstReference
from qprobe_preference.policy import Experiment, more_judges, paper_values
from qprobe_preference.report import Method, WinTable
from qprobe_preference.winrates import Judgements, WinRate

KS = (1, 2, 3, 5, 10, 20, 30, 40, 48)
FEW = 30


def policy_pools(experiment: Experiment) -> dict[str, Pool]:
    """One answer to every prompt by each of the other policies, by their name."""
    config, pools = experiment.config, {}
    split = dataclasses.replace(experiment.split, recorded=None, reward=experiment.reward)
    for policy in experiment.settings.policies:
        own = {"sampler": {**config["sampler"], "n": 1, "greedy": False}}
        model = policy["model"]
        own["model"] = {**config["model"], **(model if isinstance(model, dict) else {"name": model, "revision": None})}
        settings = experiment.pipeline.sampler.settings
        ends = composition.back_ends({**config, **own}, stop=settings.stop)
        folder = experiment.pipeline.run / "policies" / re.sub(r"[^\w.-]+", "-", policy["name"])
        pools[policy["name"]] = Pool(folder, split, "sample", ends.sampler, config["seed"], ends.batch_rows)
    return pools


def label_pool(experiment: Experiment) -> Pool | None:
    """Chosen answers, to be judged against the rejected ones: how far the judge agrees with the labels. None: not asked."""
    count, pairs = experiment.settings.label_pairs, experiment.pairs.pairs
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
    pipeline = experiment.pipeline
    return Pool(pipeline.run, split, "sample", pipeline.sampler, pipeline.seed, pipeline.batch_rows)


def make(experiment: Experiment, names: Sequence[str]) -> None:
    """What the core's pipeline does not do: the other policies' answers, the other judges' verdicts, the labels."""
    pipeline, split = experiment.pipeline, experiment.split
    others, labels = policy_pools(experiment), label_pool(experiment)
    every = [*others.values(), *([labels] if labels else [])]
    if "sample" in names:
        for pool in every:
            stages.sample(pool, pipeline.progress)
            stages.give_back(pool.sampler)
    if "reward" in names:
        experiment.reward.check()
        if pipeline.reward_of(split) is not experiment.reward:  # else the pipeline has asked
            stages.reward(pipeline.test_pools[0], experiment.reward, pipeline.progress)
        for pool in every:
            stages.reward(pool, pipeline.reward_of(pool.split), pipeline.progress)
        for judge in more_judges(experiment).values():
            second = AgainstReference(judge, split.prompts, experiment.reward.references)
            second.check()
            stages.reward(pipeline.test_pools[0], second, pipeline.progress)


def write(experiment: Experiment, variants: Sequence[Variant]) -> str:
    """Write tables/win_rates.* and the figures; returns what a run prints at its end."""
    pipeline = experiment.pipeline
    probes = [variant.of(pipeline) for variant in variants] or [pipeline]
    several = len({one.layer for one in probes}) > 1
    scored: dict[str, Scored] = {}
    by_share: dict[str, dict[float, Scored]] = {}
    loss = pipeline.shown_loss
    for one in probes:
        at = functools.partial(_with_layer, experiment, one)
        scores = layer_choice.score_over(one.sweep(one.training_pools[0]), at, one.probe_layers, one.settings, one.seed)
        name = _shape(one) + (f", {comparison.layer_words(one)}" if several else "")
        scored[name] = scores.by_share[1.0][loss]
        curve = scores.by_share if scores.plain is None else scores.by_share | {1.0: scores.plain}
        by_share[name] = {share: by_loss[loss] for share, by_loss in sorted(curve.items())}
    pool = joined.join(pipeline.test_pools[0], experiment.reward)
    judged = judgements(experiment, pool)
    method = f"Q-probe {find_loss(loss).symbol}"
    paper = paper_values(experiment)
    named = {f"{method} {name}": scores for name, scores in scored.items()}
    tables = [_table(experiment, pool, judged, named, paper), *_truth(experiment, pool, named)]
    folder = pipeline.run
    for each in tables:
        report.write_tables(each, folder / "tables")
    ks = sorted({k for k in KS if k <= pipeline.k} | {pipeline.k})
    curves = {name: winrates.curve(judged, scores.q, ks, 0.0) for name, scores in named.items()}
    curves["skyline"] = winrates.curve(judged, judged.wins, ks, 0.0)
    depths = {name: _by_share(judged, own, pipeline.k) for name, own in by_share.items()}
    shares = [round(100 * share) for share in next(iter(by_share.values()))]
    heading = [pipeline.title, f"judge {experiment.reward.judge.name}"]
    figures = report.write_figures(heading, folder / "figures", ks, curves, shares, depths if len(shares) > 1 else {})
    parts = [*_unread(experiment), *(report.to_text(each) for each in tables)]
    parts.append(_example(pool, next(iter(scored.values()))))
    places = [f"tables:   {folder / 'tables'}", *(f"figure:   {path}" for path in figures if path.suffix == ".png")]
    return "\n\n".join([*parts, "\n".join([*places, f"run:      {folder}"])])


def _unread(experiment: Experiment) -> list[str]:
    """What is said before the tables: which of a judge's replies could not be read, where that is many."""
    pipeline, reward = experiment.pipeline, experiment.reward
    pools = [pipeline.test_pools[0], *(pool for pool in pipeline.pools if pool.kind == "greedy")]
    asked: list[tuple[Pool, Reward]] = [(pool, reward) for pool in [*pools, *policy_pools(experiment).values()]]
    if (labels := label_pool(experiment)) is not None:
        asked.append((labels, pipeline.reward_of(labels.split)))
    for judge in more_judges(experiment).values():
        second = AgainstReference(judge, experiment.split.prompts, experiment.reward.references)
        asked.append((pipeline.test_pools[0], second))
    return [said for pool, stage in asked if (said := stages.unread_words(pool, stage))]


def _with_layer(experiment: Experiment, pipeline: Pipeline, layer: int) -> Joined:
    """The tested candidates with the features of a layer."""
    return joined.join(pipeline.test_pools[0], experiment.reward, pipeline.embedder, layer)


def judgements(experiment: Experiment, pool: Joined) -> Judgements:
    """A pool's rewards as verdicts against the references; lengths in characters."""
    openings, references = experiment.reward.openings, experiment.reward.references
    keys = [pool.task_ids[group] for group in pool.groups]
    # As a judge is shown them.
    shown = [(openings[key] + text).strip() for key, text in zip(keys, pool.completions, strict=True)]
    against = [(openings[key] + references[key]).strip() for key in keys]
    return Judgements.of(
        pool.rewards,
        pool.groups,
        pool.verdicts,
        list(map(len, shown)),
        list(map(len, against)),
        [ours == theirs for ours, theirs in zip(shown, against, strict=True)],
        pool.cluster_of_prompt[pool.groups],
    )


def _table(
    experiment: Experiment, pool: Joined, judged: Judgements, probes: dict[str, Scored], paper: dict[str, float]
) -> WinTable:
    pipeline, reward = experiment.pipeline, experiment.reward
    base = _rate(pipeline, judged, judged.base_law())
    rows = [Method("base", base, paper=paper.get("base"))]
    greedy = [("greedy", pool) for pool in pipeline.pools if pool.kind == "greedy"]
    for name, single in [*greedy, *policy_pools(experiment).items()]:
        own = judgements(experiment, joined.join(single, reward))
        found = _rate(pipeline, own, own.base_law())
        rows.append(Method(name, found, _over(pipeline, found, base), paper=paper.get(name)))
    rows += _choices(pipeline, judged, base, probes, paper)
    notes = _agreements(experiment, judged)
    prompts = len(pool.task_ids)
    if prompts < FEW:
        notes.append(f"Only {prompts} prompts: the intervals are wide, and the bootstrap's own are too narrow.")
    trained = "trained on prompts of other folds"
    if pipeline.training_split is not None:
        trained = f"trained on {len(pipeline.training_split.prompts):,} pairs of other prompts"
    return WinTable(
        pipeline.title,
        f"judge {reward.judge.name}, against {experiment.against}; {len(judged.wins):,} candidates; probes {trained}",
        "win_rates",
        rows,
        "characters",
        tuple(notes),
    )


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


def _truth(experiment: Experiment, pool: Joined, probes: dict[str, Scored]) -> list[WinTable]:
    """The same choices by what the recorded candidates truly earned; none where that is not known."""
    if experiment.truth is None:
        return []
    pipeline, truly = experiment.pipeline, _truly(experiment)
    base = _rate(pipeline, truly, truly.base_law())
    return [
        WinTable(
            f"{pipeline.title}: the true verdicts",
            f"win: the candidate's recorded label is higher than that of {experiment.against}; no judge",
            "truth",
            [Method("base", base), *_choices(pipeline, truly, base, probes, {})],
        )
    ]


def _truly(experiment: Experiment) -> Judgements:
    truth = experiment.truth
    assert truth is not None  # the callers look
    keys = sorted(truth.labels)
    wins = [(1 + np.sign(np.asarray(truth.labels[key]) - truth.references[key])) / 2 for key in keys]
    return Judgements.of(
        np.concatenate(wins), np.repeat(np.arange(len(keys)), [len(truth.labels[key]) for key in keys])
    )


def _agreements(experiment: Experiment, judged: Judgements) -> list[str]:
    """How far the judge agrees with the labels of pairs, with the truth, and with further judges."""
    pipeline, notes, first = experiment.pipeline, [], experiment.reward.judge.name
    if (pool := label_pool(experiment)) is not None:
        rows = joined.join(pool, pipeline.reward_of(pool.split))
        clusters = rows.cluster_of_prompt[rows.groups]
        own = Judgements.of(rows.rewards, rows.groups, rows.verdicts, clusters=clusters)
        found = _rate(pipeline, own, own.base_law())
        notes.append(
            f"{first} prefers the chosen answer of {100 * found.rate.value:.1f} % [{100 * found.rate.low:.1f}, "
            f"{100 * found.rate.high:.1f}] of {len(rows.verdicts)} labelled test pairs, ties half; a coin gives 50."
        )
    if experiment.truth is not None:
        notes.append(_agreement(first, judged, "the true verdicts", _truly(experiment)))
    for judge in more_judges(experiment).values():
        second = AgainstReference(judge, experiment.split.prompts, experiment.reward.references)
        other = judgements(experiment, joined.join(pipeline.test_pools[0], second))
        notes.append(_agreement(first, judged, judge.name, other))
    return notes


def _agreement(first: str, judged: Judgements, second: str, other: Judgements) -> str:
    if not (judged.compared & other.compared).any():
        return f"{first} and {second}: on no two answers have both given a verdict, so nothing is known of their agreement."
    return report.agreement_note(first, second, winrates.agreement(judged, other))


def _by_share(judged: Judgements, scored: dict[float, Scored], k: int) -> Band:
    laws = (judged.probe_law(scores.q, k, 0.0) for scores in scored.values())
    return winrates.band([winrates.win_rate(judged, law).rate for law in laws])


def _rate(pipeline: Pipeline, judged: Judgements, law: Any) -> WinRate:
    return winrates.win_rate(judged, law, draws=pipeline.settings.bootstrap, seed=pipeline.seed)


def _over(pipeline: Pipeline, found: WinRate, base: WinRate) -> Interval:
    return winrates.difference(found, base, draws=pipeline.settings.bootstrap, seed=pipeline.seed)


def _shape(pipeline: Pipeline) -> str:
    hidden = pipeline.training.hidden
    return f"{len(hidden) + 1} layers" if hidden else "linear"


def _example(pool: Joined, scores: Scored) -> str:
    """The prompt whose best and worst score lie furthest apart, with both answers, their scores and their verdicts."""
    q = scores.q.mean(axis=0)
    rows = max((np.flatnonzero(pool.groups == p) for p in range(len(pool.task_ids))), key=lambda r: float(np.ptp(q[r])))
    parts = [f"One example, {pool.task_ids[pool.groups[rows[0]]]}:"]
    for words, row in (("likes best", rows[q[rows].argmax()]), ("likes least", rows[q[rows].argmin()])):
        text = "\n".join(f"    | {line}" for line in pool.completions[row].strip().splitlines()) or "    | (empty)"
        parts.append(f"  the probe {words}, Q = {q[row]:+.3f}, judged a {pool.verdicts[row]}:\n{text}")
    return "\n".join(parts)
