"""How likely a choice is right: on planted difficulty, against scikit-learn, on prompts that were not seen, kept and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression
from tables import joined as table

from qprobe.evaluation import tested
from qprobe.evaluation.certainty import certainty
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.probe.calibration import CALIBRATION_FILE, Calibration, _logistic, calibrate
from qprobe.probe.estimator import QProbe
from qprobe.probe.solvers import Rows

ROWS = 6


def planted(prompts: int, seed: int, noise: float = 0.0) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows whose first column says how easy their prompt is, scores that know nothing, and every row's probability of 1."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), ROWS)
    features = rng.normal(size=(len(groups), 8))
    easy = rng.normal(size=prompts)[groups]
    features[:, 0] = easy + noise * rng.normal(size=len(groups))
    chance = 1 / (1 + np.exp(-(0.5 + 2 * easy)))
    rewards = (rng.random(len(groups)) < chance).astype(float)
    return Rows(features, rewards, groups), rng.normal(size=len(groups)), chance


def test_probabilities_are_those_that_were_planted() -> None:
    rows, scores, _ = planted(600, seed=0)
    made = calibrate(rows, scores)
    assert made is not None
    fresh, _, chance = planted(600, seed=1)
    found = made.probabilities(fresh.blocks["features"], fresh.groups)
    assert np.abs(found - chance).mean() < 0.05
    assert np.square(found - fresh.rewards).mean() < np.square(chance - fresh.rewards).mean() + 0.005


def test_where_nothing_tells_how_hard_a_prompt_is_every_choice_is_as_likely() -> None:
    rows, scores, _ = planted(400, seed=0)
    blind = Rows(np.random.default_rng(3).normal(size=(len(rows), 8)), rows.rewards, rows.groups)
    made = calibrate(blind, scores)
    assert made is not None
    found = made.probabilities(np.random.default_rng(4).normal(size=(len(rows), 8)), blind.groups)
    assert np.abs(found - rows.rewards.mean()).mean() < 0.06


def test_the_mean_of_the_candidates_helps_where_each_is_noisy() -> None:
    rows, scores, _ = planted(600, seed=0, noise=2.0)
    made = calibrate(rows, scores)
    assert made is not None
    fresh, _, chance = planted(600, seed=1, noise=2.0)
    features = fresh.blocks["features"]
    alone = 1 / (1 + np.exp(-(made.intercept + (made.own + made.others) * (features @ made.weights + made.bias))))
    together = made.probabilities(features, fresh.groups)
    assert np.square(together - chance).mean() < 0.7 * np.square(alone - chance).mean()


def test_the_choices_are_those_of_the_scores() -> None:
    """Of every prompt one row is right, and the scores know it: every choice is right, so there is nothing to tell apart."""
    rows, _, _ = planted(120, seed=0)
    rows.rewards[:] = np.arange(len(rows)) % ROWS == 2
    assert calibrate(rows, rows.rewards) is None
    assert calibrate(rows, np.random.default_rng(0).normal(size=len(rows))) is not None


def test_coefficients_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(80, 2)) * [3, 0.1] + [5, -1]
    rewards = (inputs @ [1, 20] + 15 + 3 * rng.normal(size=80) > 0).astype(float)
    intercept, *slopes = _logistic(inputs, rewards)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    model = LogisticRegression(C=1.0, tol=1e-10).fit((inputs - mean) / deviation, rewards)
    assert slopes == pytest.approx(model.coef_[0] / deviation, rel=1e-3)
    assert intercept == pytest.approx(model.intercept_[0] - (model.coef_[0] / deviation) @ mean, rel=1e-3, abs=1e-4)


def test_a_coefficient_below_zero_is_no_knowledge() -> None:
    inputs = np.random.default_rng(0).normal(size=(80, 2))
    intercept, first, second = _logistic(inputs, (inputs[:, 0] - inputs[:, 1] > 0).astype(float))
    assert first > 1
    assert second == 0
    assert abs(intercept) < 0.5


@pytest.mark.parametrize("kind", ["five to one", "few wrong", "one cluster", "nothing differs"])
def test_too_little_to_say_so_is_said(kind: str) -> None:
    rows, scores, _ = planted(60, seed=0)
    features, rewards, clusters = rows.blocks["features"], rows.rewards.copy(), None
    if kind == "five to one":
        rewards = 1 + 4 * rewards
    if kind == "few wrong":
        rewards[rows.groups >= 8] = 1
    if kind == "one cluster":
        clusters = np.zeros(len(rows), dtype=np.int64)
    if kind == "nothing differs":
        features = np.ones_like(features)
    assert calibrate(Rows(features, rewards, rows.groups, clusters=clusters), scores) is None


def test_it_is_kept_with_the_probe_and_leaves_with_it(tmp_path: Path) -> None:
    rows, _, _ = planted(80, seed=0)
    probe = QProbe(loss="auto").fit(rows.blocks["features"], rows.rewards, rows.groups)
    assert isinstance(probe.calibration_, Calibration)
    probe.save_pretrained(tmp_path)
    again = QProbe.from_pretrained(tmp_path).calibration_
    assert again is not None
    assert again.packed() == pytest.approx(probe.calibration_.packed(), abs=0)
    with pytest.raises(ValueError, match="shape"):
        again.probabilities(np.ones((3, 5)))
    (tmp_path / CALIBRATION_FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match="calibration"):
        QProbe.from_pretrained(tmp_path)
    QProbe(loss="reward_mse").fit(rows.blocks["features"], rows.rewards, rows.groups).save_pretrained(tmp_path)
    assert QProbe.from_pretrained(tmp_path).calibration_ is None


def test_certainty_by_hand() -> None:
    """Sixty prompts of two candidates; the second is chosen, and is right as often as is said, by halves."""
    rewards = np.zeros((60, 2))
    rewards[:30, 1] = np.arange(30) % 10 < 9  # the surer half: .9
    rewards[30:, 1] = np.arange(30) % 10 < 2  # .2
    said = np.repeat([0.8, 0.3], 30)
    right = np.stack([np.full(60, 0.99), said], axis=1).ravel()
    q = np.tile([0.0, 1.0], 60)
    scores = Scored(np.float32([q]), np.zeros((1, 60)), [], right[None])
    found = certainty(tested.Tested(table(rewards), EvaluationSettings(bootstrap=200), 2, 0), {"auto": scores})
    assert found is not None
    own = found.series["Q-probe auto"]
    assert own.predicted == pytest.approx([0.3, 0.8])
    assert own.observed.value == pytest.approx([0.2, 0.9])
    assert own.prompts == [30, 30]
    assert own.brier == pytest.approx((0.9 * 0.04 + 0.1 * 0.64) / 2 + (0.2 * 0.49 + 0.8 * 0.09) / 2)
    assert own.brier_of_mean == pytest.approx(0.55 * 0.45)
    assert own.surest.value[own.shares.index(0.5)] == pytest.approx(0.9)
    assert own.surest.value[-1] == pytest.approx(0.55)
    without = Scored(scores.q, scores.beta, [])
    assert certainty(tested.Tested(table(rewards), EvaluationSettings(bootstrap=200), 2, 0), {"auto": without}) is None


@pytest.mark.parametrize("kind", ["short", "another width"])
def test_a_calibration_of_another_probe_is_not_read(kind: str, tmp_path: Path) -> None:
    rows, _, _ = planted(80, seed=0)
    QProbe(loss="reward_mse").fit(rows.blocks["features"], rows.rewards, rows.groups).save_pretrained(tmp_path)
    packed = np.zeros(2 if kind == "short" else 9 + 4)
    (tmp_path / CALIBRATION_FILE).write_bytes(save({"calibration": packed}))
    with pytest.raises(ValueError, match="calibration"):
        QProbe.from_pretrained(tmp_path)
