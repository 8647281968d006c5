"""The sweep of probes that an evaluation asks for: which are trained on what, and how they are kept.

One set of prompts is cross-validated: every seed redraws the folds, and every prompt is scored by probes that never saw it.
With a training set and a test set, every probe trains on the first and scores all of the second. Beside the probes that
learn from all their training prompts stand some that learn from a part of them, for the learning curve. All are trained in the
same passes over the data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from qprobe.files import write_whole
from qprobe.probe.calibration import Calibration
from qprobe.probe.losses import find_loss
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.ranking import Distinct
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, TrainingSettings, held_out_mixed, train
from qprobe.run.joined import Joined

# A linear probe starts at zero, so seeds differ by their training prompts alone.
LEFT_OUT = 0.1
# What decides a sweep besides its inputs: a sweep that other code drew is trained anew.
DRAWN_BY = 2
CALIBRATION = ".calibration"  # behind the number of a probe, the name of a tensor
CONTROLS = ("length", "logprob", "likelihood", "likelihood_columns", "agreement", "random_direction", "shuffled_labels")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is trained and how it is measured.

    Args:
        losses: names of `qprobe.probe.losses.LOSSES`, or "auto" (`qprobe.evaluation.auto`); a row of the table each.
        seeds: probes a loss; each redraws folds (cross-validation) or held-out prompts.
        folds: parts of the cross-validation where there is one set of prompts.
        k: candidates at use; None takes all samples of a tested prompt.
        train_share: share of the training prompts that every seed draws, in (0, 1]; cross-validation uses them all. At 1
            each of several seeds leaves a tenth out (LEFT_OUT): they would all be one probe, and their spread 0.
        curve_shares: shares of those, in (0, 1) and rising, that further probes learn from, for the learning curve; none
            leaves it out. Every share costs as many probes as the table itself.
        curve_prompts: the same in numbers of prompts (clusters where there are any), 1 or more and rising; `counted` makes
            shares of them.
        beta: temperature that every probe is measured at, >= 0; None: each at its own. 0 makes best-of-2 of preference pairs
            their accuracy.
        partition: measure on one random partition of every prompt's samples into sets of k, as the paper does, instead of
            exactly.
        controls: names of CONTROLS, choices that need no probe, as rows of the same table. shuffled_labels trains; likelihood
            is logprob also for completions that were brought along, which the base model then reads.
        draws: random subsets a prompt where no closed form exists.
        bootstrap: resamples of an interval.
    """

    losses: tuple[str, ...] = ("reward_mse", "reward_cross_entropy", "policy_gradient")
    seeds: int = 5
    folds: int = 5
    k: int | None = None
    train_share: float = 1.0
    curve_shares: tuple[float, ...] = (0.25, 0.5)
    curve_prompts: tuple[int, ...] = ()
    beta: float | None = None
    partition: bool = False
    controls: tuple[str, ...] = ("length", "logprob", "random_direction")
    draws: int = 200
    bootstrap: int = 10_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "curve_shares", tuple(self.curve_shares))
        object.__setattr__(self, "curve_prompts", tuple(self.curve_prompts))
        object.__setattr__(self, "controls", tuple(self.controls))
        for name in self.losses:
            find_loss(name)
        if not self.losses or self.seeds < 1 or self.folds < 2 or self.draws < 2 or self.bootstrap < 100:
            raise ValueError(
                "evaluation needs at least one loss, seeds >= 1, folds >= 2, draws >= 2 and bootstrap >= 100; it has "
                f"{len(self.losses)}, {self.seeds}, {self.folds}, {self.draws} and {self.bootstrap}."
            )
        if not 0 < self.train_share <= 1:
            raise ValueError(f"evaluation.train_share is {self.train_share}: a share in (0, 1].")
        if [*self.curve_shares] != sorted({share for share in self.curve_shares if 0 < share < 1}):
            raise ValueError(
                f"evaluation.curve_shares is {list(self.curve_shares)}: rising shares above 0 and below 1, such as [0.25, 0.5]."
            )
        if [*self.curve_prompts] != sorted({count for count in self.curve_prompts if count >= 1}):
            raise ValueError(
                f"evaluation.curve_prompts is {list(self.curve_prompts)}: rising numbers of prompts, such as [5, 10, 20]."
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"evaluation.k is {self.k}: a policy chooses from at least one candidate.")
        if unknown := [name for name in self.controls if name not in CONTROLS]:
            raise ValueError(
                f"evaluation.controls has {', '.join(map(str, unknown))}: choose from {', '.join(CONTROLS)}."
            )
        if self.beta is not None and not self.beta >= 0:
            raise ValueError(f"evaluation.beta is {self.beta}: a temperature of 0 (argmax) or more, or null.")

    @property
    def drawn_share(self) -> float:
        """Share of a training set's prompts that a seed learns from: never all of them where seeds should differ."""
        return 1 - LEFT_OUT if self.seeds > 1 and self.train_share == 1 else self.train_share

    def counted(self, prompts: int, clusters: np.ndarray | None, folded: bool) -> EvaluationSettings:
        """The same with `curve_prompts` among the shares; numbers that would be all of the prompts are left out.

        Args:
            prompts: of the set that probes are trained on.
            clusters: (P,) cluster of each, numbered from 0; None: each is its own.
            folded: whether the set is cross-validated, so that a probe learns from all folds but one.
        """
        every = prompts if clusters is None else int(clusters.max()) + 1
        trained = every * (1 - 1 / self.folds if folded else self.drawn_share)
        shares = {count / trained for count in self.curve_prompts if count < round(trained)}
        return dataclasses.replace(self, curve_shares=tuple(sorted({*self.curve_shares, *shares})), curve_prompts=())


