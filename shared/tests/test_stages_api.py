"""Stages over an API: completions from one server with local embeddings, faults that cost a batch, usage beside the table."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.models import openai_client
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiError
from qprobe.pipeline import inspection
from qprobe.prompts import Prompt
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool, RewardRow, Split
from qprobe.sampling import SamplingSettings
from qprobe.sampling.openai import OpenAISampler
from qprobe.store.table import Table

LAW = SamplingSettings(n=3, temperature=1.0, max_new_tokens=8, stop=("e",))
TEXTS = [Prompt(f"t-{i}", text=f"def add{i}(") for i in range(8)]
CHATS = [Prompt(f"c-{i}", messages=({"role": "user", "content": f"What is {i}?"},)) for i in range(8)]


def make_pool(run: Path, there: Any, prompts: list[Prompt] = TEXTS, **changes: Any) -> Pool:
    """Eight prompts x 3 samples in batches of two prompts; one call at a time, so that faults fall where they are meant."""
    sampler = OpenAISampler(None, LAW, there.settings(concurrency=1, **changes))
    return Pool(run, Split("train", prompts, {"data": "own"}), "sample", sampler, 0, batch_rows=6)


def contents(table: Table) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.parts()}


def new_command() -> None:
    """What a new process begins with: no client, nothing spent."""
    openai_client.close_clients()


@pytest.mark.parametrize("prompts", [TEXTS, CHATS])
def test_completions_from_an_api_are_embedded_by_a_local_model(
    server: Any, tiny_model: ModelSpec, fakes: ModuleType, tmp_path: Path, prompts: list[Prompt], relative_error: Any
) -> None:
    class Length(fakes.Reward):  # type: ignore[misc, name-defined]
        def rows(self, batch: Any) -> list[RewardRow]:
            return [RewardRow(float(len(text))) for _, _, text in batch.rows]

    pool, embedder, reward = make_pool(tmp_path, server, prompts), HFEmbedder(tiny_model, (4,)), Length()
    stages.sample(pool, progress=False)
    rewarding.reward(pool, reward, progress=False)
    stages.embed(pool, embedder, progress=False)
    joined = join(pool, reward, embedder, 4)
    assert joined.rewards.tolist() == [float(len(text)) for text in joined.completions]
    assert joined.features is not None
    assert joined.features.shape == (24, 32)
    # Prompt and completion are tokenised here, once each; the prompt as plain text, which gets its BOS.
    tokenizer = models.load_tokenizer(tiny_model)
    by_id = {prompt.task_id: prompt for prompt in prompts}
    ids = [tokenizer.encode_prompt(pool.sampler.render(by_id[i])[0], templated=False) for i in joined.task_ids]
    assert all(prompt[0] == 0 for prompt in ids)
    texts = [joined.completions[p * 3 : p * 3 + 3] for p in range(8)]
    wanted = embedder.embed(ids, [[tokenizer.encode_completion(text) for text in row] for row in texts])[4]
    assert relative_error(torch.from_numpy(joined.features).float(), wanted) < 2e-3  # stored as float16


def test_completions_and_embeddings_from_two_models_of_an_api(server: Any, tmp_path: Path) -> None:
    pool, embedder = make_pool(tmp_path, server, CHATS), OpenAIEmbedder(None, server.settings())
    stages.sample(pool, progress=False)
    stages.embed(pool, embedder, progress=False)
    features = pool.features(embedder, 0)
    assert features.read(pool.batches).num_rows == 24
    sent = [text for path, _, body in server.requests if path == "/v1/embeddings" for text in body["input"]]
    completions = pool.completions.read(pool.batches)["completion"].to_pylist()
    assert sent == [f"What is {p}?\n\n{completions[3 * p + i]}" for p in range(8) for i in range(3)]
    assert features.usage()["calls"] == 4
    assert pool.completions.usage()["calls"] >= 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((401, "no"), "set the environment variable OPENAI_API_KEY"),
        ((404, "no such model"), "does not know the model 'tiny'"),
        ((500, "broken"), "4 times in a row"),
        ("drop", "is it running"),
        ("cut", "broke off"),
        ("not json", "no JSON"),
        ('{"choices": []}', "no choices"),
    ],
)
def test_what_was_finished_stays_and_the_same_command_continues(
    server: Any, refusal: Any, tmp_path: Path, fault: Any, message: str
) -> None:
    pool = make_pool(tmp_path / "run", server)
    stages.sample(other := make_pool(tmp_path / "other", server), progress=False)
    server.requests.clear()
    new_command()
    calls = {"left": 5}  # a batch is two calls or more: the first is whole, a later one is begun

    def fails_later(answer: dict[str, Any]) -> dict[str, Any]:
        calls["left"] -= 1
        if calls["left"] == 0:
            server.always = refusal(*fault) if isinstance(fault, tuple) else fault
        return answer

    server.always = fails_later
    with pytest.raises((ApiError, ValueError), match=message):
        stages.sample(pool, progress=False)
    before = contents(pool.completions)
    assert len(before) in (1, 2)
    server.always = None
    new_command()
    stages.sample(pool, progress=False)
    assert contents(pool.completions).items() >= before.items()
    rows = pool.completions.read(pool.batches)
    keys = list(zip(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
    assert keys == [(f"t-{p}", i) for p in range(8) for i in range(3)]
    # This server honours seeds: a run with a fault in it is the run without.
    assert rows["completion"].to_pylist() == other.completions.read(other.batches)["completion"].to_pylist()
    assert pool.completions.usage()["calls"] == len(server.requests)


def test_many_passing_faults_lose_no_row_and_are_counted(server: Any, refusal: Any, tmp_path: Path) -> None:
    draws = random.Random(3)
    prompts = [Prompt(f"t-{i:02d}", text=f"def add{i}(") for i in range(40)]
    kinds = [
        "drop",
        "cut",
        refusal(500, "broken"),
        refusal(429, "slow"),
        (refusal(429, "slow"), {"Retry-After": "0.05"}),
    ]
    server.faults += [draws.choice(kinds) if draws.random() < 0.3 else None for _ in range(120)]
    faults = len([fault for fault in server.faults if fault is not None])
    sampler = OpenAISampler(None, LAW, server.settings(concurrency=4, retries=12), choices_per_call=1)
    pool = Pool(tmp_path, Split("train", prompts, {"data": "own"}), "sample", sampler, 0, batch_rows=30)
    stages.sample(pool, progress=False)
    rows = pool.completions.read(pool.batches)
    keys = list(zip(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
    assert keys == [(f"t-{p:02d}", i) for p in range(40) for i in range(3)]
    assert not server.faults
    assert faults > 25
    assert pool.completions.usage()["retries"] == faults
    assert pool.completions.usage()["calls"] == len(server.requests)


def test_a_limit_of_calls_ends_a_command_and_the_next_goes_on(server: Any, tmp_path: Path) -> None:
    done: list[int] = []
    while len(done) < 4:
        new_command()
        pool = make_pool(tmp_path, server, max_calls=6)
        if len(pool.completions.parts()) == 4:
            break
        with contextlib.suppress(ApiError):
            stages.sample(pool, progress=False)
        done.append(len(pool.completions.parts()))
    assert done == sorted(set(done))
    assert len(pool.completions.parts()) == 4
    # What was spent on batches that were lost is counted too.
    assert pool.completions.usage()["calls"] == len(server.requests)
    assert len(done) > 1
    new_command()
    again = make_pool(tmp_path / "again", server, max_calls=6)
    with pytest.raises(ApiError, match=r"api.max_calls=6 is reached.*What was finished stays"):
        stages.sample(again, progress=False)


def test_usage_is_written_where_a_reader_finds_it(server: Any, refusal: Any, tmp_path: Path, key: str) -> None:
    pool = make_pool(tmp_path, server)
    server.faults.append(refusal(500, "once"))
    stages.sample(pool, progress=False)
    lines = [json.loads(x) for x in (tmp_path / "completions/train.sample/usage.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert set(lines[0]) == {"at", "calls", "retries", "prompt_tokens", "completion_tokens", "answers of tiny-2026-11"}
    total = pool.completions.usage()
    assert total["calls"] == len(server.requests)
    assert total["retries"] == 1
    said = inspection.to_text(inspection.inspect(tmp_path))
    assert f"spent {total['calls']} calls, 1 retries, " in said
    stages.sample(pool, progress=False)
    assert pool.completions.usage() == total
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [content for content in written if key.encode() in content]


def test_a_line_of_usage_that_was_cut_short_is_passed_over(server: Any, tmp_path: Path) -> None:
    pool = make_pool(tmp_path, server)
    stages.sample(pool, progress=False)
    total = pool.completions.usage()
    with (pool.completions.folder / "usage.jsonl").open("a") as file:
        file.write('{"at": "2026-11-22T18:00:00+00:00", "calls": 7, "ret')
    assert pool.completions.usage() == total


def test_local_back_ends_write_no_usage(fakes: ModuleType, tmp_path: Path) -> None:
    pool = Pool(tmp_path, fakes.split(), "sample", fakes.Sampler(), 0)
    stages.sample(pool, progress=False)
    assert not (pool.completions.folder / "usage.jsonl").exists()
    assert pool.completions.usage() == {}
    assert "spent" not in inspection.to_text(inspection.inspect(tmp_path))
