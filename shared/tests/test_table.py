"""The run folder: whole parts or none, other inputs refused by name, damage and foreign parts found, features plain."""

import errno
import os
import random
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe.store import table as store
from qprobe.store.table import StoreError, Table

KEYS = ["a", "b"]


def rewards(keys: list[str], samples: int = 2) -> pa.Table:
    rows = [(key, sample) for key in keys for sample in range(samples)]
    columns = {
        "task_id": [key for key, _ in rows],
        "sample": [sample for _, sample in rows],
        "reward": [0.25 * i for i in range(len(rows))],
        "verdict": ["passed"] * len(rows),
        "seconds": [0.5] * len(rows),
        "detail": [f"row {i}" for i in range(len(rows))],
    }
    return pa.table(columns, schema=store.REWARDS)


def features(keys: list[str], values: np.ndarray) -> pa.Table:
    return store.feature_rows(keys, list(range(len(keys))), values.astype(np.float32))[0]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    opened = store.open_table(tmp_path, "rewards", "pool", "name", inputs={"seed": 1}, schema=store.REWARDS)
    opened.begin()
    return opened


@pytest.fixture
def states(tmp_path: Path) -> Table:
    opened = store.open_table(tmp_path, "features", "pool", "embedder", "layer=01", inputs={"layer": 1})
    opened.begin()
    return opened


def test_what_was_written_is_read_in_the_order_that_was_asked_for(table: Table) -> None:
    table.write(["c"], rewards(["c"]))
    table.write(KEYS, rewards(KEYS))
    assert table.has(KEYS)
    assert not table.has(["b", "a"])  # another batch
    assert table.read([KEYS, ["c"]]).equals(pa.concat_tables([rewards(KEYS), rewards(["c"])]))
    assert table.read([["c"]]).equals(rewards(["c"]))
    assert sorted(table.read()["task_id"].to_pylist()) == ["a", "a", "b", "b", "c", "c"]
    some = table.read([["c"]], ["sample", "reward"])
    assert some.equals(rewards(["c"]).select(["sample", "reward"]))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = store.open_table(full_disk, "features", inputs={})
    small.begin()
    rows = features(["a"] * 100, np.ones((100, 300)))  # 60 kB
    with pytest.raises(OSError, match="No space left on device") as caught:  # noqa: PT012 - which of them is the disk's choice
        for number in range(10):
            small.write([str(number)], rows)
    assert "it is absent" in str(caught.value)
    written = len(small.parts())
    assert written >= 2
    assert len(list(small.folder.iterdir())) == written + 1  # and the manifest: nothing half written
    assert small.read().num_rows == 100 * written
    monkeypatch.setattr(store, "MAPPED_ABOVE", 0)
    with pytest.raises(StoreError, match="No space left"):
        small.read_embeddings([[str(number)] for number in range(written)])
    assert len(list(small.folder.iterdir())) == written + 1


@pytest.mark.parametrize("which", ["table", "states"])
@pytest.mark.parametrize("damage", ["truncated", "random", "empty"])
def test_an_unreadable_part_stops_the_run_with_its_name(
    which: str, damage: str, request: pytest.FixtureRequest
) -> None:
    damaged: Table = request.getfixturevalue(which)
    damaged.write(KEYS, rewards(KEYS) if which == "table" else features(KEYS, np.ones((2, 3))))
    path = damaged.part(KEYS)
    content = path.read_bytes()
    made = {"truncated": content[:-7], "random": random.Random(0).randbytes(len(content)), "empty": b""}
    path.write_bytes(made[damage])
    with pytest.raises(StoreError, match=path.name):
        damaged.read()


@pytest.mark.parametrize("which", ["table", "states"])
def test_no_changed_byte_is_ever_read_as_another_number(which: str, request: pytest.FixtureRequest) -> None:
    damaged: Table = request.getfixturevalue(which)
    values = np.random.default_rng(0).normal(size=(2, 40))
    damaged.write(KEYS, rewards(KEYS) if which == "table" else features(KEYS, values))
    path = damaged.part(KEYS)
    content, rows = path.read_bytes(), damaged.read().to_pylist()
    draws = random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        try:
            read = damaged.read().to_pylist()
        except StoreError:
            refused += 1
        else:
            assert read == rows
    assert refused > 150


def foreign(kind: str) -> pa.Table:
    keys = {"task_id": KEYS, "sample": pa.array([0, 1], pa.int32())}
    three = np.arange(6.0)
    if kind == "columns":
        return pa.table({**keys, "score": [0.5, 1.0]})
    if kind == "order":
        return rewards(KEYS).select([0, 1, 3, 2, 4, 5])
    if kind == "float64 values":
        return pa.table({**keys, "embedding": pa.FixedSizeListArray.from_arrays(pa.array(three), 3)})
    if kind == "lists":
        return pa.table({**keys, "embedding": pa.array([[1.0, 2.0], [3.0]])})
    return features(KEYS, three.reshape(2, 3)).set_column(1, "sample", pa.array([0, 1], pa.int64()))