@dataclass(frozen=True)
class Procedure:
    """How probes are trained and measured, and which layer they read: a number, "best", or None for the highest."""

    training: TrainingSettings
    settings: EvaluationSettings
    layer: int | str | None = None


@dataclass(frozen=True)
class SweepProbe:
    """One probe of a sweep.

    Args:
        loss, seed: of its training.
        fold: the prompts that it never saw; None: it is tested on another set.
        trained: the probe.
        share: of its training prompts that it learned from.
        prompts: how many these are.
        layer: whose features it reads; None in sweeps from before there were several.
        taken: whether it stands for its loss, seed, fold and share: the others were trained at other layers and are compared.
        plain: whether it learned as those of smaller shares had to, holding nothing out, where the table's probes of all
            training prompts could choose: the learning curve is about these.
    """

    loss: str
    seed: int
    fold: int | None
    trained: TrainedProbe
    share: float = 1.0
    prompts: int = 0
    layer: int | None = None
    taken: bool = True
    plain: bool = False


class Maker(Protocol):
    """`cross_validate` or `train_on_all`."""

    def __call__(
        self,
        joined: Joined,
        training: TrainingSettings,
        settings: EvaluationSettings,
        *,
        k: int,
        seed: int,
        progress: bool,
    ) -> list[SweepProbe]: ...


def training_data(joined: Joined) -> Data:
    """The rows of a pool as training reads them."""
    assert joined.features is not None  # the callers join with features
    clusters = None if joined.clusters is None else torch.from_numpy(joined.clusters)
    features, rewards, groups = map(torch.from_numpy, (joined.features, joined.rewards, joined.groups))
    return Data(features, rewards, groups, clusters, Distinct.of(joined.completions, joined.groups))


def probe_seed(seed: int, number: int) -> int:
    """The seed of a run's probe: those of two runs have none in common."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def fold_of(prompts: int, folds: int, seed: int, clusters: np.ndarray | None = None) -> np.ndarray:
    """(P,) fold of every prompt, by lot, a cluster in one fold; the folds' numbers of clusters differ by one at most."""
    count = prompts if clusters is None else int(clusters.max()) + 1
    if count < folds:
        one, several = ("prompt", "prompts") if clusters is None else ("cluster of prompts", "clusters of prompts")
        way = f"use more {several} or evaluation.folds={count}" if count > 1 else "cross-validation needs two at least"
        raise ValueError(f"{count} {several if count > 1 else one} cannot make {folds} folds: {way}.")
    of_cluster = np.random.default_rng([seed, count]).permutation(np.arange(count) % folds)
    return of_cluster if clusters is None else of_cluster[clusters]


def cross_validate(
    joined: Joined, training: TrainingSettings, settings: EvaluationSettings, *, k: int, seed: int, progress: bool
) -> list[SweepProbe]:
    """Train seeds x folds x losses probes for every share, each on prompts outside its fold."""
    prompts, clusters = len(joined.task_ids), joined.clusters
    folds = [fold_of(prompts, settings.folds, probe_seed(seed, s), clusters) for s in range(settings.seeds)]
    own = {(s, f): np.flatnonzero(folds[s] != f) for s in range(settings.seeds) for f in range(settings.folds)}
    return _train(joined, training, settings, own, k, seed, progress)


