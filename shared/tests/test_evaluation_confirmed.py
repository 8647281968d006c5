"""Printed numbers against a second way of computing them: learning curves, copies, ranges of rewards, digits, subsets."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from qprobe.evaluation import layer_choice, measure
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings, SweepProbe, cross_validate, probe_seed
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import TrainedProbe, TrainingSettings
from qprobe.report import figures
from qprobe.report.results import Results, Row
from qprobe.run.joined import Joined

TRAINING = TrainingSettings(
    steps=30, learning_rate=0.05, held_out=0.3, minimum_mixed=2, check_every=5, chunks_per_batch=6
)
SETTINGS = EvaluationSettings(seeds=2, folds=3, curve_shares=(), draws=20, bootstrap=200)


def joined(rewards: Any, features: np.ndarray | None = None) -> Joined:
    """(P, n) rewards of P prompts."""
    table = np.asarray(rewards, dtype=np.float32)
    prompts, samples = table.shape
    return Joined(
        [f"p{number:03d}" for number in range(prompts)],
        np.repeat(np.arange(prompts), samples),
        [f"completion {row}" for row in range(prompts * samples)],
        table.ravel(),
        ["passed" if reward else "failed" for reward in table.ravel()],
        features,
    )


def planted(prompts: int = 12, samples: int = 5, seed: int = 0) -> Joined:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts * samples, 4)).astype(np.float16)
    return joined((features[:, 0] > 0).reshape(prompts, samples), features)


def scored(q: Any, beta: Any = 0.0) -> Scored:
    """(S, N) scores at one temperature, or (S, P) temperatures."""
    q = np.asarray(q, dtype=np.float32)
    return Scored(q, np.asarray(beta, dtype=float), [])


def evaluate(
    pool: Joined,
    scores: dict[str, Scored],
    k: int,
    greedy: Any = None,
    parts: dict[float, dict[str, Scored]] | None = None,
    **changes: Any,
) -> Results:
    settings = dataclasses.replace(SETTINGS, **changes)
    greedy = None if greedy is None else np.asarray(greedy, dtype=np.float32)
    return measure.evaluate(
        "title", "protocol", "pool", pool, greedy, {1.0: scores} | (parts or {}), settings, k=k, seed=0
    )


def row(results: Results, method: str) -> Row:
    (found,) = [entry for entry in results.rows if entry.method == method]
    return found


def parameters(probe: SweepProbe) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in probe.trained.network.parameters())


def test_runs_of_different_seeds_have_no_probe_in_common() -> None:
    seeds = {(run, number): probe_seed(run, number) for run in range(100) for number in range(10)}
    assert len(set(seeds.values())) == 1000
    pool, folds = planted(40), {}
    for run in (0, 1):
        sweep = cross_validate(pool, TRAINING, SETTINGS, k=3, seed=run, progress=False)
        folds[run] = {parameters(probe) for probe in sweep}
    assert not folds[0] & folds[1]


def mostly_alike(prompts: int, mixed: int) -> Joined:
    """Of so many prompts the first `mixed` have good and bad completions, and a feature says which."""
    rng = np.random.default_rng(1)
    rewards = rng.integers(0, 2, (prompts, 1)).repeat(4, axis=1)
    rewards[:mixed] = [0, 1, 0, 1]
    features = rng.normal(size=(prompts * 4, 3)).astype(np.float32)
    features[:, 0] += 2 * rewards.ravel()
    return joined(rewards, features)


def test_all_probes_of_a_learning_curve_hold_prompts_out_or_none_does() -> None:
    """Of 40 mixed prompts 8 are held out, of a quarter of them 2: too few, where five are asked for."""
    pool = mostly_alike(40, 40)
    training = dataclasses.replace(TRAINING, minimum_mixed=5, held_out=0.2)
    settings = dataclasses.replace(SETTINGS, curve_shares=(0.25, 0.75))
    sweep = cross_validate(pool, training, settings, k=2, seed=0, progress=False)
    table = [probe for probe in sweep if probe.share == 1 and not probe.plain]
    curve = [probe for probe in sweep if probe.share < 1 or probe.plain]
    assert all(probe.trained.chosen for probe in table)
    assert not any(probe.trained.chosen for probe in curve)
    assert {probe.share for probe in curve} == {0.25, 0.75, 1.0}
    assert len(curve) == 3 * len(table)
    scores = layer_choice.score_over(sweep, lambda _: pool, [1], settings, 0)
    assert scores.plain is not None
    results = measure.evaluate("t", "p", "pool", pool, None, scores.by_share, settings, k=2, seed=0, plain=scores.plain)
    assert any("Every probe of the learning curve" in note for note in results.notes)
    line = results.reward_against_prompts
    assert line is not None
    # The last point is of the probes that learned as the others did, at the default temperature.
    q, beta = scores.plain["reward_mse"].q, TRAINING.beta
    pairs = [(a, b) for a in range(4) for b in range(a)]
    expected = []
    for seed in q:
        for prompt in range(40):
            own, rewards = seed.reshape(40, 4)[prompt], pool.rewards.reshape(40, 4)[prompt]
            expected += [rewards[list(p)] @ softmax(own[list(p)] / beta) for p in pairs]
    assert line.series["Q-probe L_Q"].value[-1] == pytest.approx(np.mean(expected), rel=1e-5)
    # Where every share has enough, all choose, and the table's own probes are the curve's last.
    enough = dataclasses.replace(training, minimum_mixed=1)
    sweep = cross_validate(pool, enough, settings, k=2, seed=0, progress=False)
    assert all(probe.trained.chosen and not probe.plain for probe in sweep)
    # Where none has, none chooses.
    few = dataclasses.replace(training, minimum_mixed=30)
    sweep = cross_validate(pool, few, settings, k=2, seed=0, progress=False)
    assert not any(probe.trained.chosen or probe.plain for probe in sweep)


def test_probes_of_a_row_hold_prompts_out_together() -> None:
    """Of 30 prompts half are mixed, so that draws of held-out ones lie on both sides of any number."""
    pool = mostly_alike(30, 15)
    training = dataclasses.replace(TRAINING, minimum_mixed=3, held_out=0.3)
    settings = dataclasses.replace(SETTINGS, seeds=5)
    sweep = cross_validate(pool, training, settings, k=2, seed=0, progress=False)
    assert len({probe.trained.held_out_mixed >= 3 for probe in sweep}) == 2
    assert len({probe.trained.chosen for probe in sweep}) == 1


def test_the_saved_probe_learns_from_every_prompt() -> None:
    pool = mostly_alike(20, 20)
    training = dataclasses.replace(TRAINING, minimum_mixed=2, held_out=0.3, standardize=False)

    def weights(rows: Joined) -> np.ndarray:
        ((_, probe),) = layer_choice.final_probes(lambda _: rows, [1], ["reward_mse"], training, k=2, seed=0)
        assert probe.chosen
        return np.concatenate([p.detach().numpy().ravel() for p in probe.network.parameters()])

    before = weights(pool)
    assert pool.features is not None
    unseen = 0
    for prompt in range(20):
        # A feature that only this prompt has: its weight moves where a probe learns from it.
        features = np.pad(pool.features, ((0, 0), (0, 1)))
        features[pool.groups == prompt, -1] = 1.0
        unseen += weights(dataclasses.replace(pool, features=features))[-2] == 0
    assert len(before) == 4
    assert unseen == 0


def test_copies_of_a_completion_are_no_pairs_and_no_choices() -> None:
    """a is right, b and c are wrong, and b is there three times; two copies of d differ by a judge's mood alone."""
    pool = joined([[1, 0, 0, 0, 0], [1, 0, 1, 0, 1]])
    pool = dataclasses.replace(pool, completions=["a", "b", "b", "b", "c", "d", "d", "d", "d", "d"])
    # b scores above a, c below: one of the two different pairs is in order.
    q = scored([[2, 3, 3, 3, 1, 0, 0, 0, 0, 0]], np.zeros((1, 2)))
    results = evaluate(pool, {"reward_mse": q}, k=2, seeds=1)
    assert results.mixed_prompts == 1
    found = row(results, "Q-probe L_Q")
    assert found.auc == pytest.approx(0.5)
    # Rewards are over samples: one of five is right, and of two samples one is right in four pairs of ten.
    assert row(results, "pass@1").value == pytest.approx((0.2 + 0.6) / 2)
    assert row(results, "skyline pass@2").value == pytest.approx((0.4 + 0.9) / 2)


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (-300.0, -200.0), (0.0, 0.5)])
def test_the_scores_of_prompts_stand_beside_rewards_of_any_range(low: float, high: float) -> None:
    rewards = np.linspace(low, high, 12).reshape(4, 3)
    pool = joined(rewards)
    results = evaluate(pool, {"reward_mse": scored([np.arange(12)], np.zeros((1, 4)))}, k=2, seeds=1)
    assert results.scores_per_prompt is not None
    points = results.scores_per_prompt.series["Q-probe L_Q"]
    np.testing.assert_allclose([point.base for point in points], rewards.mean(axis=1), rtol=1e-6)
    slope, _ = results.scores_per_prompt.line("Q-probe L_Q") or (None, None)
    assert slope == pytest.approx(11 / (high - low), rel=1e-4)
    figure = figures.scores_per_prompt(results)
    assert figure is not None
    left, right = figure.axes[0].get_xlim()
    assert left < rewards.mean(axis=1).min() < rewards.mean(axis=1).max() < right
    if high > 1 or low < 0:
        assert right - left < 1.3 * (high - low)
    assert Results.from_json(results.to_json()) == results


