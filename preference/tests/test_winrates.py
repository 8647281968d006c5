"""Win rates: counts and laws by hand, intervals against published examples and second implementations, lengths, judges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from qprobe.probe.metrics import reward_grid
from qprobe_preference.winrates import (
    SLOPE_PRECISION,
    Judgements,
    agreement,
    band,
    curve,
    difference,
    length_controlled,
    win_rate,
)

WORDS = ["win", "tie", "loss"]


def pools(prompts: int = 40, each: int = 6, seed: int = 0) -> tuple[Judgements, np.ndarray]:
    """Judged candidates, with ties and soft wins, and scores that say something of them; prompts in mixed order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(prompts), each))
    wins = rng.choice([0.0, 0.2, 0.5, 1.0], size=len(groups))
    lengths, references = rng.integers(1, 200, (2, len(groups)))
    return Judgements.of(wins, groups, None, lengths, references), wins + rng.normal(size=len(groups)).round(1)


def single(wins: int, ties: int, losses: int) -> Judgements:
    values = np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])
    return Judgements.of(values, np.arange(len(values)))


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
    found = [win_rate(Judgements.of(s, np.arange(60)), np.ones(60), draws=2).wilson for s in samples]
    assert np.mean([w is not None and w.low <= 0.45 <= w.high for w in found]) > 0.95


def test_wilson_is_only_for_one_answer_a_prompt() -> None:
    judged, _ = pools()
    assert win_rate(judged, judged.base_law()).wilson is None


def test_a_prompt_weighs_the_same_however_many_candidates_it_has() -> None:
    judged = Judgements.of([1, 1, 1, 1, 0, 0], [7, 7, 7, 7, 3, 3])
    found = win_rate(judged, judged.base_law())
    assert found.rate.value == pytest.approx(0.5)
    np.testing.assert_array_equal(found.prompts, [3, 7])
    np.testing.assert_allclose(found.per_prompt, [0, 1])


def test_no_verdict_counts_half_apart_and_bounds_the_rate() -> None:
    judged = Judgements.of([1, np.nan, 0, 1, 0], range(5), ["win", "unparsed", "loss", "win", "refused"])
    found = win_rate(judged, np.ones(5))
    assert found.rate.value == pytest.approx(3 / 5)
    assert (found.wins, found.ties, found.losses) == (2, 0, 1)
    assert found.undecided == {"unparsed": 1, "refused": 1}
    assert found.undecided_range == (pytest.approx(2 / 5), pytest.approx(4 / 5))


def test_a_missing_verdict_never_moves_selection() -> None:
    judged, scores = pools()
    words = np.where(scores > np.median(scores), "unparsed", judged.verdicts)
    hidden = Judgements.of(judged.wins, judged.groups, list(words))
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
    assert band([None, at_4]).value == [None, at_4.value]


def test_turned_round_a_judge_gives_the_other_side_s_rate() -> None:
    judged, _ = pools()
    turned = Judgements.of(1 - judged.wins, judged.groups, None, judged.reference_lengths, judged.lengths)
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
    a, b = (win_rate(Judgements.of(w, np.arange(50)), np.ones(50)) for w in (wins + 0.1, wins))
    found = difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert a.rate.low < b.rate.high
    with pytest.raises(ValueError, match="other prompts"):
        difference(a, win_rate(Judgements.of(wins, np.arange(1, 51)), np.ones(50)))


def test_mean_lengths_are_those_of_what_is_taken() -> None:
    judged = Judgements.of([1, 0, 0, 1], [0, 0, 1, 1], None, [10, 20, 30, 40], [5, 5, 7, 7])
    found = win_rate(judged, judged.probe_law([1, 2, 1, 2], 2, 0.0))
    assert (found.length, found.reference_length) == (30, 6)


