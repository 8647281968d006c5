"""The estimator under a caller's settings of torch, at the ends of what numbers can hold, and in scikit-learn's hands."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold

from qprobe import QProbe
from qprobe.probe import network
from qprobe.probe.losses import LOSSES
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.training import TrainingSettings

OPTIONS: dict[str, Any] = {"steps": 20, "learning_rate": 0.05, "minimum_mixed": 3}


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forty prompts of five rows; feature 0 decides."""
    features = np.random.default_rng(seed).normal(size=(200, 4)).astype(np.float32)
    return features, (features[:, 0] > 0.3).astype(np.float32), np.repeat(np.arange(40), 5)


def auc(probe: QProbe, features: np.ndarray, rewards: np.ndarray, prompts: np.ndarray) -> float:
    return float(np.nanmean(within_prompt_auc(probe.score(features), rewards, prompts)))


# --- the caller's state


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        np.geterr(),
    )


CALLERS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": default_dtype,
    "device": default_device,
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu"),
    "numpy raises": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("name", list(CALLERS))
def test_a_callers_settings_change_nothing_and_are_restored(name: str, tmp_path: Path) -> None:
    expected = QProbe(**OPTIONS).fit(*rows()).score(rows()[0])
    with CALLERS[name]():
        before = state()
        probe = QProbe(**OPTIONS).fit(*rows())
        scores = probe.score(rows()[0])
        probe.save_pretrained(tmp_path)
        read = QProbe.from_pretrained(tmp_path)
        chosen = probe.select(rows()[0][:5], beta=0)
        assert state() == before
        with pytest.raises(ValueError, match="rewards"):
            QProbe(**OPTIONS).fit(rows()[0], rows()[1][:-1], rows()[2])
        assert state() == before
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(read.score(rows()[0]), expected)
    assert chosen == int(expected[:5].argmax())


@pytest.mark.parametrize("loss", list(LOSSES))
def test_tensors_made_in_inference_mode_are_learnt_from(loss: str) -> None:
    expected = QProbe(loss, **OPTIONS).fit(*rows()).score(rows()[0])
    with torch.inference_mode():
        tensors = [torch.tensor(part) for part in rows()]
        inside = QProbe(loss, **OPTIONS).fit(*tensors).score(tensors[0])
    np.testing.assert_array_equal(inside, expected)
    np.testing.assert_array_equal(QProbe(loss, **OPTIONS).fit(*tensors).score(tensors[0]), expected)


# --- the ends of numbers


@pytest.mark.parametrize("loss", ["policy_gradient", "reward_mse"])
@pytest.mark.parametrize("minimum_mixed", [3, 1000], ids=["prompts held out", "none held out"])
def test_a_training_that_diverged_raises_and_leaves_no_probe(loss: str, minimum_mixed: int, tmp_path: Path) -> None:
    probe = QProbe(loss, steps=60, learning_rate=1e6, minimum_mixed=minimum_mixed)
    with pytest.raises(ValueError, match="learning_rate"):
        probe.fit(*rows())
    with pytest.raises(ValueError, match="trained"):
        probe.save_pretrained(tmp_path)


def test_a_learning_rate_that_diverges_loses_against_one_that_does_not() -> None:
    probe = QProbe("reward_mse", **OPTIONS, learning_rates=(1e6, 0.05)).fit(*rows())
    assert probe.training_["learning_rate"] == 0.05
    assert auc(probe, *rows(1)) > 0.9


