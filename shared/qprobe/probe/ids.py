"""Ids of any kind as dense numbers, without an array of fixed-width text: there every id takes the space of the longest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor


def dense_ids(ids: ArrayLike | Iterable[Any] | Tensor, name: str = "prompts") -> np.ndarray:
    """Number ids 0..G-1, equal ids alike.

    Ids are told apart as the keys of a dictionary are: 1 and "1" are two ids, 1 and 1.0 are one. They are numbered in
    ascending order where they have one, so that the order of rows does not matter; in order of appearance otherwise.

    Args:
        ids: N ids, each text, a number, a tuple or whatever else is hashable: a sequence, a one-dimensional array or tensor,
            a column of pandas or Arrow.
        name: what the ids are called in messages.

    Returns: (N,) int64.

    Raises:
        ValueError: an id is missing (None, NaN) or not hashable, or `ids` is no column of ids.
    """
    if isinstance(ids, Tensor):
        ids = np.asarray(ids.detach().cpu().tolist())  # bfloat16 has no numpy type
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise ValueError(f"{name} has shape {ids.shape}: give one id for each row.")
    if isinstance(ids, str | bytes | Mapping | Set) or not isinstance(ids, Iterable):
        raise ValueError(f"{name} is {type(ids).__name__}: give one id for each row, in their order.")
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "biu":
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    numbers: dict[Any, int] = {}
    codes = []
    for row, given in enumerate(ids):
        entry = _plain(given)
        try:
            codes.append(numbers.setdefault(entry, len(numbers)))
        except TypeError as error:
            raise ValueError(
                f"{name} holds {type(entry).__name__} in row {row}: an id is text, a number or a tuple of these."
            ) from error
    for entry, number in numbers.items():
        if _missing(entry):
            raise ValueError(f"{name} holds {entry} in row {codes.index(number)}: give every row the id of its prompt.")
    return _in_order(list(numbers))[np.array(codes, dtype=np.int64)]


def _plain(entry: Any) -> Any:
    """An id that compares by its value: scalars of torch compare by identity, those of Arrow have no order."""
    if isinstance(entry, Tensor) and entry.numel() == 1:
        return entry.item()
    return entry.as_py() if hasattr(entry, "as_py") else entry


def _missing(entry: Any) -> bool:
    """None, NaN, NaT, and pandas' NA, which says of no comparison whether it holds."""
    try:
        return entry is None or bool(entry != entry)
    except TypeError:
        return True


def _in_order(distinct: list[Any]) -> np.ndarray:
    """(G,) int64, the place of every id among all."""
    places = np.arange(len(distinct))
    try:
        order = sorted(range(len(distinct)), key=distinct.__getitem__)
    except TypeError:  # numbers beside text
        return places
    ranks = np.empty_like(places)
    ranks[order] = places
    return ranks
