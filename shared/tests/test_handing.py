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
from qprobe.models.prefix import PrefixRun
from qprobe.pipeline import ray_cluster
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


def test_a_layer_that_is_not_there_is_a_sentence_and_the_memory_s_limit_stays(
    tiny_model: ModelSpec, tmp_path: Path
) -> None:
    pool = a_pool(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"[Ll]ayer 9"):
        stages.sample(pool, False, HFEmbedder(tiny_model, (9,)))
    sampler: Any = pool.sampler
    passes = sampler.passes
    stages.sample(pool, False, HFEmbedder(tiny_model, (3,)))
    assert sampler.passes is passes
    made: Any = handing(sampler, HFEmbedder(tiny_model, (3,)), [3])
    assert made.passes is passes


# ------------------------------------------------------------------------------------------------------- greedy beside


def a_greedy_pool(pool: Pool, **changes: Any) -> Pool:
    own = pool.sampler.settings
    settings = dataclasses.replace(own, n=1, temperature=0.0, **changes)
    return dataclasses.replace(pool, kind="greedy", sampler=HFSampler(pool.sampler.model, settings, 24), batch_rows=5)  # type: ignore[attr-defined]


def rows_of(pool: Pool) -> list[dict[str, Any]]:
    return [row | {"logprob": round(row["logprob"], 3)} for row in pool.completions.read(pool.batches).to_pylist()]


@pytest.fixture
def run_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of every pass over prompts."""
    counts: list[int] = []
    prefill = PrefixRun.prefill

    def counted(self: PrefixRun, prompts: Any, *args: Any, **more: Any) -> Any:
        counts.append(len(prompts))
        return prefill(self, prompts, *args, **more)

    monkeypatch.setattr(PrefixRun, "prefill", counted)
    return counts


@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_greedy_completions_are_drawn_beside_the_others_and_are_those_of_their_own_pool(
    tiny_model: ModelSpec, tmp_path: Path, run_prompts: list[int], rows_at_once: int
) -> None:
    pool = a_pool(tiny_model, tmp_path / "beside", rows_at_once=rows_at_once)
    alone = a_pool(tiny_model, tmp_path / "alone", rows_at_once=rows_at_once)
    greedy, greedy_alone = a_greedy_pool(pool), a_greedy_pool(alone)
    embedder = HFEmbedder(tiny_model, (3,))
    stages.sample(pool, False, embedder, greedy)
    assert sum(run_prompts) == 12  # each once, for both
    stages.sample(greedy, progress=False)
    assert len(greedy.completions.parts()) == 3  # 12 rows by 5
    for single in (alone, greedy_alone):
        stages.sample(single, progress=False)
    assert rows_of(pool) == rows_of(alone)
    assert rows_of(greedy) == rows_of(greedy_alone)
    assert {row["sample"] for row in rows_of(greedy)} == {0}
    assert greedy.completions.noted("law") is not None
    assert all(pool.features(embedder, 3).has(keys) for keys in pool.batches)


def test_what_is_left_of_the_greedy_completions_is_drawn_by_themselves(
    tiny_model: ModelSpec, tmp_path: Path, run_prompts: list[int]
) -> None:
    pool, whole = a_pool(tiny_model, tmp_path / "cut"), a_pool(tiny_model, tmp_path / "whole")
    for each in (pool, whole):
        stages.sample(each, False, None, a_greedy_pool(each))
    greedy = a_greedy_pool(pool)
    greedy.completions.part(greedy.batches[1]).unlink()
    pool.completions.part(pool.batches[0]).unlink()  # as if killed between the two, and more
    run_prompts.clear()
    stages.sample(pool, False, None, a_greedy_pool(pool))
    assert sum(run_prompts) == 2
    stages.sample(greedy, progress=False)
    assert sum(run_prompts) == 2 + 5
    assert rows_of(pool) == rows_of(whole)
    assert rows_of(greedy) == rows_of(a_greedy_pool(whole))


def test_greedy_completions_of_another_kind_are_drawn_by_themselves(
    tiny_model: ModelSpec, tiny_gpt2_model: ModelSpec, tmp_path: Path
) -> None:
    pool = a_pool(tiny_model, tmp_path)
    sampler: Any = pool.sampler
    assert sampler.beside(a_greedy_pool(pool).sampler).greedy_too
    for other in (
        a_greedy_pool(pool, max_new_tokens=8).sampler,
        a_greedy_pool(pool, stop=("b",)).sampler,
        HFSampler(tiny_model, dataclasses.replace(SETTINGS, n=1)),
        HFSampler(tiny_gpt2_model, dataclasses.replace(SETTINGS, n=1, temperature=0.0)),
    ):
        assert sampler.beside(other) is None
    assert not sampler.greedy_too
    sharded = dataclasses.replace(pool, shard=(1, 2))
    stages.sample(sharded, False, None, greedy := dataclasses.replace(a_greedy_pool(pool), shard=(1, 2)))
    assert greedy.completions.parts() == []


def test_what_a_cluster_has_left_knows_the_likelihood_columns(
    tiny_model: ModelSpec, fakes: Any, tmp_path: Path
) -> None:
    """As where an actor was killed between a layer's part and theirs."""
    embedder = HFEmbedder(tiny_model, (3,), likelihood=True)
    made = fakes.pipeline(tmp_path, sampler=HFSampler(tiny_model, SETTINGS), greedy=None, embedder=embedder)
    made.execute(["sample", "embed"])
    assert ray_cluster.batches_left(made, ["sample", "embed"]) == []
    (pool,) = made.sample_pools
    pool.features(embedder, LIKELIHOOD).part(pool.batches[1]).unlink()
    assert ray_cluster.batches_left(made, ["sample", "embed"]) == [(pool.name, 2)]
    ray_cluster.make_batch(made, "embed", pool.name, 2)
    assert ray_cluster.batches_left(made, ["sample", "embed"]) == []
