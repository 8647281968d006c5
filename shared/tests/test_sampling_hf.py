"""Sampling draws from exactly the law that the settings name, one completion a seed, and cuts at stop texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.sampling import Completion, SamplingSettings, sample_seeds
from qprobe.sampling.hf import CANDIDATES, HFSampler, sample_tokens

Ids = Callable[..., list[list[int]]]
Logprobs = Callable[[ModelSpec, Sequence[int]], Tensor]
PROMPT_LENGTHS = (5, 17, 1, 9)


def seeds_for(prompts: int, n: int) -> list[list[int]]:
    return [sample_seeds(0, f"task {p}", n) for p in range(prompts)]


def greedy(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"n": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24} | changes)


# ---------------------------------------------------------------------------------------------- the law of one token


def nucleus_law(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The truncated law, token by token: likeliest first, until top_k are taken or their mass reaches top_p."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    law, mass = np.zeros(len(logits)), 0.0
    total = weights[order].sum()
    for token in order:
        if mass >= top_p:
            break
        law[token] = weights[token]
        mass += weights[token] / total
    return np.asarray(law / law.sum())


def random_logits(vocabulary: int, spread: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, spread, vocabulary).astype(np.float32)


LAWS = {
    "peaked nucleus": (random_logits(600, 3.0, 1), SamplingSettings(temperature=0.8, top_p=0.95)),
    "flat: the candidates are short of top_p": (
        random_logits(600, 0.3, 2),
        SamplingSettings(temperature=1.0, top_p=0.9),
    ),
    "flat: the candidates just suffice": (random_logits(600, 0.3, 3), SamplingSettings(temperature=1.0, top_p=0.5)),
    "hot": (random_logits(600, 3.0, 4), SamplingSettings(temperature=2.0, top_p=0.95)),
    "whole law": (random_logits(600, 0.5, 5), SamplingSettings(temperature=0.7, top_p=1.0)),
    "top_k alone": (random_logits(600, 1.0, 6), SamplingSettings(temperature=1.3, top_p=1.0, top_k=40)),
    "top_k beyond the candidates": (random_logits(600, 0.3, 7), SamplingSettings(top_p=1.0, top_k=400)),
    "top_k, then top_p of what is left": (random_logits(600, 1.0, 8), SamplingSettings(top_p=0.6, top_k=40)),
    "small vocabulary": (random_logits(50, 1.0, 9), SamplingSettings(temperature=1.0, top_p=0.8)),
    "top_k beyond a small vocabulary": (random_logits(50, 1.0, 10), SamplingSettings(top_p=0.9, top_k=99)),
    "one token has all of top_p": (
        np.array([0.0, 5.0, 0.0], dtype=np.float32),
        SamplingSettings(temperature=1.0, top_p=0.9),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_evenly_spread_draws_meet_the_law_to_one_count(name: str) -> None:
    # However the tokens are laid along [0, 1), each holds an interval of its probability: N even draws give N p +- 1.
    logits, settings = LAWS[name]
    law = nucleus_law(logits.astype(np.float64), settings.temperature, settings.top_k, settings.top_p)
    draws = 5_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = sample_tokens(torch.tensor(logits).expand(draws, -1), uniforms, settings)
    counts = np.bincount(tokens.numpy(), minlength=len(logits))
    assert np.abs(counts - law * draws).max() <= 1.01
    assert counts[law == 0].sum() == 0


def test_rows_of_one_batch_keep_their_own_laws() -> None:
    # Peaked and flat rows take different paths; every row must get its own answer back.
    settings = SamplingSettings(temperature=1.0, top_p=0.9)
    rows = torch.stack([torch.tensor(random_logits(600, (0.2, 4.0)[r % 2], r)) for r in range(9)])
    uniforms = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together = sample_tokens(rows, uniforms, settings)
    alone = torch.cat([sample_tokens(rows[r : r + 1], uniforms[r : r + 1], settings) for r in range(9)])
    assert together.tolist() == alone.tolist()
    laws = [nucleus_law(row.double().numpy(), 1.0, 0, 0.9) for row in rows]
    assert [np.count_nonzero(law) > CANDIDATES for law in laws] == [True, False] * 4 + [True]
    assert all(law[token] > 0 for law, token in zip(laws, together.tolist(), strict=True))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (SamplingSettings(temperature=1.0, top_p=0.35), 4),
        (SamplingSettings(temperature=1.0, top_p=1.0, top_k=3), 3),
        (SamplingSettings(temperature=1.0, top_p=0.5, top_k=5), 3),
    ],
)
def test_among_equal_scores_as_many_are_kept_as_the_mass_needs(settings: SamplingSettings, kept: int) -> None:
    uniforms = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    tokens = sample_tokens(torch.zeros(1200, 10), uniforms, settings)
    counts = sorted(np.bincount(tokens.numpy(), minlength=10))[-kept:]
    assert np.abs(np.array(counts) - 1200 / kept).max() <= 1
    assert sum(counts) == 1200


def test_greedy_is_the_likeliest_token() -> None:
    logits = torch.tensor(np.stack([random_logits(600, 1.0, seed) for seed in range(5)]))
    wanted = [int(np.argmax(row)) for row in logits.numpy()]
    assert sample_tokens(logits, torch.full((5,), 0.9, dtype=torch.float64), greedy()).tolist() == wanted


@pytest.mark.parametrize("settings", [SamplingSettings(temperature=1.0, top_p=p) for p in (1.0, 0.9)])
def test_the_ends_of_the_unit_interval_stay_inside_the_law(settings: SamplingSettings) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.5, -math.inf]] * 2)
    largest = 1 - 2.0**-53
    tokens = sample_tokens(logits, torch.tensor([0.0, largest], dtype=torch.float64), settings)
    assert set(tokens.tolist()) == {1, 2}
    rows = torch.tensor(np.stack([random_logits(40, 1.0, seed) for seed in range(500)]))
    drawn = sample_tokens(rows, torch.full((500,), largest, dtype=torch.float64), settings)
    laws = [nucleus_law(row.double().numpy(), 1.0, 0, settings.top_p) for row in rows]
    assert all(law[token] > 0 for law, token in zip(laws, drawn.tolist(), strict=True))


# ------------------------------------------------------------------------------------------- completions of a model


def generated(model: Any, prompt: list[int]) -> list[int]:
    """Tokens by transformers' own greedy decoding, one prompt at a time."""
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    made = model.generate(
        torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0
    )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def hold_to_generate(spec: ModelSpec, stock: Callable[[ModelSpec], Any], prompts: list[list[int]]) -> set[str]:
    """Compare greedy completions with `generate`; returns how they ended."""
    ends = models.load(spec).eos_token_ids
    sampled = HFSampler(spec, greedy()).sample(prompts, seeds_for(4, 1))
    for prompt, (completion,) in zip(prompts, sampled, strict=True):
        tokens = generated(stock(spec), prompt)
        ended = tokens[-1] in ends
        assert completion.token_ids == (tokens[:-1] if ended else tokens)
        assert completion.finish_reason == ("stop" if ended else "length")
    return {completion.finish_reason for (completion,) in sampled}


