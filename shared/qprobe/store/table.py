"""The run folder: typed Parquet parts that are only ever added, one manifest a table.

    run/prompts/<split>/                       run/completions/<pool>/
    run/rewards/<pool>/<reward>/               run/features/<pool>/<embedder>/layer=NN/

A part holds one batch, is named by its keys, and appears by rename, whole or not at all. A killed stage loses at most the
batch in work. The manifest says what the table was made from; a table made from other inputs is never added to. A table's
`identity` enters the inputs of the tables made from it, so a changed sampler disowns the rewards as well, and a changed
learning rate disowns nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qprobe.files import fingerprint, remove_abandoned, write_whole
from qprobe.store import sharing

# Embeddings above this size are read into a temporary file that is mapped, so that the kernel may drop what is not in use:
# memory then does not grow with the number of samples. Below it a file would only cost time.
MAPPED_ABOVE = 256 * 2**20
# Note on a table: how many of its parts were made anew from the same inputs, as those with replies that could not be read.
REMADE = "remade"

# What stands behind the fingerprints of inputs: a fingerprint tells a user nothing.
MEANINGS = {
    "completions": "the completions that it was made of",
    "prompts": "the prompts that it was made of",
    "split.file": "the content of the file of prompts",
    "split.content": "the content of the data set",
    "recorded.completions": "the completions that were brought along",
    "reward.rewards": "the rewards of the file",
    "reward.source": "the file of the reward function",
    "reward.fields": "the fields of the prompts' lines that the reward reads",
}
_DIGEST = re.compile(r"[0-9a-f]{12,64}")

KEY = [pa.field("task_id", pa.string(), nullable=False), pa.field("sample", pa.int32(), nullable=False)]
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
        *KEY,
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32())),  # null where the back end gives none
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),  # untempered, summed, nats; NaN where unknown
    ]
)
LIKELIHOODS = pa.schema(
    [*KEY, pa.field("logprob", pa.float32(), nullable=False), pa.field("tokens", pa.int32(), nullable=False)]
)
REWARDS = pa.schema(
    [
        *KEY,
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("seconds", pa.float32(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def features_schema(dimension: int, exact: bool = False) -> pa.Schema:
    """Rows of embeddings; float16, or float32 (`exact`) where a value does not fit."""
    values = pa.list_(pa.float32() if exact else pa.float16(), dimension)
    return pa.schema([*KEY, pa.field("embedding", values, nullable=False)])


class StoreError(RuntimeError):
    """The run folder cannot be used as it is; the message says what to do."""


@dataclass(frozen=True)
class Table:
    """One table of a run folder. `open_table` makes them.

    Args:
        folder: where its parts lie.
        inputs: what it is made from, JSON-able.
        schema: of every part; None for features, whose dimension the first part fixes.
    """

    folder: Path
    inputs: dict[str, Any]
    schema: pa.Schema | None

    @functools.cached_property
    def identity(self) -> str:
        return fingerprint(self.inputs)

    @property
    def state(self) -> str:
        """The identity, and how often parts were made anew since: for whoever keeps what it made of the rows."""
        remade = self.noted(REMADE)
        return self.identity if remade is None else fingerprint([self.identity, remade])

    @property
    def name(self) -> str:
        return str(self.folder)

    def begin(self) -> None:
        """Make the table ready to be added to: write its manifest, or check the one that is there. What is outdated goes.

        Raises:
            StoreError: the table was made from other inputs, or its manifest cannot be read.
        """
        self.check_inputs()
        if self.outdated:
            tqdm.write(f"{self.name} was made by an older version: it is made anew.", file=sys.stderr)
            for path in [*self.parts(), self._manifest]:  # the manifest last: a killed call goes on here
                path.unlink(missing_ok=True)
            self.__dict__.pop("outdated")  # is looked at again
        if not self._manifest.exists():
            text = json.dumps({"inputs": self.inputs, "created": _now(), "made_with": _versions()}, indent=2)
            write_whole(self._manifest, text.encode())
        remove_abandoned(self.folder)

    def check_inputs(self) -> None:
        """Raise StoreError where parts or a manifest of other inputs lie, unless they are outdated."""
        if not self._manifest.exists():
            if self.parts():
                raise StoreError(f"{self.name} has parts but no manifest.json: move it away or delete it.")
            return
        try:
            found = json.loads(self._manifest.read_text())["inputs"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{self._manifest} cannot be read ({error}): move the table away or delete it.") from error
        if found != json.loads(json.dumps(self.inputs)) and not self.outdated:
            raise StoreError(
                f"{self.name} was made from other inputs ({_difference(found, self.inputs)}): choose another run folder, or "
                "delete this table to make it anew."
            )

    @functools.cached_property
    def outdated(self) -> bool:
        """Whether it was made by an older version of what makes it, and from the same inputs otherwise.

        A version is a number by itself under the key "version", such as `{"reader": {"version": 2}}`. It is for what costs little
        to make anew."""
        try:
            found = json.loads(self._manifest.read_text())["inputs"]
        except (ValueError, KeyError, TypeError, OSError):
            return False  # what is wrong with it is said by `check_inputs`
        wanted = json.loads(json.dumps(self.inputs))
        return bool(found != wanted) and _is_older(found, wanted)

    def part(self, keys: Sequence[str]) -> Path:
        """Where the part with these keys lies, or would lie."""
        return self.folder / f"part-{fingerprint(list(keys))}.parquet"

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def has(self, keys: Sequence[str]) -> bool:
        return self.part(keys).exists() and not self.outdated

    def write(self, keys: Sequence[str], rows: pa.Table) -> None:
        """Add one part, whole or not at all. `keys` are the task ids that it holds, in order.

        Raises:
            StoreError: rows of another schema.
            OSError: a full disk; the part is absent, the message says so.
        """
        if self.schema is not None and not rows.schema.equals(self.schema):
            raise StoreError(f"{self.name} takes rows of {self.schema.names}, not of {rows.schema.names}.")
        # Features: dictionary, compression and statistics gain nothing and cost 5 times the time.
        plain = self.schema is None
        buffer = pa.BufferOutputStream()
        pq.write_table(
            rows,
            buffer,
            compression="none" if plain else "zstd",
            use_dictionary=not plain,
            write_statistics=not plain,
            write_page_checksum=True,  # else a damaged part is read as other numbers
        )
        write_whole(self.part(keys), buffer.getvalue().to_pybytes())

    def read(self, batches: Iterable[Sequence[str]] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, or those of the batches named by their keys, in that order.

        Args:
            batches: task ids of each part; None reads every part that is there.
            columns: names of those to read; None reads all.

        Raises:
            StoreError: a part is missing, unreadable or foreign; the message names it.
        """
        paths = self._paths_of(batches)
        tables = [_read_part(path, self.schema, columns) for path in paths]
        if self.schema is None:
            tables = _same_width(tables, paths)
        return pa.concat_tables(tables)

    def read_embeddings(self, batches: Iterable[Sequence[str]]) -> tuple[list[tuple[str, int]], np.ndarray]:
        """The keys and embeddings of a features table, with one part at a time in memory besides the result.

        Args:
            batches: task ids of each part.

        Returns: ((task_id, sample) of the N rows, (N, D) float16, or float32 where a part is). Above MAPPED_ABOVE bytes the
            array is a memory-mapped file without a name in the table's folder, gone with the array.

        Raises:
            StoreError: as `read`, or the disk has no room for that file.
        """
        paths = self._paths_of(batches)
        shapes = [_features_shape(path) for path in paths]
        width = shapes[0].width
        for shape, path in zip(shapes, paths, strict=True):
            if shape.width != width:
                raise StoreError(_other_width(path, shape.width, paths[0], width))
        dtype = np.dtype(np.float32 if any(shape.exact for shape in shapes) else np.float16)
        rows = sum(shape.rows for shape in shapes)
        keys: list[tuple[str, int]] = []

        def parts() -> Iterable[np.ndarray]:
            for path in paths:
                part = _read_part(path, None)  # as many rows as its footer said, or it is unreadable
                keys.extend(zip(part["task_id"].to_pylist(), part["sample"].to_pylist(), strict=True))
                yield embeddings_of(part).astype(dtype, copy=False)

        if rows * width * dtype.itemsize > MAPPED_ABOVE:
            return keys, self._mapped(parts(), (rows, width), dtype)
        values = np.empty((rows, width), dtype)
        start = 0
        for part in parts():
            values[start : start + len(part)] = part
            start += len(part)
        return keys, values

    def _mapped(self, parts: Iterable[np.ndarray], shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Written and not stored through the map: a full disk is then an error, not the death of the process.
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)
                file.flush()
                return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            size = shape[0] * shape[1] * dtype.itemsize / 2**30
            raise StoreError(
                f"The embeddings of {self.name} do not fit a temporary file beside them ({error.strerror or error}): training "
                f"and evaluation need {size:.1f} GiB there while they run; make room, then start the same command again."
            ) from error

    def _paths_of(self, batches: Iterable[Sequence[str]] | None) -> list[Path]:
        self.check_inputs()
        if self.outdated:
            raise StoreError(f"{self.name} was made by an older version: run the stage that makes it again.")
        paths = self.parts() if batches is None else [self.part(keys) for keys in batches]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise StoreError(
                f"{self.name} is missing {len(missing)} of {len(paths)} parts: run the stage that makes it."
            )
        if not paths:
            raise StoreError(f"{self.name} has no rows yet: run the stage that makes it.")
        return paths

    def note(self, name: str, value: Any) -> None:
        """Write down something of how the table was made, beside its inputs: it is no input, no later table depends on it."""
        manifest = json.loads(self._manifest.read_text())
        write_whole(self._manifest, json.dumps(manifest | {name: value}, indent=2).encode())

    def noted(self, name: str) -> Any:
        """What `note` wrote; None where nothing."""
        return json.loads(self._manifest.read_text()).get(name) if self._manifest.exists() else None

    def note_usage(self, spent: dict[str, int]) -> None:
        """Add a line to usage.jsonl, where something was spent at an API. It is no input: no later table depends on it."""
        if spent:
            line = json.dumps({"at": _now(), **spent}) + "\n"
            # One short write to the end: processes that share a table do not cut each other's lines.
            with (self.folder / "usage.jsonl").open("a") as file:
                file.write(line)

    def usage(self) -> dict[str, int]:
        """What was spent at an API to make this table, summed over all commands; empty where none was used."""
        path, total = self.folder / "usage.jsonl", Counter[str]()
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                total.update({key: int(value) for key, value in json.loads(line).items() if key != "at"})
            except (ValueError, TypeError, AttributeError):
                continue  # a line that a kill or a full disk cut short
        return dict(total)

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"