def test_a_table_without_a_difference_says_none() -> None:
    """Rewards of less than a digit: what is printed as +0.000 is neither better nor more, though its interval excludes 0."""
    prompts = 40
    rewards = np.tile([0.0006, 0.0], (prompts, 1))
    pool = joined(rewards)
    right = np.tile([1.0, 0.0], prompts)
    wrong = right.copy()
    wrong[::4], wrong[1::4] = 0, 1  # in every other prompt

    def by(q: np.ndarray) -> Scored:
        trained = TrainedProbe(ProbeNetwork(1), 0.0, 1, True, 20, 1e-3)
        return Scored(np.float32([q]), np.zeros((1, prompts)), [SweepProbe("", 0, None, trained, prompts=prompts)])

    scores = {"reward_mse": by(wrong), "policy_gradient": by(right)}
    half = {name: by(wrong) for name in scores}
    results = evaluate(pool, scores, k=2, seeds=1, parts={0.5: half}, losses=tuple(scores), bootstrap=1000)
    words = " ".join(results.notes)
    difference = row(results, "Q-probe L_PG").difference_low
    assert difference is not None
    assert difference > 0
    assert "L_PG against Q-probe L_Q: +0.000 [+0.000, +0.000]: not told apart" in words
    assert "L_PG: all training prompts earn +0.000 [+0.000, +0.000] against 50% of them: whether" in words
    assert "better" not in words
    assert "would help" not in words.replace("whether more prompts would help cannot be told", "")