def test_greedy_completions_equal_generate(
    any_tiny_model: ModelSpec, stock: Callable[[ModelSpec], Any], random_ids: Ids
) -> None:
    hold_to_generate(any_tiny_model, stock, random_ids(PROMPT_LENGTHS))


def test_greedy_completions_end_where_generate_ends(
    make_model: Callable[..., ModelSpec], stock: Callable[[ModelSpec], Any], random_ids: Ids
) -> None:
    prompts = random_ids(PROMPT_LENGTHS)
    first = HFSampler(make_model(), greedy()).sample(prompts, seeds_for(4, 1))[1][0].token_ids
    assert first is not None
    assert hold_to_generate(make_model(eos_token_id=[1, first[3]]), stock, prompts) == {"length", "stop"}


@pytest.fixture(scope="module")
def leaving_model(make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """A tiny Llama with fifteen tokens that end a completion: rows leave the batch all the time."""
    return make_model(eos_token_id=[1, *range(20, 34)])


LEAVING = SamplingSettings(n=3, temperature=1.0, top_p=0.97, max_new_tokens=40, stop=("e", "\x12"))


def outcome(completion: Completion) -> tuple[Any, ...]:
    """All but the log-probability, which is compared up to rounding."""
    return (completion.text, completion.token_ids, completion.finish_reason, completion.seed)


def test_a_completion_does_not_depend_on_its_batch(leaving_model: ModelSpec, random_ids: Ids) -> None:
    prompts, seeds = random_ids((5, 17, 1, 9, 3, 30)), seeds_for(6, 3)
    together = HFSampler(leaving_model, LEAVING).sample(prompts, seeds)
    single = HFSampler(leaving_model, SamplingSettings(**vars(LEAVING) | {"n": 1}))
    lengths = []
    for prompt, of_prompt, completions in zip(prompts, seeds, together, strict=True):
        (by_prompt,) = HFSampler(leaving_model, LEAVING).sample([prompt], [of_prompt])
        alone = [single.sample([prompt], [[seed]])[0][0] for seed in of_prompt]
        assert [outcome(c) for c in completions] == [outcome(c) for c in by_prompt] == [outcome(c) for c in alone]
        for completion, other in zip(completions, alone, strict=True):
            assert completion.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [c.seed for c in completions] == of_prompt
        lengths += [len(c.token_ids or []) for c in completions]
    assert len(set(lengths)) > 6


def test_settings_that_change_no_token_change_no_completion(tiny_model: ModelSpec, random_ids: Ids) -> None:
    prompts, seeds = random_ids((5,)), [[3, 4]]
    long = HFSampler(tiny_model, SamplingSettings(n=2, max_new_tokens=40)).sample(prompts, seeds)[0]
    short = HFSampler(tiny_model, SamplingSettings(n=2, max_new_tokens=9)).sample(prompts, seeds)[0]
    assert [c.token_ids for c in short] == [(c.token_ids or [])[:9] for c in long]


def test_the_log_probability_is_the_untempered_sum_of_all_that_was_drawn_the_end_included(
    leaving_model: ModelSpec, random_ids: Ids, stock_logprobs: Logprobs
) -> None:
    prompts, ends = random_ids(PROMPT_LENGTHS), sorted(models.load(leaving_model).eos_token_ids)
    settings = SamplingSettings(n=40, temperature=1.7, top_p=0.9, top_k=50, max_new_tokens=12)
    sampled = HFSampler(leaving_model, settings).sample(prompts, seeds_for(4, 40))
    empty = 0
    for prompt, completions in zip(prompts, sampled, strict=True):
        for completion in completions:
            ids = completion.token_ids
            assert ids is not None
            table = stock_logprobs(leaving_model, [*prompt, *ids])
            kept = sum(float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(ids))
            if completion.finish_reason == "length":
                assert completion.logprob == pytest.approx(kept, abs=1e-3)
                continue
            # Which of the ends was drawn is not told: it is one of them.
            nearest = min(abs(completion.logprob - kept - float(table[-1, end])) for end in ends)
            assert nearest <= 1e-3
            if not ids:
                empty += 1
                assert completion.logprob < 0
    assert empty


def test_the_tokens_of_a_stop_text_count_in_the_log_probability(
    tiny_model: ModelSpec, random_ids: Ids, stock_logprobs: Logprobs
) -> None:
    prompts = random_ids(PROMPT_LENGTHS)
    free = SamplingSettings(n=3, temperature=1.0, top_p=1.0, max_new_tokens=20)
    whole = HFSampler(tiny_model, free).sample(prompts, seeds_for(4, 3))
    tokenizer = models.load_tokenizer(tiny_model)
    stopped = 0
    for prompt, completions, own in zip(prompts, whole, seeds_for(4, 3), strict=True):
        for completion, seed in zip(completions, own, strict=True):
            ids = completion.token_ids or []
            if len(ids) < 12 or not (word := tokenizer.decode_completion(prompt, ids)[4:6]).isalnum():
                continue
            one = SamplingSettings(n=1, temperature=1.0, top_p=1.0, max_new_tokens=20, stop=(word,))
            ((cut,),) = HFSampler(tiny_model, one).sample([prompt], [[seed]])
            # The text up to and with the stop text, by the tokens of the longer completion.
            drawn = next(t for t in range(len(ids) + 1) if word in tokenizer.decode_completion(prompt, ids[:t])[1:])
            table = stock_logprobs(tiny_model, [*prompt, *ids[:drawn]])
            wanted = sum(float(table[len(prompt) - 1 + t, token]) for t, token in enumerate(ids[:drawn]))
            assert len(cut.token_ids or []) < drawn
            assert cut.logprob == pytest.approx(wanted, abs=1e-3)
            stopped += 1
    assert stopped


def test_samples_of_one_prompt_follow_the_models_law(
    tiny_model: ModelSpec, random_ids: Ids, stock_logprobs: Logprobs
) -> None:
    (prompt,), n = random_ids((6,)), 4000
    settings = SamplingSettings(n=n, temperature=0.5, top_p=0.8, max_new_tokens=1)
    (completions,) = HFSampler(tiny_model, settings).sample([prompt], [sample_seeds(1, "law", n)])
    counts = np.bincount([c.token_ids[0] for c in completions if c.token_ids], minlength=300)
    law = nucleus_law(stock_logprobs(tiny_model, prompt)[-1].numpy(), 0.5, 0, 0.8)
    assert counts[law == 0].sum() == 0
    assert stats.chisquare(counts[law > 0], law[law > 0] * counts.sum()).pvalue > 1e-3


def test_every_step_draws_anew(make_model: Callable[..., ModelSpec], random_ids: Ids) -> None:
    # All weights zero: 300 equally likely tokens at every step, so neighbouring tokens are independent.
    spec = make_model(initializer_range=0.0)
    settings = SamplingSettings(n=150, temperature=1.0, top_p=1.0, max_new_tokens=12)
    (completions,) = HFSampler(spec, settings).sample(random_ids((4,)), [sample_seeds(2, "steps", 150)])
    pairs = np.array([pair for c in completions for pair in itertools.pairwise(c.token_ids or [])])
    table = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=5, range=[[0, 300], [0, 300]])[0]
    assert table.sum() > 1000
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.chisquare(table.sum(axis=0)).pvalue > 1e-3