@pytest.mark.parametrize("kind", ["columns", "order", "float64 values", "lists", "int64 samples"])
def test_a_foreign_part_stops_the_run_with_its_name(kind: str, table: Table, states: Table) -> None:
    taken = table if kind == "order" else states
    path = taken.part(KEYS)
    pq.write_table(foreign(kind), path)
    with pytest.raises(StoreError, match="foreign"):
        taken.read()


def test_rows_of_another_schema_are_not_written(table: Table) -> None:
    with pytest.raises(StoreError, match="embedding"):
        table.write(KEYS, features(KEYS, np.ones((2, 3))))
    assert table.parts() == []


def test_a_table_of_other_inputs_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {
        "a": {"stop": ("x",), "hidden": (1,), "layers": (2,), "tokens": (3,), "temperature": 0.8},
        "seed": 1,
    }
    store.open_table(tmp_path, "t", inputs=inputs).begin()
    store.open_table(tmp_path, "t", inputs=inputs).begin()  # the same inputs: tuples are lists in JSON
    other = store.open_table(tmp_path, "t", inputs={"a": inputs["a"] | {"temperature": 1.0, "top_k": 5}, "seed": 1})
    message = r"a.temperature was 0.8, now 1.0; a.top_k was 'not there', now 5"
    for call in (other.begin, other.check_inputs, other.read):
        with pytest.raises(StoreError, match=message):
            call()


def test_parts_without_a_manifest_are_refused(table: Table) -> None:
    table.write(KEYS, rewards(KEYS))
    (table.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match="has parts but no manifest"):
        table.begin()
    with pytest.raises(StoreError, match="it has no manifest"):
        store.found_table(table.folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "\xff"])
def test_a_damaged_manifest_is_named(table: Table, text: str) -> None:
    (table.folder / "manifest.json").write_bytes(text.encode("latin-1"))
    for call in (table.begin, lambda: store.found_table(table.folder)):
        with pytest.raises(StoreError, match="json cannot be read"):
            call()


def test_a_begun_table_keeps_its_manifest_and_tells_its_inputs(table: Table) -> None:
    manifest = (table.folder / "manifest.json").read_bytes()
    table.begin()
    assert (table.folder / "manifest.json").read_bytes() == manifest
    assert store.found_table(table.folder, store.REWARDS).inputs == {"seed": 1}


def test_missing_and_absent_parts_say_which_stage_to_run(table: Table) -> None:
    with pytest.raises(StoreError, match="has no rows yet"):
        table.read()
    table.write(KEYS, rewards(KEYS))
    with pytest.raises(StoreError, match="is missing 1 of 2 parts"):
        table.read([KEYS, ["c"]])


def test_identity_follows_the_content_of_the_inputs_alone() -> None:
    def identity(inputs: dict[str, Any]) -> str:
        return Table(Path("x"), inputs, None).identity

    assert identity({"a": 1, "b": (2,)}) == identity({"b": [2], "a": 1})
    assert identity({"a": 1}) != identity({"a": 2})


def test_features_are_float16_bit_by_bit(states: Table) -> None:
    values = np.array([[1.5, -2.25, 65504.0], [6e-8, 0.1, -0.0]])
    rows, exact = store.feature_rows(KEYS, [0, 1], values.astype(np.float32))
    assert not exact
    states.write(KEYS, rows)
    read = store.embeddings_of(states.read())
    assert read.dtype == np.float16
    assert read.tobytes() == values.astype(np.float16).tobytes()