def balanced(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Wins and differences with the same share of wins at every difference."""
    differences = np.repeat([-50.0, -10.0, 0.0, 30.0, 200.0], 20)
    return np.tile(np.repeat([1.0, 0.0], [round(20 * rate), round(20 * (1 - rate))]), 5), differences


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_length_controlled_without_an_effect_of_length_is_the_plain_rate(rate: float) -> None:
    wins, differences = balanced(rate)
    found = length_controlled(wins, differences, np.arange(100))
    assert found is not None
    assert found.value == pytest.approx(rate, abs=1e-6)
    assert found.low < rate < found.high


def longer(share: float, count: int = 600) -> np.ndarray:
    """Differences in length of answers of which that share is longer."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(count) < share, 1, -1) * rng.exponential(80, size=count)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_length_controlled_takes_wins_by_length_to_a_half(share: float) -> None:
    differences = longer(share)
    wins = 1 / (1 + np.exp(-4 * np.tanh(differences / differences.std())))
    assert share == 0.5 or abs(wins.mean() - 0.5) > 0.2
    found = length_controlled(wins, differences, np.arange(600))
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=0.02)


def test_length_controlled_of_a_hard_step_is_at_least_nearer_to_a_half() -> None:
    differences = longer(0.85)
    wins = (differences > 0).astype(float)
    found = length_controlled(wins, differences, np.arange(600))
    assert found is not None
    assert 0.5 < found.value < wins.mean() - 0.05
    evenly = np.concatenate([differences, -differences])  # as many shorter by as much: half, by symmetry
    found = length_controlled((evenly > 0).astype(float), evenly, np.arange(1200))
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=1e-6)


def test_length_controlled_finds_the_rate_behind_a_known_effect_and_covers_it() -> None:
    # The 5 answers of a prompt say little more than one: intervals over answers would be half as wide, and hold it less.
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        d = rng.normal(60, 100, size=(100, 5))
        squashed = np.tanh(d / d.std())
        # One lot a prompt: its answers win or lose together, and each still wins with its own probability.
        lot = rng.random((100, 1))
        wins = (lot < 1 / (1 + np.exp(0.8 - 1.5 * squashed))).astype(float)
        found = length_controlled(wins.ravel(), d.ravel(), np.repeat(np.arange(100), 5), np.full(500, 0.2))
        assert found is not None
        held += found.low <= 1 / (1 + np.exp(0.8)) <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_length_controlled_against_scikit_learn() -> None:
    # With the slope scaled up its prior fades on both sides; soft wins are a win and a loss with their weights.
    rng = np.random.default_rng(1)
    d, wins, weights = rng.normal(20, 50, 300), rng.random(300), rng.uniform(0.5, 2, 300)
    spread = np.sqrt(np.cov(d, aweights=weights, ddof=0))
    x = np.tanh(d / spread)

    def loss(at: np.ndarray) -> float:
        logits = at[0] + at[1] * x
        return float(weights @ (np.logaddexp(0, logits) - wins * logits) + SLOPE_PRECISION * at[1] ** 2 / 2)

    expected = minimize(loss, np.zeros(2), tol=1e-12).x
    found = length_controlled(wins, d, np.arange(300), weights)
    assert found is not None
    assert found.value == pytest.approx(1 / (1 + np.exp(-expected[0])), abs=1e-6)
    twice = LogisticRegression(C=1 / SLOPE_PRECISION, tol=1e-10).fit(
        np.tile(x, 2)[:, None], np.repeat([1, 0], 300), np.concatenate([weights * wins, weights * (1 - wins)])
    )
    assert found.value == pytest.approx(1 / (1 + np.exp(-twice.intercept_[0])), abs=1e-6)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_length_controlled_knows_no_unit_nor_order(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, wins, groups = rng.normal(20, 50, 60), rng.choice([0, 0.5, 1], 60), np.repeat(np.arange(20), 3)
    order = rng.permutation(60)
    a = length_controlled(wins, d, groups)
    b = length_controlled(wins[order], scale * d[order], groups[order])
    assert a is not None
    assert b is not None
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-7)


def test_length_controlled_is_silent_where_it_cannot_be_told() -> None:
    d, groups = np.arange(-5.0, 5.0), np.arange(10)
    assert length_controlled(np.ones(10), d, groups) is None
    assert length_controlled(np.zeros(10), d, groups) is None
    wins = np.tile([1.0, 0.0], 5)
    assert length_controlled(wins, np.full(10, 30.0), groups) is None
    found = length_controlled(wins, np.zeros(10), groups)
    assert found is not None
    assert found.value == pytest.approx(0.5)


