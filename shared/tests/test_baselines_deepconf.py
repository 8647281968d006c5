"""DeepConf: confidences of a plain forward pass, votes by the authors' rules written out, places by hand."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from qprobe.baselines.consistency import Answer
from qprobe.baselines.deepconf import TOP, DeepConf, DeepConfSettings, confidence, ranks
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import LikelihoodColumns
from qprobe.run import stages
from qprobe.run.pools import Pool, RewardBatch, completions_of

Logprobs = Callable[[ModelSpec, Sequence[int]], Tensor]


class LastDigit:
    def identity(self) -> dict[str, Any]:
        return {"agreement": "last digit, odd ones say nothing"}

    def check(self) -> None:
        pass

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        for batch in batches:
            yield [int(text[-1]) // 4 if int(text[-1]) % 2 == 0 else None for _, text in batch]


def plain(laws: Tensor, prompt: int, tokens: int) -> list[float]:
    """The confidence of every token, from log-laws (T, V) of the joined sequence."""
    own = laws[prompt - 1 : prompt - 1 + max(1, tokens)].double().numpy()
    return [-float(np.mean(np.sort(law)[::-1][:TOP])) for law in own]


def test_confidences_are_those_of_a_plain_forward_pass(
    any_tiny_model: ModelSpec, random_ids: Any, stock_logprobs: Logprobs
) -> None:
    prompts = random_ids((5, 3))
    completions = [random_ids((4, 0, 17), seed=1), random_ids((2, 6), seed=2)]
    found = LikelihoodColumns(any_tiny_model).confidences(prompts, completions, TOP)
    rows = [(prompt, ids) for prompt, of_prompt in zip(prompts, completions, strict=True) for ids in of_prompt]
    for (prompt, ids), own in zip(rows, found, strict=True):
        laws = stock_logprobs(any_tiny_model, [*prompt, *ids])
        assert own.tolist() == pytest.approx(plain(laws, len(prompt), len(ids)), abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 31])
@pytest.mark.parametrize("measure", ["bottom_10", "lowest", "tail"])
def test_groups_are_all_full_windows_and_a_shorter_answer_is_one(measure: str, tokens: int) -> None:
    own, width = np.random.default_rng(tokens).exponential(size=tokens), 7
    groups = [np.mean(own[at : at + width]) for at in range(max(1, tokens - width + 1))]
    expected = {
        "lowest": min(groups),
        "bottom_10": np.mean(sorted(groups)[: max(1, int(0.1 * len(groups)))]),  # two of 25
        "tail": np.mean(own[-width:]),
    }
    assert confidence(own, DeepConfSettings(measure, width)) == pytest.approx(expected[measure])


def test_the_confident_vote_and_nobody_votes_for_nothing() -> None:
    keys, own = ["a", "b", "b", None, "a", "c"], [5.0, 3.0, 3.5, 9.0, 1.0, 5.0]
    # All vote: a 6, b 6.5, c 5, nothing is last. Among equals the more confident is first.
    assert ranks(keys, own, 1.0) == [3, 4, 5, 0, 2, 1]
    # The lowest of five loses its vote: a 5, b 6.5, c 5, and the same answer keeps the same weight.
    assert ranks(keys, own, 0.8) == [2, 3, 4, 0, 1, 2]
    # Of the most confident fifth, the two 5s vote.
    assert ranks(keys, own, 0.2) == [4, 1, 2, 0, 3, 4]
    assert ranks([None, None], [2.0, 3.0], 0.9) == [0, 1]


@pytest.mark.parametrize("agreement", [LastDigit(), None])
def test_a_batch_is_scored_prompt_by_prompt(
    agreement: LastDigit | None, tiny_model: ModelSpec, stock_logprobs: Logprobs, fakes: ModuleType, tmp_path: Path
) -> None:
    pool = Pool(tmp_path, fakes.split("test", 3), "sample", fakes.Sampler(6), 0, batch_rows=12)
    stages.sample(pool, progress=False)
    batches = [
        RewardBatch(keys, [(row["task_id"], row["sample"], row["completion"]) for row in completions_of(pool, keys)])
        for keys in pool.batches
    ]
    ranker = DeepConf(tiny_model, DeepConfSettings(window=3, measure="lowest", keep=1.0), agreement)
    assert ranker.of_all == (agreement is not None)
    reader, votes = LikelihoodColumns(tiny_model), defaultdict[tuple[str, Hashable], float](float)
    expected: dict[tuple[str, int], tuple[Hashable, float]] = {}
    for task_id, sample, text in (row for batch in batches for row in batch.rows):
        prompt, ids = reader.encode_prompt(f"task {task_id[2:]}: ", templated=False), reader.encode_completion(text)
        own = plain(stock_logprobs(tiny_model, [*prompt, *ids]), len(prompt), len(ids))
        least = min(float(np.mean(own[at : at + 3])) for at in range(len(own) - 2))
        key = next(agreement.keys([[(task_id, text)]]))[0] if agreement else None
        if key is not None:
            votes[task_id, key] += least
        expected[task_id, sample] = key, least
    scored = list(ranker.scores(pool, tmp_path, iter(batches)))
    assert [batch for batch, _ in scored] == batches
    found = {row[:2]: r.reward for batch, rows in scored for row, r in zip(batch.rows, rows, strict=True)}
    compared = 0
    for (one, (said, sure)), (other, (says, other_sure)) in itertools.permutations(expected.items(), 2):
        weights = [-1.0 if key is None else votes[one[0], key] for key in (said, says)]
        apart = weights[0] - weights[1] if said != says else sure - other_sure
        if one[0] == other[0] and apart > 1e-3:  # up to rounding
            assert found[one] > found[other]
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("changes", [{"measure": "worst"}, {"window": 0}, {"keep": 0.0}, {"keep": 1.5}])
def test_what_cannot_be_measured_names_its_key(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        DeepConfSettings(**changes)


def test_a_model_that_cannot_be_had_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be had"):
        DeepConf(ModelSpec(str(tmp_path / "none")), DeepConfSettings(), None).check()
