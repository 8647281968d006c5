"""Columns of numbers, checked."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Elements of the largest array that a Monte Carlo step holds: 32 MB of int64.
BLOCK = 4_000_000


def _columns(**columns: ArrayLike) -> list[Floats]:
    """The columns as float64 arrays of one length, none empty, no NaN."""
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    first, length = next((name, array.size) for name, array in arrays.items())
    for name, array in arrays.items():
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{name} has shape {array.shape}: give one dimension with at least one value")
        if array.size != length:
            raise ValueError(f"{name} has {array.size} rows, {first} has {length}: give one of each per row")
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array)))
            raise ValueError(f"{name} holds {array[row]} in row {row}: drop such rows first, knowingly")
    return list(arrays.values())


def _rows_by_prompt(groups: ArrayLike, length: int) -> tuple[Integers, list[Integers]]:
    """Sorted prompt ids and the row numbers of each."""
    ids = np.asarray(groups)
    if ids.shape != (length,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"groups is {ids.dtype} of shape {ids.shape}: give one integer prompt id for each of {length} rows"
        )
    prompts, starts = np.unique(np.sort(ids), return_index=True)
    return prompts.astype(np.int64), np.split(np.argsort(ids, kind="stable"), starts[1:])