def train_on_all(
    joined: Joined, training: TrainingSettings, settings: EvaluationSettings, *, k: int, seed: int, progress: bool
) -> list[SweepProbe]:
    """Train seeds x losses probes for every share on a training set, each on its own draw of `drawn_share` of the prompts."""
    own = {(s, None): np.arange(len(joined.task_ids)) for s in range(settings.seeds)}
    return _train(joined, training, settings, own, k, seed, progress, settings.drawn_share)


def _train(
    joined: Joined,
    training: TrainingSettings,
    settings: EvaluationSettings,
    own: dict[tuple[int, Any], np.ndarray],
    k: int,
    seed: int,
    progress: bool,
    whole: float = 1.0,
) -> list[SweepProbe]:
    """Train a probe for every loss, share and entry of `own`: (seed, fold) -> its training prompts.

    Probes that are compared all hold prompts out or none does, as the mean of the mixed ones that they would hold out says. Where
    those of a smaller share have too few, all of the learning curve hold none out: then it has probes of all training prompts of
    its own, or it would show what choosing brings and not what prompts do.
    """
    prompts, data = len(joined.task_ids), training_data(joined)
    of_share: dict[float, list[tuple[str, int, Any, int, ProbeTask]]] = {}
    for share in (1.0, *settings.curve_shares):
        for loss in settings.losses:
            for (s, fold), training_prompts in own.items():
                drawn = drawn_prompts(training_prompts, joined.cluster_of_prompt, whole * share, probe_seed(seed, s))
                groups = torch.zeros(prompts, dtype=torch.bool)
                groups[torch.from_numpy(drawn)] = True
                task = ProbeTask(loss, probe_seed(seed, s), groups)
                of_share.setdefault(share, []).append((loss, s, fold, len(drawn), task))
    chooses = {
        share: float(np.mean(held_out_mixed(data, [task for *_, task in entries], training))) >= training.minimum_mixed
        for share, entries in of_share.items()
    }
    alike = all(chooses.values())
    planned = []
    for share, entries in of_share.items():
        planned += [(*entry, share, chooses[share] if share == 1 else alike, False) for entry in entries]
    if chooses[1.0] and not alike:
        planned += [(*entry, 1.0, False, True) for entry in of_share[1.0]]
    tasks = [dataclasses.replace(task, chooses=may) for *_, task, _, may, _ in planned]
    trained = train(data, tasks, training, k=k, seed=seed, progress=progress)
    return [
        SweepProbe(loss, s, fold, probe, share, count, plain=plain)
        for (loss, s, fold, count, _, share, _, plain), probe in zip(planned, trained, strict=True)
    ]


def drawn_prompts(prompts: np.ndarray, clusters: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The prompts of a share of their clusters, by lot; a smaller share is part of a larger one."""
    own = np.unique(clusters[prompts])
    order = np.random.default_rng([seed, len(own)]).permutation(own)
    drawn = order[: max(1, round(len(own) * share))]
    return prompts[np.isin(clusters[prompts], drawn)]


def save_sweep(sweep: Sequence[SweepProbe], folder: Path, inputs: dict[str, Any]) -> None:
    """Write all probes of a sweep: weights as safetensors, the rest as JSON, which appears last."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for number, probe in enumerate(sweep):
        trained = probe.trained
        tensors |= {f"{number}.{name}": t.contiguous() for name, t in trained.network.state_dict().items()}
        if trained.calibration is not None:
            tensors[f"{number}{CALIBRATION}"] = torch.from_numpy(trained.calibration.packed())
        tensors_of = ("network", "calibration")
        described = {f.name: getattr(trained, f.name) for f in dataclasses.fields(trained) if f.name not in tensors_of}
        own = {f.name: getattr(probe, f.name) for f in dataclasses.fields(probe) if f.name != "trained"}
        entries.append(own | {"trained": described})
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
            prefix, calibration = f"{number}.", tensors.pop(f"{number}{CALIBRATION}", None)
            network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            trained = TrainedProbe(
                network=network,
                calibration=None if calibration is None else Calibration.of_packed(calibration),
                **entry.pop("trained"),
            )
            sweep.append(SweepProbe(trained=trained, **entry))
        return sweep
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{folder} holds a damaged sweep of probes ({first}): delete the folder, it is trained anew."
        ) from error
