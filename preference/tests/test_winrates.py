"""Win rates: counts and laws by hand, intervals against published examples and second implementations."""

from __future__ import annotations

import numpy as np
import pytest

from qprobe.probe.metrics import reward_grid
from qprobe_preference.winrates import (
    Judgements,
    band,
    curve,
    difference,
    win_rate,
)


def pools(prompts: int = 40, each: int = 6, seed: int = 0) -> tuple[Judgements, np.ndarray]:
    """Judged candidates, with ties and soft wins, and scores that say something of them; prompts in mixed order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(prompts), each))
    wins = rng.choice([0.0, 0.2, 0.5, 1.0], size=len(groups))
    lengths, references = rng.integers(1, 200, (2, len(groups)))
    return Judgements(wins, groups, None, lengths, references), wins + rng.normal(size=len(groups)).round(1)


def single(wins: int, ties: int, losses: int) -> Judgements:
    values = np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])
    return Judgements(values, np.arange(len(values)))


def test_ties_count_half_and_are_counted() -> None:
    found = win_rate(single(5, 2, 3), np.ones(10))
    assert found.rate.value == pytest.approx(0.6)
    assert (found.wins, found.ties, found.losses, found.undecided) == (5, 2, 3, {})


def test_wilson_without_ties_is_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 15 of 148, method 3.
    found = win_rate(single(15, 0, 133), np.ones(148))
    assert found.wilson is not None
    assert (found.wilson.low, found.wilson.high) == (pytest.approx(0.0624, abs=5e-5), pytest.approx(0.1605, abs=5e-5))


def test_wilson_with_ties_holds_the_truth_often_enough() -> None:
    # Wins, ties and losses of known probability: 2,000 samples of 60 prompts, true rate 0.45.
    rng = np.random.default_rng(0)
    samples = rng.choice([1.0, 0.5, 0.0], p=[0.3, 0.3, 0.4], size=(2000, 60))
    found = [win_rate(Judgements(s, np.arange(60)), np.ones(60), draws=2).wilson for s in samples]
    assert np.mean([w is not None and w.low <= 0.45 <= w.high for w in found]) > 0.95


def test_wilson_is_only_for_one_answer_a_prompt() -> None:
    judged, _ = pools()
    assert win_rate(judged, judged.base_law()).wilson is None


def test_a_prompt_weighs_the_same_however_many_candidates_it_has() -> None:
    judged = Judgements([1, 1, 1, 1, 0, 0], [7, 7, 7, 7, 3, 3])
    found = win_rate(judged, judged.base_law())
    assert found.rate.value == pytest.approx(0.5)
    np.testing.assert_array_equal(found.prompts, [3, 7])
    np.testing.assert_allclose(found.per_prompt, [0, 1])


def test_no_verdict_counts_half_apart_and_bounds_the_rate() -> None:
    judged = Judgements([1, np.nan, 0, 1, 0], range(5), ["win", "unparsed", "loss", "win", "refused"])
    found = win_rate(judged, np.ones(5))
    assert found.rate.value == pytest.approx(3 / 5)
    assert (found.wins, found.ties, found.losses) == (2, 0, 1)
    assert found.undecided == {"unparsed": 1, "refused": 1}
    assert found.undecided_range == (pytest.approx(2 / 5), pytest.approx(4 / 5))


def test_a_missing_verdict_never_moves_selection() -> None:
    judged, scores = pools()
    words = np.where(scores > np.median(scores), "unparsed", judged.verdicts)
    hidden = Judgements(judged.wins, judged.groups, list(words))
    np.testing.assert_array_equal(judged.probe_law(scores, 4, 0.3), hidden.probe_law(scores, 4, 0.3))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_probe_s_rate_is_the_core_s_expected_reward(k: int) -> None:
    judged, scores = pools()
    grid = reward_grid(scores, judged.wins, judged.groups, [k], [0.0, 0.5], draws=4000, rng=np.random.default_rng(1))
    argmax = win_rate(judged, judged.probe_law(scores, k, 0.0))
    np.testing.assert_allclose(argmax.per_prompt, grid.values[0, 0], atol=1e-12)
    softmax = win_rate(judged, judged.probe_law(scores, k, 0.5, draws=4000))
    # Both are simulated where k is neither 1 nor the pool: their errors add.
    assert np.all(np.abs(softmax.per_prompt - grid.values[0, 1]) <= 5 * np.sqrt(2) * grid.errors[0, 1] + 1e-12)


def test_each_prompt_and_probe_has_its_own_temperature() -> None:
    judged, scores = pools(prompts=2)
    both = judged.probe_law(np.stack([scores, -scores]), 6, np.array([[0.0, 1.0], [0.0, 1.0]]))
    mean = np.mean([judged.probe_law(s, 6, np.array([[0.0, 1.0]])) for s in (scores, -scores)], axis=0)
    np.testing.assert_allclose(both, mean)
    cold, warm = judged.groups == 0, judged.groups == 1
    np.testing.assert_allclose(both[cold], (judged.probe_law(scores, 6, 0) + judged.probe_law(-scores, 6, 0))[cold] / 2)
    np.testing.assert_allclose(both[warm], (judged.probe_law(scores, 6, 1) + judged.probe_law(-scores, 6, 1))[warm] / 2)


def test_skyline_bounds_every_law_and_grows_with_k() -> None:
    judged, scores = pools()
    skyline = [win_rate(judged, judged.skyline_law(k)).rate.value for k in range(1, 7)]
    assert skyline == sorted(skyline)
    assert skyline[0] == pytest.approx(win_rate(judged, judged.base_law()).rate.value)
    assert skyline[3] >= win_rate(judged, judged.probe_law(scores, 4, 0.0)).rate.value
    best = [judged.wins[judged.groups == p].max() for p in range(40)]
    assert skyline[-1] == pytest.approx(np.mean(best))


def test_a_curve_is_the_table_s_rate_at_every_k() -> None:
    judged, scores = pools()
    line = curve(judged, scores, [1, 4], 0.3, seed=5)
    at_4 = win_rate(judged, judged.probe_law(scores, 4, 0.3, seed=5), seed=5).rate
    assert (line.value[1], line.low[1], line.high[1]) == (at_4.value, at_4.low, at_4.high)
    assert band([at_4]).value == [at_4.value]


def test_turned_round_a_judge_gives_the_other_side_s_rate() -> None:
    judged, _ = pools()
    turned = Judgements(1 - judged.wins, judged.groups, None, judged.reference_lengths, judged.lengths)
    a, b = (win_rate(j, j.base_law()) for j in (judged, turned))
    assert a.rate.value == pytest.approx(1 - b.rate.value)
    assert (a.wins, a.ties, a.losses) == pytest.approx((b.losses, b.ties, b.wins))
    assert (a.length, a.reference_length) == (b.reference_length, b.length)
    assert a.length_controlled is not None
    assert b.length_controlled is not None
    assert a.length_controlled.value == pytest.approx(1 - b.length_controlled.value)
    assert a.length_controlled.low == pytest.approx(1 - b.length_controlled.high)


def test_two_policies_are_compared_on_the_same_prompts() -> None:
    # Every prompt is won by 0.1 more: the difference has no spread at all, though the rates do.
    rng = np.random.default_rng(0)
    wins = rng.uniform(0, 0.9, size=50)
    a, b = (win_rate(Judgements(w, np.arange(50)), np.ones(50)) for w in (wins + 0.1, wins))
    found = difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert a.rate.low < b.rate.high
    with pytest.raises(ValueError, match="other prompts"):
        difference(a, win_rate(Judgements(wins, np.arange(1, 51)), np.ones(50)))


def test_mean_lengths_are_those_of_what_is_taken() -> None:
    judged = Judgements([1, 0, 0, 1], [0, 0, 1, 1], None, [10, 20, 30, 40], [5, 5, 7, 7])
    found = win_rate(judged, judged.probe_law([1, 2, 1, 2], 2, 0.0))
    assert (found.length, found.reference_length) == (30, 6)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"wins": [0.5, 1.5]}, "Row 1 .* outside"),
        ({"wins": [0.5, np.nan]}, "Row 1"),
        ({"verdicts": ["win", "draw"]}, "Row 1 .* none of win"),
        ({"verdicts": ["win", "win"]}, "Row 1 .* opposite"),
        ({"groups": [0]}, "groups has shape"),
        ({"groups": [0.0, 1.0]}, "integer"),
        ({"lengths": [1, 2]}, "reference_lengths"),
        ({"lengths": [1, 2], "reference_lengths": [-1, 2]}, "reference_lengths"),
        ({"wins": []}, "wins has shape"),
    ],
)
def test_bad_judgements_are_refused_by_row_and_column(columns: dict[str, list[float]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Judgements(**({"wins": [1.0, 0.0], "groups": [0, 1]} | columns))  # type: ignore[arg-type]


@pytest.mark.parametrize("law", [np.ones(240), [1.0]])
def test_a_law_that_is_none_is_refused(law: np.ndarray) -> None:
    judged, _ = pools()
    with pytest.raises(ValueError, match="law"):
        win_rate(judged, law)
