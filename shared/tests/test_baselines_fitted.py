"""Baselines that are fitted on hidden states and rewards: by hand, on planted states, and on folds that nothing crosses."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tables import joined as table
from tables import row

from qprobe.baselines import Fitted
from qprobe.baselines.clue import CLUE
from qprobe.baselines.paired_differences import CodeLAT, PairedDifferences
from qprobe.evaluation import fitted
from qprobe.evaluation.sweep import EvaluationSettings, fold_of, probe_seed
from qprobe.pipeline import needs
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.solvers import NothingToLearn
from qprobe.probe.training import TrainingSettings
from qprobe.run.joined import Joined

EVERY = [CLUE(), CodeLAT(), PairedDifferences()]
LINEAR = [CodeLAT(), PairedDifferences()]
SETTINGS = EvaluationSettings(losses=("reward_mse",), seeds=3, folds=4, curve_shares=(), draws=5, bootstrap=100)


def drawn(prompts: int = 30, samples: int = 6, width: int = 5, seed: int = 0) -> tuple[Any, Any, Any]:
    """States, rewards of three values, groups: nothing is planted."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), samples)
    states = rng.normal(size=(len(groups), width)) + 10 * rng.normal(size=(prompts, width))[groups]
    return states, rng.integers(0, 3, len(groups)) / 2, groups


def planted(noise: Sequence[float], prompts: int = 4000, seed: int = 0) -> tuple[Any, Any, Any]:
    """A right and a wrong row a prompt, one unit apart along the first axis; noise of these deviations, and far-off prompts."""
    rng = np.random.default_rng(seed)
    groups, rewards = np.repeat(np.arange(prompts), 2), np.tile([1.0, 0.0], prompts)
    states = rng.normal(size=(len(groups), len(noise))) * noise
    states[:, 0] += rewards
    return states + 100 * rng.normal(size=(prompts, len(noise)))[groups], rewards, groups


def direction(baseline: Fitted, *rows: Any) -> Any:
    """What a linear score projects on, of length 1."""
    width = rows[0].shape[1]
    found = baseline.fit(*rows)(np.eye(width), np.arange(width))
    return found / np.linalg.norm(found)


def test_clue_by_hand() -> None:
    states = np.array([[0, 0], [2, 0], [10, 5], [10, 3]], dtype=float)
    score = CLUE().fit(states, np.array([0, 1, 1.0, 0]), np.array([0, 0, 1, 1]))
    # Less the prompts' means (1, 0) and (10, 4), the successes are (1, 0) and (0, 1): their centroid is (1/2, 1/2), that of
    # failures (-1/2, -1/2).
    tested = np.array(
        [[7, 7], [9, 7], [8, 10], [3, 3]], dtype=float
    )  # three of a prompt with the mean (8, 8), and one alone
    to_right = np.array([np.hypot(1.5, 1.5), np.hypot(0.5, 1.5), np.hypot(0.5, 1.5), np.hypot(0.5, 0.5)])
    to_wrong = np.array([np.hypot(0.5, 0.5), np.hypot(1.5, 0.5), np.hypot(0.5, 2.5), np.hypot(0.5, 0.5)])
    np.testing.assert_allclose(score(tested, np.array([4, 4, 4, 9])), to_wrong - to_right)


def test_clue_prefers_the_side_of_successes_however_loud_the_rest_is() -> None:
    states, rewards, groups = planted([0.3, 30.0, 30.0])
    scores = CLUE().fit(states, rewards, groups)(np.array([[1.0, 9, 9], [0, 9, 9]]), np.array([0, 0]))
    assert scores[0] > scores[1]


def test_a_success_of_clue_earned_as_much_as_is_said() -> None:
    states, rewards, groups = drawn()
    half = CLUE(success=0.5).fit(states, rewards, groups)(states, groups)
    np.testing.assert_array_equal(half, CLUE().fit(states, (rewards >= 0.5).astype(float), groups)(states, groups))
    assert not np.allclose(half, CLUE().fit(states, rewards, groups)(states, groups))