def two_judges(count: int = 300, alike: float = 0.6, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    a = rng.choice(WORDS, p=[0.5, 0.2, 0.3], size=count)
    b = np.where(rng.random(count) < alike, a, rng.choice(WORDS, size=count))
    return list(a), list(b)


def judge(words: list[str], each: int = 1) -> Judgements:
    wins = [{"win": 1.0, "tie": 0.5, "loss": 0.0, "unparsed": 0.5}[w] for w in words]
    return Judgements.of(wins, np.arange(len(words)) // each, words)


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learn_s(seed: int) -> None:
    a, b = two_judges(seed=seed)
    found = agreement(judge(a), judge(b))
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(cohen_kappa_score(a, b))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.agreed == pytest.approx(np.mean(np.array(a) == np.array(b)))
    assert found.table.sum() == 300


def test_kappa_s_interval_is_as_wide_as_theory_says_and_wider_over_few_prompts() -> None:
    a, b = two_judges(count=1000)
    found = agreement(judge(a), judge(b), draws=4000).kappa
    assert found is not None
    # Fleiss, Cohen and Everitt (1969): large-sample standard error of kappa.
    t = np.array([[np.mean((np.array(a) == x) & (np.array(b) == y)) for y in WORDS] for x in WORDS])
    r, c, k = t.sum(1), t.sum(0), found.value
    chance = r @ c
    diagonal = sum(t[i, i] * (1 - (r[i] + c[i]) * (1 - k)) ** 2 for i in range(3))
    off = (1 - k) ** 2 * sum(t[i, j] * (c[i] + r[j]) ** 2 for i in range(3) for j in range(3) if i != j)
    error = np.sqrt((diagonal + off - (k - chance * (1 - k)) ** 2) / 1000) / (1 - chance)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.07)
    copies = agreement(
        judge([w for w in a[:100] for _ in range(10)], 10), judge([w for w in b[:100] for _ in range(10)], 10)
    )
    once = agreement(judge(a[:100]), judge(b[:100]))
    assert copies.kappa == once.kappa


def test_kappa_of_one_verdict_throughout_and_of_none() -> None:
    assert agreement(judge(["win"] * 5), judge(["win"] * 5)).kappa is None
    found = agreement(judge(["win", "loss", "unparsed", "tie"]), judge(["win", "loss", "win", "unparsed"]))
    assert (found.left_out, found.agreed, found.table.sum()) == (2, 1.0, 2)
    with pytest.raises(ValueError, match="nothing to agree on"):
        agreement(judge(["unparsed"]), judge(["win"]))
    with pytest.raises(ValueError, match="other comparisons"):
        agreement(judge(["win", "loss"]), judge(["win"]))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"wins": [0.5, 1.5]}, r"Row 1 \(verdict win, win 1.5\) has a win outside"),
        ({"wins": [0.5, np.nan]}, "Row 1"),
        ({"verdicts": ["win", "draw"]}, "Row 1 .* is none of win, tie, loss, unparsed"),
        ({"verdicts": ["win", "win"]}, "Row 1 .* says the opposite"),
        ({"groups": [0]}, r"groups has shape \(1,\)"),
        ({"groups": [0.0, 1.0]}, "integer prompt id"),
        ({"lengths": [1, 2]}, "both, or neither"),
        ({"lengths": [1, 2], "reference_lengths": [-1, 2]}, "reference_lengths holds"),
        ({"wins": []}, "at least one"),
    ],
)
def test_bad_judgements_are_one_sentence(columns: dict[str, list[float]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Judgements.of(**({"wins": [1.0, 0.0], "groups": [0, 1]} | columns))  # type: ignore[arg-type]


def test_a_law_that_is_none_is_refused() -> None:
    judged, _ = pools()
    with pytest.raises(ValueError, match="sum to 1"):
        win_rate(judged, np.ones(len(judged.wins)))
    with pytest.raises(ValueError, match="shape"):
        win_rate(judged, [1.0])
