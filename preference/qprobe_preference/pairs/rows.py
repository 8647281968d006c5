"""Rows of a data set, from a local file (.jsonl or .json, also packed: .gz, .bz2, .zst; or .parquet) or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.files import read_text

_PACKED = (".gz", ".bz2", ".zst")


@dataclass(frozen=True)
class Row:
    """One row: where it is, and what it holds by column."""

    place: str
    values: dict[str, Any]


def from_file(path: Path) -> Iterator[Row]:
    """The rows of a file, by the end of its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file or a line that cannot be read; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check dataset.path.")
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    if path.name.removesuffix(path.suffix if path.suffix in _PACKED else "").endswith((".jsonl", ".json")):
        return _json_rows(path)
    raise ValueError(f"{path} is of no known kind: give .jsonl or .json (also packed: .gz, .bz2, .zst), or .parquet.")


def from_hub(name: str, split: str, data_dir: str | None = None, config: str | None = None) -> Iterator[Row]:
    """The rows of one split of a data set on the hub.

    Raises:
        ModuleNotFoundError: the package `datasets` is missing.
        OSError: the hub gives no such set, or cannot be reached.
    """
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config, data_dir=data_dir, split=split)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: pip install datasets, or give a local file by dataset.path=FILE."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"The split {split} of {name} could not be loaded from the hub ({first.rstrip('.')}): check the network and the "
            "names, or give a local file by dataset.path=FILE."
        ) from error
    return (Row(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def needed(row: Row, columns: Sequence[str]) -> list[Any]:
    """The values of some columns.

    Raises:
        ValueError: a column is missing; the message names it with the row.
    """
    if missing := [column for column in columns if column not in row.values]:
        raise ValueError(
            f"{row.place}: there is no column {', '.join(missing)}; it has {', '.join(map(str, row.values)) or 'none'}. Is "
            "dataset.format the right one?"
        )
    return [row.values[column] for column in columns]


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}): fetch it again.") from error


def _json_rows(path: Path) -> Iterator[Row]:
    text = read_text(path)
    if ".jsonl" not in path.name and text.lstrip().startswith("["):
        values = _parsed(str(path), text, "a list of JSON objects")
        for number, value in enumerate(values, start=1):
            yield _row(f"{path}, row {number}", value)
        return
    # Only line feeds end a line: JSON may hold the other separators that str.splitlines knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _row(place, _parsed(place, line, "one JSON object a line"))


def _parsed(place: str, text: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: this is no JSON ({error}); give {wanted}.") from error


def _row(place: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{place}: this is no JSON object; give {{...}} with its columns.")
    return Row(place, values)