@pytest.mark.parametrize("prompts", [12, 30])
def test_few_mixed_prompts_are_said_as_what_they_are(prompts: int) -> None:
    pool = mostly_alike(prompts, 12)
    notes = evaluate(pool, {"reward_mse": scored([np.zeros(4 * prompts)], np.zeros((1, prompts)))}, k=2, seeds=1).notes
    assert any("Only 12 of 30 prompts" in note for note in notes) == (prompts == 30)
    assert any("There are only 12 prompts" in note for note in notes) == (prompts == 12)


def test_the_figure_of_reward_against_kl_is_enumerated_where_its_subsets_are_few() -> None:
    pool = joined([[1, 0, 0, 1], [0, 1, 0, 0]])
    q = np.array([3.0, 1.0, 2.0, 4.0, 0.5, 1.5, 0.0, 1.0])
    results = evaluate(pool, {"reward_mse": scored([q], np.zeros((1, 2)))}, k=2, seeds=1)
    assert results.reward_against_kl is not None
    points = results.reward_against_kl.series["Q-probe L_Q"]
    for point in points:
        expected = []
        for own, rewards in zip(q.reshape(2, 4), pool.rewards.reshape(2, 4), strict=True):
            for pair in ([a, b] for a in range(4) for b in range(a)):
                weights = softmax(own[pair] / point.beta) if point.beta else own[pair] == own[pair].max()
                expected.append(weights @ rewards[pair])
        assert point.reward == pytest.approx(np.mean(expected), abs=1e-9)
    rewards = [point.reward for point in sorted(points, key=lambda point: point.beta)]
    assert rewards[0] == max(reward for reward in rewards if reward is not None)


def test_what_is_reported_of_all_prompts_is_reported_without_some() -> None:
    pool = joined([[1, 0], [0, 1], [1, 1], [0, 0]])
    q = scored([[1, 0, 0, 1, 0, 0, 0, 0]], np.zeros((1, 4)))
    results = measure.evaluate(
        "t",
        "p",
        "pool",
        pool,
        None,
        {1.0: {"reward_mse": q}},
        dataclasses.replace(SETTINGS, seeds=1),
        k=2,
        seed=0,
        apart={"are known": frozenset({pool.task_ids[2]}), "are new": frozenset()},
    )
    (note,) = [note for note in results.notes if note.startswith("Without")]
    # Of prompts 0, 1 and 3.
    assert note.startswith("Without the 1 of 4 prompts that are known: pass@1 0.333 [")
    assert "Q-probe L_Q 0.667 [" in note
    assert "skyline pass@2 0.667 [" in note
