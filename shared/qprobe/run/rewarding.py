"""The stage that rewards a pool's completions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from qprobe import store
from qprobe.run.pools import Keys, Pool, Reward, RewardBatch, completions_of
from qprobe.run.runners.local import Work, run_stage
from qprobe.run.stages import MANY
from qprobe.store.table import Table

SAID = ("reward", "verdict")  # what later stages read of a reward


@runtime_checkable
class Asks(Protocol):
    """A reward stage that asks somebody whose replies may be of no use: then it gives a verdict of `unread` for now. The next
    command asks again."""

    unread: frozenset[str]

    def replies(self, verdict: str, detail: str) -> tuple[int, int]:
        """How many replies a row rests on, and how many of them could not be read."""


def reward(pool: Pool, reward_stage: Reward, progress: bool = True) -> None:
    """Reward the pool's completions."""
    table = pool.rewards(reward_stage)
    table.check_inputs()
    begun = False
    again = {keys for keys in pool.own_batches if table.has(keys) and _is_unread(table, keys, reward_stage)}

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, pa.Table]]:
        nonlocal begun
        waiting: dict[Keys, Keys] = {}  # the runner knows a batch by its own object

        def reward_batches() -> Iterator[RewardBatch]:
            for keys in batches:
                waiting[keys] = keys
                rows = completions_of(pool, keys)
                yield RewardBatch(keys, [(r["task_id"], r["sample"], r["completion"]) for r in rows])

        for batch, rewarded in reward_stage(reward_batches()):
            if batch.keys not in waiting:
                raise RuntimeError(
                    f"The reward {reward_stage.name} gave the batch of {batch.keys[0]} twice, or was never given it."
                )
            if len(rewarded) != len(batch.rows):
                raise RuntimeError(
                    f"The reward {reward_stage.name} gave {len(rewarded)} rows for {len(batch.rows)} completions."
                )
            columns = {
                "task_id": [task_id for task_id, _, _ in batch.rows],
                "sample": [number for _, number, _ in batch.rows],
                "reward": [_finite(r.reward, reward_stage.name) for r in rewarded],
                "verdict": [r.verdict for r in rewarded],
                "seconds": [r.seconds for r in rewarded],
                "detail": [r.detail for r in rewarded],
            }
            if not begun:  # a reward that fails at once is corrected, and must not meet a table of its former self
                table.begin()
                begun = True
            yield waiting.pop(batch.keys), pa.table(columns, schema=store.REWARDS)

    def write(keys: Keys, rows: pa.Table) -> None:
        if keys in again:
            if rows.select(SAID).equals(table.read([keys], SAID)):
                return
            table.note(store.REMADE, (table.noted(store.REMADE) or 0) + 1)
        table.write(keys, rows)

    works = [Work(keys, pool.rows(keys), table.has(keys) and keys not in again) for keys in pool.own_batches]
    run_stage(f"reward {pool.kind}", works, stage, write, progress=progress)
    unread, asked = _replies(pool, reward_stage)
    if 2 * unread > asked:
        raise RuntimeError(
            f"{_unread_words(unread, asked, pool, reward_stage)} Most could not, so nothing is concluded from them."
        )
    if said := unread_words(pool, reward_stage):
        tqdm.write(said, file=sys.stderr)


def unread_words(pool: Pool, reward_stage: Reward) -> str | None:
    """A sentence on the replies behind a pool's rewards where a tenth or more could not be read; None where fewer are."""
    unread, asked = _replies(pool, reward_stage)
    return _unread_words(unread, asked, pool, reward_stage) if unread and unread >= MANY * asked else None


def _unread_words(unread: int, asked: int, pool: Pool, reward_stage: Reward) -> str:
    return (
        f"{unread} of {asked} replies of {reward_stage.name} on {pool.name} could not be read: their comparisons count half for "
        "now, and the same command asks for them again."
    )


def _replies(pool: Pool, reward_stage: Reward) -> tuple[int, int]:
    """How many replies behind a pool's rewards could not be read, and of how many."""
    if not isinstance(reward_stage, Asks):
        return 0, 0
    rows = pool.rewards(reward_stage).read(pool.own_batches, ["verdict", "detail"])
    counted = [reward_stage.replies(*row) for row in zip(*(column.to_pylist() for column in rows), strict=True)]
    return sum(unread for _, unread in counted), sum(asked for asked, _ in counted)


def _is_unread(table: Table, keys: Keys, reward_stage: Reward) -> bool:
    if not isinstance(reward_stage, Asks):
        return False
    return not reward_stage.unread.isdisjoint(table.read([keys], ["verdict"])["verdict"].to_pylist())


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):  # a user's function may give anything
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(f"The reward {name} gave {value!r}: a reward is a finite number.")
    return number
