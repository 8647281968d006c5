"""Likelihood columns: those of the joined sequences under the stock model, written out token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import likelihood_columns, prefix
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED, LikelihoodColumns, TokenLaw, columns_of, token_law
from qprobe.models.question import QUESTION_COLUMNS, Question
from qprobe.prompts import Prompt

Ids = Callable[..., list[list[int]]]
Logprobs = Callable[[ModelSpec, Sequence[int]], Tensor]
MakeModel = Callable[..., ModelSpec]


def written_out(laws: Tensor, prompt: Sequence[int], ids: Sequence[int], ending: Sequence[int]) -> dict[str, float]:
    """The columns by their definitions, from log-laws (T, V) of the joined sequence."""
    at = len(prompt) - 1
    own = [laws[at + place] for place in range(len(ids) + 1)]
    after = sum(float(laws[at + len(ids) + place, token]) for place, token in enumerate(ending))
    logprobs = [float(law[token]) for law, token in zip(own, ids, strict=False)] or [after]
    own_laws = own[: len(ids)] or own
    entropies = [-float((law.exp() * law).sum()) for law in own_laws]
    certainty = [-float(law.mean()) - np.log(len(law)) for law in own_laws]
    return {
        "logprob_sum": sum(logprobs),
        "logprob_mean": float(np.mean(logprobs)),
        "logprob_min": min(logprobs),
        "logprob_mean_last_10": float(np.mean(logprobs[-10:])),
        "logprob_mean_lowest_5": float(np.mean(sorted(logprobs)[:5])),
        "entropy_mean": float(np.mean(entropies)),
        "entropy_max": max(entropies),
        "entropy_mean_last_10": float(np.mean(entropies[-10:])),
        "entropy_max_window_9": float(pd.Series(entropies).rolling(9, min_periods=1).mean().max()),
        "entropy_at_end": -float((own[-1].exp() * own[-1]).sum()),
        "self_certainty_mean": float(np.mean(certainty)),
        "self_certainty_min": min(certainty),
        "logprob_of_ending": after,
        "logprob_of_ending_begun": float(own[-1][ending[0]]),
        "logprob_of_likeliest_next": float(own[-1].max()),
        "tokens": len(ids),
        "tokens_below_minus_1": sum(value < -1 for value in logprobs),
    }


@pytest.mark.parametrize("ending", [[7], [7, 9, 11]])
@pytest.mark.parametrize("tokens_per_pass", [8192, 5])
def test_columns_are_those_of_the_joined_sequences(
    any_tiny_model: ModelSpec,
    random_ids: Ids,
    stock_logprobs: Logprobs,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_pass: int,
    ending: list[int],
) -> None:
    monkeypatch.setitem(prefix.TOKENS_PER_PASS, "cpu", tokens_per_pass)
    prompts = random_ids((5, 9, 3))
    completions: list[list[list[int]]] = [random_ids((4, 1, 0, 27), seed=1), [], random_ids((2, 6, 2), seed=2)]
    completions[2][2] = completions[2][0]
    read = LikelihoodColumns(any_tiny_model, ending).read(prompts, completions)
    rows = [(prompt, ids) for prompt, of_prompt in zip(prompts, completions, strict=True) for ids in of_prompt]
    assert read.columns.shape == (len(rows), len(COLUMNS))
    for (prompt, ids), found in zip(rows, read.columns, strict=True):
        wanted = written_out(stock_logprobs(any_tiny_model, [*prompt, *ids, *ending]), prompt, ids, ending)
        assert dict(zip(COLUMNS, found.tolist(), strict=True)) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("ending", "behind"), [([7], [9, 3, 12]), ([7, 9, 11], [7, 9, 11, 3, 12])])
def test_a_question_is_asked_behind_the_ending_and_changes_no_other_column(
    any_tiny_model: ModelSpec, random_ids: Ids, stock_logprobs: Logprobs, ending: list[int], behind: list[int]
) -> None:
    prompts = random_ids((5, 9))
    completions = [random_ids((4, 1, 0), seed=1), random_ids((2, 6), seed=2)]
    plain = LikelihoodColumns(any_tiny_model, ending).read(prompts, completions, layers=(2,))
    asked = Question(tuple(behind), yes=20, no=31)
    read = LikelihoodColumns(any_tiny_model, ending, asked).read(prompts, completions, layers=(2,))
    np.testing.assert_allclose(read.columns[:, : len(COLUMNS)], plain.columns, atol=1e-4)
    torch.testing.assert_close(read.states[2], plain.states[2], atol=1e-4, rtol=1e-4)
    rows = [(prompt, ids) for prompt, of_prompt in zip(prompts, completions, strict=True) for ids in of_prompt]
    for (prompt, ids), found in zip(rows, read.columns[:, len(COLUMNS) :], strict=True):
        law = stock_logprobs(any_tiny_model, [*prompt, *ids, *behind])[-1]
        mass = float(np.log(np.exp(float(law[20])) + np.exp(float(law[31]))))
        assert found == pytest.approx([float(law[20] - law[31]), mass], abs=1e-4)


def test_a_question_is_asked_as_the_user_does_or_in_plain_text(make_model: MakeModel) -> None:
    tokenizer = models.load_tokenizer(make_model())
    found = Question.of("Is it right?", tokenizer, "\n```")
    conversation = [("user", "Go on."), ("assistant", "It is."), ("user", "Is it right?")]
    whole, _ = tokenizer.render_prompt(
        Prompt("t", messages=tuple({"role": role, "content": text} for role, text in conversation))
    )
    text = tokenizer.tokenizer.decode(list(found.behind))
    assert text == "\n```" + whole.partition("It is.")[2]
    assert [tokenizer.tokenizer.decode([token]) for token in (found.yes, found.no)] == [
        "Y",
        "N",
    ]  # its tokens are bytes
    plain = models.load_tokenizer(make_model(chat_template=None))
    assert plain.tokenizer.decode(list(Question.of("Is it right?", plain, None).behind)) == "\n\nIs it right?\nAnswer: "


@pytest.mark.parametrize(
    ("template", "text"),
    [("{{ messages[0].content }}", "Right?"), ("same", " ")],
)
def test_a_question_that_cannot_be_asked_is_a_sentence(make_model: MakeModel, template: str, text: str) -> None:
    changes = {} if template == "same" else {"chat_template": template}
    with pytest.raises(ValueError, match=r"embedder\.question"):
        Question.of(text, models.load_tokenizer(make_model(**changes)), None)


def test_states_of_the_same_pass_are_those_of_the_embedder(any_tiny_model: ModelSpec, random_ids: Ids) -> None:
    prompts = random_ids((5, 9))
    completions = [random_ids((4, 0, 7), seed=1), random_ids((2,), seed=2)]
    read = LikelihoodColumns(any_tiny_model, ending=[7, 9]).read(prompts, completions, layers=(2, -1))
    wanted = HFEmbedder(any_tiny_model, layers=(2, -1)).embed(prompts, completions)
    assert sorted(read.states) == sorted(wanted)
    for layer, states in wanted.items():
        torch.testing.assert_close(read.states[layer], states, atol=1e-4, rtol=1e-4)


def test_a_law_cut_into_pieces_is_the_same_and_impossible_words_count_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    logits[2, 3:] = -torch.inf
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    whole = token_law(logits, tokens)
    monkeypatch.setitem(likelihood_columns.SCORES_AT_A_TIME, "cpu", 22)
    cut = token_law(logits, tokens)
    log_law = logits[2, :3].double().log_softmax(0)
    for found in (whole, cut):
        assert found.entropy[2] == pytest.approx(-float((log_law.exp() * log_law).sum()), abs=1e-6)
        assert found.certainty[2] == pytest.approx(-float(log_law.mean()) - np.log(3), abs=1e-6)
    np.testing.assert_allclose(whole.logprob, cut.logprob, atol=1e-6)


def test_equal_words_are_the_least_certain_and_a_sure_word_has_no_entropy() -> None:
    law = token_law(torch.tensor([[0.0] * 8, [200.0] + [0.0] * 7]), torch.tensor([3, 0]))
    assert law.entropy == pytest.approx([np.log(8), 0], abs=1e-6)
    assert law.certainty[0] == pytest.approx(0, abs=1e-6)
    assert law.logprob == pytest.approx([-np.log(8), 0], abs=1e-6)


def test_an_empty_completion_is_as_likely_as_its_ending() -> None:
    one = np.array([-3.0])
    found = dict(zip(COLUMNS, columns_of(TokenLaw(one, np.array([2.0]), one + 9, one + 2), -4.0), strict=True))
    assert (found["tokens"], found["logprob_sum"], found["logprob_mean"], found["entropy_mean"]) == (0, -4, -4, 2)


def test_untrained_scores_are_columns() -> None:
    assert set(UNTRAINED) <= {*COLUMNS, *QUESTION_COLUMNS}
    assert set(UNTRAINED.values()) == {1, -1}


@pytest.mark.parametrize(
    ("prompts", "completions", "word"),
    [([[1, 2]], [], "list"), ([[]], [[[3]]], "empty"), ([[1, 2]], [[[3, 10**6]]], "token")],
)
def test_what_cannot_be_read_is_a_sentence(tiny_model: ModelSpec, prompts: Any, completions: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LikelihoodColumns(tiny_model, ending=[7]).read(prompts, completions)
