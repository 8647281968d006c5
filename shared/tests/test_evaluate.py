"""What methods earn: tables, curves and sentences against values by hand or by a second way of computing them."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from tables import SETTINGS, TRAINING, evaluate, joined, mostly_alike, planted, row, scored

from qprobe.evaluation import evaluate as evaluation
from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.scoring import Scored, score
from qprobe.evaluation.sweep import (
    EvaluationSettings,
    SweepProbe,
    cross_validate,
)
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import TrainedProbe
from qprobe.report import figures
from qprobe.report.results import Results


def test_the_learning_curve_by_hand_and_its_verdict() -> None:
    # Ten mixed prompts. All training prompts choose right everywhere, half of them right in four, a quarter nowhere.
    pool = joined([[1, 0]] * 10)
    q = {1.0: [1, 0] * 10, 0.5: [1, 0] * 4 + [0, 1] * 6, 0.25: [0, 1] * 10}
    parts = {}
    for share, values in q.items():
        network = ProbeNetwork(1)
        probe = SweepProbe(
            "policy_gradient", 0, None, TrainedProbe(network, 0.0, 1, True, 20, 1e-3), share, int(40 * share)
        )
        parts[share] = {"policy_gradient": Scored(np.float32([values]), np.zeros((1, 10)), [probe])}
    results = evaluate(pool, parts[1.0], k=2, parts=parts, seeds=1)
    curve = results.reward_against_prompts
    assert curve is not None
    assert curve.prompts == [10, 20, 40]
    assert curve.series["Q-probe L_PG"].value == pytest.approx([0.0, 0.4, 1.0])
    note = next(note for note in results.advice if "all training prompts earn" in note)
    assert note.startswith("Q-probe L_PG: all training prompts earn +0.600 [")
    assert note.endswith("against 50% of them: more prompts would help.")
    same = evaluate(pool, parts[1.0], k=2, parts={0.5: parts[1.0]}, seeds=1)
    assert any(note.endswith("whether more prompts would help cannot be told.") for note in same.advice)


def test_the_difference_to_greedy_is_paired_and_simulation_has_an_error_of_its_own() -> None:
    # Of 20 candidates 190 are pairs, which are enumerated, and 15,504 are sets of five, which are drawn.
    lot = np.random.default_rng(0)
    pool = joined(lot.integers(0, 2, (4, 20)))
    q = scored(lot.integers(0, 10, (1, 80)), np.zeros((1, 4)))
    argmax = row(evaluate(pool, {"reward_mse": q}, k=5, greedy=[1, 1, 0, 0], seeds=1), "Q-probe L_Q")
    assert argmax.value is not None
    assert argmax.over_greedy == pytest.approx(argmax.value - 0.5)
    assert argmax.simulation_error == 0  # closed form
    soft = dataclasses.replace(q, beta=np.ones((1, 4)))
    few, many = (
        row(evaluate(pool, {"reward_mse": soft}, k=5, seeds=1, draws=draws), "Q-probe L_Q") for draws in (20, 2000)
    )
    assert few.over_greedy is None
    assert few.simulation_error is not None
    assert many.simulation_error is not None
    assert 5 < few.simulation_error / many.simulation_error < 20  # 10, the root of 2000 / 20
    # Seeds choose from the same sets: four alike are no more exact than one.
    four = Scored(np.repeat(q.q, 4, axis=0), np.ones((4, 4)), [])
    alike = row(evaluate(pool, {"reward_mse": four}, k=5, seeds=4, draws=20), "Q-probe L_Q")
    few_subsets = row(evaluate(pool, {"reward_mse": soft}, k=2, seeds=1, draws=20), "Q-probe L_Q")
    assert few_subsets.simulation_error == 0
    assert (alike.value, alike.simulation_error) == pytest.approx((few.value, few.simulation_error))


def test_a_table_by_hand() -> None:
    # Prompt 0: rewards 1 and 0. Prompt 1: 0 and 0. Prompt 2: 1 and 1. Prompt 3: 0 and 1.
    pool = joined([[1, 0], [0, 0], [1, 1], [0, 1]])
    right, wrong = [3, 1, 0, 0, 5, 4, -2, -1], [1, 3, 0, 0, 5, 4, -2, -1]  # wrong in prompt 0 alone
    results = evaluate(pool, {"policy_gradient": scored([right, wrong], np.zeros((2, 4)))}, k=2, greedy=[0, 1, 1, 0])
    assert (results.prompts, results.samples, results.samples_per_prompt, results.mixed_prompts) == (4, 8, 2, 2)
    assert [entry.method for entry in results.rows] == ["pass@1", "greedy", "Q-probe L_PG", "skyline pass@2"]
    assert row(results, "pass@1").value == 0.5
    assert row(results, "pass@1").difference is None
    assert row(results, "greedy").value == 0.5
    assert row(results, "skyline pass@2").value == 0.75
    assert row(results, "skyline pass@2").difference == 0.25
    probe = row(results, "Q-probe L_PG")
    # Seeds earn 3/4 and 2/4.
    assert probe.value == pytest.approx(0.625)
    assert probe.seed_spread == pytest.approx(0.25 / math.sqrt(2))
    assert probe.difference == pytest.approx(0.125)
    assert probe.auc == pytest.approx(0.75)  # over seeds (1, 0) in prompt 0, (1, 1) in prompt 3
    assert (probe.seeds, probe.beta, probe.prompts, probe.samples_per_prompt) == (2, 0.0, 4, 2)
    assert probe.low is not None
    assert probe.high is not None
    assert 0 <= probe.low <= 0.625 <= probe.high <= 1
    assert results.reward_against_k is not None
    assert results.reward_against_k.k == [1, 2]
    assert results.reward_against_k.series["Q-probe L_PG"].value == pytest.approx([0.5, 0.625])
    assert results.reward_against_k.series["skyline pass@k"].value == pytest.approx([0.5, 0.75])
    assert results.scores_per_prompt is not None
    # Mean scores of the prompts are 2, 0, 4.5 and -1.5; their mean is 1.25.
    points = results.scores_per_prompt.series["Q-probe L_PG"]
    assert [(point.task_id, point.base) for point in points] == [
        ("p000", 0.5),
        ("p001", 0.0),
        ("p002", 1.0),
        ("p003", 0.5),
    ]
    assert [point.score for point in points] == pytest.approx([0.75, -1.25, 3.25, -2.75])


def test_each_prompt_is_scored_at_its_own_probes_temperature() -> None:
    pool = joined([[1, 0], [1, 0]])
    third = math.log(3)
    # Weights 3/4 and 1/4 at beta 1; 9/10 and 1/10 at beta 1/2.
    results = evaluate(pool, {"reward_mse": scored([[third, 0, third, 0]], [[1.0, 0.5]])}, k=2, seeds=1)
    probe = row(results, "Q-probe L_Q")
    assert probe.value == pytest.approx((0.75 + 0.9) / 2)
    assert probe.beta == 0.75
    assert probe.seed_spread is None
    assert row(results, "greedy").value is None  # not run
    trade_off = results.reward_against_kl
    assert trade_off is not None
    points = {point.beta: point for point in trade_off.series["Q-probe L_Q"]}
    assert points[1.0].reward == pytest.approx(0.75)
    assert points[0.5].reward == pytest.approx(0.9)
    assert points[0.0].reward == 1.0
    # Two samples, both candidates: the law is (w, 1 - w) against (1/2, 1/2).
    assert points[1.0].kl == pytest.approx(math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25), rel=1e-5)
    assert points[0.0].kl == pytest.approx(math.log(2))


def test_a_perfect_scorer_reaches_the_skyline_and_a_random_one_stays_at_the_base() -> None:
    rng = np.random.default_rng(0)
    table = (rng.uniform(size=(100, 8)) < rng.uniform(size=(100, 1))).astype(float)
    pool = joined(table)
    results = evaluate(
        pool,
        {
            "reward_mse": scored([table.ravel()], np.zeros((1, 100))),
            "policy_gradient": scored([rng.normal(size=800)], np.full((1, 100), 0.05)),
        },
        k=4,
        seeds=1,
        draws=50,
    )
    curves = results.reward_against_k
    assert curves is not None
    assert curves.k == list(range(1, 9))
    assert curves.series["Q-probe L_Q"].value == pytest.approx(curves.series["skyline pass@k"].value)
    assert row(results, "Q-probe L_Q").value == pytest.approx(row(results, "skyline pass@4").value)
    assert row(results, "Q-probe L_Q").auc == 1.0
    chance = row(results, "Q-probe L_PG")
    assert chance.value is not None
    base = row(results, "pass@1").value
    # A completion chosen at random has a reward of standard deviation below 1/2 about its prompt's mean: 0.05 for 100.
    assert chance.value == pytest.approx(base, abs=3 * 0.05)
    assert chance.auc == pytest.approx(0.5, abs=0.1)
    assert row(results, "skyline pass@4").value > base + 0.2  # type: ignore[operator]
    assert any("L_PG: its within-prompt AUC cannot be told from chance" in note for note in results.notes)
    assert not any("L_Q: its" in note for note in results.notes)


def test_the_same_seed_gives_the_same_results() -> None:
    pool = planted(samples=20)
    sweep = cross_validate(pool, TRAINING, SETTINGS, k=5, seed=5, progress=False)
    scores = score(sweep, pool, SETTINGS, 5)[1.0]
    first, again = (evaluate(pool, scores, k=5) for _ in range(2))
    assert first == again
    assert evaluate(pool, scores, k=5, draws=21) != first


def test_the_notes_say_what_a_reader_must_know() -> None:
    nothing = evaluate(joined([[1, 1], [0, 0]]), {"reward_mse": scored([[0, 1, 2, 3]] * 2, np.zeros((2, 2)))}, k=1)
    assert any("there is nothing to choose, by any probe" in note for note in nothing.notes)
    assert row(nothing, "Q-probe L_Q").auc is None
    assert nothing.notes[-1] == "The figure of reward against KL is for k=1 candidates."
    pool = planted()
    few = dataclasses.replace(TRAINING, minimum_mixed=100)
    sweep = cross_validate(pool, few, SETTINGS, k=3, seed=5, progress=False)
    results = evaluate(pool, score(sweep, pool, SETTINGS, 5)[1.0], k=3)
    assert any(
        note.startswith("18 of 18 probes use the default stopping step, learning rate and beta")
        for note in results.notes
    )


def test_published_values_stand_beside_their_own_method_alone() -> None:
    pool = joined([[1, 0], [0, 0]])
    scores = {"reward_mse": scored([[0, 1, 2, 3]] * 2, np.zeros((2, 2)))}
    paper = {"Q-probe L_Q": 0.29, "pass@1": 0.24}
    results = evaluation.evaluate(pool, Scores({1.0: scores}), SETTINGS, k=2, seed=0, published=paper)
    assert {entry.method: entry.paper for entry in results.rows if entry.paper is not None} == paper


def test_the_example_is_the_mixed_prompt_with_the_widest_gap() -> None:
    pool = joined([[0, 0, 0], [0, 1, 0], [1, 0, 1]])
    q = [[9, -9, 0, 0, 1, 2, 5, 4, 8], [9, -9, 0, 0, 1, 2, 5, 6, 4]]  # means in prompt 2: 5, 5, 6
    found = evaluation.example(pool, {"reward_mse": scored(q)}, "reward_mse")
    assert found == evaluation.Example("p001", "completion 5", "failed", "completion 3", "failed")
    q = [[9, -9, 0, 0, 1, 2, 5, 4, 8]]
    found = evaluation.example(pool, {"reward_mse": scored(q)}, "reward_mse")
    assert found == evaluation.Example("p002", "completion 8", "passed", "completion 7", "failed")
    wordless = dataclasses.replace(joined([[0.25, 1]]), verdicts=["", ""])  # a reward is its own verdict then
    found = evaluation.example(wordless, {"reward_mse": scored([[2, 1]])}, "reward_mse")
    assert found == evaluation.Example("p000", "completion 0", "reward 0.25", "completion 1", "reward 1")
    assert evaluation.example(joined([[1, 1], [0, 0]]), {"reward_mse": scored([[0, 1, 2, 3]])}, "reward_mse") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(joined([[1, 0]]), {}, k=3), "samples"),
        (lambda: EvaluationSettings(losses=("reward_mse", "x")), "loss"),
        (lambda: EvaluationSettings(losses=()), "loss"),
        (lambda: EvaluationSettings(seeds=0), "seeds"),
        (lambda: EvaluationSettings(folds=1), "folds"),
        (lambda: EvaluationSettings(bootstrap=10), "bootstrap"),
        (lambda: EvaluationSettings(train_share=0.0), "train_share"),
        (lambda: EvaluationSettings(k=0), r"evaluation\.k"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


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
    words = " ".join([*results.notes, *results.advice])
    difference = row(results, "Q-probe L_PG").difference_low
    assert difference is not None
    assert difference > 0
    assert "L_PG against Q-probe L_Q: +0.000 [+0.000, +0.000]: not told apart" in words
    assert "L_PG: all training prompts earn +0.000 [+0.000, +0.000] against 50% of them: whether" in words
    assert "better" not in words
    for unsure in ("prompts would help cannot", "of them would help cannot"):
        words = words.replace(f"whether more {unsure} be told", "")
    assert "would help" not in words


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
    results = evaluation.evaluate(
        pool,
        Scores({1.0: {"reward_mse": q}}),
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
