"""From tasks to trained probes: what is held out, who trains together, and what is chosen on held-out prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qprobe.probe import losses
from qprobe.probe.calibration import Calibration
from qprobe.probe.metrics import reward_grid
from qprobe.probe.network import ProbeNetwork, StackedNetworks, is_finite
from qprobe.probe.own_state import own_state
from qprobe.probe.training.batches import Passes, descend, total_steps
from qprobe.probe.training.data import Data, score_rows, statistics
from qprobe.probe.training.objective import HeldOutWatch
from qprobe.probe.training.settings import TrainingSettings

# Temperatures that are compared on held-out prompts. The paper uses 0.1 for every loss.
BETAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)

# Probes share passes where each has at least this share of the rows of the largest among them ...
LEAST_SHARE = 0.5
# ... and all together have at most so many times its rows: a batch grows with that, and every probe reads it all.
MOST_TIMES = 4


@dataclass(frozen=True)
class ProbeTask:
    """One probe to train: its loss, its seed, and its prompts.

    Args:
        loss: a name of `losses.LOSSES`.
        seed: of the held-out choice and of hidden layers.
        groups: (G,) bool, the groups it may learn from (training and held-out).
        learning_rate: its own, > 0; None takes the settings', or chooses among their candidates.
        chooses: whether it holds prompts out to choose on; None: where enough of these would be mixed. Probes that are
            compared should all do the same, or what is compared is that.
    """

    loss: str
    seed: int
    groups: Tensor
    learning_rate: float | None = None
    chooses: bool | None = None


@dataclass(frozen=True)
class TrainedProbe:
    """A trained probe and how its hyper-parameters came about.

    Args:
        network: plain, with any standardisation folded in.
        beta: temperature to use it at.
        steps: optimiser steps after which its weights were taken.
        chosen: whether steps and beta were chosen on held-out prompts.
        held_out_mixed: held-out prompts with good and bad completions (those that there would have been, if not chosen).
        learning_rate: that it was trained at.
        note: what a reader should know of its training; empty where that is nothing.
        held_out_loss: its own loss on its held-out prompts, the lowest that was seen; None where none were held out.
        calibration: how likely its choices are right; None where it was not made.
    """

    network: ProbeNetwork
    beta: float
    steps: int
    chosen: bool
    held_out_mixed: int
    learning_rate: float
    note: str = ""
    held_out_loss: float | None = None
    calibration: Calibration | None = None


@own_state()
def train(
    data: Data, tasks: Sequence[ProbeTask], settings: TrainingSettings, *, k: int, seed: int = 0, progress: bool = False
) -> list[TrainedProbe]:
    """Train one probe a task, in passes over the data that they share.

    Args:
        data: rows to learn from.
        tasks: M probes.
        settings: shared by all of them.
        k: candidates at use, for the choice of beta; capped at the smallest held-out group.
        seed: of the order of the data.

    Raises:
        ValueError: an unknown loss, rewards that a loss cannot read, a probe without prompts, or one that diverged: its
            loss or weights are no finite numbers, at every learning rate.
    """
    _check_tasks(data, tasks)
    mixed = data.mixed
    splits = [_held_out(data, task, settings, mixed) for task in tasks]
    candidates = [
        _Candidate(number, task, split, rate)
        for number, (task, split) in enumerate(zip(tasks, splits, strict=True))
        for rate in _learning_rates(task, split, settings)
    ]
    clusters = _clusters(data, candidates)
    passes = [Passes.over(data, torch.stack([c.fitted for c in cluster]), settings) for cluster in clusters]
    best: dict[int, _Outcome] = {}
    total = sum(total_steps(p, settings) for p in passes)
    with tqdm(total=total, desc="train   ", unit=" steps", disable=not progress, mininterval=0.5) as bar:
        for cluster, own_passes in zip(clusters, passes, strict=True):
            for outcome in _train_together(data, cluster, own_passes, settings, seed, bar):
                number = outcome.candidate.number
                if number not in best or outcome.loss < best[number].loss:
                    best[number] = outcome
    return [_finished(data, best[number], settings, k) for number in range(len(tasks))]


def held_out_mixed(data: Data, tasks: Sequence[ProbeTask], settings: TrainingSettings) -> list[int]:
    """How many prompts with good and bad completions each probe would hold out to choose on."""
    mixed = data.mixed
    return [_held_out(data, task, settings, mixed).mixed for task in tasks]


def refitted(
    data: Data,
    tasks: Sequence[ProbeTask],
    trained: Sequence[TrainedProbe],
    settings: TrainingSettings,
    *,
    k: int,
    seed: int = 0,
) -> list[TrainedProbe]:
    """Probes trained once more, on all of their prompts: those that were held out too, with what was chosen on them.

    Args:
        data, tasks, settings, k, seed: as of `train`, which made `trained`.
        trained: a probe a task; one that held nothing out, or is best untrained, is given back as it is.
    """
    made = []
    for task, probe in zip(tasks, trained, strict=True):
        if probe.chosen and probe.steps:
            again = dataclasses.replace(task, learning_rate=probe.learning_rate, chooses=False)
            own = dataclasses.replace(settings, steps=probe.steps)
            (whole,) = train(data, [again], own, k=k, seed=seed)
            probe = dataclasses.replace(probe, network=whole.network)
        made.append(probe)
    return made


@dataclass(frozen=True)
class _Split:
    held: Tensor
    chosen: bool
    mixed: int


@dataclass(frozen=True)
class _Candidate:
    """A probe at one learning rate; the task's number says whose candidate it is."""

    number: int
    task: ProbeTask
    split: _Split
    learning_rate: float

    @property
    def fitted(self) -> Tensor:
        return self.task.groups & ~self.split.held


