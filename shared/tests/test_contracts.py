"""What every sampler and every embedder promises, one suite for all: a new back end is one more entry of the two tables.

vLLM's entries need vLLM: `make test-vllm` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding import Embedder
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineSettings
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, Sampler, SamplingSettings, sample_seeds
from qprobe.sampling.base import stop_position
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler
from qprobe.sampling.vllm import VLLMSampler

Make = Callable[..., Any]
TOLERANCE = 1e-4
ENGINE = EngineSettings(enforce_eager=True, kv_cache_gib=0.0625, gpu_memory_utilization=0.3)
HEAD = 32  # numbers in a head, the fewest that vLLM computes on a CPU

# How a back end is made on the weights of a spec. Others than "hf" are compared with it, in float32.
SAMPLERS: dict[str, Callable[[ModelSpec, SamplingSettings, Make], Sampler]] = {
    "hf": lambda spec, settings, serve: HFSampler(spec, settings),
    "openai": lambda spec, settings, serve: OpenAISampler(None, settings, serve(spec).settings()),
    "openai, call by call": lambda spec, settings, serve: OpenAISampler(
        None, settings, serve(spec).settings(), choices_per_call=1
    ),
    "vllm": lambda spec, settings, serve: VLLMSampler(replace(spec, device="auto"), settings, ENGINE),
}
EMBEDDERS: dict[str, Callable[[ModelSpec, Make], Embedder]] = {
    "hf": lambda spec, serve: HFEmbedder(spec),
    "openai": lambda spec, serve: OpenAIEmbedder(None, serve(spec).settings(), inputs_per_call=3),
    "vllm": lambda spec, serve: VLLMEmbedder(replace(spec, device="auto"), engine=ENGINE),
}
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]


def entries(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=NEEDS_VLLM if name == "vllm" else ()) for name in table]


PROMPTS = [
    Prompt("text", text="def add("),
    Prompt("chat", messages=({"role": "user", "content": "What is the sum?"},)),
    Prompt("unicode", text="naïve 🙂 数"),
    Prompt(
        "talk",
        tuple({"role": who, "content": said} for who, said in zip(("user", "assistant", "user"), "abc", strict=True)),
    ),
    Prompt("short", text="x"),
]
LAW = SamplingSettings(n=3, temperature=1.0, top_p=0.95, max_new_tokens=10)


def greedy(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"n": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12} | changes)


def seeds_for(prompts: Sequence[Prompt], n: int) -> list[list[int]]:
    return [sample_seeds(0, prompt.task_id, n) for prompt in prompts]


def draw(sampler: Sampler, prompts: Sequence[Prompt] = PROMPTS) -> list[list[Completion]]:
    seeds = seeds_for(prompts, sampler.settings.n)
    return sampler.sample([sampler.render(prompt)[1] for prompt in prompts], seeds)


def texts(completions: Sequence[Sequence[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in row] for row in completions]


@pytest.fixture(scope="module")
def tiny_model(make_model: Make) -> Iterator[ModelSpec]:
    yield make_model(head_dim=HEAD)
    vllm_engine.shut_down()


# ---------------------------------------------------------------------------------------------------------- samplers


@pytest.fixture(params=entries(SAMPLERS))
def make_sampler(request: pytest.FixtureRequest, make_server: Make, tiny_model: ModelSpec) -> Make:
    """Make the sampler in turn: (settings, spec of the tiny model)."""

    def make(settings: SamplingSettings = LAW, spec: ModelSpec = tiny_model) -> Sampler:
        return SAMPLERS[request.param](spec, settings, make_server)

    return make


def test_n_completions_a_prompt_each_with_its_seed_in_order(make_sampler: Make) -> None:
    completions = draw(make_sampler())
    assert [[c.seed for c in row] for row in completions] == seeds_for(PROMPTS, 3)
    assert {c.finish_reason for row in completions for c in row} <= {"stop", "length"}
    assert len({text for row in texts(completions) for text in row}) > 10


def test_equal_seeds_give_equal_completions(make_sampler: Make) -> None:
    assert texts(draw(make_sampler())) == texts(draw(make_sampler()))


def test_completions_stand_at_their_prompts_whatever_the_order(make_sampler: Make) -> None:
    sampler = make_sampler()
    together = texts(draw(sampler))
    assert texts(draw(sampler, PROMPTS[::-1])) == together[::-1]
    assert [texts(draw(sampler, [prompt]))[0] for prompt in PROMPTS] == together


def test_greedy_completions_equal_the_reference(make_sampler: Make, tiny_model: ModelSpec) -> None:
    found, wanted = draw(make_sampler(greedy())), draw(HFSampler(tiny_model, greedy()))
    assert texts(found) == texts(wanted)
    assert [row[0].finish_reason for row in found] == [row[0].finish_reason for row in wanted]


@pytest.mark.parametrize("stop", [("e",), ("\n", "the", " "), tuple("abcdefghij\n")])
def test_stop_texts_cut_where_the_free_completion_first_has_one(
    make_sampler: Make, tiny_model: ModelSpec, stop: tuple[str, ...]
) -> None:
    found = draw(make_sampler(greedy(stop=stop, max_new_tokens=30)))
    free = draw(HFSampler(tiny_model, greedy(max_new_tokens=30)))
    cuts = [stop_position(row[0].text, stop) for row in free]
    assert texts(found) == [[row[0].text[:cut]] for row, cut in zip(free, cuts, strict=True)]
    stopped = [row[0].finish_reason == "stop" for row in found]
    was_cut = [c < len(row[0].text) or row[0].finish_reason == "stop" for c, row in zip(cuts, free, strict=True)]
    assert stopped == was_cut
    assert any(stopped) or stop == ("e",)


class SecondVowel:
    """A rule: a completion ends before its second vowel, whatever stop texts say."""

    def __init__(self) -> None:
        self.prompts: set[str] = set()

    def identity(self) -> dict[str, Any]:
        return {"rule": "second vowel"}

    def may_end(self, recent: str) -> bool:
        return bool(set(recent) & set("aeiou"))

    def end(self, prompt: str, text: str, last: bool) -> int | None:
        self.prompts.add(prompt)
        vowels = [at for at, letter in enumerate(text) if letter in "aeiou"]
        return vowels[1] if len(vowels) > 1 else None


@pytest.mark.parametrize("told", [(), ("e", "a")])
def test_a_rule_cuts_in_the_place_of_stop_texts(
    make_sampler: Make, tiny_model: ModelSpec, told: tuple[str, ...]
) -> None:
    rule = SecondVowel()
    sampler = make_sampler(greedy(stop=told, rule=rule, max_new_tokens=30))
    found = draw(sampler)
    free = draw(HFSampler(tiny_model, greedy(max_new_tokens=30)))
    cuts = [SecondVowel().end("", row[0].text, last=True) for row in free]
    assert any(cuts)
    assert texts(found) == [[row[0].text[:cut]] for row, cut in zip(free, cuts, strict=True)]
    assert all(row[0].finish_reason == "stop" for row, cut in zip(found, cuts, strict=True) if cut is not None)
    said = PROMPTS[0].text
    assert said is not None
    assert any(said in prompt for prompt in rule.prompts)
    assert sampler.identity()["rule"] == "second vowel"
    json.dumps(sampler.identity())


def test_a_stop_text_that_begins_a_completion_does_not_empty_it(make_sampler: Make, tiny_model: ModelSpec) -> None:
    first = draw(HFSampler(tiny_model, greedy()))[0][0].text[0]
    found = draw(make_sampler(greedy(stop=(first,))), PROMPTS[:1])[0][0].text
    assert found == draw(HFSampler(tiny_model, greedy(stop=(first,))), PROMPTS[:1])[0][0].text
    assert found.startswith(first)


def test_the_longest_length_ends_a_completion(make_sampler: Make) -> None:
    completions = [c for row in draw(make_sampler(greedy(max_new_tokens=2))) for c in row]
    assert "length" in {c.finish_reason for c in completions}
    assert all(len(c.token_ids) <= 2 for c in completions if c.token_ids is not None)


def test_every_completion_can_be_written_as_utf_8(make_sampler: Make) -> None:
    completions = draw(make_sampler(SamplingSettings(n=6, temperature=1.5, top_p=1.0, max_new_tokens=10)))
    assert all(c.text.encode().decode() == c.text for row in completions for c in row)


def test_token_ids_decode_to_the_text_where_they_are_given(make_sampler: Make, tiny_model: ModelSpec) -> None:
    sampler, tokenizer = make_sampler(), models.load_tokenizer(tiny_model)
    for prompt, row in zip(PROMPTS, draw(sampler), strict=True):
        for completion in row:
            if completion.token_ids is None:
                assert sampler.tokenizer_fingerprint() is None
                continue
            assert sampler.tokenizer_fingerprint() == tokenizer.fingerprint()
            ids = sampler.render(prompt)[1]
            assert tokenizer.decode_completion(ids, completion.token_ids) == completion.text


def test_log_probabilities_are_nan_or_the_references(make_sampler: Make, tiny_model: ModelSpec) -> None:
    found, wanted = draw(make_sampler(greedy())), draw(HFSampler(tiny_model, greedy()))
    for (f,), (w,) in zip(found, wanted, strict=True):
        assert math.isnan(f.logprob) or f.logprob == pytest.approx(w.logprob, abs=1e-3)


def test_a_prompt_beyond_the_context_is_a_sentence(make_sampler: Make) -> None:
    long = Prompt("long", text="y" * 250)
    with pytest.raises(ValueError, match="context"):
        draw(make_sampler(greedy()), [long])


def test_wrong_numbers_of_seeds_are_a_sentence(make_sampler: Make) -> None:
    sampler = make_sampler()
    ids = sampler.render(PROMPTS[0])[1]
    for prompts, seeds in (([ids], [[1, 2]]), ([ids, ids], [[1, 2, 3]]), ([], [[1, 2, 3]])):
        with pytest.raises(ValueError, match="seeds"):
            sampler.sample(prompts, seeds)


def test_no_prompts_give_no_completions_and_an_empty_one_is_a_sentence(make_sampler: Make) -> None:
    assert make_sampler().sample([], []) == []
    with pytest.raises(ValueError, match="no tokens"):
        make_sampler().sample([[]], [[1, 2, 3]])


def test_identities_are_plain_and_hold_the_law(make_sampler: Make) -> None:
    written = [json.dumps(make_sampler(law).identity(), sort_keys=True) for law in (LAW, greedy())]
    assert len(set(written)) == 2
    first, second = make_sampler(LAW), make_sampler(greedy())
    assert first.prompt_identity() == second.prompt_identity()  # both pools of a split share its prompts
    assert json.loads(json.dumps(first.prompt_identity())) == first.prompt_identity()


def test_prompts_are_rendered_to_text_that_holds_what_was_said(make_sampler: Make) -> None:
    sampler = make_sampler()
    for prompt in PROMPTS:
        text, ids = sampler.render(prompt)
        said = [prompt.text] if prompt.text is not None else [m["content"] for m in prompt.messages]
        assert all(words in text for words in said)
        assert ids
        assert all(0 <= i < 2**31 for i in ids)


def test_a_completion_that_ends_at_once_is_empty(make_sampler: Make, make_model: Make, tiny_model: ModelSpec) -> None:
    # The last of the samplers' tests: it starts another engine where there are engines.
    ids = draw(HFSampler(tiny_model, greedy()))[0][0].token_ids
    assert ids
    ending = make_model(head_dim=HEAD, eos_token_id=[1, ids[0]])
    ((completion,),) = draw(make_sampler(greedy(stop=("zz",)), ending), PROMPTS[:1])
    assert (completion.text, completion.finish_reason) == ("", "stop")
    assert completion.token_ids in (None, [])


# --------------------------------------------------------------------------------------------------------- embedders

ROWS = [("def add(", ["x, y)", "", "🙂 数"]), ("naïve 🙂", ["!"]), ("a", ["", "=1", "(((((((("])]


@pytest.fixture(params=entries(EMBEDDERS))
def make_embedder(request: pytest.FixtureRequest, make_server: Make, tiny_model: ModelSpec) -> Callable[[], Embedder]:
    """Make the embedder in turn, on the tiny model."""
    return lambda: EMBEDDERS[request.param](tiny_model, make_server)


def embed(embedder: Embedder, rows: Sequence[tuple[str, list[str]]]) -> Tensor:
    """(N, D) of the last layer."""
    prompts = [embedder.encode_prompt(prompt, False) for prompt, _ in rows]
    completions = [[embedder.encode_completion(text) for text in texts] for _, texts in rows]
    found = embedder.embed(prompts, completions)
    assert sorted(found) == sorted(embedder.layers)
    return found[max(embedder.layers)]


def test_embeddings_equal_the_reference(
    make_embedder: Make,
    tiny_model: ModelSpec,
    stock_states: Callable[[ModelSpec, Sequence[int]], tuple[Tensor, ...]],
    relative_error: Callable[[Tensor, Tensor], float],
) -> None:
    tokenizer = models.load_tokenizer(tiny_model)
    wanted = []
    for prompt, completions in ROWS:
        for text in completions:
            ids = [*tokenizer.encode_prompt(prompt, False), *tokenizer.encode_completion(text)]
            # A server tokenises the joined text: these rows are ones where that is the same.
            assert ids == tokenizer.encode_prompt(prompt + text, False)
            wanted.append(stock_states(tiny_model, ids)[-1][-1])
    found = embed(make_embedder(), ROWS)
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    assert relative_error(found, torch.stack(wanted)) <= TOLERANCE


def test_an_embedding_does_not_depend_on_its_batch(
    make_embedder: Make, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    embedder = make_embedder()
    together = embed(embedder, ROWS)
    alone = torch.cat([embed(embedder, [(prompt, [text])]) for prompt, texts in ROWS for text in texts])
    assert relative_error(together, alone) <= TOLERANCE


def test_text_beyond_the_context_is_a_sentence(make_embedder: Make) -> None:
    with pytest.raises(ValueError, match="context"):
        embed(make_embedder(), [("y" * 100, ["z" * 150])])


def test_prompts_and_completions_must_match(make_embedder: Make) -> None:
    embedder = make_embedder()
    ids = embedder.encode_prompt("a", False)
    with pytest.raises(ValueError, match="prompts"):
        embedder.embed([ids, ids], [[ids]])
    with pytest.raises(ValueError, match="no tokens"):
        embedder.embed([[]], [[ids]])


def test_an_embedder_says_what_it_is(make_embedder: Make) -> None:
    embedder = make_embedder()
    assert json.loads(json.dumps(embedder.identity()))["model"]["name"]
    assert embedder.layers
    assert all(layer >= 0 for layer in embedder.layers)
    assert embedder.folder_name() == embedder.folder_name().strip("/. ")
    assert embedder.tokenizer_fingerprint()
