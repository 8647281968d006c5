"""Stages: whole batches, resumed without a row twice or lost, no reward invented, tokens reused only where they mean the same."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe import store
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.joined import Joined, join
from qprobe.run.pools import Pool, RewardBatch, RewardRow, Split
from qprobe.run.runners.local import Work, run_stage
from qprobe.sampling import sample_seeds
from qprobe.store.table import StoreError, Table


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    """Ten prompts x 4 samples in batches of 3, 3, 3 and 1 prompts."""
    return make_pool(fakes, tmp_path)


def make_pool(fakes: ModuleType, run: Path, **changes: Any) -> Pool:
    values = {"split": fakes.split(), "kind": "sample", "sampler": fakes.Sampler(), "seed": 5, "batch_rows": 12}
    return Pool(run, **values | changes)


def complete(pool: Pool, fakes: ModuleType, embedder: Any = None) -> Joined:
    embedder = embedder or fakes.Embedder()
    stages.sample(pool, progress=False)
    stages.reward(pool, fakes.Reward(), progress=False)
    stages.embed(pool, embedder, progress=False)
    return join(pool, fakes.Reward(), embedder, embedder.layers[0])


def contents(table: Table) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.parts()}


def rewrite(table: Table, keys: Any, change: Any) -> None:
    """Put changed rows into the part of a batch."""
    pq.write_table(change(table.read([keys])), table.part(keys))


def test_batches_are_whole_prompts_of_the_sorted_tasks_whatever_the_order_they_came_in(
    fakes: ModuleType, tmp_path: Path
) -> None:
    ids = [f"t-{number:03d}" for number in range(10)]
    expected = [tuple(ids[:3]), tuple(ids[3:6]), tuple(ids[6:9]), tuple(ids[9:])]
    for prompts in (fakes.prompts(10), fakes.prompts(10)[::-1]):
        assert make_pool(fakes, tmp_path, split=Split("s", prompts, {})).batches == expected
    assert len(make_pool(fakes, tmp_path, batch_rows=1).batches) == 10  # a prompt is never cut


SIZES = {"t-000": 5, "t-001": 1, "t-002": 2, "t-003": 9, "t-004": 4}


def recorded_split(fakes: ModuleType) -> Split:
    texts = {task_id: [f"answer {10 * size + n:02d}" for n in range(size)] for task_id, size in SIZES.items()}
    return Split("mine", fakes.prompts(5), {"file": "mine"}, texts)


def test_unequal_prompts_fill_a_batch_as_far_as_they_fit(fakes: ModuleType, tmp_path: Path) -> None:
    split = recorded_split(fakes)
    for rows, expected in [
        (8, [["t-000", "t-001", "t-002"], ["t-003"], ["t-004"]]),  # 8; 9 is more than fits, and is not cut; 4
        (7, [["t-000", "t-001"], ["t-002"], ["t-003"], ["t-004"]]),
        (100, [list(SIZES)]),
    ]:
        pool = make_pool(fakes, tmp_path, split=split, batch_rows=rows)
        assert [list(batch) for batch in pool.batches] == expected
    assert pool.smallest == 1


def test_completions_that_are_there_already_are_taken_and_nothing_is_drawn(fakes: ModuleType, tmp_path: Path) -> None:
    split, sampler = recorded_split(fakes), fakes.Sampler()
    pool = make_pool(fakes, tmp_path, split=split, sampler=sampler, batch_rows=8)
    joined = complete(pool, fakes)
    assert sampler.calls == []
    assert split.recorded is not None
    assert joined.completions == [text for task_id in SIZES for text in split.recorded[task_id]]
    assert joined.groups.tolist() == [place for place, size in enumerate(SIZES.values()) for _ in range(size)]
    assert joined.rewards.tolist() == [
        float(fakes.passes(task_id, text)) for task_id in SIZES for text in split.recorded[task_id]
    ]
    assert joined.features is not None
    goodness = [int(text.removeprefix("answer ")) / 100 for text in joined.completions]
    np.testing.assert_array_equal(joined.features[:, 0], np.array(goodness, np.float16))
    rows = pool.completions.read(pool.batches).to_pylist()
    assert [row["sample"] for row in rows] == [n for size in SIZES.values() for n in range(size)]
    assert all(row["token_ids"] is None and row["finish_reason"] == "imported" for row in rows)
    other = Split("mine", split.prompts, split.source, dict(split.recorded) | {"t-001": ["answer 00"]})
    with pytest.raises(StoreError, match="completions"):
        stages.sample(make_pool(fakes, tmp_path, split=other, batch_rows=8), progress=False)


def test_a_split_with_completions_has_some_of_every_prompt(fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="t-001"):
        Split("mine", fakes.prompts(2), {}, {"t-000": ["x"], "t-001": []})


def test_completions_carry_their_own_seed_and_the_tables_join(pool: Pool, fakes: ModuleType) -> None:
    joined = complete(pool, fakes)
    rows = pool.completions.read(pool.batches).to_pylist()
    assert [(row["task_id"], row["sample"]) for row in rows] == [(t, s) for t in pool.task_ids for s in range(4)]
    for row in rows:
        # hash(run seed, task_id) + sample, from the words of DESIGN.
        digest = hashlib.sha256(b"5\x00" + row["task_id"].encode()).digest()
        assert row["seed"] == int.from_bytes(digest[:8], "big") // 8 + row["sample"]
        assert bytes(row["token_ids"]).decode() == row["completion"]
    assert joined.completions == [row["completion"] for row in rows]
    assert joined.groups.tolist() == [number for number in range(10) for _ in range(4)]
    expected = [float(fakes.passes(row["task_id"], row["completion"])) for row in rows]
    assert joined.rewards.tolist() == expected
    assert 0 < sum(expected) < 40
    assert joined.verdicts == ["passed" if reward else "failed" for reward in expected]
    assert joined.features is not None
    goodness = [int(text.removeprefix("answer ")) / 100 for text in joined.completions]
    np.testing.assert_array_equal(joined.features[:, 0], np.array(goodness, np.float16))


def test_a_stage_resumes_where_it_was_cut_and_ends_as_if_undisturbed(fakes: ModuleType, tmp_path: Path) -> None:
    whole = make_pool(fakes, tmp_path / "whole")
    undisturbed = complete(whole, fakes)
    cut = make_pool(fakes, tmp_path / "cut")
    complete(cut, fakes)
    lost = {"completions": (0, 3), "rewards": (1,), "features": (0, 2)}
    tables = {
        "completions": cut.completions,
        "rewards": cut.rewards(fakes.Reward()),
        "features": cut.features(fakes.Embedder(), 1),
    }
    for name, table in tables.items():
        for number in lost[name]:
            table.part(cut.batches[number]).unlink()
    before = {name: contents(table) for name, table in tables.items()}
    sampler, reward, embedder = fakes.Sampler(), fakes.Reward(), fakes.Embedder()
    again = make_pool(fakes, tmp_path / "cut", sampler=sampler)
    stages.sample(again, progress=False)
    stages.reward(again, reward, progress=False)
    stages.embed(again, embedder, progress=False)
    # The very batches that were lost: none cut anew from what was left.
    assert (sampler.calls, reward.calls, embedder.calls) == ([3, 1], [3], [3, 3])
    assert sampler.rendered == 0
    for name, table in tables.items():
        assert contents(table).items() >= before[name].items()
    resumed = join(again, reward, embedder, 1)
    assert resumed.completions == undisturbed.completions
    np.testing.assert_array_equal(resumed.rewards, undisturbed.rewards)
    assert resumed.features is not None
    assert undisturbed.features is not None
    np.testing.assert_array_equal(resumed.features, undisturbed.features)
    for name, table in tables.items():
        rows = table.read()
        found = sorted(zip(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
        assert found == [(t, s) for t in cut.task_ids for s in range(4)], name


def test_a_finished_stage_asks_nobody(pool: Pool, fakes: ModuleType) -> None:
    complete(pool, fakes)
    sampler, reward, embedder = fakes.Sampler(), fakes.Reward(), fakes.Embedder()
    complete(make_pool(fakes, pool.run, sampler=sampler), fakes, embedder)
    stages.reward(pool, reward, progress=False)
    assert sampler.calls == reward.calls == embedder.calls == []


def test_a_part_is_written_as_soon_as_its_batch_is_done(
    pool: Pool, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.sample(pool, progress=False)
    table = pool.rewards(fakes.Reward())
    reward = fakes.Reward()
    seen = []

    def rows(batch: RewardBatch) -> Any:
        seen.append(len(table.parts()))
        return fakes.Reward().rows(batch)

    monkeypatch.setattr(reward, "rows", rows)
    stages.reward(pool, reward, progress=False)
    assert seen == [0, 1, 2, 3]


def test_rewards_may_come_in_any_order_of_batches(fakes: ModuleType, tmp_path: Path) -> None:
    tables = []
    for reward in (fakes.Reward(), fakes.Reward(reverse=True)):
        pool = make_pool(fakes, tmp_path / str(reward.reverse))
        stages.sample(pool, progress=False)
        stages.reward(pool, reward, progress=False)
        tables.append(pool.rewards(reward).read(pool.batches))
    assert reward.calls == [1, 3, 3, 3]  # really reversed
    assert tables[0].equals(tables[1])


def test_a_reward_that_fails_writes_no_row_of_its_batch_and_the_others_stay(pool: Pool, fakes: ModuleType) -> None:
    stages.sample(pool, progress=False)
    with pytest.raises(RuntimeError, match="answer"):
        stages.reward(pool, fakes.Reward(fail_at=2), progress=False)
    table = pool.rewards(fakes.Reward())
    assert [table.has(keys) for keys in pool.batches] == [True, True, False, False]
    reward = fakes.Reward()
    stages.reward(pool, reward, progress=False)
    assert reward.calls == [3, 1]
    assert table.read(pool.batches).num_rows == 40


class Broken:
    """A reward whose batches are changed before they are given back."""

    name = "broken"

    def __init__(self, change: Any) -> None:
        self.change = change

    def identity(self) -> dict[str, Any]:
        return {}

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        yield from self.change([(batch, [RewardRow(1.0)] * len(batch.rows)) for batch in batches])


def graded(value: Any) -> Any:
    return lambda batches: [(batch, [*rows[:-1], RewardRow(value)]) for batch, rows in batches]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (graded(float("nan")), ValueError, "broken"),
        (graded(float("-inf")), ValueError, "broken"),
        (graded(1e39), ValueError, "broken"),  # infinite as float32
        (graded(None), ValueError, "broken"),
        (graded("good"), ValueError, "broken"),
        (lambda batches: [(b, rows[:-1]) for b, rows in batches], RuntimeError, "completions"),
        (lambda batches: batches[:-1], RuntimeError, "returned"),
        (lambda batches: [*batches, batches[0]], RuntimeError, "batch"),
        (
            lambda batches: [(RewardBatch(("x",), [("x", 0, "")]), [RewardRow(0.0)])],
            RuntimeError,
            "batch",
        ),
    ],
)
def test_a_reward_that_breaks_its_promise_is_a_sentence(
    pool: Pool, change: Any, error: type[Exception], message: str
) -> None:
    stages.sample(pool, progress=False)
    with pytest.raises(error, match=message):
        stages.reward(pool, Broken(change), progress=False)
    table = pool.rewards(Broken(change))
    for part in table.parts():
        assert np.isfinite(pq.read_table(part, partitioning=None)["reward"].to_numpy()).all()


def test_tokens_are_reused_where_both_tokenizers_are_one(pool: Pool, fakes: ModuleType) -> None:
    embedder = fakes.Embedder()
    complete(pool, fakes, embedder)
    assert {prompt[0] for prompt, _ in embedder.seen} == {ord("t")}  # as the sampler encoded it: without a mark
    texts = pool.completions.read(pool.batches)["completion"].to_pylist()
    assert [bytes(completion).decode() for _, completion in embedder.seen] == texts


@pytest.mark.parametrize("sampler", [{"tokens": False}, {"tokenizer": "another"}])
def test_otherwise_prompt_and_completion_are_encoded_each_by_itself(
    sampler: dict[str, Any], fakes: ModuleType, tmp_path: Path
) -> None:
    pool = make_pool(fakes, tmp_path, sampler=fakes.Sampler(**sampler))
    embedder = fakes.Embedder()
    complete(pool, fakes, embedder)
    texts = pool.completions.read(pool.batches)["completion"].to_pylist()
    for (prompt, completion), task, text in zip(
        embedder.seen, [t for t in pool.task_ids for _ in range(4)], texts, strict=True
    ):
        assert prompt == [fakes.PROMPT_MARK, *f"task {task[2:]}: ".encode()]
        assert completion == list(text.encode())


def test_a_conversation_is_encoded_as_already_templated(fakes: ModuleType, tmp_path: Path) -> None:
    messages = ({"role": "user", "content": "task 007: "},)
    split = Split("chat", [Prompt("t-007", messages=messages)], {})
    embedder = fakes.Embedder(tokenizer="another")
    complete(make_pool(fakes, tmp_path, split=split), fakes, embedder)
    assert bytes(embedder.seen[0][0]).decode() == "task 007: "


def test_several_layers_are_made_in_one_pass_each_in_its_table(pool: Pool, fakes: ModuleType) -> None:
    embedder = fakes.Embedder(layers=(2, 1))
    complete(pool, fakes, embedder)
    assert embedder.calls == [3, 3, 3, 1]
    first, second = (
        store.embeddings_of(pool.features(embedder, layer).read(pool.batches)).astype(np.float32) for layer in (1, 2)
    )
    np.testing.assert_allclose(second, 10 * first, rtol=2e-3)  # two roundings to float16
    assert (pool.run / "features" / "train.sample" / "fake-numbers" / "layer=01").is_dir()


def test_a_layer_that_is_added_leaves_the_rows_of_the_others_untouched(pool: Pool, fakes: ModuleType) -> None:
    complete(pool, fakes)
    table = pool.features(fakes.Embedder(), 1)
    before = {path: path.stat().st_mtime_ns for path in table.parts()}
    embedder = fakes.Embedder(layers=(1, 2), values=dict.fromkeys(range(4), 0.99))  # as bfloat16 may move bits
    stages.embed(pool, embedder, progress=False)
    assert {path: path.stat().st_mtime_ns for path in table.parts()} == before
    assert pool.features(embedder, 2).read(pool.batches).num_rows == 40


def test_values_beyond_float16_are_told_and_kept(
    pool: Pool, fakes: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = complete(pool, fakes, fakes.Embedder(values={0: 1e5, 2: 1e5}))
    assert joined.features is not None
    assert joined.features.dtype == np.float32
    assert joined.features[0, 0] == 1e5
    assert capsys.readouterr().out.count("stored as float32") == 1


def test_a_join_of_large_features_is_the_same_join(
    pool: Pool, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = complete(pool, fakes)
    monkeypatch.setattr("qprobe.store.table.MAPPED_ABOVE", 0)
    mapped = join(pool, fakes.Reward(), fakes.Embedder(), 1)
    assert isinstance(mapped.features, np.memmap)
    assert joined.features is not None
    np.testing.assert_array_equal(mapped.features, joined.features)
    assert mapped.features.flags.writeable  # torch reads no other memory without a warning
    assert mapped.completions == joined.completions
    assert sorted(path.suffix for path in pool.features(fakes.Embedder(), 1).folder.iterdir()) == [
        ".json",
        *[".parquet"] * 4,
    ]


def test_an_embedding_of_nan_is_refused_with_its_row(pool: Pool, fakes: ModuleType) -> None:
    with pytest.raises(StoreError, match="t-003"):
        complete(pool, fakes, fakes.Embedder(values={1: float("nan")}))
    table = pool.features(fakes.Embedder(), 1)
    assert [table.has(keys) for keys in pool.batches] == [True, False, False, False]


@pytest.mark.parametrize("name", ["completions", "rewards", "features"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: pa.concat_tables([rows, rows.slice(4, 1)]), "t-001"),  # a row twice
        (lambda rows: rows.slice(1), "t-000"),  # a row missing
        (lambda rows: rows.take([1, 0, *range(2, 12)]), "t-000"),  # rows exchanged
        (lambda rows: pa.concat_tables([rows.slice(0, 11), rows.slice(4, 1)]), "t-001|t-002"),  # one twice, one missing
    ],
)
def test_rows_twice_missing_or_exchanged_are_refused(
    name: str, change: Any, told: str, pool: Pool, fakes: ModuleType
) -> None:
    complete(pool, fakes)
    embedder = fakes.Embedder()
    tables = {
        "completions": pool.completions,
        "rewards": pool.rewards(fakes.Reward()),
        "features": pool.features(embedder, 1),
    }
    rewrite(tables[name], pool.batches[0], change)
    with pytest.raises(StoreError, match=rf"The {name} of train.sample do not hold every .* for \('({told})', \d\)"):
        join(pool, fakes.Reward(), embedder, 1)


def test_a_stage_before_its_inputs_says_which_is_missing(pool: Pool, fakes: ModuleType) -> None:
    for stage in (
        lambda: stages.reward(pool, fakes.Reward(), progress=False),
        lambda: stages.embed(pool, fakes.Embedder(), progress=False),
        lambda: join(pool, fakes.Reward()),
    ):
        with pytest.raises(StoreError, match="missing"):
            stage()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed"),
        ({"batch_rows": 8}, "batch_rows"),
        ({"sampler": {"n": 2}}, r"sampler\.n"),
        ({"sampler": {"temperature": 1.0}}, r"sampler\.temperature"),
        ({"split": 3}, r"split\.start"),
    ],
)
def test_completions_of_other_inputs_are_refused_and_the_difference_named(
    changes: dict[str, Any], message: str, pool: Pool, fakes: ModuleType
) -> None:
    complete(pool, fakes)
    before = sorted(path for path in pool.run.rglob("*"))
    if "sampler" in changes:
        changes = {"sampler": fakes.Sampler(**changes["sampler"])}
    if "split" in changes:
        changes = {"split": fakes.split(start=changes["split"])}
    other = make_pool(fakes, pool.run, **changes)
    with pytest.raises(StoreError, match=message):
        stages.sample(other, progress=False)
    for stage in (stages.reward, stages.embed):
        maker = fakes.Reward() if stage is stages.reward else fakes.Embedder()
        with pytest.raises(StoreError, match="inputs"):
            stage(other, maker, progress=False)
    assert sorted(pool.run.rglob("*")) == before
    assert not any(".tmp" in name for _, _, files in os.walk(pool.run) for name in files)


def test_a_split_needs_prompts_of_different_names(fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="prompts"):
        Split("empty", [], {})
    with pytest.raises(ValueError, match="t-001"):
        Split("s", [*fakes.prompts(3), *fakes.prompts(1, start=1)], {})


def test_seeds_differ_between_runs_prompts_and_samples() -> None:
    seeds = [seed for run in (0, 1) for task in ("a", "b", "1") for seed in sample_seeds(run, task, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_the_runner_counts_what_it_made_and_takes_batches_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []

    def stage(batches: Iterable[str]) -> Iterator[tuple[str, int]]:
        for batch in batches:
            events.append(f"work {batch}")
            yield batch, 1

    works = [Work("a", 3, True), Work("b", 2, False), Work("c", 1, False)]
    made = run_stage("name", works, stage, lambda batch, rows: events.append(f"write {batch}"))
    assert made == 3
    assert events == ["work b", "write b", "work c", "write c"]
    assert "6/6" in capsys.readouterr().err


def test_prompts_of_the_same_tokens_and_their_equal_rows_are_embedded_once(fakes: ModuleType, tmp_path: Path) -> None:
    texts = {"a": ["answer 10", "answer 20"], "b": ["answer 30", "answer 10"], "c": ["answer 10", "answer 10"]}
    prompts = [Prompt(key, text="task 001: " if key != "c" else "task 002: ") for key in texts]
    pool = Pool(tmp_path, Split("pairs", prompts, {}, texts), "sample", fakes.Sampler(), 0)
    embedder, alone = fakes.Embedder(), fakes.Embedder()
    stages.sample(pool, progress=False)
    stages.embed(pool, embedder, progress=False)
    assert len(embedder.seen) == 4  # three answers of a's and b's prompt, one of c's
    ids = {text: alone.encode_completion(text) for of_prompt in texts.values() for text in of_prompt}
    expected = alone.embed(
        [alone.encode_prompt(str(prompt.text), templated=False) for prompt in prompts],
        [[ids[text] for text in of_prompt] for of_prompt in texts.values()],
    )
    _, found = pool.features(embedder, 1).read_embeddings(pool.batches)
    assert np.array_equal(found, expected[1].numpy().astype(found.dtype))


def test_texts_that_were_brought_along_are_fingerprinted_once_however_many_batches(
    fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 160,000 pairs once a batch would be hours."""
    split = fakes.split("brought", 40)
    texts = {prompt.task_id: ["7", "8"] for prompt in split.prompts}
    brought = dataclasses.replace(split, recorded=texts)
    seen: list[int] = []
    real = stages.fingerprint

    def counting(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], list):  # of texts; parts are named by keys
            seen.append(len(value))
        return real(value)

    monkeypatch.setattr(stages, "fingerprint", counting)
    for _ in range(2):
        pool = Pool(tmp_path / "run", brought, "sample", fakes.Sampler(2), seed=0, batch_rows=4)
        assert len(pool.batches) == 20
        stages.sample(pool, progress=False)
        stages.reward(pool, fakes.Reward(), progress=False)
        stages.embed(pool, fakes.Embedder((1,)), progress=False)
    assert len(seen) == 1