@dataclass(frozen=True)
class _Outcome:
    candidate: _Candidate
    network: ProbeNetwork
    steps: int
    loss: float  # the lowest held-out loss; infinite where nothing was held out
    diverged: bool  # whether its weights were no finite numbers at the end, whatever step it was taken from


def _check_tasks(data: Data, tasks: Sequence[ProbeTask]) -> None:
    if not tasks:
        raise ValueError("There is no probe to train: give at least one loss and one seed.")
    for name in dict.fromkeys(task.loss for task in tasks):
        losses.check_rewards(data.rewards, name)
    for task in tasks:
        if len(task.groups) != len(data.sizes) or not bool(task.groups.any()):
            raise ValueError(f"A probe ({task.loss}, seed {task.seed}) has no prompts to learn from.")
        if task.learning_rate is not None and not task.learning_rate > 0:
            raise ValueError(
                f"A probe ({task.loss}, seed {task.seed}) has the learning rate {task.learning_rate}: it must be above 0."
            )


def _held_out(data: Data, task: ProbeTask, settings: TrainingSettings, mixed_groups: Tensor) -> _Split:
    """Hold out whole prompts by lot, or none where the choice on them would be noise."""
    prompts = data.prompt_of_group
    own = torch.unique(prompts[task.groups])
    generator = torch.Generator().manual_seed(task.seed)
    count = int(len(own) * settings.held_out)
    chosen_prompts = own[torch.randperm(len(own), generator=generator)[:count]]
    held = task.groups & torch.isin(prompts, chosen_prompts)
    mixed = len(torch.unique(prompts[held & mixed_groups]))
    enough = count > 0 and (mixed >= settings.minimum_mixed if task.chooses is None else task.chooses)
    return _Split(held if enough else torch.zeros_like(held), enough, mixed)


def _learning_rates(task: ProbeTask, split: _Split, settings: TrainingSettings) -> tuple[float, ...]:
    if task.learning_rate is not None:
        return (task.learning_rate,)
    if split.chosen and settings.learning_rates:
        return settings.learning_rates
    return (settings.learning_rate,)