def open_table(run: Path, *parts: str, inputs: dict[str, Any], schema: pa.Schema | None = None) -> Table:
    """The table run/parts..., whether it exists or not; in a run folder that shares, with what the others have of it."""
    table = Table(run.joinpath(*parts), inputs, schema)
    sharing.take(run, table.folder, inputs)
    return table


def found_table(folder: Path, schema: pa.Schema | None = None) -> Table:
    """A table that exists, with the inputs that its own manifest names: for reading what somebody else made."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        raise StoreError(f"{folder} is no table of a run folder: it has no manifest.json.")
    try:
        return Table(folder, dict(json.loads(manifest.read_text())["inputs"]), schema)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreError(f"{manifest} cannot be read ({error}): move the table away or delete it.") from error


def feature_rows(task_ids: Sequence[str], samples: Sequence[int], values: np.ndarray) -> tuple[pa.Table, bool]:
    """Rows of a features part.

    Args:
        task_ids, samples: (N,) keys.
        values: (N, D) float32.

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
    exact = bool(np.abs(values).max(initial=0.0) > np.finfo(np.float16).max)
    flat = values.astype(np.float32 if exact else np.float16).ravel()
    schema = features_schema(values.shape[1], exact)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])
    arrays = [pa.array(task_ids, pa.string()), pa.array(samples, pa.int32()), embedding]
    return pa.Table.from_arrays(arrays, schema=schema), exact


