"""What probes that train together are taught by: their losses on a batch, and looks at them on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qprobe.probe import losses
from qprobe.probe.network import StackedNetworks
from qprobe.probe.training.data import ROWS_AT_A_TIME, Data, RowReader
from qprobe.probe.training.settings import TrainingSettings

# Chunks of each held-out prompt that a look reads. What a look cannot know is other prompts, not other samples of these.
CHUNKS_LOOKED_AT = 4


def columns_of(names: Sequence[str]) -> dict[str, Tensor]:
    """The probes of every loss, by their number."""
    return {name: torch.tensor([m for m, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}


def loss_values(
    columns: dict[str, Tensor],
    scores: Tensor,
    rewards: Tensor,
    chunks: Tensor,
    weights: Tensor,
    settings: TrainingSettings,
) -> Tensor:
    """Every probe's own loss on the same rows.

    Args:
        columns: of `columns_of`.
        scores: (N, M) float, Q values.
        rewards: (N,) float.
        chunks: (N,) int64, which rows are compared.
        weights: (N, M) float, 1 where a row is a probe's own, else 0.

    Returns: (M,).
    """
    if len(columns) == 1:
        (name,) = columns
        return _loss_values(name, scores, rewards, chunks, weights, settings)
    values = [_loss_values(name, scores[:, c], rewards, chunks, weights[:, c], settings) for name, c in columns.items()]
    order = torch.cat(list(columns.values()))
    return torch.cat(values)[torch.argsort(order)]


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


class HeldOutWatch:
    """Looks at every probe's own loss on its held-out prompts and keeps the weights of its best step.

    A look scores the prompts that any probe holds out, which many seeds together make nearly all, so it is bounded twice:
    it reads at most CHUNKS_LOOKED_AT chunks of a prompt, and `every` steps lie between two looks, so many that looking
    (forward) costs at most about a quarter of what the steps between (forward and backward) cost.

    Args:
        data: the rows.
        losses: M names.
        held: (M, G) bool, the groups that each probe holds out; a probe without any is not watched.
        settings: of the training.
        rows_per_batch: rows of a step, on average.
    """

    def __init__(
        self, data: Data, losses: Sequence[str], held: Tensor, settings: TrainingSettings, rows_per_batch: float
    ) -> None:
        self.data = data
        self.settings = settings
        self.columns = columns_of(losses)
        self.watched = held.any(1)
        self.rows, chunks = _held_out_chunks(data, held.any(0), settings.chunk)
        self.weights = held[:, data.groups[self.rows]].T.float()
        self.chunks = torch.unique(chunks, return_inverse=True)[1]
        self.every = max(settings.check_every, math.ceil(2 * len(self.rows) / rows_per_batch))
        self.best = torch.full((len(held),), math.inf)
        self.steps = [0] * len(held)
        self.in_vain = torch.zeros(len(held), dtype=torch.int64)
        self.kept: list[Tensor] = []
        self._read = RowReader(data.features)

    @torch.no_grad()
    def look(self, stack: StackedNetworks, step: int) -> None:
        """Compare, and keep what is better than ever before."""
        if not self.watched.any():
            return
        scores = torch.empty(len(self.rows), len(self.best))
        for part, own in zip(self.rows.split(ROWS_AT_A_TIME), scores.split(ROWS_AT_A_TIME), strict=True):
            own.copy_(stack(self._read(part)))
        rewards = self.data.rewards[self.rows]
        values = loss_values(self.columns, scores, rewards, self.chunks, self.weights, self.settings)
        # A probe that has waited long enough is done, whatever the others make training go on for: its end is its own.
        better = self.watched & ~self._done & (values < self.best)
        self.in_vain = torch.where(better, 0, self.in_vain + 1)
        self.best = torch.where(better, values, self.best)
        parameters = list(stack.parameters())
        if not self.kept:
            self.kept = [p.detach().clone() for p in parameters]
        for kept, parameter in zip(self.kept, parameters, strict=True):
            kept[better] = parameter.detach()[better]
        for m in better.nonzero()[:, 0].tolist():
            self.steps[m] = step

    @property
    def finished(self) -> bool:
        """Whether training may end: every probe is watched, and was not better for `patience` looks."""
        return bool(self._done.all())

    @property
    def _done(self) -> Tensor:
        patience = math.inf if self.settings.patience is None else self.settings.patience
        return self.watched & (self.in_vain >= patience)

    @torch.no_grad()
    def restore(self, stack: StackedNetworks, last_step: int) -> None:
        """Give every watched probe its best weights back; the others keep their last."""
        for m in (~self.watched).nonzero()[:, 0].tolist():
            self.steps[m] = last_step
        for kept, parameter in zip(self.kept, stack.parameters(), strict=False):
            parameter[self.watched] = kept[self.watched]


def _held_out_chunks(data: Data, held: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows that a look reads, ascending, and the chunk of each: as in training, but always the same.

    A prompt's rows are dealt to its chunks in turn, so that rows which were sorted by reward still make mixed chunks.
    """
    rows = held[data.groups].nonzero()[:, 0]
    groups = data.groups[rows]
    order = torch.argsort(groups, stable=True)
    kept = torch.where(held, data.sizes, 0)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(rows)) - (kept.cumsum(0) - kept)[groups[order]]
    parts = (data.sizes + size - 1) // size
    number = place % parts[groups]
    looked_at = number < CHUNKS_LOOKED_AT
    return rows[looked_at], ((parts.cumsum(0) - parts)[groups] + number)[looked_at]
