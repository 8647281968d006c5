"""A recorded run: prompts, completions and features of a run folder, compact, so that others go on without the model.

pack(Path("runs/big"), Path("recorded/big"), layers=[18, 23], notes={"weights": "..."})

A recording stands in for a model: `RecordedSampler` and `RecordedEmbedder` give back what was drawn and embedded, as any
back end does. Rewards are not recorded: whoever uses a recording executes the programs, or asks the judge, again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qprobe import store
from qprobe.embedding import LIKELIHOOD, tables_of
from qprobe.files import fingerprint, write_whole
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.models.question import QUESTION_COLUMNS
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, SamplingSettings
from qprobe.store.table import StoreError, Table

CARD = "recording.json"
# Pools that a recording gives back. Those of baselines answer prompts of their own, under the same task ids.
KINDS = ("sample", "greedy")


def pack(run: Path, folder: Path, layers: Sequence[int] | None = None, notes: dict[str, str] | None = None) -> int:
    """Write a run folder's prompts, completions and features into a folder of a few files.

    Args:
        run: a run folder whose stages sample and embed are finished.
        folder: is made; files of an earlier recording there are replaced.
        layers: of the features; None takes every layer.
        notes: what the tables' own manifests do not say, such as where the weights are from.

    Returns: bytes written.

    Raises:
        StoreError: no such tables, a layer that is not there, unfinished completions or features, a
            layer by two embedders.
    """
    pools = [t for t in _found(run / "completions", store.COMPLETIONS) if t.folder.name.rpartition(".")[2] in KINDS]
    splits = {table.folder.name.rpartition(".")[0] for table in pools}
    prompts = [table for table in _found(run / "prompts", store.PROMPTS) if table.folder.name in splits]
    features = _found(run / "features", None)
    chosen = [table for table in features if layers is None or _layer(table) in (*layers, LIKELIHOOD)]
    if lacking := sorted(set(layers or ()) - {_layer(table) for table in chosen}):
        known = ", ".join(map(str, sorted({_layer(table) for table in features} - {LIKELIHOOD}))) or "none"
        raise StoreError(f"{run} has no features of layer {', '.join(map(str, lacking))}: it has {known}.")
    embedders: dict[tuple[str, int], str] = {}
    for table in chosen:
        own = table.folder.parent.name
        if (other := embedders.setdefault((table.folder.parents[1].name, _layer(table)), own)) != own:
            raise StoreError(
                f"{run} has features of layer {_layer(table)} by two embedders, {other} and {own}: pack a copy with those of "
                "one, or name other layers."
            )
    of_pool = {table.folder.name: table.read() for table in pools}
    states = [table.read() for table in chosen]
    _check_whole(prompts, of_pool, list(zip(chosen, states, strict=True)))
    files = {
        "prompts.parquet": _labelled(prompts, "split", {t.folder.name: t.read() for t in prompts}),
        "completions.parquet": _labelled(pools, "pool", of_pool),
    }
    for table, rows in zip(chosen, states, strict=True):
        files[f"features/{table.folder.parents[1].name}.layer={_layer(table):02d}.parquet"] = rows
    card = {
        "notes": notes or {},
        "prompts": {table.folder.name: _manifest(table) for table in prompts},
        "completions": {table.folder.name: _manifest(table) for table in pools},
        "features": [
            {"pool": t.folder.parents[1].name, "embedder": t.folder.parent.name, **_manifest(t)} for t in chosen
        ],
    }
    written = 0
    (folder / CARD).unlink(missing_ok=True)  # an older one must not describe new files
    for name, rows in files.items():
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer, compression="zstd", compression_level=19, write_page_checksum=True)
        content = buffer.getvalue().to_pybytes()
        write_whole(folder / name, content)
        written += len(content)
    text = json.dumps(card, indent=1).encode()
    write_whole(folder / CARD, text)
    return written + len(text)


def _found(folder: Path, schema: pa.Schema | None) -> list[Table]:
    tables = [store.found_table(path.parent, schema) for path in sorted(folder.rglob("manifest.json"))]
    if not tables:
        raise StoreError(f"{folder} holds no table: run the stages sample and embed first.")
    return tables


def _layer(table: Table) -> int:
    return int(table.inputs["layer"])


def _manifest(table: Table) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((table.folder / "manifest.json").read_text())
    return read


def _labelled(tables: Sequence[Table], name: str, rows: dict[str, pa.Table]) -> pa.Table:
    """Rows of several tables in one, with the name of their own."""
    return pa.concat_tables(
        rows[t.folder.name].add_column(0, name, pa.array([t.folder.name] * len(rows[t.folder.name]), pa.string()))
        for t in tables
    )


def _check_whole(
    prompts: Sequence[Table], pools: dict[str, pa.Table], features: Sequence[tuple[Table, pa.Table]]
) -> None:
    wanted = {table.folder.name: int(table.inputs["prompts"]) for table in prompts}
    for name, rows in pools.items():
        found, expected = len(set(rows["task_id"].to_pylist())), wanted[name.rpartition(".")[0]]
        if found < expected:
            raise StoreError(
                f"The completions {name} are missing {expected - found} of {expected} prompts: run sample."
            )
    for table, rows in features:
        of_pool = len(pools[table.folder.parents[1].name])
        if len(rows) < of_pool:
            raise StoreError(f"{table.name} is missing {of_pool - len(rows)} of {of_pool} rows: run embed.")


@dataclass(frozen=True)
class Recording:
    """A packed run.

    Args:
        folder: where it lies.
        card: who made what with which settings.
    """

    folder: Path
    card: dict[str, Any]

    @functools.cached_property
    def identity(self) -> str:
        """By content: of the card, which holds the identity of everything that was recorded."""
        return fingerprint(self.card)

    @functools.cached_property
    def prompts(self) -> dict[str, dict[str, Any]]:
        """task id -> its row, with the split."""
        return {row["task_id"]: row for row in self._read("prompts.parquet").to_pylist()}

    def completions(self, kind: str) -> list[dict[str, Any]]:
        """Rows of all pools of a kind, such as "sample"."""
        rows = self._read("completions.parquet").to_pylist()
        return [row for row in rows if row["pool"].rpartition(".")[2] == kind]

    def features(self, layer: int) -> dict[tuple[str, int], np.ndarray]:
        """(task_id, sample) -> (D,) state of a layer."""
        found: dict[tuple[str, int], np.ndarray] = {}
        for entry in self.card["features"]:
            if entry["inputs"]["layer"] != layer:
                continue
            table = self._read(f"features/{entry['pool']}.layer={layer:02d}.parquet")
            keys = zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
            found |= dict(zip(keys, store.embeddings_of(table), strict=True))
        return found

    @property
    def layers(self) -> list[int]:
        return sorted({int(entry["inputs"]["layer"]) for entry in self.card["features"]} - {LIKELIHOOD})

    @property
    def has_likelihoods(self) -> bool:
        """Whether likelihood columns were recorded."""
        return any(entry["inputs"]["layer"] == LIKELIHOOD for entry in self.card["features"])

    def _read(self, name: str) -> pa.Table:
        try:
            with pq.ParquetFile(self.folder / name, page_checksum_verification=True) as file:
                return file.read()
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"{self.folder / name} cannot be read ({str(error).splitlines()[0]}): get the recording anew."
            ) from error


@functools.lru_cache(maxsize=4)
def open_recording(place: str) -> Recording:
    """A recording by its folder, or by package:folder for one that a package brings along.

    Raises:
        StoreError: there is none, or its card cannot be read.
    """
    package, colon, inside = place.partition(":")
    folder = Path(place)
    if colon and not folder.exists():
        specification = importlib.util.find_spec(package)
        if specification is None or specification.origin is None:
            raise StoreError(f"The recording {place} is in a package that is not installed: install {package}.")
        folder = Path(specification.origin).parent / inside
    try:
        return Recording(folder, json.loads((folder / CARD).read_text()))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is no recording: it has no readable {CARD} ({error}).") from error


class RecordedSampler:
    """Gives back recorded completions, known by their seeds; the greedy ones at temperature 0.

    Args:
        model: is not looked at; a recording says which model drew it.
        settings: `n` of it, at most as many as were recorded; everything else is the recording's.
        recording: a folder, or package:folder.
    """

    def __init__(self, model: ModelSpec, settings: SamplingSettings, recording: str) -> None:
        self.settings = settings
        self.recording = open_recording(recording)
        self.kind = "greedy" if settings.temperature == 0 else "sample"

    def identity(self) -> dict[str, Any]:
        return {"sampler": "recorded", "recording": self.recording.identity, "kind": self.kind, "n": self.settings.n}

    def prompt_identity(self) -> dict[str, Any]:
        return {"recording": self.recording.identity}

    def tokenizer_fingerprint(self) -> str:
        return f"recording {self.recording.identity}"

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        """As it was rendered when it was recorded.

        Raises:
            ValueError: the prompt was not recorded, or was another one.
        """
        row = self.recording.prompts.get(prompt.task_id)
        if row is None:
            raise ValueError(
                f"{self.recording.folder} has no prompt {prompt.task_id}: it holds {_some(self.recording)}."
            )
        messages = json.dumps(prompt.messages) if prompt.messages else None
        same = row["messages"] == messages and (
            row["prompt"].endswith(prompt.opening) if messages else row["prompt"] == prompt.text
        )
        if not same:
            raise ValueError(
                f"The prompt {prompt.task_id} is another one than in {self.recording.folder}: use the style that was recorded."
            )
        return row["prompt"], row["prompt_token_ids"]

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        """The completions that were drawn with these seeds.

        Raises:
            ValueError: seeds that were not recorded.
        """
        if lacking := sum(seed not in self._by_seed for row in seeds for seed in row):
            raise ValueError(
                f"{self.recording.folder} does not hold {lacking} of these completions: it was drawn with another seed, or "
                f"has fewer than n={self.settings.n} a prompt."
            )
        return [[self._by_seed[seed] for seed in row] for row in seeds]

    @functools.cached_property
    def _by_seed(self) -> dict[int, Completion]:
        names = [field.name for field in dataclasses.fields(Completion) if field.compare and field.name != "text"]
        rows = self.recording.completions(self.kind)
        return {row["seed"]: Completion(row["completion"], **{name: row[name] for name in names}) for row in rows}


class RecordedEmbedder:
    """Gives back recorded features, known by the tokens of prompt and completion.

    Args:
        model: is not looked at; a recording says which model embedded it.
        recording: a folder, or package:folder.
        layers: of those that were recorded; None takes all.
        likelihood: whether it gives the likelihood columns too.
    """

    def __init__(
        self, model: ModelSpec, recording: str, layers: Sequence[int] | None = None, likelihood: bool = False
    ) -> None:
        self.likelihood = likelihood
        self.recording = open_recording(recording)
        self.layers = sorted(layers or self.recording.layers)
        if lacking := sorted(set(self.layers) - set(self.recording.layers)):
            raise ValueError(
                f"embedder.layers: {self.recording.folder} has no layer {', '.join(map(str, lacking))}; it has "
                f"{', '.join(map(str, self.recording.layers))}."
            )

        if likelihood and not self.recording.has_likelihoods:
            raise ValueError(f"embedder.likelihood: {self.recording.folder} has no likelihood columns: say false.")

    def identity(self) -> dict[str, Any]:
        return {"embedder": "recorded", "recording": self.recording.identity}

    def likelihood_identity(self) -> dict[str, Any]:
        return {}

    def column_names(self) -> tuple[str, ...]:
        width = len(next(iter(self.recording.features(LIKELIHOOD).values())))
        return (*COLUMNS, *QUESTION_COLUMNS)[:width]

    def folder_name(self) -> str:
        return "recorded"

    def tokenizer_fingerprint(self) -> str:
        return f"recording {self.recording.identity}"

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        raise ValueError(f"{self.recording.folder} embeds what it recorded, with its own tokens, and no other text.")

    def encode_completion(self, text: str) -> list[int]:
        return self.encode_prompt(text, templated=False)

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        """The states that were recorded for these tokens.

        Raises:
            ValueError: tokens that were not recorded.
        """
        rows = [(tuple(prompt), tuple(ids)) for prompt, own in zip(prompts, completions, strict=True) for ids in own]
        if lacking := sum(row not in self._places for row in rows):
            raise ValueError(f"{self.recording.folder} has no features of {lacking} of these {len(rows)} completions.")
        places = [self._places[row] for row in rows]
        return {layer: torch.from_numpy(values[places]).float() for layer, values in self._found[1].items()}

    @functools.cached_property
    def _found(self) -> tuple[list[tuple[str, int]], dict[int, np.ndarray]]:
        """The rows that every layer has (a pool may have fewer layers than another), and their states."""
        found = {layer: self.recording.features(layer) for layer in tables_of(self)}
        keys = [key for key in found[self.layers[0]] if all(key in of_layer for of_layer in found.values())]
        return keys, {layer: np.array([of_layer[key] for key in keys]) for layer, of_layer in found.items()}

    @functools.cached_property
    def _places(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
        """(prompt tokens, completion tokens) -> row; equal rows have equal states."""
        place = {key: number for number, key in enumerate(self._found[0])}
        prompts = {task_id: tuple(row["prompt_token_ids"]) for task_id, row in self.recording.prompts.items()}
        return {
            (prompts[row["task_id"]], tuple(row["token_ids"])): place[row["task_id"], row["sample"]]
            for row in self.recording.completions("sample")
            if (row["task_id"], row["sample"]) in place
        }


def _some(recording: Recording) -> str:
    ids = sorted(recording.prompts)
    return f"{len(ids)} prompts, such as {ids[0]}"
