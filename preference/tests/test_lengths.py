"""The length-controlled rate: known effects are found and covered, the fit is that of scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from qprobe.probe.intervals import Interval
from qprobe_preference import lengths
from qprobe_preference.lengths import SLOPE_PRECISION


def length_controlled(*columns: np.ndarray) -> Interval:
    found = lengths.length_controlled(*columns)
    assert found is not None
    return found


def balanced(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Wins and differences with the same share of wins at every difference."""
    differences = np.repeat([-50.0, -10.0, 0.0, 30.0, 200.0], 20)
    return np.tile(np.repeat([1.0, 0.0], [round(20 * rate), round(20 * (1 - rate))]), 5), differences


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_without_an_effect_of_length_is_the_plain_rate(rate: float) -> None:
    wins, differences = balanced(rate)
    found = length_controlled(wins, differences, np.arange(100))
    assert found.value == pytest.approx(rate, abs=1e-6)
    assert found.low < rate < found.high


def longer(share: float, count: int = 600) -> np.ndarray:
    """Differences in length of answers of which that share is longer."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(count) < share, 1, -1) * rng.exponential(80, size=count)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_it_takes_wins_by_length_to_a_half(share: float) -> None:
    differences = longer(share)
    wins = 1 / (1 + np.exp(-4 * np.tanh(differences / differences.std())))
    assert share == 0.5 or abs(wins.mean() - 0.5) > 0.2
    found = length_controlled(wins, differences, np.arange(600))
    assert found.value == pytest.approx(0.5, abs=0.02)


def test_it_of_a_hard_step_is_at_least_nearer_to_a_half() -> None:
    differences = longer(0.85)
    wins = (differences > 0).astype(float)
    found = length_controlled(wins, differences, np.arange(600))
    assert 0.5 < found.value < wins.mean() - 0.05
    evenly = np.concatenate([differences, -differences])  # as many shorter by as much: half, by symmetry
    found = length_controlled((evenly > 0).astype(float), evenly, np.arange(1200))
    assert found.value == pytest.approx(0.5, abs=1e-6)


def test_it_finds_the_rate_behind_a_known_effect_and_covers_it() -> None:
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
        held += found.low <= 1 / (1 + np.exp(0.8)) <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_the_fit_is_that_of_scipy_and_scikit_learn() -> None:
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
    assert found.value == pytest.approx(1 / (1 + np.exp(-expected[0])), abs=1e-6)
    twice = LogisticRegression(C=1 / SLOPE_PRECISION, tol=1e-10).fit(
        np.tile(x, 2)[:, None], np.repeat([1, 0], 300), np.concatenate([weights * wins, weights * (1 - wins)])
    )
    assert found.value == pytest.approx(1 / (1 + np.exp(-twice.intercept_[0])), abs=1e-6)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_it_knows_no_unit_nor_order(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, wins, groups = rng.normal(20, 50, 60), rng.choice([0, 0.5, 1], 60), np.repeat(np.arange(20), 3)
    order = rng.permutation(60)
    a = length_controlled(wins, d, groups)
    b = length_controlled(wins[order], scale * d[order], groups[order])
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-7)


@pytest.mark.parametrize(
    ("wins", "differences"),
    [
        (np.ones(10), np.arange(-5.0, 5.0)),
        (np.zeros(10), np.arange(-5.0, 5.0)),
        (np.tile([1.0, 0.0], 5), np.full(10, 30.0)),
    ],
)
def test_without_both_verdicts_or_two_lengths_it_is_not_known(wins: np.ndarray, differences: np.ndarray) -> None:
    assert lengths.length_controlled(wins, differences, np.arange(10)) is None
    even = length_controlled(np.tile([1.0, 0.0], 5), np.zeros(10), np.arange(10))
    assert even.value == pytest.approx(0.5)
