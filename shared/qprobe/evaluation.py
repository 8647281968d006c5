"""From joined rows to results: a sweep of probes, their scores on prompts they have not seen, and what these earn.

One set of prompts is cross-validated: every seed redraws the folds, every prompt is scored by probes that never saw it.
With a training set and a test set, every probe trains on the first and scores all of the second.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from qprobe import policy
from qprobe.files import write_whole
from qprobe.losses import find_loss
from qprobe.metrics import (
    Interval,
    best_of_k,
    bootstrap_mean,
    mixed_prompts,
    paired_difference,
    reward_grid,
    within_prompt_auc,
)
from qprobe.network import ProbeNetwork
from qprobe.report.results import Band, Curve, PromptScore, PromptScores, Results, Row, TradeOff, TradeOffPoint
from qprobe.stages import Joined
from qprobe.training import (
    BETAS,
    ROWS_AT_A_TIME,
    Data,
    ProbeTask,
    TrainedProbe,
    TrainingSettings,
    score_rows,
    train,
)

# Temperatures of the curve of reward against KL, besides those that training may choose.
CURVE_BETAS = (*BETAS, 2.0, 5.0)
# Random subsets a prompt for the KL curve; its bias (see policy.kl_to_base) is far below the curve's width.
KL_DRAWS = 20


@dataclass(frozen=True)
class EvaluationSettings:
    """What is trained and how it is measured.

    Args:
        losses: names of `qprobe.losses.LOSSES`, a row of the table each.
        seeds: probes a loss; each redraws folds (cross-validation) or held-out prompts.
        folds: parts of the cross-validation where there is one set of prompts.
        k: candidates at use; None takes all samples of a prompt.
        train_share: share of the training prompts that every seed draws, in (0, 1]; cross-validation uses them all.
        draws: random subsets a prompt where no closed form exists.
        bootstrap: resamples of an interval.
    """

    losses: tuple[str, ...] = ("reward_mse", "reward_cross_entropy", "policy_gradient")
    seeds: int = 5
    folds: int = 5
    k: int | None = None
    train_share: float = 1.0
    draws: int = 200
    bootstrap: int = 10_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        for name in self.losses:
            find_loss(name)
        if not self.losses or self.seeds < 1 or self.folds < 2 or self.draws < 2 or self.bootstrap < 100:
            raise ValueError(
                "evaluation needs at least one loss, seeds >= 1, folds >= 2, draws >= 2 and bootstrap >= 100; it has "
                f"{len(self.losses)}, {self.seeds}, {self.folds}, {self.draws} and {self.bootstrap}."
            )
        if not 0 < self.train_share <= 1:
            raise ValueError(f"evaluation.train_share is {self.train_share}: a share in (0, 1].")
        if self.k is not None and self.k < 1:
            raise ValueError(f"evaluation.k is {self.k}: a policy chooses from at least one candidate.")


@dataclass(frozen=True)
class SweepProbe:
    """One probe of a sweep: its loss and seed, the fold it never saw (None: it is tested on another set), the probe."""

    loss: str
    seed: int
    fold: int | None
    trained: TrainedProbe


def training_data(joined: Joined) -> Data:
    """The rows of a pool as training reads them."""
    assert joined.features is not None  # the callers join with features
    return Data(torch.from_numpy(joined.features), torch.from_numpy(joined.rewards), torch.from_numpy(joined.groups))


def fold_of(prompts: int, folds: int, seed: int) -> np.ndarray:
    """(P,) fold of every prompt, by lot, sizes differing by one at most."""
    if prompts < folds:
        raise ValueError(
            f"{prompts} prompts cannot make {folds} folds: use more prompts or evaluation.folds={max(2, prompts)}."
        )
    return np.random.default_rng([seed, prompts]).permutation(np.arange(prompts) % folds)


def cross_validate(
    joined: Joined, training: TrainingSettings, settings: EvaluationSettings, *, k: int, seed: int, progress: bool
) -> list[SweepProbe]:
    """Train seeds x folds x losses probes, each on the prompts outside its fold."""
    folds = [fold_of(len(joined.task_ids), settings.folds, seed + s) for s in range(settings.seeds)]
    plan = [(loss, s, f) for loss in settings.losses for s in range(settings.seeds) for f in range(settings.folds)]
    tasks = [ProbeTask(loss, seed + s, torch.from_numpy(folds[s] != f)) for loss, s, f in plan]
    trained = train(training_data(joined), tasks, training, k=k, seed=seed, progress=progress)
    return [SweepProbe(loss, s, f, probe) for (loss, s, f), probe in zip(plan, trained, strict=True)]


def train_on_all(
    joined: Joined, training: TrainingSettings, settings: EvaluationSettings, *, k: int, seed: int, progress: bool
) -> list[SweepProbe]:
    """Train seeds x losses probes on a training set, each on its own draw of `train_share` of the prompts."""
    prompts = len(joined.task_ids)
    count = max(1, round(prompts * settings.train_share))
    plan = [(loss, s) for loss in settings.losses for s in range(settings.seeds)]
    tasks = []
    for loss, s in plan:
        drawn = torch.zeros(prompts, dtype=torch.bool)
        drawn[torch.from_numpy(np.random.default_rng([seed + s, prompts]).permutation(prompts)[:count])] = True
        tasks.append(ProbeTask(loss, seed + s, drawn))
    trained = train(training_data(joined), tasks, training, k=k, seed=seed, progress=progress)
    return [SweepProbe(loss, s, None, probe) for (loss, s), probe in zip(plan, trained, strict=True)]


def save_sweep(sweep: Sequence[SweepProbe], folder: Path, inputs: dict[str, Any]) -> None:
    """Write all probes of a sweep: weights as safetensors, the rest as JSON, which appears last."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for number, probe in enumerate(sweep):
        trained = probe.trained
        tensors |= {f"{number}.{name}": t.contiguous() for name, t in trained.network.state_dict().items()}
        described = {f.name: getattr(trained, f.name) for f in dataclasses.fields(trained) if f.name != "network"}
        entries.append({"loss": probe.loss, "seed": probe.seed, "fold": probe.fold, **described})
    network = sweep[0].trained.network
    shape = {"dimension": network.dimension, "hidden": list(network.hidden)}
    (folder / "sweep.json").unlink(missing_ok=True)  # an older one must not describe new weights
    write_whole(folder / "sweep.safetensors", tensors_to_bytes(tensors))
    text = json.dumps({"inputs": inputs, "network": shape, "probes": entries}, indent=1)
    write_whole(folder / "sweep.json", text.encode())