def test_directions_of_planted_differences() -> None:
    # The second moment of the differences is e1 e1^T + 2 diag(noise^2): its first axis is e1 as long as no noise exceeds .7.
    small = planted([0.3, 0.3, 0.3, 0.3])
    for baseline in LINEAR:
        assert direction(baseline, *small)[0] > 0.99
        states, rewards, groups = small
        assert direction(baseline, states, 1 - rewards, groups)[0] < -0.99
    # A louder axis that says nothing is the principal one, and the mean of the differences does without it.
    loud = planted([0.3, 0.3, 3.0, 0.3])
    assert abs(direction(CodeLAT(), *loud)[2]) > 0.99
    assert direction(PairedDifferences(), *loud)[0] > 0.99


def test_directions_by_every_pair_of_unequal_prompts() -> None:
    states, rewards, groups = drawn()
    kept = np.random.default_rng(1).random(len(groups)) < 0.7
    states, rewards, groups = states[kept], rewards[kept], groups[kept]
    differences, weights = [], []
    for prompt in np.unique(groups):
        own = np.flatnonzero(groups == prompt)
        pairs = [(i, j) for i in own for j in own if rewards[i] > rewards[j]]
        differences += [states[i] - states[j] for i, j in pairs]
        weights += [1 / len(pairs) for _ in pairs]
    mean = np.average(differences, axis=0, weights=weights)
    axis = np.linalg.svd(np.array(differences) * np.sqrt(weights)[:, None])[2][0]
    assert direction(PairedDifferences(), states, rewards, groups) @ mean / np.linalg.norm(mean) > 1 - 1e-9
    assert abs(direction(CodeLAT(), states, rewards, groups) @ axis) > 1 - 1e-9
    for baseline in LINEAR:  # the pairs that it was fitted on decide its sign
        aucs = within_prompt_auc(baseline.fit(states, rewards, groups)(states, groups), rewards, groups)
        assert np.nanmean(aucs) >= 0.5


@pytest.mark.parametrize("width", [1, 2])
def test_a_principal_direction_of_narrow_states(width: int) -> None:
    states, rewards, groups = planted([0.3] * width)
    assert direction(CodeLAT(), states, rewards, groups)[0] > 0.99


@pytest.mark.parametrize("baseline", EVERY, ids=lambda baseline: baseline.name)
def test_what_changes_no_choice(baseline: Fitted) -> None:
    states, rewards, groups = drawn()
    others, _, of = drawn(seed=1)

    def order(*rows: Any, tested: Any = others, prompts: Any = of) -> Any:
        """Scores less the first of each prompt."""
        scores = baseline.fit(*rows)(tested, prompts)
        return scores - scores[np.searchsorted(prompts, prompts)]

    expected = order(states, rewards, groups)
    rng = np.random.default_rng(2)
    shift = rng.normal(size=(30, 5))
    np.testing.assert_allclose(
        order(states + shift[groups], rewards, groups, tested=others + shift[of]), expected, atol=1e-9
    )
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    np.testing.assert_allclose(order(states @ turn, rewards, groups, tested=others @ turn), expected, atol=1e-6)
    lot = np.lexsort((rng.random(len(groups)), groups))  # another order within the prompts
    np.testing.assert_allclose(order(states[lot], rewards[lot], groups), expected, atol=1e-6)
    np.testing.assert_array_equal(
        np.sign(order(states, rewards, groups + 7, prompts=of * 2)), np.sign(expected)
    )  # ids are names


