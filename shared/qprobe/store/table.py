"""The run folder: typed Parquet parts that are only ever added, one manifest a table.

    run/prompts/<split>/                       run/completions/<pool>/
    run/rewards/<pool>/<reward>/               run/features/<pool>/<embedder>/layer=NN/, likelihood/

A part holds one batch, is named by its keys, and appears by rename, whole or not at all. A killed stage loses at most the
batch in work. The manifest says what the table was made from; a table made from other inputs is never added to. A table's
`identity` enters the inputs of the tables made from it, so a changed sampler disowns the rewards as well, and a changed
learning rate disowns nothing.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qprobe.files import fingerprint, remove_abandoned, write_whole
from qprobe.store import sharing
from qprobe.store.parts import COMPLETIONS as COMPLETIONS
from qprobe.store.parts import PROMPTS as PROMPTS
from qprobe.store.parts import REWARDS as REWARDS
from qprobe.store.parts import StoreError as StoreError
from qprobe.store.parts import check_widths, features_shape, inputs_of, joined, read_part
from qprobe.store.parts import embeddings_of as embeddings_of
from qprobe.store.parts import feature_rows as feature_rows

# Embeddings above this size are read into a temporary file that is mapped, so that the kernel may drop what is not in use:
# memory then does not grow with the number of samples. Below it a file would only cost time.
MAPPED_ABOVE = 256 * 2**20
# Note on a table: how many of its parts were made anew from the same inputs, as those with replies that could not be read.
REMADE = "remade"

# What the fingerprints of inputs are of: a fingerprint tells a user nothing.
_MEANINGS = {
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
        found = inputs_of(self._manifest)
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
            found = inputs_of(self._manifest)
        except StoreError:
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
        tables = [read_part(path, self.schema, columns) for path in paths]
        return joined(tables, paths) if self.schema is None else pa.concat_tables(tables)

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
        shapes = [features_shape(path) for path in paths]
        check_widths([shape.width for shape in shapes], paths)
        dtype = np.dtype(np.float32 if any(shape.exact for shape in shapes) else np.float16)
        rows, width = sum(shape.rows for shape in shapes), shapes[0].width
        keys: list[tuple[str, int]] = []

        def parts() -> Iterable[np.ndarray]:
            for path in paths:
                part = read_part(path, None)  # as many rows as its footer said, or it is unreadable
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
                f"The embeddings of {self.name} do not fit a temporary file in their folder ({error.strerror or error}): "
                f"training and evaluation need {size:.1f} GiB there while they run; make room, then start the same command again."
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
        """Write down something of how the table was made, in its manifest: it is no input, no later table depends on it."""
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
    return Table(folder, inputs_of(manifest), schema)


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
    if path in _MEANINGS and isinstance(wanted, str):
        return f"{_MEANINGS[path]} changed"
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
    versions = {"python": platform.python_version()}
    for package in ("qprobe", "torch", "transformers", "numpy", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
