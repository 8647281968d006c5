"""Rows from every kind of file; what cannot be read is a sentence with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe_preference.pairs import rows

ROWS = [{"chosen": "a\u2028b", "rejected": "c"}, {"chosen": "d", "rejected": "e"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    else:
        path.write_text(json.dumps(ROWS) if name == "list.json" else f"{LINES}\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "list.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    found = list(rows.from_file(written(tmp_path, name)))
    assert [row.values for row in found] == ROWS
    assert found[1].place.endswith((f"{name}, line 2", f"{name}, row 2"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"chosen": 1}\n{"chosen": \n', r"a\.jsonl, line 2: this is no JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1: this is no JSON object"),
        ("a.json", b"[{}, 3]", r"a\.json, row 2: this is no JSON object"),
        ("a.jsonl", b"\xff\xfe", r"a\.jsonl is no UTF-8 text \(invalid start byte at byte 0\)"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], r"a\.jsonl\.gz is a damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 10, r"a\.jsonl\.gz is a damaged gzip file"),
        ("a.parquet", b"PAR1 no", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", b"a,b", r"a\.csv is of no known kind: give \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(rows.from_file(tmp_path / name))


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        rows.from_file(tmp_path / "none.jsonl")


def test_a_missing_column_is_named_with_its_row_and_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"f, line 7: .* chosen"):
        rows.needed(rows.Row("f, line 7", {"prompt": 1, "answer": 2}), ("prompt", "chosen"))


def test_a_hub_that_refuses_is_a_sentence_that_names_the_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **more: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/set' on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"dataset\.path=FILE"):
        rows.from_hub("org/set", "test")


def test_the_hub_is_asked_for_set_folder_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **more: asked.append((a, more)) or ROWS)
    assert [row.values for row in rows.from_hub("org/set", "test", "folder")] == ROWS
    assert asked == [(("org/set", None), {"data_dir": "folder", "split": "test"})]
