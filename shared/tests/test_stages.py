"""Stages: whole batches, resumed without a row twice or lost, tokens reused only where they mean the same."""

import hashlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe import store
from qprobe.prompts import Prompt
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool, Split
from qprobe.store.table import StoreError, Table


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    made: Pool = fakes.pool(tmp_path)
    return made


def contents(table: Table) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.parts()}


def test_completions_carry_their_own_seed_and_the_tables_join(pool: Pool, fakes: ModuleType) -> None:
    joined = fakes.complete(pool)
    rows = pool.completions.read(pool.batches).to_pylist()
    assert [(row["task_id"], row["sample"]) for row in rows] == [(t, s) for t in pool.task_ids for s in range(4)]
    for row in rows:
        # hash(run seed, task_id) + sample: docs/CONTRACTS.md.
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


def test_a_sampler_that_works_on_several_batches_gives_them_back_in_any_order(
    fakes: ModuleType, tmp_path: Path
) -> None:
    class Several(fakes.Sampler):  # type: ignore[misc, name-defined]
        def sample_batches(self, batches: Any) -> Any:
            asked = list(batches)
            for number in reversed(range(len(asked))):
                yield number, self.sample(*asked[number])

    plain, several = fakes.pool(tmp_path / "plain"), fakes.pool(tmp_path / "several", sampler=Several())
    for pool in (plain, several):
        stages.sample(pool, progress=False)
    assert several.sampler.calls == plain.sampler.calls[::-1]
    assert contents(several.completions) == contents(plain.completions)


def test_a_stage_resumes_where_it_was_cut_and_ends_as_if_undisturbed(fakes: ModuleType, tmp_path: Path) -> None:
    whole = fakes.pool(tmp_path / "whole")
    undisturbed = fakes.complete(whole)
    cut = fakes.pool(tmp_path / "cut")
    fakes.complete(cut)
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
    again = fakes.pool(tmp_path / "cut", sampler=sampler)
    stages.sample(again, progress=False)
    rewarding.reward(again, reward, progress=False)
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
    fakes.complete(pool)
    sampler, reward, embedder = fakes.Sampler(), fakes.Reward(), fakes.Embedder()
    fakes.complete(fakes.pool(pool.run, sampler=sampler), embedder)
    rewarding.reward(pool, reward, progress=False)
    assert sampler.calls == reward.calls == embedder.calls == []


def test_tokens_are_reused_where_both_tokenizers_are_one(pool: Pool, fakes: ModuleType) -> None:
    embedder = fakes.Embedder()
    fakes.complete(pool, embedder)
    assert {prompt[0] for prompt, _ in embedder.seen} == {ord("t")}  # as the sampler encoded it: without a mark
    texts = pool.completions.read(pool.batches)["completion"].to_pylist()
    assert [bytes(completion).decode() for _, completion in embedder.seen] == texts


@pytest.mark.parametrize("sampler", [{"tokens": False}, {"tokenizer": "another"}])
def test_otherwise_prompt_and_completion_are_encoded_each_by_itself(
    sampler: dict[str, Any], fakes: ModuleType, tmp_path: Path
) -> None:
    pool = fakes.pool(tmp_path, sampler=fakes.Sampler(**sampler))
    embedder = fakes.Embedder()
    fakes.complete(pool, embedder)
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
    fakes.complete(fakes.pool(tmp_path, split=split), embedder)
    assert bytes(embedder.seen[0][0]).decode() == "task 007: "


def test_several_layers_are_made_in_one_pass_each_in_its_table(pool: Pool, fakes: ModuleType) -> None:
    embedder = fakes.Embedder(layers=(2, 1))
    fakes.complete(pool, embedder)
    assert embedder.calls == [3, 3, 3, 1]
    first, second = (
        store.embeddings_of(pool.features(embedder, layer).read(pool.batches)).astype(np.float32) for layer in (1, 2)
    )
    np.testing.assert_allclose(second, 10 * first, rtol=2e-3)  # two roundings to float16
    assert (pool.run / "features" / "train.sample" / "fake-numbers" / "layer=01").is_dir()


def test_a_layer_that_is_added_leaves_the_rows_of_the_others_untouched(pool: Pool, fakes: ModuleType) -> None:
    fakes.complete(pool)
    table = pool.features(fakes.Embedder(), 1)
    before = {path: path.stat().st_mtime_ns for path in table.parts()}
    embedder = fakes.Embedder(layers=(1, 2), values=dict.fromkeys(range(4), 0.99))  # as bfloat16 may move bits
    stages.embed(pool, embedder, progress=False)
    assert {path: path.stat().st_mtime_ns for path in table.parts()} == before
    assert pool.features(embedder, 2).read(pool.batches).num_rows == 40


def test_values_beyond_float16_are_told_and_kept(
    pool: Pool, fakes: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = fakes.complete(pool, fakes.Embedder(values={0: 1e5, 2: 1e5}))
    assert joined.features is not None
    assert joined.features.dtype == np.float32
    assert joined.features[0, 0] == 1e5
    assert capsys.readouterr().out.count("stored as float32") == 1


def test_an_embedding_of_nan_is_refused_with_its_row(pool: Pool, fakes: ModuleType) -> None:
    with pytest.raises(StoreError, match="t-003"):
        fakes.complete(pool, fakes.Embedder(values={1: float("nan")}))
    table = pool.features(fakes.Embedder(), 1)
    assert [table.has(keys) for keys in pool.batches] == [True, False, False, False]


def test_a_stage_before_its_inputs_says_which_is_missing(pool: Pool, fakes: ModuleType) -> None:
    for stage in (
        lambda: rewarding.reward(pool, fakes.Reward(), progress=False),
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
    fakes.complete(pool)
    before = sorted(path for path in pool.run.rglob("*"))
    if "sampler" in changes:
        changes = {"sampler": fakes.Sampler(**changes["sampler"])}
    if "split" in changes:
        changes = {"split": fakes.split(start=changes["split"])}
    other = fakes.pool(pool.run, **changes)
    with pytest.raises(StoreError, match=message):
        stages.sample(other, progress=False)
    for stage in (rewarding.reward, stages.embed):
        maker = fakes.Reward() if stage is rewarding.reward else fakes.Embedder()
        with pytest.raises(StoreError, match="inputs"):
            stage(other, maker, progress=False)
    assert sorted(pool.run.rglob("*")) == before
    assert not any(".tmp" in name for _, _, files in os.walk(pool.run) for name in files)


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