def test_equal_seeds_give_equal_completions_and_others_differ(tiny_model: ModelSpec, random_ids: Ids) -> None:
    sampler = HFSampler(tiny_model, SamplingSettings(n=4, max_new_tokens=12))
    (first,), (again,) = (sampler.sample(random_ids((6,)), [[7, 8, 7, 9]]) for _ in range(2))
    assert first == again
    assert outcome(first[0]) == outcome(first[2])
    assert len({tuple(c.token_ids or []) for c in first}) == 3


def test_the_process_random_state_is_left_alone(tiny_model: ModelSpec, random_ids: Ids) -> None:
    before = torch.random.get_rng_state()
    HFSampler(tiny_model, SamplingSettings(n=2, max_new_tokens=3)).sample(random_ids((6,)), [[7, 8]])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_identities_hold_what_decides_the_output(tiny_model: ModelSpec) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return HFSampler(tiny_model, SamplingSettings(**changes)).identity()

    values = {"n": 9, "temperature": 0.9, "top_p": 0.9, "top_k": 5, "max_new_tokens": 9, "stop": ("a",)}
    identities = [identity(), *(identity(**{name: value}) for name, value in values.items())]
    assert len(set(map(str, identities))) == 7
    assert identity(stop=["a"]) == identity(stop=("a",))
    half = HFSampler(ModelSpec(tiny_model.name, dtype="bfloat16", device="cpu"), SamplingSettings(n=9))
    assert half.identity() != identity(n=9)
    assert half.prompt_identity() == HFSampler(tiny_model, SamplingSettings()).prompt_identity()