def embeddings_of(table: pa.Table) -> np.ndarray:
    """The (N, D) matrix of a features table, float16 or float32 as stored."""
    column = table.column("embedding").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # more than 2**31 values stay in chunks
        return np.concatenate([_matrix(chunk) for chunk in column.chunks])
    return _matrix(column)


def _matrix(column: Any) -> np.ndarray:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _read_part(path: Path, schema: pa.Schema | None, columns: Sequence[str] | None = None) -> pa.Table:
    with _readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_schema(path, file.schema_arrow, schema)
        return file.read(columns=None if columns is None else list(columns))


@dataclass(frozen=True)
class _Shape:
    rows: int
    width: int
    exact: bool


def _features_shape(path: Path) -> _Shape:
    """What a part's footer says of its embeddings."""
    with _readable(path), pq.ParquetFile(path) as file:
        _check_schema(path, file.schema_arrow, None)
        kind = file.schema_arrow.field("embedding").type
        shape = _Shape(file.metadata.num_rows, kind.list_size, kind.value_type == pa.float32())
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
    names = found.names
    if not (_is_features(found) if schema is None else found.equals(schema)):
        raise StoreError(f"{path} is foreign: its columns are {names}; move it away.")


def _is_features(schema: pa.Schema) -> bool:
    if "embedding" not in schema.names or not pa.types.is_fixed_size_list(kind := schema.field("embedding").type):
        return False
    return any(schema.equals(features_schema(kind.list_size, exact)) for exact in (False, True))


