"""Pools: batches of whole prompts, completions that were brought along, and splits that cannot be."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe.run import pools, rewarding, stages
from qprobe.run.pools import Pool, Split
from qprobe.store.table import StoreError


def test_batches_are_whole_prompts_of_the_sorted_tasks_whatever_the_order_they_came_in(
    fakes: ModuleType, tmp_path: Path
) -> None:
    ids = [f"t-{number:03d}" for number in range(10)]
    expected = [tuple(ids[:3]), tuple(ids[3:6]), tuple(ids[6:9]), tuple(ids[9:])]
    for prompts in (fakes.prompts(10), fakes.prompts(10)[::-1]):
        assert fakes.pool(tmp_path, split=Split("s", prompts, {})).batches == expected
    assert len(fakes.pool(tmp_path, batch_rows=1).batches) == 10  # a prompt is never cut


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
        pool = fakes.pool(tmp_path, split=split, batch_rows=rows)
        assert [list(batch) for batch in pool.batches] == expected
    assert pool.smallest == 1


def test_completions_that_are_there_already_are_taken_and_nothing_is_drawn(fakes: ModuleType, tmp_path: Path) -> None:
    split, sampler = recorded_split(fakes), fakes.Sampler()
    pool = fakes.pool(tmp_path, split=split, sampler=sampler, batch_rows=8)
    joined = fakes.complete(pool)
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
        stages.sample(fakes.pool(tmp_path, split=other, batch_rows=8), progress=False)


def test_a_split_with_completions_has_some_of_every_prompt(fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="t-001"):
        Split("mine", fakes.prompts(2), {}, {"t-000": ["x"], "t-001": []})


def test_a_split_needs_prompts_of_different_names(fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="prompts"):
        Split("empty", [], {})
    with pytest.raises(ValueError, match="t-001"):
        Split("s", [*fakes.prompts(3), *fakes.prompts(1, start=1)], {})


def test_texts_that_were_brought_along_are_fingerprinted_once_however_many_batches(
    fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 160,000 pairs once a batch would be hours."""
    split = fakes.split("brought", 40)
    texts = {prompt.task_id: ["7", "8"] for prompt in split.prompts}
    brought = dataclasses.replace(split, recorded=texts)
    seen: list[int] = []
    real = pools.fingerprint

    def counting(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], list):  # of texts; parts are named by keys
            seen.append(len(value))
        return real(value)

    monkeypatch.setattr(pools, "fingerprint", counting)
    for _ in range(2):
        pool = Pool(tmp_path / "run", brought, "sample", fakes.Sampler(2), seed=0, batch_rows=4)
        assert len(pool.batches) == 20
        stages.sample(pool, progress=False)
        rewarding.reward(pool, fakes.Reward(), progress=False)
        stages.embed(pool, fakes.Embedder((1,)), progress=False)
    assert len(seen) == 1
