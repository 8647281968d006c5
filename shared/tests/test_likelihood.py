"""Log-likelihoods of given completions: those of the joined sequences under the stock model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.models import prefix
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler

Ids = Callable[..., list[list[int]]]
Logprobs = Callable[[ModelSpec, Sequence[int]], Tensor]


@pytest.mark.parametrize("tokens_per_pass", [8192, 5])
def test_likelihoods_are_those_of_the_joined_sequences(
    any_tiny_model: ModelSpec,
    random_ids: Ids,
    stock_logprobs: Logprobs,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_pass: int,
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", tokens_per_pass)
    prompts = random_ids((5, 9, 3))
    completions: list[list[list[int]]] = [random_ids((4, 1, 0, 7), seed=1), [], random_ids((2, 6), seed=2)]
    found = Likelihood(any_tiny_model).log_likelihood(prompts, completions)
    assert [len(of_prompt) for of_prompt in found] == [4, 0, 2]
    for prompt, of_prompt, values in zip(prompts, completions, found, strict=True):
        for ids, value in zip(of_prompt, values, strict=True):
            scores = stock_logprobs(any_tiny_model, [*prompt, *ids])  # (T, V), of the token that follows each
            wanted = sum(float(scores[len(prompt) + place - 1, token]) for place, token in enumerate(ids))
            assert value == pytest.approx(wanted, abs=1e-4)


def test_a_sampled_completion_has_the_likelihood_that_its_sampler_gave(tiny_model: ModelSpec, random_ids: Ids) -> None:
    prompts = random_ids((6, 11))
    settings = SamplingSettings(n=3, temperature=0.7, top_p=0.8, max_new_tokens=8)
    drawn = HFSampler(tiny_model, settings).sample(prompts, [[1, 2, 3]] * 2)
    found = Likelihood(tiny_model).log_likelihood(prompts, [[c.token_ids or [] for c in row] for row in drawn])
    for values, row in zip(found, drawn, strict=True):
        assert values == pytest.approx([c.logprob for c in row], abs=1e-3)


@pytest.mark.parametrize(
    ("prompts", "completions", "word"),
    [([[1, 2]], [], "prompts"), ([[1, 2], []], [[[3]], [[4]]], "no tokens"), ([[1, 2]], [[[3, 10**6]]], "token id")],
)
def test_what_cannot_be_scored_is_a_sentence(tiny_model: ModelSpec, prompts: Any, completions: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Likelihood(tiny_model).log_likelihood(prompts, completions)


def test_a_text_is_as_likely_as_all_its_continuations_together(tiny_model: ModelSpec, random_ids: Ids) -> None:
    (prompt,) = random_ids((4,))
    vocabulary = models.load(tiny_model).model.config.vocab_size
    found = Likelihood(tiny_model).log_likelihood([prompt], [[[7], *([7, token] for token in range(vocabulary))]])[0]
    assert float(torch.tensor(found[1:]).logsumexp(0)) == pytest.approx(found[0], abs=1e-4)
