"""Rows to learn from, read in pieces: features may be larger than memory, and are nowhere copied whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qprobe.probe import losses
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.own_state import own_state
from qprobe.probe.ranking import Distinct, mixed_prompts

# Rows that are read at a time outside training steps: 16 MB of float32 at 4,096 features. Larger pieces leave the caches,
# and memory that the allocator returns after every piece costs more than the arithmetic.
ROWS_AT_A_TIME = 1024

# Features are constant where their standard deviation is less than this share of their mean: float32 rounds by 6e-8, and
# sums of a model's layers by some times that ...
LEAST_RELATIVE_DEVIATION = 1e-6
# ... or where it is so small that weights which make up for it would overflow.
LEAST_DEVIATION = 1e-36


@dataclass(frozen=True)
class Data:
    """Rows to learn from.

    Args:
        features: (N, D) float16 or float32.
        rewards: (N,) float32.
        groups: (N,) int64, dense ids 0..G-1 of what is compared: a prompt's completions, or one preference pair.
        prompts: (G,) int64, the prompt of each group; None where every group is a prompt of its own.
        distinct: which rows are copies of one completion; None where that is unknown, and each counts as its own.

    Raises:
        ValueError: lengths that differ, values that are not finite, groups that are not dense.
    """

    features: Tensor
    rewards: Tensor
    groups: Tensor
    prompts: Tensor | None = None
    distinct: Distinct | None = None
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
        if self.rewards.ndim != 1:
            raise ValueError(f"rewards has shape {tuple(self.rewards.shape)}: give one number for each row.")
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
    def mixed(self) -> Tensor:
        """(G,) bool, the groups with good and bad completions, copies counted once."""
        rewards, groups = self.rewards.numpy(), self.groups.numpy()
        if self.distinct is not None:
            rewards, groups = self.distinct.mean(rewards), self.distinct.groups
        return torch.from_numpy(mixed_prompts(rewards, groups))

    @property
    def prompt_of_group(self) -> Tensor:
        return torch.arange(len(self.sizes)) if self.prompts is None else self.prompts


class RowReader:
    """Gathers rows of the features as float32, into memory that it keeps: fresh pages for every batch cost more than reading.

    Args:
        features: (N, D) of any float type.
    """

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self._stored = torch.empty(0, features.shape[1], dtype=features.dtype)
        self._read = self._stored.float()

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, D) float32 of the rows (n,); what the call before gave is overwritten.

        Ascending rows are read fastest.
        """
        if len(rows) > len(self._read):
            shape = (len(rows), self._features.shape[1])
            self._stored = torch.empty(shape, dtype=self._features.dtype)
            self._read = self._stored if self._stored.dtype == torch.float32 else torch.empty(shape)
        stored = self._stored[: len(rows)]
        torch.index_select(self._features, 0, rows, out=stored)
        if stored.dtype == torch.float32:
            return stored
        return self._read[: len(rows)].copy_(stored)


@own_state()
def score_rows(network: ProbeNetwork, features: Tensor, rows: Tensor | None = None) -> Tensor:
    """Q of rows, without a float32 copy of all the features.

    Args:
        network: the probe.
        features: (N, D) float.
        rows: (n,) int64, which of them; None scores all.

    Returns: (n,) float32.
    """
    rows = torch.arange(len(features)) if rows is None else rows
    read, scores = RowReader(features), torch.empty(len(rows))
    with torch.inference_mode():
        # Into one tensor: results kept one by one between pieces that come and go leave holes, which add up to a copy of all.
        for part, own in zip(rows.split(ROWS_AT_A_TIME), scores.split(ROWS_AT_A_TIME), strict=True):
            own.copy_(network(read(part)))
    return scores


def statistics(data: Data, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each probe's own training rows.

    Args:
        data: the rows.
        fitted: (M, G) bool, the groups that each probe trains on.

    Returns: two tensors (M, D) float32; the scale of constant features is 1. So are those called that differ by no more
        than float32 rounds, a millionth of their mean, or by less than float32 has a reciprocal for.
    """
    # Many probes share their prompts (losses of one fold): the sums are taken once for each distinct choice.
    distinct, which = torch.unique(fitted, dim=0, return_inverse=True)
    count = torch.zeros(len(distinct), 1, dtype=torch.float64)
    first = torch.zeros(len(distinct), data.features.shape[1], dtype=torch.float64)
    second = torch.zeros_like(first)
    rows = distinct.any(0)[data.groups].nonzero()[:, 0]
    read = RowReader(data.features)
    shift = read(rows[:ROWS_AT_A_TIME]).double().mean(0)  # near the mean, so that the squares do not cancel
    room = torch.empty(min(len(rows), ROWS_AT_A_TIME), len(shift), dtype=torch.float64)
    for part in rows.split(ROWS_AT_A_TIME):
        used, values = distinct[:, data.groups[part]].double(), room[: len(part)].copy_(read(part)).sub_(shift)
        count += used.sum(1, keepdim=True)
        first += used @ values
        second += used @ values.square_()
    mean = first / count
    variance = (second / count - mean.square()).clamp_min(0)
    varies = (variance > LEAST_RELATIVE_DEVIATION**2 * (mean + shift).square()) & (variance > LEAST_DEVIATION**2)
    scale = torch.where(varies, variance.sqrt(), 1.0)
    return (mean + shift).float()[which], scale.float()[which]
