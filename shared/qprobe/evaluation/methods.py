"""What every method earns on the tested prompts: one record a method, of which its row, its lines and the sentences are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.evaluation.tested import Tested
from qprobe.probe.losses import find_loss
from qprobe.probe.metrics import best_of_k


class Kind(Enum):
    """What a method is."""

    BASE = "one completion by lot"
    GREEDY = "the completion of greedy decoding"
    RIVAL = "one completion of another policy"
    CONTROL = "the best of k by scores that no probe made"
    RANKING = "the best of k by a baseline that does more than score, such as executing"
    PROBE = "a probe of the table"
    PAPER = "a probe of the paper's procedure beside ours"
    SKYLINE = "the best of k by reward"


@dataclass(frozen=True)
class PaperProbes:
    """Probes of the paper's procedure, whose rows follow ours.

    Args:
        scored: loss -> scores.
        settings: how they are measured.
    """

    scored: Mapping[str, Scored]
    settings: EvaluationSettings


@dataclass(frozen=True)
class Method:
    """A method and what it earns.

    Args:
        name: of its row.
        kind: what it is.
        samples: completions of a prompt that it uses.
        by_seed: (S, P) reward at use; None: it was not run.
        published_as: its name among the published values; "" where none is its.
        q: (S, N) its scores; None where it has none.
        errors: (S, P) standard error of `by_seed` by drawing candidate sets at random; None where nothing is drawn.
        scored: the probes behind the scores.
        by_k: (K, P) reward at every k of `Tested.ks`, mean over seeds.
        by_share: share of the training prompts -> (P,) reward at use of probes that were trained on it, mean over seeds.
    """

    name: str
    kind: Kind
    samples: int
    by_seed: np.ndarray | None
    published_as: str = ""
    q: np.ndarray | None = None
    errors: np.ndarray | None = None
    scored: Scored | None = None
    by_k: np.ndarray | None = None
    by_share: dict[float, np.ndarray] = field(default_factory=dict)

    @property
    def rewards(self) -> np.ndarray:
        """(P,) reward at use, mean over seeds; of a method that was run."""
        assert self.by_seed is not None
        return np.asarray(self.by_seed.mean(axis=0))


def measured(
    tested: Tested,
    scores: Scores,
    *,
    greedy: np.ndarray | None,
    rivals: Mapping[str, np.ndarray | None],
    controls: Mapping[str, np.ndarray | None],
    rankings: Mapping[str, np.ndarray | None],
    paper_probes: PaperProbes | None,
) -> list[Method]:
    """Every method, in the order of the table.

    Args:
        scores: of our probes.
        greedy: (P,) rewards of greedy decoding; None: not run.
        rivals: method -> (P,) rewards of another policy's one completion a prompt; None: not run.
        controls, rankings: method -> (S, N) scores; None: not run.
    """
    k = tested.k
    methods = [Method("pass@1", Kind.BASE, tested.largest, tested.base[None], "pass@1")]
    methods.append(Method("greedy", Kind.GREEDY, 1, None if greedy is None else greedy[None], "greedy"))
    for name, rewards in rivals.items():
        methods.append(Method(name, Kind.RIVAL, 1, None if rewards is None else rewards[None], name))
    for kind, of_kind in ((Kind.CONTROL, controls), (Kind.RANKING, rankings)):
        for name, q in of_kind.items():
            methods.append(Method(name, kind, k, None if q is None else tested.best_of(q), name, q))
    methods += [_probe(tested, scores, loss, published=paper_probes is None) for loss in scores.by_share[1.0]]
    if paper_probes:
        for loss, scored in paper_probes.scored.items():
            earned, errors = tested.earned(scored, [k], paper_probes.settings)
            name = name_of(loss)
            row = f"{name}, paper's procedure"
            methods.append(Method(row, Kind.PAPER, k, earned[:, 0], name, scored.q, errors[:, 0], scored))
    rewards_of = [tested.joined.rewards[rows] for rows in tested.by_prompt]
    skyline = np.stack([best_of_k(rewards, rewards, tested.ks) for rewards in rewards_of], axis=1)
    row = f"skyline pass@{k}"
    return [*methods, Method(row, Kind.SKYLINE, k, skyline[tested.ks.index(k)][None], row, by_k=skyline)]


def _probe(tested: Tested, scores: Scores, loss: str, published: bool) -> Method:
    """The probes of a loss, at every number of candidates and every share of the training prompts."""
    scored, name = scores.by_share[1.0][loss], name_of(loss)
    earned, errors = tested.earned(scored, tested.ks, tested.settings)  # (S, K, P)
    at = tested.ks.index(tested.k)
    by_share = {
        share: earned[:, at].mean(axis=0)
        if own[loss] is scored
        else tested.earned(own[loss], [tested.k], tested.settings)[0][:, 0].mean(axis=0)
        for share, own in scores.curve.items()
        if loss in own
    }
    return Method(
        name=name,
        kind=Kind.PROBE,
        samples=tested.k,
        by_seed=earned[:, at],
        published_as=name if published else "",
        q=scored.q,
        errors=errors[:, at],
        scored=scored,
        by_k=earned.mean(axis=0),
        by_share=by_share,
    )


def name_of(loss: str) -> str:
    """The name of the row of a loss's probes."""
    return f"Q-probe {find_loss(loss).symbol}"
