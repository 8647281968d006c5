"""The stage of rewards: whole batches in any order, none of a reward that fails or breaks its promise."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from qprobe.run import rewarding, stages
from qprobe.run.pools import Pool, RewardBatch, RewardRow


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    made: Pool = fakes.pool(tmp_path)
    return made


def test_a_part_is_written_as_soon_as_its_batch_is_done(
    pool: Pool, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.sample(pool, progress=False)
    table = pool.rewards(fakes.Reward())
    reward = fakes.Reward()
    seen = []

    def rows(batch: RewardBatch) -> Any:
        seen.append(len(table.parts()))
        return fakes.Reward().rows(batch)

    monkeypatch.setattr(reward, "rows", rows)
    rewarding.reward(pool, reward, progress=False)
    assert seen == [0, 1, 2, 3]


def test_rewards_may_come_in_any_order_of_batches(fakes: ModuleType, tmp_path: Path) -> None:
    tables = []
    for reward in (fakes.Reward(), fakes.Reward(reverse=True)):
        pool = fakes.pool(tmp_path / str(reward.reverse))
        stages.sample(pool, progress=False)
        rewarding.reward(pool, reward, progress=False)
        tables.append(pool.rewards(reward).read(pool.batches))
    assert reward.calls == [1, 3, 3, 3]  # really reversed
    assert tables[0].equals(tables[1])


def test_a_reward_that_fails_writes_no_row_of_its_batch_and_the_others_stay(pool: Pool, fakes: ModuleType) -> None:
    stages.sample(pool, progress=False)
    with pytest.raises(RuntimeError, match="answer"):
        rewarding.reward(pool, fakes.Reward(fail_at=2), progress=False)
    table = pool.rewards(fakes.Reward())
    assert [table.has(keys) for keys in pool.batches] == [True, True, False, False]
    reward = fakes.Reward()
    rewarding.reward(pool, reward, progress=False)
    assert reward.calls == [3, 1]
    assert table.read(pool.batches).num_rows == 40


class Broken:
    """A reward whose batches are changed before they are given back."""

    name = "broken"

    def __init__(self, change: Any) -> None:
        self.change = change

    def identity(self) -> dict[str, Any]:
        return {}

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        yield from self.change([(batch, [RewardRow(1.0)] * len(batch.rows)) for batch in batches])


def graded(value: Any) -> Any:
    return lambda batches: [(batch, [*rows[:-1], RewardRow(value)]) for batch, rows in batches]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (graded(float("nan")), ValueError, "broken"),
        (graded(float("-inf")), ValueError, "broken"),
        (graded(1e39), ValueError, "broken"),  # infinite as float32
        (graded(None), ValueError, "broken"),
        (graded("good"), ValueError, "broken"),
        (lambda batches: [(b, rows[:-1]) for b, rows in batches], RuntimeError, "completions"),
        (lambda batches: batches[:-1], RuntimeError, "returned"),
        (lambda batches: [*batches, batches[0]], RuntimeError, "batch"),
        (
            lambda batches: [(RewardBatch(("x",), [("x", 0, "")]), [RewardRow(0.0)])],
            RuntimeError,
            "batch",
        ),
    ],
)
def test_a_reward_that_breaks_its_promise_is_a_sentence(
    pool: Pool, change: Any, error: type[Exception], message: str
) -> None:
    stages.sample(pool, progress=False)
    with pytest.raises(error, match=message):
        rewarding.reward(pool, Broken(change), progress=False)
    table = pool.rewards(Broken(change))
    for part in table.parts():
        assert np.isfinite(pq.read_table(part, partitioning=None)["reward"].to_numpy()).all()
