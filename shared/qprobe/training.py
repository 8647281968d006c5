"""Training probes on (embedding, reward) rows, many at once.

All probes of a sweep share the passes over the data: one matrix product scores a batch with every probe, and a mask says
which prompts each of them trains on (folds of a cross-validation, seeds that redraw the prompts). A batch is made of
chunks: at most `chunk` samples of one prompt, drawn anew in every epoch (the paper's L_PG: 100 prompts x 10 samples).

Hyper-parameters are chosen on held-out prompts: the step at which a probe's own loss is lowest there, and the temperature
that earns most there. With fewer than `minimum_mixed` held-out prompts that have both good and bad completions such a
choice is noise: then nothing is held out and the settings' own `steps` (or `epochs`) and `beta` are used, and it is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qprobe import losses
from qprobe.metrics import mixed_prompts, reward_grid
from qprobe.network import ProbeNetwork, StackedNetworks

# Rows that are standardised or scored at a time: 64 MB of float32 at 4,096 features.
ROWS_AT_A_TIME = 4096
# Temperatures that are compared on held-out prompts. The paper uses 0.1 for every loss.
BETAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)

# What is equal within every prompt has no gradient in the losses that compare within prompts, and rounding leaves it one of
# some 1e-9. At Adam's usual epsilon of 1e-8 that noise walks nearly as far as a signal does.
ADAM_EPSILON = 1e-6


@dataclass(frozen=True)
class TrainingSettings:
    """How probes are trained.

    Args:
        hidden: widths of hidden ReLU layers; none is a linear probe.
        steps: optimiser steps; None counts `epochs` instead. The paper fixes epochs, so its steps grow with the data.
        epochs: passes over the training prompts; used where `steps` is None.
        chunks_per_batch: chunks (a prompt's samples, or `chunk` of them) in a batch.
        chunk: most samples of a chunk; the k of L_PG in training.
        learning_rate: of AdamW. The paper's 5e-5 is for features as they are; standardised ones bear more.
        weight_decay: of AdamW, on weights, not biases.
        training_beta: temperature of L_PG in training; the paper trains at 1.
        standardize: train on standardised features; the statistics are folded into the weights afterwards.
        held_out: share of the training prompts that choose stopping step and temperature, in [0, 1).
        minimum_mixed: held-out prompts with good and bad completions below which nothing is held out.
        check_every: steps between two looks at the held-out loss.
        beta: temperature of the policy where none was chosen on held-out prompts.
    """

    hidden: tuple[int, ...] = ()
    steps: int | None = 500
    epochs: int = 150
    chunks_per_batch: int = 100
    chunk: int = 10
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    training_beta: float = 1.0
    standardize: bool = True
    held_out: float = 0.2
    minimum_mixed: int = 20
    check_every: int = 10
    beta: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("chunks_per_batch", "chunk", "epochs", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"training.steps is {self.steps}: at least 1, or null to count epochs.")
        for width in self.hidden:
            if type(width) is not int or width < 1:
                raise ValueError(f"training.hidden is {self.hidden}: widths are whole numbers of at least 1.")
        if not (self.learning_rate > 0 and self.weight_decay >= 0 and self.training_beta > 0 and self.beta >= 0):
            raise ValueError(
                f"training: learning_rate={self.learning_rate} and training_beta={self.training_beta} must be above 0, "
                f"weight_decay={self.weight_decay} and beta={self.beta} 0 or more."
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"training.held_out is {self.held_out}: a share of the prompts in [0, 1).")


@dataclass(frozen=True)
class Data:
    """Rows to learn from.

    Args:
        features: (N, D) float16 or float32.
        rewards: (N,) float32.
        groups: (N,) int64, dense ids 0..G-1 of what is compared: a prompt's completions, or one preference pair.
        prompts: (G,) int64, the prompt of each group; None where every group is a prompt of its own.

    Raises:
        ValueError: lengths that differ, values that are not finite, groups that are not dense.
    """

    features: Tensor
    rewards: Tensor
    groups: Tensor
    prompts: Tensor | None = None
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = len(self.features)
        if self.features.ndim != 2 or rows == 0:
            raise ValueError(f"features has shape {tuple(self.features.shape)}: give (N, D) with at least one row.")
        for name in ("rewards", "groups"):
            if len(getattr(self, name)) != rows:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} rows, features has {rows}: give one of each per row."
                )
        losses.check_finite(self.features, "features")
        losses.check_finite(self.rewards, "rewards")
        if self.groups.dtype != torch.int64 or int(self.groups.min()) < 0:
            raise ValueError("groups has ids that are not int64 from 0 on: number the groups densely from 0.")
        sizes = torch.bincount(self.groups)
        if int(sizes.min()) == 0:
            raise ValueError("groups has gaps: number the groups densely from 0.")
        if self.prompts is not None and len(self.prompts) != len(sizes):
            raise ValueError(f"prompts has {len(self.prompts)} entries for {len(sizes)} groups: give one a group.")
        object.__setattr__(self, "sizes", sizes)

    @property
    def prompt_of_group(self) -> Tensor:
        return torch.arange(len(self.sizes)) if self.prompts is None else self.prompts


@dataclass(frozen=True)
class ProbeTask:
    """One probe to train: its loss, its seed, and its prompts.

    Args:
        loss: a name of `losses.LOSSES`.
        seed: of the held-out choice and of hidden layers.
        groups: (G,) bool, the groups it may learn from (training and held-out).
    """

    loss: str
    seed: int
    groups: Tensor


@dataclass(frozen=True)
class TrainedProbe:
    """A trained probe and how its hyper-parameters came about.

    Args:
        network: plain, with any standardisation folded in.
        beta: temperature to use it at.
        steps: optimiser steps after which its weights were taken.
        chosen: whether steps and beta were chosen on held-out prompts.
        held_out_mixed: held-out prompts with good and bad completions (those that there would have been, if not chosen).
    """

    network: ProbeNetwork
    beta: float
    steps: int
    chosen: bool
    held_out_mixed: int


def train(
    data: Data, tasks: Sequence[ProbeTask], settings: TrainingSettings, *, k: int, seed: int = 0, progress: bool = False
) -> list[TrainedProbe]:
    """Train one probe a task, all in the same passes over the data.

    Args:
        data: rows to learn from.
        tasks: M probes.
        settings: shared by all of them.
        k: candidates at use, for the choice of beta; capped at the smallest held-out group.
        seed: of the order of the data, which all probes share.

    Raises:
        ValueError: an unknown loss, rewards that a loss cannot read, a probe without prompts.
    """
    _check_tasks(data, tasks)
    splits = [_held_out(data, task, settings) for task in tasks]
    held = torch.stack([split.held for split in splits])  # (M, G)
    fitted = torch.stack([task.groups for task in tasks]) & ~held
    stack = _start(data, tasks, fitted, settings)
    watch = _HeldOutWatch(data, tasks, held, settings)
    _descend(data, tasks, fitted, stack, watch, settings, seed, progress)
    trained = []
    for m, split in enumerate(splits):
        network = stack.network(m)
        if not split.chosen:
            trained.append(TrainedProbe(network, settings.beta, watch.steps[m], False, split.mixed))
            continue
        beta = _best_beta(data, network, split.held, k, tasks[m].seed)
        trained.append(TrainedProbe(network, beta, watch.steps[m], True, split.mixed))
    return trained


def score_rows(network: ProbeNetwork, features: Tensor) -> Tensor:
    """Q of every row, (N,) float32, without a float32 copy of all the features."""
    with torch.inference_mode():
        return torch.cat([network(part) for part in features.split(ROWS_AT_A_TIME)])


@dataclass(frozen=True)
class _Split:
    held: Tensor
    chosen: bool
    mixed: int


def _check_tasks(data: Data, tasks: Sequence[ProbeTask]) -> None:
    if not tasks:
        raise ValueError("There is no probe to train: give at least one loss and one seed.")
    for name in dict.fromkeys(task.loss for task in tasks):
        losses.check_rewards(data.rewards, name)
    for task in tasks:
        if len(task.groups) != len(data.sizes) or not bool(task.groups.any()):
            raise ValueError(f"A probe ({task.loss}, seed {task.seed}) has no prompts to learn from.")


def _mixed_groups(data: Data) -> Tensor:
    return torch.from_numpy(mixed_prompts(data.rewards.numpy(), data.groups.numpy()))


def _held_out(data: Data, task: ProbeTask, settings: TrainingSettings) -> _Split:
    """Hold out whole prompts by lot, or none where the choice on them would be noise."""
    prompts = data.prompt_of_group
    own = torch.unique(prompts[task.groups])
    generator = torch.Generator().manual_seed(task.seed)
    count = int(len(own) * settings.held_out)
    chosen_prompts = own[torch.randperm(len(own), generator=generator)[:count]]
    held = task.groups & torch.isin(prompts, chosen_prompts)
    mixed = len(torch.unique(prompts[held & _mixed_groups(data)]))
    enough = count > 0 and mixed >= settings.minimum_mixed
    return _Split(held if enough else torch.zeros_like(held), enough, mixed)


def _start(data: Data, tasks: Sequence[ProbeTask], fitted: Tensor, settings: TrainingSettings) -> StackedNetworks:
    mean, scale = _statistics(data, fitted) if settings.standardize else (None, None)
    seeds = [task.seed for task in tasks]
    return StackedNetworks(data.features.shape[1], settings.hidden, seeds=seeds, mean=mean, scale=scale)


def _statistics(data: Data, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (M, D) of each probe's own training rows; constant features keep the scale 1."""
    # Many probes share their prompts (losses of one fold): the sums are taken once for each distinct choice.
    distinct, which = torch.unique(fitted, dim=0, return_inverse=True)
    shift = data.features[:ROWS_AT_A_TIME].double().mean(0)  # near the mean, so that the squares do not cancel
    count = torch.zeros(len(distinct), 1, dtype=torch.float64)
    first = torch.zeros(len(distinct), data.features.shape[1], dtype=torch.float64)
    second = torch.zeros_like(first)
    for rows, groups in zip(data.features.split(ROWS_AT_A_TIME), data.groups.split(ROWS_AT_A_TIME), strict=True):
        used, values = distinct[:, groups].double(), rows.double() - shift
        count += used.sum(1, keepdim=True)
        first += used @ values
        second += used @ values.square()
    mean = first / count
    variance = (second / count - mean.square()).clamp_min(0)
    scale = torch.where(variance > 1e-12 * (1 + (mean + shift).square()), variance.sqrt(), 1.0)
    return (mean + shift).float()[which], scale.float()[which]


def _batches(data: _Rows, settings: TrainingSettings, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (rows, chunk of each row): prompts cut into chunks by lot, chunks in random order."""
    order = torch.randperm(len(data.groups), generator=generator)
    order = order[torch.argsort(data.groups[order], stable=True)]  # by group, shuffled within
    sizes = data.sizes
    parts = (sizes + settings.chunk - 1) // settings.chunk
    first = sizes.cumsum(0) - sizes
    groups = data.groups[order]
    place = torch.arange(len(order)) - first[groups]
    # As even as can be: 12 samples in chunks of at most 10 are 6 and 6, not 10 and 2.
    chunk = (parts.cumsum(0) - parts)[groups] + place * parts[groups] // sizes[groups]
    count = int(parts.sum())
    shuffled = torch.randperm(count, generator=generator)
    chunk = shuffled[chunk]
    by_chunk = torch.argsort(chunk, stable=True)
    order, chunk = order[by_chunk], chunk[by_chunk]
    ends = torch.bincount(chunk, minlength=count).cumsum(0)
    for start in range(0, count, settings.chunks_per_batch):
        stop = min(start + settings.chunks_per_batch, count)
        rows = slice(int(ends[start - 1]) if start else 0, int(ends[stop - 1]))
        yield order[rows], chunk[rows] - start


def _loss_values(
    name: str, scores: Tensor, rewards: Tensor, chunks: Tensor, weights: Tensor, settings: TrainingSettings
) -> Tensor:
    """(M,) losses of one kind on a batch."""
    loss = losses.find_loss(name)
    if loss.reads == "rows":
        return loss.function(scores, rewards, weights=weights)
    if loss.reads == "pairs":  # the pairs that the rewards imply within each chunk
        return losses.pairwise_logistic(scores, rewards, chunks, weights=weights)
    if name == "policy_gradient":
        # The baseline moves the value only (PAPER, equations): the mean reward makes it the advantage of the policy.
        baseline = float(rewards.mean())
        return loss.function(scores, rewards, chunks, beta=settings.training_beta, baseline=baseline, weights=weights)
    return loss.function(scores, rewards, chunks, weights=weights)


def _by_loss(tasks: Sequence[ProbeTask]) -> dict[str, Tensor]:
    names = [task.loss for task in tasks]
    return {name: torch.tensor([m for m, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}


class _HeldOutWatch:
    """Looks at every probe's own loss on its held-out prompts and keeps the weights of its best step."""

    def __init__(self, data: Data, tasks: Sequence[ProbeTask], held: Tensor, settings: TrainingSettings) -> None:
        self.data = data
        self.settings = settings
        self.columns = _by_loss(tasks)
        self.active = held.any(1)
        rows = held.any(0)[data.groups].nonzero()[:, 0]
        self.rows = rows
        groups = data.groups[rows]
        self.weights = held[:, groups].T.float()
        self.groups = torch.unique(groups, return_inverse=True)[1]
        self.best = torch.full((len(tasks),), math.inf)
        self.steps = [0] * len(tasks)
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def look(self, stack: StackedNetworks, step: int) -> None:
        if not self.active.any():
            return
        scores = torch.cat([stack(self.data.features[part]) for part in self.rows.split(ROWS_AT_A_TIME)])
        values = torch.full_like(self.best, math.inf)
        for name, columns in self.columns.items():
            values[columns] = _loss_values(
                name,
                scores[:, columns],
                self.data.rewards[self.rows],
                self.groups,
                self.weights[:, columns],
                self.settings,
            )
        better = self.active & (values < self.best)
        self.best = torch.where(better, values, self.best)
        parameters = list(stack.parameters())
        if not self.kept:
            self.kept = [p.detach().clone() for p in parameters]
        for kept, parameter in zip(self.kept, parameters, strict=True):
            kept[better] = parameter.detach()[better]
        for m in better.nonzero()[:, 0].tolist():
            self.steps[m] = step

    @torch.no_grad()
    def restore(self, stack: StackedNetworks, last_step: int) -> None:
        """Give every watched probe its best weights back; the others keep their last."""
        for m in (~self.active).nonzero()[:, 0].tolist():
            self.steps[m] = last_step
        for kept, parameter in zip(self.kept, stack.parameters(), strict=False):
            parameter[self.active] = kept[self.active]


def _descend(
    data: Data,
    tasks: Sequence[ProbeTask],
    fitted: Tensor,
    stack: StackedNetworks,
    watch: _HeldOutWatch,
    settings: TrainingSettings,
    seed: int,
    progress: bool,
) -> None:
    columns = _by_loss(tasks)
    biases = list(stack.biases)
    optimiser = torch.optim.AdamW(
        [
            {"params": list(stack.weights), "weight_decay": settings.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        eps=ADAM_EPSILON,
    )
    generator = torch.Generator().manual_seed(seed)
    # No probe learns from the rest: the passes leave it out.
    used = fitted.any(0)[data.groups].nonzero()[:, 0]
    seen, dense = torch.unique(data.groups[used], return_inverse=True)
    part = _Rows(dense, torch.bincount(dense))
    chunks = int(((part.sizes + settings.chunk - 1) // settings.chunk).sum())
    total = settings.steps or settings.epochs * math.ceil(chunks / settings.chunks_per_batch)
    step = 0
    with tqdm(total=total, desc="train   ", unit=" steps", disable=not progress, mininterval=0.5) as bar:
        watch.look(stack, 0)
        while step < total:
            for rows, chunk in _batches(part, settings, generator):
                at = used[rows]
                scores = stack(data.features[at])
                weights = fitted[:, seen[dense[rows]]].T.float()
                rewards = data.rewards[at]
                total_loss = torch.stack(
                    [
                        _loss_values(name, scores[:, c], rewards, chunk, weights[:, c], settings).sum()
                        for name, c in columns.items()
                    ]
                ).sum()
                optimiser.zero_grad()
                total_loss.backward()
                optimiser.step()
                step += 1
                bar.update()
                if step % settings.check_every == 0 or step == total:
                    watch.look(stack, step)
                if step == total:
                    break
    watch.restore(stack, total)


@dataclass(frozen=True)
class _Rows:
    """Groups and their sizes: what batches are cut from."""

    groups: Tensor
    sizes: Tensor


def _best_beta(data: Data, network: ProbeNetwork, held: Tensor, k: int, seed: int) -> float:
    """The temperature that earns most on the held-out groups; the smallest of equals."""
    rows = held[data.groups].nonzero()[:, 0]
    scores = score_rows(network, data.features[rows])
    groups = data.groups[rows].numpy()
    smallest = int(data.sizes[held].min())
    grid = reward_grid(
        scores.numpy(),
        data.rewards[rows].numpy(),
        groups,
        [min(k, smallest)],
        BETAS,
        draws=200,
        rng=np.random.default_rng(seed),
    )
    return BETAS[int(grid.values[0].mean(axis=1).argmax())]
