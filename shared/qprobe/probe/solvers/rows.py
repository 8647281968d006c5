"""Rows to solve on: named blocks of columns, rewards, and which rows are compared and left out together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Array = NDArray[Any]  # of a float type that is chosen by size

# Rewards are equal that differ by less than this share of the largest: the rounding of arithmetic.
ROUNDING = 1e-6
# Columns are constant whose deviation is less than this share of their mean: float32 rounds by 6e-8, a model by more.
LEAST_RELATIVE_DEVIATION = 1e-6
# Values that are converted to a wider type at a time, 64 MB of float64.
VALUES_AT_A_TIME = 2**23


class NothingToLearn(ValueError):
    """No prompt has rewards that differ, or no column does."""


@dataclass(frozen=True)
class Rows:
    """What a solver reads; nothing here is copied or converted.

    Args:
        blocks: named columns, each (N, D_b) of any float type; one array of (N, D) is a block named "features".
        rewards: (N,) float, any range.
        groups: (N,) int, the prompt of each row: what is compared.
        clusters: (N,) int, what is left out together; whole prompts. None: every prompt by itself.
        weights: (N,) float > 0, of each row; None: 1.
        anchors: named untrained scores, each (N,) float, higher is better.

    Raises:
        ValueError: lengths that differ, values that are no finite numbers, a prompt in two clusters, a name used twice.
    """

    blocks: Mapping[str, Array]
    rewards: Floats
    groups: Integers
    clusters: Integers
    weights: Floats
    anchors: Mapping[str, Floats]
    order: Integers = field(init=False, repr=False)

    def __init__(
        self,
        blocks: Mapping[str, ArrayLike] | ArrayLike,
        rewards: ArrayLike,
        groups: ArrayLike,
        *,
        clusters: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        anchors: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        named = blocks if isinstance(blocks, Mapping) else {"features": blocks}
        count = len(np.atleast_1d(np.asarray(rewards)))
        set_ = object.__setattr__
        set_(self, "blocks", {name: _block(block, name, count) for name, block in named.items()})
        set_(self, "rewards", _column(rewards, "rewards", count))
        set_(self, "groups", _dense(groups, "groups", count))
        set_(self, "clusters", self.groups if clusters is None else _dense(clusters, "clusters", count))
        set_(self, "weights", np.ones(count) if weights is None else _column(weights, "weights", count))
        set_(self, "anchors", {name: _column(values, name, count) for name, values in (anchors or {}).items()})
        if not self.blocks or count == 0:
            raise ValueError("There is nothing to learn from: give at least one block of columns and one row.")
        if not bool((self.weights > 0).all()):
            raise ValueError("weights holds a value that is not above 0: leave such rows out.")
        pairs = np.unique(np.stack([self.groups, self.clusters]), axis=1)
        if pairs.shape[1] != self.groups.max() + 1:
            raise ValueError("A prompt is in two clusters: a cluster is left out whole, so it holds whole prompts.")
        set_(self, "order", np.lexsort((np.arange(count), self.groups, self.clusters)))

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def mixed(self) -> NDArray[np.bool_]:
        """(N,) bool, rows of prompts whose rewards differ: where there is something to choose."""
        top, bottom = np.full(self.groups.max() + 1, -np.inf), np.full(self.groups.max() + 1, np.inf)
        np.maximum.at(top, self.groups, self.rewards)
        np.minimum.at(bottom, self.groups, self.rewards)
        return np.asarray((top - bottom > ROUNDING * np.abs(self.rewards).max())[self.groups])

    def take(self, rows: NDArray[np.bool_] | Integers) -> Rows:
        """Some of the rows; their blocks are copied."""
        return Rows(
            {name: block[rows] for name, block in self.blocks.items()},
            self.rewards[rows],
            self.groups[rows],
            clusters=self.clusters[rows],
            weights=self.weights[rows],
            anchors={name: values[rows] for name, values in self.anchors.items()},
        )


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of each column of a block, so that all its columns together have the variance 1.

    Args:
        mean: (D,) float64.
        factor: (D,) float64, what a column less its mean is multiplied by; 0 for constant columns.
    """

    mean: Floats
    factor: Floats

    @classmethod
    def of(cls, block: Array, weights: Floats) -> Scale:
        """Weighted statistics of a block (N, D)."""
        share = weights / weights.sum()
        mean = np.zeros(block.shape[1])
        for rows in pieces(block):
            mean += share[rows] @ block[rows].astype(np.float64)
        variance = np.zeros_like(mean)
        for rows in pieces(block):
            variance += share[rows] @ np.square(block[rows].astype(np.float64) - mean)
        deviation = np.sqrt(variance)
        varies = deviation > LEAST_RELATIVE_DEVIATION * np.abs(mean)
        factor = np.zeros_like(mean)
        factor[varies] = 1 / (deviation[varies] * np.sqrt(varies.sum()))
        return cls(mean, factor)


def pieces(block: Array) -> Iterator[slice]:
    """Slices of rows that are converted at a time."""
    step = max(1, VALUES_AT_A_TIME // max(1, block.shape[1]))
    return (slice(start, min(start + step, len(block))) for start in range(0, len(block), step))


def _block(values: ArrayLike, name: str, count: int) -> Array:
    array = np.asarray(values)
    if array.ndim == 1 and array.dtype.kind in "fiub":
        array = array[:, None]
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    if array.dtype.kind != "f" or array.ndim != 2:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}: give (N, D) of one float type.")
    if len(array) != count:
        raise ValueError(f"{name} has {len(array)} rows, rewards has {count}: give one of each per row.")
    for rows in pieces(array):
        finite = np.isfinite(array[rows]).all(axis=1)
        if not finite.all():
            at = rows.start + int((~finite).argmax())
            hint = "; float16 holds no more than 65504" if array.dtype == np.float16 else ""
            raise ValueError(f"{name} holds NaN or infinity in row {at}{hint}: remove or repair such rows first.")
    return array


def _column(values: ArrayLike, name: str, count: int) -> Floats:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.shape != (count,):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}: give one number for each of the {count} rows."
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity in row {int((~np.isfinite(array)).argmax())}: repair it first.")
    return array


def _dense(values: ArrayLike, name: str, count: int) -> Integers:
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}: give one whole number for each of {count} rows."
        )
    return np.unique(array, return_inverse=True)[1].astype(np.int64)