def load_sweep(folder: Path, inputs: dict[str, Any]) -> list[SweepProbe] | None:
    """A saved sweep; None where there is none or it was made from other inputs (it is then trained anew)."""
    if not (folder / "sweep.json").exists():
        return None
    try:
        card = json.loads((folder / "sweep.json").read_text())
        if card["inputs"] != json.loads(json.dumps(inputs)):
            return None
        tensors = tensors_from_bytes((folder / "sweep.safetensors").read_bytes())
        sweep = []
        for number, entry in enumerate(card["probes"]):
            network = ProbeNetwork(card["network"]["dimension"], tuple(card["network"]["hidden"]))
            prefix = f"{number}."
            network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            loss, seed, fold = (entry.pop(name) for name in ("loss", "seed", "fold"))
            sweep.append(SweepProbe(loss, seed, fold, TrainedProbe(network=network, **entry)))
        return sweep
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{folder} holds a damaged sweep of probes ({first}): delete the folder, it is trained anew."
        ) from error


@dataclass(frozen=True)
class Scored:
    """A loss's scores on prompts its probes have not seen, one row a seed.

    Args:
        q: (S, N) float32 scores.
        beta: (S, P) the temperature that belongs to each prompt's probe.
        probes: those that scored.
    """

    q: np.ndarray
    beta: np.ndarray
    probes: list[SweepProbe]


