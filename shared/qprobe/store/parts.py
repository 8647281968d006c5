"""Parts of tables: their schemas, and reading them so that a damaged or foreign one is a sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_KEY = [pa.field("task_id", pa.string(), nullable=False), pa.field("sample", pa.int32(), nullable=False)]
PROMPTS = pa.schema(
    [
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("messages", pa.string()),  # JSON; null for a prompt of plain text
        pa.field("prompt", pa.string(), nullable=False),  # as rendered
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
COMPLETIONS = pa.schema(
    [
        *_KEY,
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),  # null where the back end gives none
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),  # untempered, summed, nats; NaN where unknown
    ]
)
LIKELIHOODS = pa.schema(
    [*_KEY, pa.field("logprob", pa.float32(), nullable=False), pa.field("tokens", pa.int32(), nullable=False)]
)
REWARDS = pa.schema(
    [
        *_KEY,
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("seconds", pa.float32(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def features_schema(dimension: int, exact: bool = False) -> pa.Schema:
    """Rows of embeddings; float16, or float32 (`exact`) where a value does not fit."""
    values = pa.list_(pa.float32() if exact else pa.float16(), dimension)
    return pa.schema([*_KEY, pa.field("embedding", values, nullable=False)])


class StoreError(RuntimeError):
    """The run folder cannot be used as it is; the message says what to do."""


def feature_rows(
    task_ids: Sequence[str], samples: Sequence[int], values: np.ndarray, exact: bool = False
) -> tuple[pa.Table, bool]:
    """Rows of a features part.

    Args:
        task_ids, samples: (N,) keys.
        values: (N, D) float32.
        exact: float32 is asked for, though float16 may hold the values.

    Returns: (table, exact): exact says that float16 could not hold the values and float32 was used.

    Raises:
        StoreError: a value is not finite.
    """
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise StoreError(
            f"The embedding of {task_ids[row]}, sample {samples[row]}, is not finite: the model overflows in its dtype; use "
            "bfloat16 or float32."
        )
    exact = exact or bool(np.abs(values).max(initial=0.0) > np.finfo(np.float16).max)
    flat = values.astype(np.float32 if exact else np.float16).ravel()
    schema = features_schema(values.shape[1], exact)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])
    return pa.table([pa.array(task_ids, pa.string()), pa.array(samples, pa.int32()), embedding], schema=schema), exact


def embeddings_of(table: pa.Table) -> np.ndarray:
    """The (N, D) matrix of a features table, float16 or float32 as stored."""
    column = table.column("embedding").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # more than 2**31 values stay in chunks
        return np.concatenate([_matrix(chunk) for chunk in column.chunks])
    return _matrix(column)


def _matrix(column: Any) -> np.ndarray:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def read_part(path: Path, schema: pa.Schema | None, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part; `schema` is None for features.

    Raises:
        StoreError: the part is unreadable or foreign.
    """
    with _readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_schema(path, file.schema_arrow, schema)
        return file.read(columns=None if columns is None else list(columns))


@dataclass(frozen=True)
class Shape:
    """Of the embeddings of a part; `exact`: in float32."""

    rows: int
    width: int
    exact: bool


def features_shape(path: Path) -> Shape:
    """What a part's footer says of its embeddings.

    Raises:
        StoreError: the part is unreadable or foreign.
    """
    with _readable(path), pq.ParquetFile(path) as file:
        _check_schema(path, file.schema_arrow, None)
        kind = file.schema_arrow.field("embedding").type
        shape = Shape(file.metadata.num_rows, kind.list_size, kind.value_type == pa.float32())
        if shape.rows * shape.width * 2 > path.stat().st_size:  # no checksum guards the footer
            raise pa.ArrowInvalid(f"its footer names {shape.rows} rows, more than it can hold")
        return shape


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # a damaged footer may hold bytes that are no text
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(
            f"{path} cannot be read ({first}): delete this part and start the same command again."
        ) from error


def _check_schema(path: Path, found: pa.Schema, schema: pa.Schema | None) -> None:
    if not (_is_features(found) if schema is None else found.equals(schema)):
        raise StoreError(f"{path} is foreign: its columns are {found.names}; move it away.")


def _is_features(schema: pa.Schema) -> bool:
    if "embedding" not in schema.names or not pa.types.is_fixed_size_list(kind := schema.field("embedding").type):
        return False
    return any(schema.equals(features_schema(kind.list_size, exact)) for exact in (False, True))


def joined(tables: Sequence[pa.Table], paths: Sequence[Path]) -> pa.Table:
    """Rows of several parts of features, all float32 as soon as one of them is."""
    kinds = [table.schema.field("embedding").type for table in tables]
    check_widths([kind.list_size for kind in kinds], paths)
    exact = any(kind.value_type == pa.float32() for kind in kinds)
    schema = features_schema(kinds[0].list_size, exact)
    return pa.concat_tables([table.cast(schema) for table in tables])


def check_widths(widths: Sequence[int], paths: Sequence[Path]) -> None:
    """Raise StoreError where embeddings are not as wide as those of the first part."""
    for width, path in zip(widths, paths, strict=True):
        if width != widths[0]:
            raise StoreError(f"{path} is foreign: its embeddings have {width} values, {paths[0].name} has {widths[0]}.")


def inputs_of(manifest: Path) -> dict[str, Any]:
    """What a table was made from, by its manifest.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return dict(json.loads(manifest.read_text())["inputs"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreError(f"{manifest} cannot be read ({error}): move the table away or delete it.") from error
