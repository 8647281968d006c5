"""Passes over the data that many probes share: batches of chunks, and an optimiser that knows each probe's own steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from qprobe.probe.network import StackedNetworks
from qprobe.probe.training.data import Data, RowReader
from qprobe.probe.training.objective import HeldOutWatch, columns_of, loss_values
from qprobe.probe.training.settings import TrainingSettings

# What is equal within every prompt has no gradient in the losses that compare within prompts, and rounding leaves it one of
# some 1e-9. At Adam's usual epsilon of 1e-8 that noise walks nearly as far as a signal does.
ADAM_EPSILON = 1e-6
ADAM_DECAY = (0.9, 0.999)


class StackedAdamW:
    """AdamW for networks that train together, each with its own learning rate and its own count of steps.

    A network of which a batch holds no row makes no step: momentum and weight decay would move it all the same.

    Args:
        weights: parameters (M, ...) that decay.
        biases: parameters (M, ...) that do not.
        learning_rates: (M,) float > 0.
        weight_decay: >= 0, times the learning rate.

    Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), as torch.optim.AdamW computes it.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], learning_rates: Tensor, weight_decay: float
    ) -> None:
        self._parameters = [*((p, weight_decay) for p in weights), *((p, 0.0) for p in biases)]
        self._first = [torch.zeros_like(p) for p, _ in self._parameters]
        self._second = [torch.zeros_like(p) for p, _ in self._parameters]
        self._rates = learning_rates.double()
        self._steps = torch.zeros(len(learning_rates), dtype=torch.float64)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], taught: Tensor) -> None:
        """One step of the networks that were taught.

        Args:
            gradients: of the weights, then of the biases.
            taught: (M,) bool.
        """
        self._steps += taught
        counts = self._steps.clamp_min(1)
        first_decay, second_decay = ADAM_DECAY
        rates = self._rates * taught
        size = rates / (1 - first_decay**counts)
        correction = (1 - second_decay**counts).sqrt()
        for (parameter, decay), gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            first.lerp_(gradient, _like(taught * (1 - first_decay), parameter))
            second.lerp_(gradient.square(), _like(taught * (1 - second_decay), parameter))
            if decay:
                parameter *= _like(1 - rates * decay, parameter)
            denominator = (second.sqrt() / _like(correction, parameter)).add_(ADAM_EPSILON)
            parameter.addcdiv_(first * _like(size, parameter), denominator, value=-1)


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    return values.to(parameter.dtype).reshape(-1, *[1] * (parameter.ndim - 1))


@dataclass(frozen=True)
class Passes:
    """The rows that some probes learn from, cut into batches.

    Args:
        rows: (n,) int64, the rows that any probe learns from, ascending.
        groups: (n,) int64, dense ids of their groups.
        weights: (g, M) float, 1 where a group is a probe's own.
        sizes: (g,) int64, rows of each group.
        chunk: most rows of a chunk.
        batch: chunks of a batch.
    """

    rows: Tensor
    groups: Tensor
    weights: Tensor
    sizes: Tensor
    chunk: int
    batch: int

    @classmethod
    def over(cls, data: Data, fitted: Tensor, settings: TrainingSettings) -> Passes:
        """Passes over the groups (M, G) that probes learn from."""
        rows = fitted.any(0)[data.groups].nonzero()[:, 0]
        seen, groups = torch.unique(data.groups[rows], return_inverse=True)
        sizes, weights = torch.bincount(groups), fitted[:, seen].T.float()
        chunks = _chunks(sizes, settings.chunk)
        own = float((chunks @ weights.long()).double().mean())
        # So many that each probe has chunks_per_batch of its own among them, as if it trained alone.
        batch = min(math.ceil(settings.chunks_per_batch * int(chunks.sum()) / own), int(chunks.sum()))
        return cls(rows, groups, weights, sizes, settings.chunk, batch)

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(int(_chunks(self.sizes, self.chunk).sum()) / self.batch)

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """(place in `rows`, ascending; chunk of each) of every batch: prompts cut into chunks by lot, in random order."""
        order = torch.randperm(len(self.groups), generator=generator)
        order = order[torch.argsort(self.groups[order], stable=True)]  # by group, shuffled within
        parts = _chunks(self.sizes, self.chunk)
        first = self.sizes.cumsum(0) - self.sizes
        groups = self.groups[order]
        place = torch.arange(len(order)) - first[groups]
        # As even as can be: 12 samples in chunks of at most 10 are 6 and 6, not 10 and 2.
        chunk = (parts.cumsum(0) - parts)[groups] + place * parts[groups] // self.sizes[groups]
        count = int(parts.sum())
        shuffled = torch.randperm(count, generator=generator)
        chunk = shuffled[chunk]
        by_chunk = torch.argsort(chunk, stable=True)
        order, chunk = order[by_chunk], chunk[by_chunk]
        ends = torch.bincount(chunk, minlength=count).cumsum(0)
        for start in range(0, count, self.batch):
            stop = min(start + self.batch, count)
            rows = slice(int(ends[start - 1]) if start else 0, int(ends[stop - 1]))
            at, ascending = order[rows].sort()  # neighbours in memory are read together
            yield at, chunk[rows][ascending] - start


def _chunks(sizes: Tensor, chunk: int) -> Tensor:
    return (sizes + chunk - 1) // chunk


def descend(
    data: Data,
    names: Sequence[str],
    passes: Passes,
    stack: StackedNetworks,
    watch: HeldOutWatch,
    learning_rates: Tensor,
    settings: TrainingSettings,
    seed: int,
    bar: tqdm[None],
) -> Tensor:
    """Train the networks of a stack, and leave each at its best watched step, or at the last.

    Returns: (M,) bool, the networks whose weights were no finite numbers when training ended.
    """
    columns = columns_of(names)
    parameters = [*stack.weights, *stack.biases]
    optimiser = StackedAdamW(list(stack.weights), list(stack.biases), learning_rates, settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    read = RowReader(data.features)
    total = total_steps(passes, settings)
    step = 0
    watch.look(stack, 0)
    while step < total and not watch.finished:
        for at, chunks in passes.epoch(generator):
            rows = passes.rows[at]
            weights = passes.weights[passes.groups[at]]
            values = loss_values(columns, stack(read(rows)), data.rewards[rows], chunks, weights, settings)
            optimiser.step(torch.autograd.grad(values.sum(), parameters), weights.any(0))
            step += 1
            bar.update()
            if step % watch.every == 0 or step == total:
                watch.look(stack, step)
            if step == total or watch.finished:
                break
    bar.total -= total - step  # what was not needed
    finite = [torch.isfinite(p.detach()).flatten(1).all(1) for p in parameters]
    watch.restore(stack, step)
    return ~torch.stack(finite).all(0)


def total_steps(passes: Passes, settings: TrainingSettings) -> int:
    return settings.steps or settings.epochs * passes.batches_per_epoch