def score(sweep: Sequence[SweepProbe], joined: Joined, settings: EvaluationSettings, seed: int) -> dict[str, Scored]:
    """Every loss's scores of a pool's rows."""
    assert joined.features is not None  # the callers join with features
    features = torch.from_numpy(joined.features)
    prompts = len(joined.task_ids)
    by_loss: dict[str, Scored] = {}
    tested: dict[int, np.ndarray] = {}
    for number, probe in enumerate(sweep):
        if probe.loss not in by_loss:
            shape = settings.seeds, len(features)
            by_loss[probe.loss] = Scored(np.empty(shape, np.float32), np.empty((settings.seeds, prompts)), [])
        by_loss[probe.loss].probes.append(probe)
        tested[number] = np.ones(prompts, dtype=bool)
        if probe.fold is not None:
            tested[number] = fold_of(prompts, settings.folds, seed + probe.seed) == probe.fold
        by_loss[probe.loss].beta[probe.seed, tested[number]] = probe.trained.beta
    # All probes read a piece of the features while it is in memory: the whole may be a file.
    for start in range(0, len(features), ROWS_AT_A_TIME):
        piece = features[start : start + ROWS_AT_A_TIME].float()
        groups = joined.groups[start : start + ROWS_AT_A_TIME]
        for number, probe in enumerate(sweep):
            rows = np.flatnonzero(tested[number][groups])
            own = piece if len(rows) == len(piece) else piece[torch.from_numpy(rows)]
            by_loss[probe.loss].q[probe.seed, start + rows] = score_rows(probe.trained.network, own).numpy()
    return by_loss


def evaluate(
    title: str,
    protocol: str,
    pool: str,
    joined: Joined,
    greedy: np.ndarray | None,
    scored: dict[str, Scored],
    settings: EvaluationSettings,
    *,
    k: int,
    seed: int,
    paper: dict[str, float] | None = None,
) -> Results:
    """Everything that the tables and figures say of one pool.

    Args:
        greedy: (P,) rewards of greedy decoding, prompts as in `joined`; None where it was not run.
        k: candidates at use.
        paper: published values by method, only where the set-up is the paper's.
    """
    return _Evaluation(joined, settings, k, seed, paper or {}).results(title, protocol, pool, greedy, scored)


