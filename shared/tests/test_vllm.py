"""vLLM itself, on a CPU or a GPU, with a tiny model: what it samples and embeds is what the transformers back ends do.

`make test-vllm` builds an environment with vLLM for CPUs and runs this file. An engine takes some ten seconds to start: the
tests that generate come first and share one, those that pool share another.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineError, EngineSettings
from qprobe.sampling import SamplingSettings
from qprobe.sampling.base import stop_position
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.vllm import VLLMSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

ENGINE = EngineSettings(enforce_eager=True, kv_cache_gib=0.0625, gpu_memory_utilization=0.3)
GREEDY = SamplingSettings(n=1, temperature=0.0, top_p=1.0, max_new_tokens=24)
TEXTS = ["def add(first, second):\n", "Grüße, 世界: 🙂", "a", "The answer to the question " * 3]
# A second end of sequence, which the generation configuration names and the tokenizer does not.
SECOND_END = 57


@pytest.fixture(scope="module")
def model(make_model: Callable[..., ModelSpec]) -> Iterator[ModelSpec]:
    """Heads of 32 numbers, the fewest that vLLM computes on a CPU."""
    spec = make_model(head_dim=32, eos_token_id=[1, SECOND_END])
    yield dataclasses.replace(spec, device="auto")
    vllm_engine.shut_down()


@pytest.fixture(scope="module")
def prompts(model: ModelSpec) -> list[list[int]]:
    tokenizer = models.load_tokenizer(model)
    return [tokenizer.encode_prompt(text, templated=False) for text in TEXTS]


def seeds_of(prompts: list[list[int]], n: int) -> list[list[int]]:
    return [[2**61 + 1000 * p + i for i in range(n)] for p in range(len(prompts))]


def engine_processes() -> list[Any]:
    """The processes beneath this one, less the one that multiprocessing itself keeps."""
    import psutil

    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    ]


def test_stop_texts_cut_as_the_transformers_sampler_cuts(model: ModelSpec, prompts: list[list[int]]) -> None:
    reference = HFSampler(dataclasses.replace(model, device="cpu"), GREEDY)
    seeds = seeds_of(prompts, 1)
    texts = [completion.text for (completion,) in reference.sample(prompts, seeds)]
    words = {text[place : place + 2] for text in texts for place in (0, 3, 7) if len(text) > place + 1}
    cut = 0
    for stop in [(word,) for word in sorted(words)] + [tuple(sorted(words))]:
        settings = dataclasses.replace(GREEDY, stop=stop)
        expected = HFSampler(reference.model, settings).sample(prompts, seeds)
        found = VLLMSampler(model, settings, ENGINE).sample(prompts, seeds)
        for (ours,), (wanted,), whole in zip(found, expected, texts, strict=True):
            assert dataclasses.replace(ours, logprob=0) == dataclasses.replace(wanted, logprob=0)
            assert ours.text == whole[: stop_position(whole, stop)]
            cut += ours.text != whole
    assert cut >= 4


def test_a_completion_depends_on_its_seed_and_neither_on_order_nor_on_company(
    model: ModelSpec, prompts: list[list[int]]
) -> None:
    sampler = VLLMSampler(model, SamplingSettings(n=3, temperature=0.9, max_new_tokens=12), ENGINE)
    seeds = seeds_of(prompts, 3)
    together = sampler.sample(prompts, seeds)
    assert [[c.seed for c in of_prompt] for of_prompt in together] == seeds
    assert len({c.text for c in together[0]}) > 1
    backwards = sampler.sample(prompts[::-1], seeds[::-1])[::-1]
    alone = [sampler.sample([prompt], [own])[0] for prompt, own in zip(prompts, seeds, strict=True)]
    for others in (backwards, alone):
        assert [[c.token_ids for c in row] for row in others] == [[c.token_ids for c in row] for row in together]


def test_tokens_decode_to_the_text_and_carry_their_untempered_log_probability(
    model: ModelSpec,
    prompts: list[list[int]],
    stock_logprobs: Callable[[ModelSpec, list[int]], torch.Tensor],
) -> None:
    settings = SamplingSettings(n=16, temperature=1.5, top_p=1.0, max_new_tokens=40)
    tokenizer = models.load_tokenizer(model)
    ended = 0
    completions = VLLMSampler(model, settings, ENGINE).sample(prompts, seeds_of(prompts, 16))
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        for completion in of_prompt:
            tokens = completion.token_ids
            assert tokens is not None
            assert completion.text == tokenizer.decode_completion(prompt, tokens)
            assert not {1, SECOND_END} & set(tokens)
            assert (completion.finish_reason == "length") == (len(tokens) == 40)
            ended += completion.finish_reason == "stop"
            law = stock_logprobs(model, [*prompt, *tokens])
            places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
            expected = sum(float(law[at, token]) for at, token in zip(places, tokens, strict=True))
            # The end that was drawn is in the sum; which of the two it was is not told.
            ends = [float(law[-1, end]) for end in (1, SECOND_END)] if completion.finish_reason == "stop" else [0.0]
            assert min(abs(completion.logprob - expected - end) for end in ends) <= 2e-3
    assert ended >= 3


def test_the_first_token_follows_the_tempered_truncated_law(
    model: ModelSpec, prompts: list[list[int]], stock_logprobs: Callable[[ModelSpec, list[int]], torch.Tensor]
) -> None:
    from scipy.stats import chisquare

    settings = SamplingSettings(n=600, temperature=0.7, top_k=6, top_p=0.6, max_new_tokens=1)
    completions = VLLMSampler(model, settings, ENGINE).sample(prompts[:1], seeds_of(prompts[:1], 600))[0]
    scores = stock_logprobs(model, prompts[0])[-1] / 0.7
    likeliest = scores.topk(6)
    law = likeliest.values.softmax(dim=0)
    law = law.masked_fill(law.cumsum(dim=0) - law >= 0.6, 0)
    expected = dict(zip(likeliest.indices.tolist(), (law / law.sum() * 600).tolist(), strict=True))
    assert 2 <= sum(value > 0 for value in expected.values()) < 6
    drawn = [token for c in completions for token in (c.token_ids or [])]
    counts = {token: drawn.count(token) for token in expected if expected[token] > 0}
    assert sum(counts.values()) == len(drawn) == 600
    assert chisquare(list(counts.values()), [expected[token] for token in counts]).pvalue > 1e-4


def test_embeddings_are_the_last_layer_of_transformers_and_the_sampling_engine_is_gone(
    model: ModelSpec, prompts: list[list[int]], relative_error: Callable[[torch.Tensor, torch.Tensor], float]
) -> None:
    VLLMSampler(model, GREEDY, ENGINE).sample(prompts, seeds_of(prompts, 1))
    sampling = {process.pid for process in engine_processes()}
    assert sampling
    tokenizer = models.load_tokenizer(model)
    texts = [["return 1", "", "é🙂\n"], [""], ["x" * 100, "y"], ["in the word."]]
    completions = [[tokenizer.encode_completion(text) for text in of_prompt] for of_prompt in texts]
    expected = HFEmbedder(dataclasses.replace(model, device="cpu")).embed(prompts, completions)
    for _ in range(2):  # the second time much of it is in the prefix cache
        found = VLLMEmbedder(model, engine=ENGINE).embed(prompts, completions)
        assert list(found) == [4]
        assert found[4].dtype == torch.float32
        assert relative_error(found[4], expected[4]) < 1e-4
    assert not sampling & {process.pid for process in engine_processes()}


def test_an_engine_whose_process_is_ended_is_a_sentence_and_the_next_call_starts_another(
    model: ModelSpec, prompts: list[list[int]]
) -> None:
    embedder = VLLMEmbedder(model, engine=ENGINE)
    before = embedder.embed(prompts[:1], [[[]]])
    for process in engine_processes():
        process.kill()
    with pytest.raises(EngineError, match="died") as caught:
        embedder.embed(prompts[:1], [[[]]])
    assert "\n" not in str(caught.value)
    assert torch.allclose(embedder.embed(prompts[:1], [[[]]])[4], before[4], atol=1e-6)


def test_closing_ends_all_processes_of_the_engine(model: ModelSpec, prompts: list[list[int]]) -> None:
    embedder = VLLMEmbedder(model, engine=ENGINE)
    embedder.embed(prompts[:1], [[[]]])
    assert sum(process.memory_info().rss for process in engine_processes()) > 2**28
    embedder.close()
    assert engine_processes() == []


def test_an_engine_that_lacks_memory_is_a_sentence_with_advice(model: ModelSpec, prompts: list[list[int]]) -> None:
    greedy = VLLMSampler(model, GREEDY, dataclasses.replace(ENGINE, kv_cache_gib=1e5))
    with pytest.raises(EngineError, match="max_model_len") as caught:
        greedy.sample(prompts, seeds_of(prompts, 1))
    assert "\n" not in str(caught.value)
    assert engine_processes() == []