def _clusters(data: Data, candidates: Sequence[_Candidate]) -> list[list[_Candidate]]:
    """Who trains together: probes with about as many rows, on prompts that are not too many all together."""
    rows = [int(data.sizes[candidate.fitted].sum()) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda i: (-rows[i], candidates[i].task.seed))
    clusters: list[list[_Candidate]] = []
    largest, union = 0, torch.zeros(len(data.sizes), dtype=torch.bool)
    for i in order:
        fitted = candidates[i].fitted
        together = int(data.sizes[union | fitted].sum())
        if not clusters or rows[i] < LEAST_SHARE * largest or together > MOST_TIMES * largest:
            clusters.append([])
            largest, union = rows[i], fitted
        clusters[-1].append(candidates[i])
        union = union | fitted
    return clusters


def _train_together(
    data: Data,
    cluster: Sequence[_Candidate],
    passes: Passes,
    settings: TrainingSettings,
    seed: int,
    bar: tqdm[None],
) -> list[_Outcome]:
    fitted = torch.stack([c.fitted for c in cluster])
    held = torch.stack([c.split.held for c in cluster])
    mean, scale = statistics(data, fitted) if settings.standardize else (None, None)
    seeds = [c.task.seed for c in cluster]
    stack = StackedNetworks(data.features.shape[1], settings.hidden, seeds=seeds, mean=mean, scale=scale)
    names = [c.task.loss for c in cluster]
    watch = HeldOutWatch(data, names, held, settings, len(passes.rows) / passes.batches_per_epoch)
    rates = torch.tensor([c.learning_rate for c in cluster])
    diverged = descend(data, names, passes, stack, watch, rates, settings, seed, bar)
    return [
        _Outcome(c, stack.network(m), watch.steps[m], float(watch.best[m]), bool(diverged[m]))
        for m, c in enumerate(cluster)
    ]


def _finished(data: Data, outcome: _Outcome, settings: TrainingSettings, k: int) -> TrainedProbe:
    candidate, split = outcome.candidate, outcome.candidate.split
    _check_converged(outcome)
    beta, note = settings.beta, ""
    if outcome.diverged:
        note = f"It diverged after step {outcome.steps}, where its weights are from: a lower learning_rate is steadier."
    if split.chosen:
        beta = _best_beta(data, outcome.network, split.held, k, candidate.task.seed)
    elif settings.learning_rates and candidate.task.learning_rate is None:
        note = (
            f"The learning rate was not chosen among {len(settings.learning_rates)}: {split.mixed} held-out prompts with good "
            f"and bad completions are fewer than {settings.minimum_mixed}; it is {candidate.learning_rate:g}."
        )
    held_out_loss = outcome.loss if split.chosen else None
    return TrainedProbe(
        outcome.network, beta, outcome.steps, split.chosen, split.mixed, candidate.learning_rate, note, held_out_loss
    )


def _check_converged(outcome: _Outcome) -> None:
    """Raise where there is nothing but numbers that are not finite, or an untrained probe because of them."""
    candidate = outcome.candidate
    finite = is_finite(outcome.network) and not (candidate.split.chosen and math.isinf(outcome.loss))
    if finite and not (outcome.diverged and outcome.steps == 0):
        return
    raise ValueError(
        f"A probe ({candidate.task.loss}, seed {candidate.task.seed}) diverged: its loss or its weights are no finite "
        f"numbers. Lower the learning_rate (it is {candidate.learning_rate:g}), and if that does not help, rescale rewards "
        "and features to a range of about 1."
    )


def _best_beta(data: Data, network: ProbeNetwork, held: Tensor, k: int, seed: int) -> float:
    """The temperature that earns most on the held-out groups; the smallest of equals."""
    rows = held[data.groups].nonzero()[:, 0]
    scores = score_rows(network, data.features, rows)
    grid = reward_grid(
        scores.numpy(),
        data.rewards[rows].numpy(),
        data.groups[rows].numpy(),
        [min(k, int(data.sizes[held].min()))],
        BETAS,
        draws=200,
        rng=np.random.default_rng(seed),
    )
    return BETAS[int(grid.values[0].mean(axis=1).argmax())]