@pytest.mark.parametrize("baseline", EVERY, ids=lambda baseline: baseline.name)
def test_no_fit_sees_the_prompts_that_it_scores_nor_their_clusters(baseline: Fitted) -> None:
    # Two prompts of a cluster have an axis of their own, which says which of their completions are right; others do not have it.
    prompts = 24
    rewards = np.tile([1.0, 0.0, 1.0, 0.0], (prompts, 1))
    states = np.zeros((prompts * 4, prompts // 2), dtype=np.float32)
    cluster = np.arange(prompts) // 2
    states[np.arange(len(states)), np.repeat(cluster, 4)] = 2 * rewards.ravel() - 1
    rows = dataclasses.replace(table(rewards, states), clusters=cluster)

    def spread(folded: bool) -> Any:
        """(S, P) how far the candidates of a prompt are apart."""
        found = fitted.scores(baseline.fit, lambda _: rows, lambda _: rows, [1], SETTINGS, 0, folded=folded)
        return np.ptp(found.reshape(len(found), prompts, 4), axis=2)

    assert spread(folded=True).max() < 1e-6
    assert spread(folded=False).max() > 0.01  # who sees them knows


def test_folds_are_those_of_the_probes_and_layers_are_averaged() -> None:
    states, rewards, _ = drawn(prompts=20, samples=4)
    rows = table(rewards.reshape(20, 4), states.astype(np.float32))
    assert rows.features is not None
    layers = {1: rows, 5: dataclasses.replace(rows, features=rows.features * 3)}
    seen: list[tuple[float, tuple[int, ...]]] = []

    def fit(states: Any, rewards: Any, groups: Any) -> Any:
        seen.append((float(states[0, 0]), tuple(np.unique(groups))))
        assert len(states) == len(rewards) == len(groups)
        return lambda tested, _: tested[:, 0]

    found = fitted.scores(fit, layers.__getitem__, layers.__getitem__, [1, 5], SETTINGS, 7, folded=True)
    assert found.shape == (3, 80)
    np.testing.assert_allclose(found, np.tile(2 * rows.features[:, 0].astype(float), (3, 1)))
    folds = [fold_of(20, 4, probe_seed(7, number)) for number in range(3)]
    learned = [tuple(np.flatnonzero(of != fold)) for of in folds for fold in range(4)]
    assert [prompts for _, prompts in seen] == learned * 2


def test_a_training_split_is_learned_from_whole_and_once() -> None:
    rows, other = (table(rewards.reshape(-1, 6), states) for states, rewards, _ in (drawn(), drawn(prompts=7, seed=1)))
    found = fitted.scores(CLUE().fit, lambda _: rows, lambda _: other, [3], SETTINGS, 0, folded=False)
    assert other.features is not None
    expected = CLUE().fit(np.asarray(rows.features), rows.rewards, rows.groups)(other.features, other.groups)
    np.testing.assert_allclose(found, expected[None])


def test_what_cannot_be_fitted_is_said() -> None:
    states, rewards, groups = drawn()
    for success, count in ((2.0, 0), (0.0, 180)):
        with pytest.raises(NothingToLearn, match=rf"{count} of 180.*baselines\.clue\.success"):
            CLUE(success).fit(states, rewards, groups)
    for baseline in LINEAR:
        with pytest.raises(NothingToLearn, match=f"{baseline.method}.*differ"):
            baseline.fit(states, (groups % 2).astype(float), groups)


def test_rows_of_a_run(fakes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(success: float) -> Any:
        return fakes.pipeline(
            tmp_path / "run",
            tests=[fakes.split("numbers", 24)],
            embedder=fakes.Embedder((1, 2)),
            baselines=[CLUE(success), CodeLAT(), PairedDifferences()],
            training=TrainingSettings(steps=5),
            settings=dataclasses.replace(SETTINGS, k=3),
        )

    first = make(1.0)
    first.execute(["sample", "reward", "embed"])
    needs.tell(make(1.0), ["baselines", "train", "evaluate"])
    assert "aseline" not in capsys.readouterr().err  # they cost what probes do
    first.execute(["train", "evaluate"])
    results = first.results(first.tests[0])
    rows: Joined = first.rows(first.test_pools[0], 1)
    for baseline, seeds in ((CLUE(), 3), (CodeLAT(), 3), (PairedDifferences(), 3)):
        found = row(results, baseline.method)
        assert found.low is not None
        assert found.difference_low is not None
        assert [found.seeds, found.samples_per_prompt, found.over_control] == [seeds, 3, None]
        assert any(f"against {baseline.method}: " in note for note in results.notes)
    # The fakes' goodness is the only part that differs within prompts but for small noise.
    assert row(results, "mean paired difference").auc == pytest.approx(1, abs=0.1)
    assert sum("CLUE chooses among k=3" in note for note in results.notes) == 1
    assert rows.features is not None

    other = make(2.0)
    with pytest.raises(FileNotFoundError, match="other settings"):
        other.results(other.tests[0])
    other.execute(["evaluate"])
    results = other.results(other.tests[0])
    assert row(results, "CLUE").value is None
    assert any("baselines.clue.success" in note for note in results.notes)
    assert row(results, "Code-LAT").value is not None
