"""The API back ends against vLLM's own server: completions from one, embeddings from a second, faults between; no orphans.

`make test-vllm` runs it; a server takes some twenty seconds to start.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from served import policy_of, save_probe, serving

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.models import openai_client
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split
from qprobe.sampling import Completion, SamplingSettings, sample_seeds
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler
from qprobe.serving.running import application
from qprobe.serving.settings import ServeSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

PROMPTS = 200


@pytest.fixture(scope="module")
def model(make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """Heads of 32 numbers, the fewest that vLLM computes on a CPU."""
    return make_model(head_dim=32)


@pytest.fixture(scope="module")
def server(vllm_server: ModuleType, model: ModelSpec) -> Iterator[Any]:
    started = vllm_server.VLLMServer(model)
    yield started
    openai_client.close_clients()
    started.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 0.02)


def test_greedy_completions_and_their_log_probabilities_are_those_of_transformers(
    server: Any, model: ModelSpec
) -> None:
    prompts = [
        Prompt("text", text="def add("),
        Prompt("unicode", text="Grüße, 世界: 🙂"),
        Prompt("chat", messages=({"role": "user", "content": "What is the sum?"},)),
    ]
    seeds = [[2**61 + i] for i in range(len(prompts))]
    known = 0
    for length in (24, 1):
        law = SamplingSettings(n=1, temperature=0.0, top_p=1.0, max_new_tokens=length, stop=("zz", "\n\n"))
        reference, sampler = HFSampler(model, law), OpenAISampler(None, law, server.settings())
        expected = reference.sample([reference.render(prompt)[1] for prompt in prompts], seeds)
        found = sampler.sample([sampler.render(prompt)[1] for prompt in prompts], seeds)
        for (ours,), (wanted,) in zip(found, expected, strict=True):
            assert (ours.finish_reason, ours.seed) == (wanted.finish_reason, wanted.seed)
            # The server keeps to itself a last character that is not whole.
            assert ours.text.rstrip("\ufffd") == wanted.text.rstrip("\ufffd")
            if ours.text == wanted.text and not math.isnan(ours.logprob):
                known += 1
                assert ours.logprob == pytest.approx(wanted.logprob, abs=1e-3)
    assert known


def test_200_prompts_through_a_faulty_network_are_complete_and_unique_and_retries_are_counted(
    server: Any, vllm_server: ModuleType, tmp_path: Path
) -> None:
    proxy = vllm_server.Proxy(server.url, share=0.3)
    try:
        law = SamplingSettings(n=8, temperature=1.0, top_p=1.0, max_new_tokens=6)
        sampler = OpenAISampler(None, law, server.settings(base_url=proxy.url, timeout=1.5, retries=12, concurrency=8))
        split = Split("train", [Prompt(f"t-{i:03d}", text=f"def add{i}(") for i in range(PROMPTS)], {"data": "own"})
        pool = Pool(tmp_path, split, "sample", sampler, 0, batch_rows=200)
        stages.sample(pool, progress=False)
    finally:
        proxy.close()
    rows = pool.completions.read(pool.batches)
    keys = list(zip(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
    assert sorted(keys) == [(f"t-{i:03d}", sample) for i in range(PROMPTS) for sample in range(8)]
    wanted = [seed for i in range(PROMPTS) for seed in sample_seeds(0, f"t-{i:03d}", 8)]
    assert [seed for _, seed in sorted(zip(keys, rows["seed"].to_pylist(), strict=True))] == wanted
    spent = pool.completions.usage()
    assert set(proxy.met) - {""} == set(proxy.FAULTS)
    assert spent["retries"] == proxy.met.total()
    assert spent["calls"] == PROMPTS + spent["retries"] == proxy.passed + proxy.met.total()
    assert not list(tmp_path.rglob("*.tmp"))


def test_embeddings_from_a_second_server_are_the_last_layer_of_transformers(
    vllm_server: ModuleType, model: ModelSpec, relative_error: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    second = vllm_server.VLLMServer(model, pooling=True)
    try:
        embedder = OpenAIEmbedder(None, second.settings(), inputs_per_call=3)
        tokenizer = models.load_tokenizer(model)
        rows = [("def add(", ["x, y)", "", "🙂 数"]), ("a", ["", "=1"])]
        found = embedder.embed(
            [embedder.encode_prompt(prompt, False) for prompt, _ in rows],
            [[embedder.encode_completion(text) for text in texts] for _, texts in rows],
        )[0]
    finally:
        openai_client.close_clients()
        second.close()
    joined = [tokenizer.encode_prompt(prompt + text, False) for prompt, texts in rows for text in texts]
    assert relative_error(found, HFEmbedder(model).embed(joined, [[[]] for _ in joined])[4]) < 1e-4


# Starts a server or an engine and waits to be killed.
SERVES = """
import sys, time
from qprobe.models import ModelSpec
sys.path.insert(0, sys.argv[2])
from vllm_server import VLLMServer
server = VLLMServer(ModelSpec(sys.argv[1], dtype="float32", device="cpu"))
print("ready", flush=True)
time.sleep(600)
"""
SAMPLES = """
import sys, time
from qprobe.models import ModelSpec
from qprobe.sampling import SamplingSettings
from qprobe.sampling.vllm import VLLMSampler
if __name__ == "__main__":
    engine = {"enforce_eager": True, "kv_cache_gib": 0.0625, "gpu_memory_utilization": 0.3}
    law = SamplingSettings(n=1, max_new_tokens=2)
    VLLMSampler(ModelSpec(sys.argv[1], dtype="float32", device="auto"), law, engine).sample([[5, 6]], [[1]])
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("script", "early"), [(SAMPLES, True), (SAMPLES, False), (SERVES, False)])
def test_a_killed_process_leaves_neither_engine_nor_server_behind(
    model: ModelSpec, tmp_path: Path, script: str, early: bool
) -> None:
    import psutil

    path = tmp_path / "started.py"
    path.write_text(script)
    command = [sys.executable, str(path), model.name, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        there = psutil.Process(parent.pid)

        def started() -> list[Any]:
            children = there.children(recursive=True)
            return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

        if early:  # the guard, then the first of vLLM's own
            end = time.monotonic() + 120
            while len(started()) < 2 and time.monotonic() < end:
                time.sleep(0.05)
        else:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
        left = started()
        assert len(left) >= 2
        parent.kill()
    gone, alive = psutil.wait_procs(left, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
    assert len(gone) == len(left)


def test_the_model_is_the_one_that_is_served(server: Any, model: ModelSpec) -> None:
    """The server's own word that it is vLLM, so that no fake stands in for it."""
    with urllib.request.urlopen(f"{server.url}/models") as answer:
        (served,) = json.load(answer)["data"]
    assert served["owned_by"] == "vllm"
    assert served["root"] == dataclasses.asdict(model)["name"]


def test_a_served_probe_draws_from_vllm_and_scores_as_the_library(
    server: Any, model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the official client, with `n`, log-probabilities and a stream; the key is the client's."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    policy = policy_of(save_probe(tmp_path / "probe", model))
    prompt = Prompt("p", text="def add(")
    with serving(application(policy, ServeSettings(), server.settings())) as made, made.client() as client:
        asked: Any = {"model": server.settings().model, "prompt": prompt.text, "max_tokens": 12, "logprobs": 1}
        body = {"qprobe": {"k": 6, "seed": 3, "return_candidates": True}}
        answer = client.completions.create(**asked, n=2, extra_body=body)
        assert answer.usage.qprobe["valid"] == 6
        shown = answer.qprobe["candidates"]
        assert len({candidate["text"] for candidate in shown}) > 1
        completions = [Completion(candidate["text"], None, "stop", math.nan, 0) for candidate in shown]
        (read,) = policy.read([prompt], [policy.sampler.render(prompt)], [completions])
        assert [candidate["score"] for candidate in shown] == pytest.approx(read.scores.tolist(), abs=1e-3)
        assert answer.choices[0].text in [candidate["text"] for candidate in shown]
        assert len(answer.choices) == 2
        assert all(choice.logprobs.token_logprobs for choice in answer.choices)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage.completion_tokens > 12  # of all candidates