# ----------------------------------------------------------------------------------------------- seeds and bad input


def test_seeds_are_a_hash_of_run_and_task_plus_the_sample() -> None:
    # printf '7\0HumanEval/0' | sha256sum begins with these 16 digits.
    assert sample_seeds(7, "HumanEval/0", 3) == [(0x8CE7D389D26C45AF >> 3) + i for i in range(3)]
    runs, tasks = (0, 1, 10, 101), ("1", "01", "a", "HumanEval/0")
    seeds = {seed for run in runs for task in tasks for seed in sample_seeds(run, task, 50)}
    assert len(seeds) == 4 * 4 * 50
    assert 0 <= min(seeds) <= max(seeds) < 2**62


def test_seeds_differ_between_runs_prompts_and_samples() -> None:
    seeds = [seed for run in (0, 1) for task in ("a", "b", "1") for seed in sample_seeds(run, task, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -1},
        {"n": 2, "temperature": 0.0},
        {"stop": ("a", "")},
        {"stop": "END"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SamplingSettings(**changes)


def test_a_completion_may_fill_the_context(tiny_model: ModelSpec) -> None:
    settings = SamplingSettings(n=1, max_new_tokens=10)
    (completion,) = HFSampler(tiny_model, settings).sample([[5] * 182], [[1]])[0]
    assert len(completion.token_ids or []) <= 10
