"""Stages in this process: batch after batch, each written as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

Batch = TypeVar("Batch")
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Work(Generic[Batch]):
    """One batch of a stage: what it holds, how many rows it makes, and whether they are there already."""

    batch: Batch
    rows: int
    done: bool


def run_stage(
    name: str,
    works: Sequence[Work[Batch]],
    stage: Callable[[Iterable[Batch]], Iterator[tuple[Batch, Rows]]],
    write: Callable[[Batch, Rows], None],
    *,
    unit: str = "rows",
    progress: bool = True,
) -> int:
    """Do the batches that are not done, write each one's rows as they come, and show rate and time left.

    Args:
        name: of the stage, for the progress bar.
        works: all batches of the table, in order.
        stage: takes the batches left and yields each with its rows, in any order; it may work on several at once.
        write: stores one batch's rows, whole or not at all.

    Returns: the number of rows that were made now.
    """
    left = [work for work in works if not work.done]
    if not left:
        return 0
    total = sum(work.rows for work in works)
    rows_of = {id(work.batch): work.rows for work in left}
    made = sum(rows_of.values())
    with tqdm(
        total=total,
        initial=total - made,
        desc=f"{name:<8}",
        unit=f" {unit}",
        disable=not progress,
        smoothing=0.1,
        mininterval=0.5,
    ) as bar:
        for batch, rows in stage(work.batch for work in left):
            write(batch, rows)
            bar.update(rows_of.pop(id(batch)))
    if rows_of:
        raise RuntimeError(
            f"The stage {name} returned without {len(rows_of)} of {len(left)} batches: nothing was lost, run it again."
        )
    return made