class _Evaluation:
    def __init__(
        self, joined: Joined, settings: EvaluationSettings, k: int, seed: int, paper: dict[str, float]
    ) -> None:
        self.joined = joined
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
        self.mixed = mixed_prompts(joined.rewards, joined.groups)
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

    def interval(self, values: np.ndarray) -> Interval:
        return bootstrap_mean(values, draws=self.settings.bootstrap, rng=self.rng())

    def row(self, method: str, values: np.ndarray, samples: int, **more: Any) -> Row:
        """A row of the table from a value a prompt."""
        reward = self.interval(values)
        difference = None
        if method != "pass@1":
            difference = paired_difference(values, self.base, draws=self.settings.bootstrap, rng=self.rng())
        return Row(
            method=method,
            value=reward.value,
            low=_finite(reward.low),
            high=_finite(reward.high),
            prompts=len(values),
            samples_per_prompt=samples,
            difference=None if difference is None else difference.value,
            difference_low=None if difference is None else _finite(difference.low),
            difference_high=None if difference is None else _finite(difference.high),
            paper=self.paper.get(method),
            **more,
        )

    def results(
        self, title: str, protocol: str, pool: str, greedy: np.ndarray | None, scored: dict[str, Scored]
    ) -> Results:
        samples = max(len(rows) for rows in self.by_prompt)
        skyline = np.stack(
            [best_of_k(self.joined.rewards[r], self.joined.rewards[r], self.ks) for r in self.by_prompt], axis=1
        )
        at_k = self.ks.index(self.k)
        rows = [self.row("pass@1", self.base, samples)]
        rows.append(self.row("greedy", greedy, 1) if greedy is not None else Row(method="greedy"))
        curves, trade_offs, prompt_scores = {}, {}, {}
        for loss, scores in scored.items():
            method = f"Q-probe {find_loss(loss).symbol}"
            earned = np.stack([self.earned(scores, s) for s in range(self.settings.seeds)])  # (S, K, P)
            spread = float(earned[:, at_k].mean(axis=1).std(ddof=1)) if self.settings.seeds > 1 else None
            rows.append(
                self.row(
                    method,
                    earned[:, at_k].mean(axis=0),
                    self.k,
                    seeds=self.settings.seeds,
                    seed_spread=spread,
                    beta=float(np.median(scores.beta)),
                    **self.auc(scores),
                )
            )
            curves[method] = self.band(earned.mean(axis=0))
            trade_offs[method] = self.trade_off(scores)
            prompt_scores[method] = self.prompt_scores(scores)
        rows.append(self.row(f"skyline pass@{self.k}", skyline[at_k], self.k))
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
            scores_per_prompt=PromptScores(series=prompt_scores),
            notes=self.notes(scored, rows),
        )

    def earned(self, scores: Scored, s: int) -> np.ndarray:
        """(K, P) expected reward of one seed at every k, each prompt at its own probe's temperature."""
        betas = sorted(set(scores.beta[s].tolist()))
        grid = reward_grid(
            scores.q[s],
            self.joined.rewards,
            self.joined.groups,
            self.ks,
            betas,
            draws=self.settings.draws,
            rng=self.rng(),
        )
        which = np.searchsorted(betas, scores.beta[s])
        return grid.values[:, which, np.arange(len(self.base))]

    def auc(self, scores: Scored) -> dict[str, float | None]:
        """Within-prompt AUC over the mixed prompts, mean over seeds."""
        if not self.mixed.any():
            return {}
        each = np.stack([within_prompt_auc(q, self.joined.rewards, self.joined.groups) for q in scores.q])
        interval = self.interval(each[:, self.mixed].mean(axis=0))
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
                policy.kl_to_base(
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
            PromptScore(task_id=task, base=float(np.clip(base, 0, 1)), score=float(mean[rows].mean()))
            for task, base, rows in zip(self.joined.task_ids, self.base, self.by_prompt, strict=True)
        ]

    def notes(self, scored: dict[str, Scored], rows: list[Row]) -> list[str]:
        """What a reader must know before believing the table."""
        notes = []
        if not self.mixed.any():
            notes.append("No prompt has both good and bad completions: there is nothing to choose, by any probe.")
        trained = [probe.trained for scores in scored.values() for probe in scores.probes]
        defaults = [probe for probe in trained if not probe.chosen]
        if defaults:
            fewest = min(probe.held_out_mixed for probe in defaults)
            notes.append(
                f"{len(defaults)} of {len(trained)} probes use the default stopping step and beta: holding out prompts would "
                f"have left them {fewest} or a few more with both good and bad completions, too few to choose on."
            )
        for row in rows:
            if row.auc_low is not None and row.auc_high is not None and row.auc_low <= 0.5 <= row.auc_high:
                notes.append(
                    f"{row.method}: its within-prompt AUC cannot be told from chance (0.5) on {int(self.mixed.sum())} prompts."
                )
        notes.append(f"The figure of reward against KL is for k={self.curve_k} candidates.")
        return notes


def _finite(end: float) -> float | None:
    """An end of an interval; None where it is infinite (a single prompt says nothing of others)."""
    return end if math.isfinite(end) else None


@dataclass(frozen=True)
class Example:
    """Two completions of one prompt: the one a probe prefers, and the one it likes least."""

    task_id: str
    preferred: str
    preferred_verdict: str
    other: str
    other_verdict: str


def example(joined: Joined, scored: dict[str, Scored], loss: str) -> Example | None:
    """Of the mixed prompts, the one whose best and worst score lie furthest apart, whatever their verdicts are."""
    q = scored[loss].q.mean(axis=0)
    mixed = np.flatnonzero(mixed_prompts(joined.rewards, joined.groups))
    if len(mixed) == 0:
        return None
    rows = max((np.flatnonzero(joined.groups == p) for p in mixed), key=lambda r: float(np.ptp(q[r])))
    best, worst = rows[q[rows].argmax()], rows[q[rows].argmin()]
    return Example(
        joined.task_ids[joined.groups[best]],
        joined.completions[best],
        joined.verdicts[best],
        joined.completions[worst],
        joined.verdicts[worst],
    )
