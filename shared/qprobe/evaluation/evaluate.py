"""From scores on unseen prompts to results: what every method earns, and what may be believed of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qprobe.evaluation import curves, notes
from qprobe.evaluation.advice import advice
from qprobe.evaluation.best_control import best_control
from qprobe.evaluation.certainty import certainty
from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.methods import Kind, PaperProbes, measured
from qprobe.evaluation.rows import rows
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.evaluation.tested import Tested
from qprobe.probe.ranking import Distinct, mixed_prompts
from qprobe.report.results import Results
from qprobe.run.joined import Joined


def evaluate(
    joined: Joined,
    scores: Scores,
    settings: EvaluationSettings,
    *,
    k: int,
    seed: int,
    title: str = "",
    protocol: str = "",
    pool: str = "",
    greedy: np.ndarray | None = None,
    rivals: Mapping[str, np.ndarray | None] | None = None,
    controls: Mapping[str, np.ndarray | None] | None = None,
    rankings: Mapping[str, np.ndarray | None] | None = None,
    training_rewards: Mapping[str, float] | None = None,
    folds: np.ndarray | None = None,
    paper_probes: PaperProbes | None = None,
    apart: Mapping[str, frozenset[str]] | None = None,
    published: Mapping[str, float] | None = None,
    made_from: str = "",
) -> Results:
    """Everything that the tables and figures say of one pool.

    Args:
        joined: the pool's rows.
        scores: what our probes say of them; the table is about those of all training prompts.
        k: candidates at use.
        seed: of resamples and random candidate sets.
        title, protocol, pool: words for the reader.
        greedy: (P,) rewards of greedy decoding, prompts as in `joined`; None where it was not run.
        rivals: method -> (P,) rewards of another policy's one completion a prompt, a row of the table each; None: not run.
        controls: method -> (S, N) scores that no probe made, a row of the table each; None: not run.
        rankings: the same of baselines that do more than score; no probe is held against them.
        training_rewards, folds: how the best control is chosen, as of `best_control`.
        apart: see `Pipeline.apart`: task ids without which every row is reported once more.
        published: values of the paper by method, only where the set-up is the paper's.
        made_from: identity of the inputs, kept with the results.

    Raises:
        ValueError: a prompt has fewer than k completions.
    """
    tested = Tested(joined, settings, k, seed)
    methods = measured(
        tested,
        scores,
        greedy=greedy,
        rivals=rivals or {},
        controls=controls or {},
        rankings=rankings or {},
        paper_probes=paper_probes,
    )
    probes = [method for method in methods if method.kind == Kind.PROBE]
    best = best_control(methods, training_rewards, folds)
    over_control = {p.name: tested.difference(p.rewards, best.rewards) for p in probes} if best else {}
    table = rows(tested, methods, over_control, published or {})
    scored = scores.by_share[1.0]
    certainties = certainty(tested, scored)
    said = notes.of_table(tested, methods, table, scores, over_control, best, apart or {})
    advised = advice(tested, methods, best, certainties)
    return Results(
        title=title,
        protocol=protocol,
        pool=pool,
        k=k,
        prompts=len(tested.base),
        samples=len(joined.rewards),
        samples_per_prompt=tested.largest,
        mixed_prompts=int(tested.mixed.sum()),
        seeds=settings.seeds,
        rows=table,
        reward_against_k=curves.against_k(tested, methods),
        reward_against_kl=curves.against_kl(tested, scored),
        reward_against_prompts=curves.against_prompts(tested, probes, scores.curve),
        reward_against_layer=curves.against_layer(tested, scored, scores.by_layer),
        scores_per_prompt=curves.by_prompt(tested, scored),
        certainty=certainties,
        notes=[note for note in said if note not in advised],
        advice=advised,
        best_control=best.name if best else "",
        made_from=made_from,
    )


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


def example(joined: Joined, scored: Mapping[str, Scored], loss: str) -> Example | None:
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
