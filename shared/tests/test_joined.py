"""A pool's tables joined: mapped where they are large, and refused where a row is not there once and in order."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe.run.joined import join
from qprobe.run.pools import Pool
from qprobe.store.table import StoreError, Table


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    made: Pool = fakes.pool(tmp_path)
    return made


def rewrite(table: Table, keys: Any, change: Any) -> None:
    """Put changed rows into the part of a batch."""
    pq.write_table(change(table.read([keys])), table.part(keys))


def test_a_join_of_large_features_is_the_same_join(
    pool: Pool, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = fakes.complete(pool)
    monkeypatch.setattr("qprobe.store.table.MAPPED_ABOVE", 0)
    mapped = join(pool, fakes.Reward(), fakes.Embedder(), 1)
    assert isinstance(mapped.features, np.memmap)
    assert joined.features is not None
    np.testing.assert_array_equal(mapped.features, joined.features)
    assert mapped.features.flags.writeable  # torch reads no other memory without a warning
    assert mapped.completions == joined.completions
    assert sorted(path.suffix for path in pool.features(fakes.Embedder(), 1).folder.iterdir()) == [
        ".json",
        *[".parquet"] * 4,
    ]


@pytest.mark.parametrize("name", ["completions", "rewards", "features"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: pa.concat_tables([rows, rows.slice(4, 1)]), "t-001"),  # a row twice
        (lambda rows: rows.slice(1), "t-000"),  # a row missing
        (lambda rows: rows.take([1, 0, *range(2, 12)]), "t-000"),  # rows exchanged
        (lambda rows: pa.concat_tables([rows.slice(0, 11), rows.slice(4, 1)]), "t-001|t-002"),  # one twice, one missing
    ],
)
def test_rows_twice_missing_or_exchanged_are_refused(
    name: str, change: Any, told: str, pool: Pool, fakes: ModuleType
) -> None:
    fakes.complete(pool)
    embedder = fakes.Embedder()
    tables = {
        "completions": pool.completions,
        "rewards": pool.rewards(fakes.Reward()),
        "features": pool.features(embedder, 1),
    }
    rewrite(tables[name], pool.batches[0], change)
    with pytest.raises(StoreError, match=rf"The {name} of train.sample do not hold every .* for \('({told})', \d\)"):
        join(pool, fakes.Reward(), embedder, 1)