def _other_width(path: Path, width: int, first: Path, wanted: int) -> str:
    return f"{path} is foreign: its embeddings have {width} values, {first.name} has {wanted}."


def _same_width(tables: list[pa.Table], paths: list[Path]) -> list[pa.Table]:
    """Parts of one dimension, all float32 as soon as one of them is."""
    kinds = [table.schema.field("embedding").type for table in tables]
    for kind, path in zip(kinds, paths, strict=True):
        if kind.list_size != kinds[0].list_size:
            raise StoreError(_other_width(path, kind.list_size, paths[0], kinds[0].list_size))
    if all(kind.value_type == pa.float16() for kind in kinds):
        return tables
    exact = features_schema(kinds[0].list_size, exact=True)
    return [
        pa.Table.from_arrays(
            [
                table.column("task_id").combine_chunks(),
                table.column("sample").combine_chunks(),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(embeddings_of(table).astype(np.float32).ravel()), exact.field(2).type.list_size
                ),
            ],
            schema=exact,
        )
        for table in tables
    ]


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """The first few values in which two inputs differ, by name."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted(set(found) | set(wanted))
        lines = [
            _difference(found.get(name, "not there"), wanted.get(name, "not there"), f"{path}.{name}" if path else name)
            for name in names
        ]
        return "; ".join([line for line in lines if line][:4])
    if found == json.loads(json.dumps(wanted)):
        return ""
    if path in MEANINGS and isinstance(wanted, str):
        return f"{MEANINGS[path]} changed"
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (found, wanted)):
        return f"the content of {path} changed"
    return f"{path} was {found!r:.80}, now {wanted!r:.80}"


def _is_older(found: Any, wanted: Any) -> bool:
    """Whether inputs are the wanted ones, but for versions that are lower or that were not named yet."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return bool(found == wanted)
    if set(found) == set(wanted) == {"version"}:
        return bool(found["version"] <= wanted["version"])
    unnamed = [wanted[key] for key in set(wanted) - set(found)]
    if set(found) - set(wanted) or not all(isinstance(value, dict) and set(value) == {"version"} for value in unnamed):
        return False
    return all(_is_older(value, wanted[key]) for key, value in found.items())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for package in ("qprobe", "torch", "transformers", "numpy", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
