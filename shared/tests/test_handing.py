"""What a sampler hands over is what the embedder would read, and the features of a run come with its completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from qprobe.embedding import LIKELIHOOD, tables_of
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.handing import can_hand, handing
from qprobe.run.pools import Pool, Split
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.refilled import RefilledBatch

SETTINGS = SamplingSettings(n=4, temperature=1.0, top_p=1.0, max_new_tokens=24, stop=("a", "\n"))


def a_pool(spec: ModelSpec, run: Path, settings: SamplingSettings = SETTINGS, rows_at_once: int = 24) -> Pool:
    prompts = [Prompt(f"p/{i:02d}", text=f"def add_{i}(first, second):\n" * (1 + i % 3)) for i in range(12)]
    sampler = HFSampler(spec, settings, rows_at_once)
    return Pool(run, Split("few", prompts, {"data": "few"}), "sample", sampler, seed=0, batch_rows=8)


def features_of(pool: Pool, embedder: HFEmbedder) -> dict[int, tuple[list[tuple[str, int]], np.ndarray]]:
    return {layer: pool.features(embedder, layer).read_embeddings(pool.batches) for layer in tables_of(embedder)}


@pytest.fixture
def read_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Completions of every call of an embedder."""
    rows: list[int] = []
    embed = HFEmbedder.embed

    def counted(self: HFEmbedder, prompts: Any, completions: Sequence[Sequence[Any]]) -> dict[int, Tensor]:
        rows.append(sum(map(len, completions)))
        return embed(self, prompts, completions)

    monkeypatch.setattr(HFEmbedder, "embed", counted)
    return rows


@pytest.mark.parametrize("rows_at_once", [5, 48])
def test_a_run_reads_nothing_again_and_has_the_features_of_one_that_reads(
    make_model: Callable[..., ModelSpec], tmp_path: Path, read_rows: list[int], rows_at_once: int
) -> None:
    leaving_model = make_model(eos_token_id=[1, *range(20, 34)])
    embedder = HFEmbedder(leaving_model, (0, 2, 4), likelihood=True)
    handed, read = (a_pool(leaving_model, tmp_path / name, rows_at_once=rows_at_once) for name in ("handed", "read"))
    stages.sample(handed, False, embedder)
    stages.embed(handed, embedder, progress=False)
    assert read_rows == []
    stages.sample(read, progress=False)
    stages.embed(read, embedder, progress=False)
    assert sum(read_rows) == 48
    texts = [pool.completions.read(pool.batches).to_pylist() for pool in (handed, read)]
    assert [row | {"logprob": 0} for row in texts[0]] == [row | {"logprob": 0} for row in texts[1]]
    assert {row["finish_reason"] for row in texts[0]} == {"stop", "length"}
    assert "" in {row["completion"] for row in texts[0]}
    ours, theirs = features_of(handed, embedder), features_of(read, embedder)
    assert sorted(ours) == [LIKELIHOOD, 0, 2, 4]
    for layer, (keys, values) in ours.items():
        assert (keys, values.dtype) == (theirs[layer][0], theirs[layer][1].dtype)
        # Layers are stored in halves, whose last digit is 1/1024 of a number.
        np.testing.assert_allclose(values, theirs[layer][1], rtol=2e-3, atol=2e-3 if layer >= 0 else 1e-4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("part-*.parquet")}
    stages.sample(handed, False, embedder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("part-*.parquet")} == before


def test_only_what_was_drawn_before_is_read(tiny_model: ModelSpec, tmp_path: Path, read_rows: list[int]) -> None:
    """As in a run that was killed between a part of completions and its features, or whose first call did not embed."""
    embedder, pool = HFEmbedder(tiny_model, (3,)), a_pool(tiny_model, tmp_path)
    first = dataclasses.replace(pool, shard=(2, len(pool.batches)))
    stages.sample(first, progress=False)
    stages.sample(pool, False, embedder)
    assert not pool.features(embedder, 3).has(pool.batches[1])
    assert all(pool.features(embedder, 3).has(keys) for keys in pool.batches[2:])
    stages.embed(pool, embedder, progress=False)
    assert read_rows == [8]
    keys, _ = pool.features(embedder, 3).read_embeddings(pool.batches)
    assert keys == [(task_id, sample) for task_id in pool.task_ids for sample in range(4)]


def test_a_batch_with_a_state_that_is_no_longer_held_is_read(
    tiny_model: ModelSpec, tmp_path: Path, read_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, pool = HFEmbedder(tiny_model, (3,)), a_pool(tiny_model, tmp_path)
    state, asked = RefilledBatch._state, 0

    def lacking(self: RefilledBatch, row: Any) -> Any:
        nonlocal asked
        asked += 1
        return None if asked == 3 else state(self, row)

    monkeypatch.setattr(RefilledBatch, "_state", lacking)
    stages.sample(pool, False, embedder)
    table = pool.features(embedder, 3)
    assert [table.has(keys) for keys in pool.batches].count(False) == 1
    assert all(pool.completions.has(keys) for keys in pool.batches)
    stages.embed(pool, embedder, progress=False)
    assert read_rows == [8]


def test_nothing_is_handed_over_where_the_embedder_reads_something_else(
    tiny_model: ModelSpec, tiny_gpt2_model: ModelSpec, fakes: Any
) -> None:
    sampler = HFSampler(tiny_model, SETTINGS)
    same, other = HFEmbedder(tiny_model, (3,), likelihood=True), HFEmbedder(tiny_gpt2_model, (1,))
    assert can_hand(sampler, same, [3, LIKELIHOOD])
    assert not can_hand(sampler, other, [1])
    assert not can_hand(sampler, HFEmbedder(dataclasses.replace(tiny_model, dtype="bfloat16"), (3,)), [3])
    assert not can_hand(sampler, fakes.Embedder(), [1])
    assert not can_hand(fakes.Sampler(), same, [3])
    behind = HFEmbedder(tiny_model, (3,), likelihood=True, ending="ab")
    assert can_hand(sampler, behind, [3])
    assert not can_hand(sampler, behind, [3, LIKELIHOOD])  # its second token is read behind the completion
    assert handing(sampler, behind, [3, LIKELIHOOD]) is sampler
    assert not sampler.keep
