"""QProbe solved: when it is, that it is the solvers' answer, what is recorded of it, and that it is saved whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from qprobe import QProbe
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.solvers import Rows, solve

FEW = 0.1


def rows(seed: int = 0, prompts: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts of five rows whose level hides what feature 0 decides within them."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), 5)
    features = rng.normal(size=(len(groups), 6)) * 3 + 10
    margin = features[:, 0] - 10 + rng.normal(size=prompts)[groups]
    return features.astype(np.float32), (margin > 0).astype(np.float32), np.array([f"task {g}" for g in groups])


def auc(probe: QProbe) -> float:
    features, rewards, names = rows(1)
    return float(
        np.nanmean(within_prompt_auc(probe.score(features), rewards, np.unique(names, return_inverse=True)[1]))
    )


@pytest.mark.parametrize(
    ("loss", "solver"),
    [
        ("reward_mse", "closed_form"),
        ("centred_mse", "closed_form"),
        ("reward_cross_entropy", "lbfgs"),
        ("policy_gradient", "lbfgs"),
        ("bradley_terry", "lbfgs"),
        ("pairwise_logistic", "lbfgs"),
    ],
)
def test_without_options_of_training_a_probe_is_solved(loss: Any, solver: str) -> None:
    features, rewards, names = rows()
    probe = QProbe(loss, l2=FEW).fit(features, rewards, names)
    expected = solve(Rows(features, rewards, np.unique(names, return_inverse=True)[1]), loss, strengths=[FEW])
    np.testing.assert_allclose(
        probe.score(features), expected.score(features), atol=1e-5 * np.ptp(expected.score(features))
    )
    assert auc(probe) > 0.9
    assert expected.choice is not None
    assert probe.training_ == {
        "solver": solver,
        "l2": FEW,
        "chosen_on_held_out_prompts": True,
        "held_out_mixed_prompts": expected.choice.prompts,
        "auc": expected.choice.auc,
        "auc_error": expected.choice.error,
        "note": expected.sentence(),
    }
    assert probe.beta_ >= 0
    same = QProbe(loss, solver=solver, l2=FEW).fit(features, rewards, names)
    np.testing.assert_array_equal(same.score(features), probe.score(features))


def test_what_is_said_of_training_is_trained_by_steps() -> None:
    for options in ({"steps": 20}, {"hidden": (4,)}, {"learning_rate": 0.05}, {"solver": "steps"}):
        probe = QProbe("reward_mse", **options).fit(*rows())  # type: ignore[arg-type]
        assert "learning_rate" in probe.training_
        assert not hasattr(probe, "solution_")


def test_l2_is_chosen_where_it_is_not_given() -> None:
    probe = QProbe("centred_mse").fit(*rows())
    assert probe.solution_.choice is not None
    assert probe.solution_.choice.candidates == 13
    assert auc(probe) > 0.9
    end = QProbe("centred_mse", l2=np.inf).fit(*rows())
    assert end.training_["l2"] == "infinity"
    assert auc(end) > 0.8


def test_a_table_with_nothing_to_choose_goes_on_by_steps_or_is_a_sentence() -> None:
    features, rewards, names = rows()
    alone = QProbe("reward_mse").fit(
        features, rewards, np.arange(len(rewards))
    )  # one completion a prompt: a regression
    assert "learning_rate" in alone.training_
    assert np.corrcoef(alone.score(features), rewards)[0, 1] > 0.5
    with pytest.raises(ValueError, match="No prompt has rewards that differ"):
        QProbe("reward_mse", solver="closed_form").fit(features, rewards * 0, names)
    with pytest.warns(UserWarning, match="all rewards are equal"):
        QProbe("centred_mse").fit(features, rewards * 0, names)


def test_pairs_are_solved_and_left_out_by_prompt() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 40, 6)).astype(np.float32)
    chosen[:, 0] = rejected[:, 0] + 1
    probe = QProbe("bradley_terry", l2=FEW).fit_pairs(chosen, rejected, np.arange(40) // 4)
    assert np.mean(probe.score(chosen) > probe.score(rejected)) > 0.9
    assert probe.training_["held_out_mixed_prompts"] == 40
    assert probe.data_["prompts"] == 10


def test_a_solved_probe_is_saved_cloned_and_fitted_again(tmp_path: Path) -> None:
    features, rewards, names = rows()
    probe = QProbe("centred_mse", l2=np.inf, k=3).fit(features, rewards, names)
    probe.save_pretrained(tmp_path)
    json.loads((tmp_path / "probe.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    read = QProbe.from_pretrained(tmp_path)
    assert read.get_params() == probe.get_params()
    for other in (read, clone(probe).fit(features, rewards, names), read.fit(features, rewards, names)):
        np.testing.assert_array_equal(other.score(features), probe.score(features))
        assert (other.beta_, other.training_) == (probe.beta_, probe.training_)
    trained = QProbe("reward_mse", steps=20).fit(features, rewards, names)
    trained.save_pretrained(tmp_path)
    card = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({k: v for k, v in card.items() if k not in ("solver", "l2")}))
    assert QProbe.from_pretrained(tmp_path).solver == "steps"  # as cards were before there were solvers


def test_half_precision_is_read() -> None:
    features, rewards, names = rows()
    expected = QProbe("centred_mse", l2=FEW).fit(features.astype(np.float16), rewards, names)
    assert auc(expected) > 0.9
    brain = QProbe("centred_mse", l2=FEW).fit(torch.from_numpy(features).bfloat16(), rewards, names)
    assert auc(brain) > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "no solver 'newton'"),
        ({"loss": "policy_gradient", "solver": "closed_form"}, "not solved by closed_form: use lbfgs"),
        ({"loss": "reward_mse", "solver": "lbfgs"}, "not solved by lbfgs: use closed_form"),
        ({"l2": 0.0}, "l2 is 0.0"),
        ({"l2": "much"}, "l2 is 'much'"),
        ({"l2": float("nan")}, "l2 is nan"),
    ],
)
def test_unknown_solvers_and_strengths_are_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QProbe(**options)


def test_a_probe_in_use_brings_no_solver() -> None:
    code = "import sys, qprobe.cli.answering; print([m for m in sys.modules if m.startswith('scipy.opt')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