def test_values_beyond_float16_are_kept_as_float32_beside_float16_parts(states: Table) -> None:
    small, large = np.array([[1.5, 0.1]], np.float32), np.array([[70000.0, 1e-9]], np.float32)
    assert store.feature_rows(["b"], [0], large)[1]
    states.write(["a"], features(["a"], small))
    states.write(["b"], features(["b"], large))
    rows = states.read([["a"], ["b"]])
    read = store.embeddings_of(rows)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.concatenate([small.astype(np.float16).astype(np.float32), large]))
    assert rows["task_id"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_embeddings_are_read_part_by_part_into_one_array(
    mapped: bool, exact: bool, states: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAPPED_ABOVE", 0 if mapped else 10**6)
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float16).astype(np.float32)
    if exact:
        values[4, 1] = 70000.0  # in the middle part alone
    batches = [["c", "d"], ["a", "b", "e"], ["f", "g"]]
    start = 0
    for batch in batches:
        states.write(batch, features(batch, values[start : start + len(batch)]))
        start += len(batch)
    keys, read = states.read_embeddings(batches)
    assert keys == [(key, number) for batch in batches for number, key in enumerate(batch)]
    assert read.dtype == (np.float32 if exact else np.float16)
    np.testing.assert_array_equal(read.astype(np.float32), values)
    assert isinstance(read, np.memmap) == mapped
    assert len(list(states.folder.iterdir())) == 4  # parts and manifest: the file has no name
    again = states.read_embeddings(batches[::-1])[1]
    np.testing.assert_array_equal(again.astype(np.float32), values[[5, 6, 2, 3, 4, 0, 1]])


def test_one_part_at_a_time_is_in_memory(states: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[str(number)] * 64 for number in range(40)]
    for batch in batches:
        states.write(batch, features(batch, np.ones((64, 512))))
    part = 64 * 512 * 2
    monkeypatch.setattr(store, "MAPPED_ABOVE", 0)
    held = []
    original = store.read_part

    def spy(*arguments: Any) -> pa.Table:
        held.append(pa.total_allocated_bytes())
        return original(*arguments)

    monkeypatch.setattr(store, "read_part", spy)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    values = states.read_embeddings(batches)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes == 40 * part
    assert max(held) - before < 8 * part  # of forty; reading has buffers of its own
    assert peak < 8 * part  # numpy's own


def test_no_room_for_the_array_is_a_sentence(states: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: Path) -> None:
        assert dir == states.folder
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states.write(KEYS, features(KEYS, np.ones((2, 3))))
    monkeypatch.setattr(store, "MAPPED_ABOVE", 0)
    monkeypatch.setattr("qprobe.store.table.tempfile.TemporaryFile", full)
    with pytest.raises(StoreError, match="No space left"):
        states.read_embeddings([KEYS])


def test_a_damaged_part_is_named_however_it_is_read(states: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAPPED_ABOVE", 0)
    states.write(KEYS, features(KEYS, np.ones((2, 40))))
    states.write(["c"], features(["c"], np.ones((1, 41))))
    with pytest.raises(StoreError, match="41 values"):
        states.read_embeddings([KEYS, ["c"]])
    with pytest.raises(StoreError, match="is missing 1 of 2 parts"):
        states.read_embeddings([KEYS, ["d"]])
    path = states.part(KEYS)
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=path.name):
        states.read_embeddings([KEYS])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused(bad: float) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(StoreError, match="b, sample 7"):
        store.feature_rows(KEYS, [0, 7], values)


def test_features_are_written_plain_and_other_tables_are_not(states: Table, table: Table) -> None:
    states.write(KEYS, features(KEYS, np.ones((2, 3))))
    group = pq.read_metadata(states.part(KEYS)).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.compression for column in columns} == {"UNCOMPRESSED"}
    assert not any(column.is_stats_set or column.has_dictionary_page for column in columns)
    table.write(KEYS, rewards(KEYS))
    group = pq.read_metadata(table.part(KEYS)).row_group(0)
    assert group.column(0).compression == "ZSTD"
    assert group.column(0).is_stats_set


def versioned(tmp_path: Path, version: int | None, seed: int = 0) -> Table:
    reader = {} if version is None else {"reader": {"version": version}}
    return store.open_table(
        tmp_path, "r", inputs={"seed": seed, "reward": {"name": "x", **reader}}, schema=store.REWARDS
    )


@pytest.mark.parametrize("before", [None, 1])
def test_a_table_of_an_older_version_is_made_anew(tmp_path: Path, before: int | None) -> None:
    old = versioned(tmp_path, before)
    old.begin()
    old.write(["a"], rewards(["a"]))
    new = versioned(tmp_path, 2)
    new.check_inputs()
    assert not new.has(["a"])
    with pytest.raises(StoreError, match="older version"):
        new.read()
    new.begin()
    assert new.parts() == []
    new.write(["b"], rewards(["b"]))
    assert new.has(["b"])
    assert versioned(tmp_path, 2).read()["task_id"].to_pylist() == ["b", "b"]


@pytest.mark.parametrize(("version", "seed"), [(3, 0), (1, 1)])
def test_a_newer_version_or_another_input_is_not_made_anew(tmp_path: Path, version: int, seed: int) -> None:
    old = versioned(tmp_path, version)
    old.begin()
    old.write(["a"], rewards(["a"]))
    for use in (Table.check_inputs, Table.begin):
        with pytest.raises(StoreError, match="other inputs"):
            use(versioned(tmp_path, 2, seed))
    assert len(old.parts()) == 1