def test_weights_that_are_no_numbers_are_neither_saved_nor_read(tmp_path: Path) -> None:
    probe = QProbe(**OPTIONS).fit(*rows())
    probe.save_pretrained(tmp_path)
    whole = (tmp_path / network.WEIGHTS_FILE).read_bytes()
    with torch.no_grad():
        probe.network_.weights[0][0, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        probe.save_pretrained(tmp_path / "other")
    bias = np.frombuffer(np.float32(probe.network_.biases[0].item()).tobytes(), dtype=np.uint8).tobytes()
    (tmp_path / network.WEIGHTS_FILE).write_bytes(whole.replace(bias, np.float32(np.inf).tobytes()))
    with pytest.raises(ValueError, match="infinite"):
        QProbe.from_pretrained(tmp_path)


@pytest.mark.parametrize("scale", [1e-7, 1e-12, 1e-30, 1e10])
def test_features_of_any_deviation_are_learnt_from(scale: float) -> None:
    features, rewards, prompts = rows()
    probe = QProbe(**OPTIONS | {"steps": 100}).fit(features * np.float32(scale), rewards, prompts)
    other, *rest = rows(1)
    assert auc(probe, other * np.float32(scale), *rest) > 0.9


F, R, P = rows()


@pytest.mark.parametrize(
    ("features", "rewards", "message"),
    [
        (F, R * 1e30, "rewards"),
        (F, R.astype(np.float64) * 1e300, "rewards"),
        (F, R.astype(np.float64) + 1e12, "rewards"),
        (F.astype(np.float64) * 1e300, R, "features"),
        (F.astype(np.float64) * 1e-50, R, "features"),
        (F.astype(np.float64) * 1e-10 + 1, R, "features"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_a_sentence(features: Any, rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QProbe("reward_mse", **OPTIONS).fit(features, rewards, P)


def test_pairs_read_the_order_of_rewards_whatever_their_size() -> None:
    expected = QProbe("bradley_terry", **OPTIONS).fit(F, R, P).score(F)
    np.testing.assert_array_equal(QProbe("bradley_terry", **OPTIONS).fit(F, R * 1e30, P).score(F), expected)


@pytest.mark.parametrize(
    ("features", "rewards", "reason"),
    [
        (F * 0 + 3, R, "no feature differs"),
        (F * np.float32(1e-7) + 1, R, "no feature differs"),
        (F, R * 0 + 0.5, "all rewards are equal"),
    ],
)
def test_a_probe_that_tells_nothing_apart_says_why(features: Any, rewards: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"scores all rows alike: {reason}") as caught:
        probe = QProbe(**OPTIONS).fit(features, rewards, P)
    assert caught[0].filename == __file__
    assert reason in probe.training_["note"]
    assert np.ptp(probe.score(features)) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert QProbe(**OPTIONS).fit(F, R, P).training_["note"] == ""


def test_ids_of_any_kind_group_the_rows_alike() -> None:
    expected = QProbe(**OPTIONS).fit(F, R, P).score(F)
    for ids in ([("task", int(p)) for p in P], [f"{p:02d}" for p in P], [f"{p:02d}" + "x" * 100 for p in P], P / 2):
        np.testing.assert_array_equal(QProbe(**OPTIONS).fit(F, R, ids).score(F), expected)
    with pytest.raises(ValueError, match="prompts"):
        QProbe(**OPTIONS).fit(F, R, [*P[:3], None, *P[4:]])
    half = np.abs(F[:100]), -np.abs(F[100:])
    by_name = QProbe("bradley_terry", **OPTIONS).fit_pairs(*half, [("task", int(p)) for p in P[:100]])
    by_number = QProbe("bradley_terry", **OPTIONS).fit_pairs(*half, P[:100])
    np.testing.assert_array_equal(by_name.score(F), by_number.score(F))


# --- scikit-learn's manners


def test_parameters_are_those_of_the_constructor() -> None:
    probe = QProbe("reward_mse", beta=0.3, k=4, seed=7, hidden=[8], steps=30)
    parameters = probe.get_params()
    assert (parameters["loss"], parameters["beta"], parameters["k"], parameters["seed"]) == ("reward_mse", 0.3, 4, 7)
    assert (parameters["hidden"], parameters["steps"], parameters["epochs"]) == ((8,), 30, TrainingSettings().epochs)
    assert QProbe(**parameters).get_params() == parameters
    assert QProbe(settings=TrainingSettings(steps=30)).get_params() == QProbe(steps=30).get_params()
    both = QProbe(beta=0.3, settings=TrainingSettings(steps=30, beta=0.7))  # at use, and where it was not chosen
    for other in (QProbe(**both.get_params()), clone(both), clone(both).set_params(k=3)):
        assert (other.beta, other.settings) == (0.3, TrainingSettings(steps=30, beta=0.7))


def test_parameters_are_set_all_or_none() -> None:
    probe = QProbe(k=4, steps=30)
    assert probe.set_params(loss="reward_mse", learning_rate=0.5) is probe
    assert probe.get_params() == QProbe("reward_mse", k=4, steps=30, learning_rate=0.5).get_params()
    for wrong in ({"loss": "nonsense"}, {"speed": 1}, {"learning_rate": -1.0}, {"k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            probe.set_params(seed=9, **wrong)
    assert probe.seed == 0
    assert probe.set_params(settings=TrainingSettings(steps=5)).settings == TrainingSettings(steps=5)


def test_a_clone_is_untrained_and_trains_alike() -> None:
    probe = QProbe("centred_mse", hidden=[3], **OPTIONS).fit(F, R, P)
    copied = clone(probe)
    assert copied.get_params() == probe.get_params()
    with pytest.raises(ValueError, match="trained"):
        copied.score(F)
    np.testing.assert_array_equal(copied.fit(F, R, P).score(F), probe.score(F))


def test_a_fitted_probe_is_copied_and_pickled_whole() -> None:
    probe = QProbe(**OPTIONS).fit(F, R, P)
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):  # noqa: S301
        np.testing.assert_array_equal(other.score(F), probe.score(F))


def test_repr_is_the_call_and_what_was_fitted() -> None:
    assert repr(QProbe()) == "QProbe(loss='policy_gradient')"
    written = repr(QProbe("reward_mse", k=4, hidden=(8,)))
    assert written == "QProbe(loss='reward_mse', k=4, hidden=(8,))"
    assert eval(written).get_params() == QProbe("reward_mse", k=4, hidden=(8,)).get_params()
    fitted = repr(QProbe(beta=0.3, **OPTIONS).fit(F, R, P))
    assert "40 prompts, 200 rows, 4 features, beta_=0.3" in fitted


def test_a_grid_search_varies_any_option_over_folds_of_prompts() -> None:
    def score(probe: QProbe, features: np.ndarray, rewards: np.ndarray) -> float:
        return float(np.corrcoef(probe.score(features), rewards)[0, 1])

    grid = {"learning_rate": [1e-7, 0.05], "loss": ["policy_gradient", "reward_mse"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of QProbe is said above
        search = GridSearchCV(QProbe(**OPTIONS), grid, scoring=score, cv=GroupKFold(2), error_score="raise")
        search.fit(F, R, groups=P, prompts=P)
    assert search.best_params_["learning_rate"] == 0.05
    assert auc(search.best_estimator_, *rows(1)) > 0.9
