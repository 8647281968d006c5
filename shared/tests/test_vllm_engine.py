"""What the vLLM back ends say and settle before any engine runs; no vLLM is needed. With one: test_vllm.py."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qprobe import models
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineSettings
from qprobe.run.stages import check, give_back
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.stopping import Growing, StopTexts
from qprobe.sampling.vllm import VLLMSampler, _take

SETTINGS = SamplingSettings(n=1, max_new_tokens=8)


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else found(name, *more))


@pytest.mark.usefixtures("without_vllm")
def test_a_missing_vllm_is_a_sentence_with_the_command_before_any_work(tiny_model: ModelSpec) -> None:
    sampler, embedder = VLLMSampler(tiny_model, SETTINGS), VLLMEmbedder(tiny_model)
    calls: list[Callable[[], Any]] = [
        lambda: check(sampler),
        lambda: check(embedder),
        lambda: sampler.sample([[5]], [[0]]),
        lambda: embedder.embed([[5]], [[[6]]]),
    ]
    for call in calls:
        with pytest.raises(ModuleNotFoundError, match="pip install"):
            call()


def test_back_ends_without_an_engine_have_nothing_to_check_or_give_back(tiny_model: ModelSpec) -> None:
    sampler = HFSampler(tiny_model, SETTINGS)
    check(sampler)
    give_back(sampler)


@pytest.mark.usefixtures("without_vllm")
def test_giving_back_without_a_running_engine_does_nothing(tiny_model: ModelSpec) -> None:
    give_back(VLLMSampler(tiny_model, SETTINGS))
    assert vllm_engine._running is None


def test_only_the_final_layer_is_embedded(tiny_model: ModelSpec) -> None:
    assert VLLMEmbedder(tiny_model, [-1]).layers == VLLMEmbedder(tiny_model, [4, -1]).layers == (4,)
    for layers in ([3], [-2], [4, 0]):
        with pytest.raises(ValueError, match="final layer"):
            VLLMEmbedder(tiny_model, layers).layers  # noqa: B018
    with pytest.raises(ValueError, match="Layer 5"):
        VLLMEmbedder(tiny_model, [5]).layers  # noqa: B018


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor_parallel_size": 0},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.5},
        {"max_model_len": 0},
        {"kv_cache_gib": 0.0},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tiny_model: ModelSpec, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VLLMSampler(tiny_model, SETTINGS, wrong)
    with pytest.raises(ValueError, match="gpus"):
        VLLMEmbedder(tiny_model, engine={"gpus": 2})


def test_a_temperature_that_vllm_would_raise_is_refused(tiny_model: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"0\.005"):
        VLLMSampler(tiny_model, dataclasses.replace(SETTINGS, temperature=0.005))


def test_a_smaller_context_binds_and_a_larger_one_is_refused(tiny_model: ModelSpec) -> None:
    assert EngineSettings().context_length(tiny_model) == 192
    assert EngineSettings(max_model_len=64).context_length(tiny_model) == 64
    with pytest.raises(ValueError, match="max_model_len"):
        EngineSettings(max_model_len=500).context_length(tiny_model)


@pytest.mark.parametrize(
    ("changes", "said"), [({"device": "cuda:1"}, "CUDA_VISIBLE"), ({"device_map": "auto"}, "tensor")]
)
def test_placements_that_vllm_does_not_know_are_refused_with_what_to_do(
    tiny_model: ModelSpec, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        vllm_engine._check_device(dataclasses.replace(tiny_model, **changes))


def test_the_first_complaint_of_the_engine_is_the_reason(tmp_path: Any) -> None:
    engine = object.__new__(vllm_engine.Engine)
    engine._log = tmp_path / "log"
    engine._log.write_text(
        "WARNING slow\n(Worker pid=7) ERROR [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
        "(EngineCore pid=6) ERROR RuntimeError: Worker failed, please check the stack trace above\n"
    )
    assert engine._reason(0) == "CUDA out of memory. Tried to allocate 2 GiB"
    assert engine._reason(engine._log.stat().st_size) is None


def test_tokens_that_come_together_end_where_they_would_have_ended_one_by_one(tiny_model: ModelSpec) -> None:
    """An engine that runs ahead hands over tokens beyond the stop text; a stop text within them must not count."""
    tokenizer = models.load_tokenizer(tiny_model)
    tokens = [token for letter in "xabcd" for token in tokenizer.encode_completion(letter)]
    stops = StopTexts(tokenizer, SamplingSettings(stop=("c", "abcd")))
    output = SimpleNamespace(token_ids=tokens, logprobs=[{t: SimpleNamespace(logprob=-1.0)} for t in tokens])
    row = Growing([0, 9], 3, frozenset({1}), stops)
    assert not _take(row, output)
    found = row.completion()
    assert (found.text, len(found.token_ids or []), found.finish_reason) == ("xab", 3, "stop")
    assert found.logprob == -4.0  # the stop text was drawn too
