"""Features of the user's own in the place of embeddings: a file a block, which is a "layer" here, numbered from 0 in their order.

What a model would be asked for is looked up by the texts of prompt and completion, as token ids (UTF-8 bytes), so that stages,
tables and probes are those of any embedder. There is no model here: what was not brought along cannot be embedded.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qprobe.embedding.base import path_name
from qprobe.models.language_model import ModelSpec
from qprobe.models.prefix import check_rows

Key = tuple[str, int]  # task id and sample


class GivenEmbedder:
    """Arrays of files.

    Args:
        model: not used; here so that all embedders are made alike.
        files: `.npy` of (N, D) numbers, a row for every candidate in the order of the candidates' file; or Parquet, a file or a
            folder of them, either of as many rows in that order, or with the columns `task_id` and `sample` that say which row is
            whose (such as a run folder's features). Of Parquet all other columns are read: numbers, or lists of them.
        layers: not used, all files are read.

    Raises:
        ValueError: no file, or one that is none of these.
    """

    def __init__(self, model: ModelSpec | None, files: Sequence[str], layers: Sequence[int] | None = None) -> None:
        if not files:
            raise ValueError("embedder.files is empty: name at least one .npy or Parquet file.")
        self.files = [Path(file) for file in files]
        self._found = [_read(file) for file in self.files]
        self._rows: dict[tuple[bytes, bytes], int] | None = None
        self._values: list[np.ndarray] = []

    @property
    def names(self) -> dict[int, str]:
        """Layer -> what its block is called: the file's name, or its number too where several have the same."""
        stems = [file.stem for file in self.files]
        return {n: stem if stems.count(stem) == 1 else f"{stem} {n}" for n, stem in enumerate(stems)}

    @property
    def widths(self) -> dict[int, int]:
        return {n: values.shape[1] for n, (_, values) in enumerate(self._found)}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(len(self.files)))

    @functools.cached_property
    def _fingerprints(self) -> list[str]:
        return [_digest(values) for _, values in self._found]

    def identity(self) -> dict[str, Any]:
        return {"embedder": "given", "model": {"name": "given", "features": self._fingerprints}, "token": "none"}

    def folder_name(self) -> str:
        return path_name("given", "-".join(self.names.values()))

    def tokenizer_fingerprint(self) -> str:
        return "utf-8"

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return list(text.encode())

    def encode_completion(self, text: str) -> list[int]:
        return list(text.encode())

    def take(self, texts: Mapping[Key, tuple[str, str]], places: Mapping[Key, int], count: int) -> str | None:
        """Learn which rows belong to which candidates.

        Args:
            texts: candidate -> prompt as rendered, and completion.
            places: candidate -> its place among all lines of the file, left-out ones included, from 0.
            count: lines of the file.

        Returns: a sentence where equal completions of a prompt have different features: they get the mean; else None.

        Raises:
            ValueError: a file lacks a candidate, or has another number of rows.
        """
        keys = list(texts)
        own = [
            _of_candidates(file, found, keys, places, count)
            for file, found in zip(self.files, self._found, strict=True)
        ]
        # Whose they are is part of what they are: rows may change their candidates, and no number with them.
        self._fingerprints = [_digest(values) for values in own]
        pairs = [(prompt.encode(), completion.encode()) for prompt, completion in texts.values()]
        self._rows = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        row_of = np.array([self._rows[pair] for pair in pairs])
        counts = np.bincount(row_of)
        self._values, differ = [], False
        for values in own:
            summed = np.zeros((len(counts), values.shape[1]))
            np.add.at(summed, row_of, values)
            mean = summed / counts[:, None]
            differ |= bool(np.abs(values - mean[row_of]).max() > 1e-6 * max(1.0, float(np.abs(values).max())))
            self._values.append(mean)
        if differ:
            return "Equal completions of a prompt have different features: each gets their mean."
        return None

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        """The features of candidates that were brought along.

        Raises:
            ValueError: another completion: it has no features.
        """
        check_rows(prompts, completions)
        asked = [(bytes(p), bytes(ids)) for p, own in zip(prompts, completions, strict=True) for ids in own]
        known = self._rows or {}
        if lacking := sum(pair not in known for pair in asked):
            raise ValueError(
                f"{lacking} of {len(asked)} completions have no features in {', '.join(map(str, self.files))}: features of "
                "your own belong to the candidates that they came with; score others by QProbe.from_pretrained(...).score."
            )
        places = [known[pair] for pair in asked]
        return {n: torch.from_numpy(values[places]).float() for n, values in enumerate(self._values)}


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _read(file: Path) -> tuple[list[Key] | None, np.ndarray]:
    """What rows are whose, None where their order says so; and (N, D) float64."""
    try:
        keys, values = (None, np.load(file, allow_pickle=False)) if file.suffix == ".npy" else _parquet(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {file} of features.") from None
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{file} is no array of numbers ({str(error).splitlines()[0]}): give .npy or Parquet."
        ) from error
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.dtype.kind not in "fiub" or not values.shape[1]:
        raise ValueError(
            f"{file} holds {values.dtype} of shape {values.shape}: give numbers, a row for every candidate."
        )
    values = values.astype(np.float64)
    finite = (np.abs(values) <= np.finfo(np.float32).max).all(axis=1)  # NaN is not
    if not finite.all():
        raise ValueError(
            f"{file}: row {int(np.argmin(finite))} (from 0) holds a value that is no finite number of float32: put one there, "
            "or leave the candidate out of both files."
        )
    return keys, values


def _parquet(file: Path) -> tuple[list[Key] | None, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    keys: list[Key] | None = None
    if {"task_id", "sample"} <= set(table.column_names):
        keys = list(zip(map(str, table["task_id"].to_pylist()), table["sample"].to_pylist(), strict=True))
        table = table.drop_columns(["task_id", "sample"])
    columns = []
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            columns.append(np.array(column.to_pylist(), dtype=np.float64))  # raises where lengths differ
        else:
            columns.append(np.asarray(column.to_numpy())[:, None])
    return keys, np.concatenate([column.astype(np.float64) for column in columns], axis=1)


def _of_candidates(
    file: Path,
    found: tuple[list[Key] | None, np.ndarray],
    candidates: Sequence[Key],
    places: Mapping[Key, int],
    count: int,
) -> np.ndarray:
    """(C, D) the rows of the candidates."""
    keys, values = found
    if keys is None:
        if len(values) != count:
            raise ValueError(
                f"{file} has {len(values)} rows, the candidates' file {count} lines: give one row for each."
            )
        return values[[places[key] for key in candidates]]
    place = {key: number for number, key in enumerate(keys)}
    if len(place) < len(keys):
        raise ValueError(f"{file} has two rows of the same task_id and sample: leave one of each.")
    if lacking := [key for key in candidates if key not in place]:
        task_id, sample = lacking[0]
        raise ValueError(
            f"{file} lacks {len(lacking)} of {len(candidates)} candidates, such as sample {sample} of {task_id}: give a row for "
            "each (samples of a prompt are numbered from 0 in the order of the file)."
        )
    return values[[place[key] for key in candidates]]
