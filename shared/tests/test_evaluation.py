"""Sweeps and what they earn: no prompt is scored by a probe that learnt from it; tables worked out by hand."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qprobe import files
from qprobe.evaluation import measure
from qprobe.evaluation.scoring import Scored, score
from qprobe.evaluation.sweep import (
    EvaluationSettings,
    SweepProbe,
    cross_validate,
    fold_of,
    load_sweep,
    probe_seed,
    save_sweep,
    train_on_all,
)
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, TrainingSettings, score_rows, train
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


def parameters(probe: SweepProbe) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in probe.trained.network.parameters()])


@pytest.mark.parametrize("loss", ["reward_mse", "reward_cross_entropy", "policy_gradient", "centred_mse"])
def test_cross_validation_never_scores_a_prompt_by_a_probe_that_learnt_from_it(loss: str) -> None:
    pool = planted()
    settings = dataclasses.replace(SETTINGS, losses=(loss,))

    def scores(rewards: np.ndarray) -> Scored:
        changed = dataclasses.replace(pool, rewards=rewards)
        sweep = cross_validate(changed, TRAINING, settings, k=3, seed=5, progress=False)
        assert any(probe.trained.chosen for probe in sweep)
        return score(sweep, changed, settings, 5)[1.0][loss]

    before = scores(pool.rewards)
    for prompt in (0, 7):
        rows = pool.groups == prompt
        after = scores(np.where(rows, 1 - pool.rewards, pool.rewards))
        own, expected = after.q[:, rows], before.q[:, rows]
        if loss == "policy_gradient":
            # Its baseline is the mean reward of a batch: that moves no gradient, only rounding, and with it the bias.
            own, expected = (q - q.mean(axis=1, keepdims=True) for q in (own, expected))
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-4 if loss == "policy_gradient" else 0)
        np.testing.assert_array_equal(after.beta[:, prompt], before.beta[:, prompt])
        assert np.abs(after.q[:, ~rows] - before.q[:, ~rows]).max() > 0.01  # the others did learn from it


def test_every_seed_has_folds_of_its_own_that_part_the_prompts() -> None:
    folds = [fold_of(11, 3, seed) for seed in range(4)]
    for fold in folds:
        assert sorted(np.bincount(fold).tolist()) == [3, 4, 4]
    assert len({tuple(fold) for fold in folds}) == 4
    np.testing.assert_array_equal(folds[0], fold_of(11, 3, 0))
    with pytest.raises(ValueError, match=r"2 prompts cannot make 3 folds: use more prompts or evaluation.folds=2"):
        fold_of(2, 3, 0)


def test_cross_validation_trains_each_loss_seed_and_fold_on_the_other_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ProbeTask] = []

    def spy(data: Data, tasks: list[ProbeTask], *arguments: Any, **more: Any) -> list[TrainedProbe]:
        seen.extend(tasks)
        return train(data, tasks, *arguments, **more)

    monkeypatch.setattr("qprobe.evaluation.sweep.train", spy)
    sweep = cross_validate(planted(), TRAINING, SETTINGS, k=3, seed=5, progress=False)
    assert len(sweep) == len(seen) == 3 * 2 * 3
    assert {(probe.loss, probe.seed, probe.fold) for probe in sweep} == {
        (loss, seed, fold) for loss in SETTINGS.losses for seed in range(2) for fold in range(3)
    }
    for probe, task in zip(sweep, seen, strict=True):
        own = probe_seed(5, probe.seed)
        assert (task.loss, task.seed) == (probe.loss, own)
        np.testing.assert_array_equal(task.groups.numpy(), fold_of(12, 3, own) != probe.fold)


@pytest.mark.parametrize(("share", "count"), [(1.0, 11), (0.95, 11), (0.5, 6), (0.01, 1)])
def test_with_a_training_set_every_seed_draws_its_share_and_scores_all_of_the_test_set(
    share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[tuple[bool, ...]] = []

    def spy(data: Data, tasks: list[ProbeTask], *arguments: Any, **more: Any) -> list[TrainedProbe]:
        masks.extend(tuple(task.groups.tolist()) for task in tasks)
        return train(data, tasks, *arguments, **more)

    monkeypatch.setattr("qprobe.evaluation.sweep.train", spy)
    settings = dataclasses.replace(SETTINGS, train_share=share, seeds=4, losses=("reward_mse", "policy_gradient"))
    sweep = train_on_all(planted(), TRAINING, settings, k=3, seed=0, progress=False)
    assert [sum(mask) for mask in masks] == [count] * 8
    assert masks[:4] == masks[4:]  # losses are compared on the same prompts
    assert len(set(masks)) > 1 or share < 0.1  # else all seeds would be one probe, with the spread 0
    test = planted(prompts=4, samples=7, seed=1)
    assert test.features is not None
    found = score(sweep, test, settings, 0)[1.0]
    for probe in sweep:
        assert probe.fold is None
        with torch.no_grad():
            expected = probe.trained.network(torch.from_numpy(test.features))
        np.testing.assert_allclose(found[probe.loss].q[probe.seed], expected.numpy(), rtol=1e-6)
        assert set(found[probe.loss].beta[probe.seed]) == {probe.trained.beta}
    alone = train_on_all(planted(), TRAINING, dataclasses.replace(settings, seeds=1), k=3, seed=0, progress=False)
    assert {probe.prompts for probe in alone} == {max(1, round(12 * share))}  # one seed has none to differ from


def test_the_learning_curves_probes_see_a_part_of_the_training_prompts_and_a_smaller_part_lies_in_a_larger() -> None:
    masks: dict[tuple[Any, ...], set[int]] = {}
    settings = dataclasses.replace(SETTINGS, losses=("reward_mse", "policy_gradient"), curve_shares=(0.25, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        seen: list[ProbeTask] = []

        def spy(data: Data, tasks: list[ProbeTask], *arguments: Any, **more: Any) -> list[TrainedProbe]:
            seen.extend(tasks)
            return train(data, tasks, *arguments, **more)

        patch.setattr("qprobe.evaluation.sweep.train", spy)
        sweep = cross_validate(planted(), TRAINING, settings, k=3, seed=5, progress=False)
    for probe, task in zip(sweep, seen, strict=True):
        masks[probe.loss, probe.seed, probe.fold, probe.share] = set(task.groups.nonzero()[:, 0].tolist())
        assert probe.prompts == int(task.groups.sum())
    for seed in range(2):
        for fold in range(3):
            quarter, half, whole = (masks["reward_mse", seed, fold, share] for share in (0.25, 0.5, 1.0))
            assert (len(quarter), len(half), len(whole)) == (2, 4, 8)
            assert quarter < half < whole
            assert masks["policy_gradient", seed, fold, 0.25] == quarter  # losses are compared on the same prompts
    pool = planted()
    parts = score(sweep, pool, settings, 5)
    assert {p.share for scores in parts[0.25].values() for p in scores.probes} == {0.25}
    results = evaluate(pool, parts[1.0], k=3, parts=parts, losses=settings.losses, curve_shares=(0.25, 0.5))
    curve = results.reward_against_prompts
    assert curve is not None
    assert curve.prompts == [2, 4, 8]
    for method, band in curve.series.items():
        assert band.value[-1] == row(results, method).value


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
    note = next(note for note in results.notes if "all training prompts earn" in note)
    assert note.startswith("Q-probe L_PG: all training prompts earn +0.600 [")
    assert note.endswith("against 50% of them: more prompts would help.")
    same = evaluate(pool, parts[1.0], k=2, parts={0.5: parts[1.0]}, seeds=1)
    assert any(note.endswith("whether more prompts would help cannot be told.") for note in same.notes)


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


def test_scores_do_not_depend_on_the_pieces_that_features_are_read_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = planted()
    sweep = cross_validate(pool, TRAINING, SETTINGS, k=3, seed=5, progress=False)
    whole = score(sweep, pool, SETTINGS, 5)[1.0]
    monkeypatch.setattr("qprobe.evaluation.scoring.ROWS_AT_A_TIME", 7)
    pieces = score(sweep, pool, SETTINGS, 5)[1.0]
    assert list(pieces) == list(SETTINGS.losses)
    for loss, scores in pieces.items():
        np.testing.assert_allclose(scores.q, whole[loss].q, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(scores.beta, whole[loss].beta)
        assert [probe.loss for probe in scores.probes] == [loss] * 6
    assert pool.features is not None
    for probe in sweep:  # every prompt by the probe that did not see it
        rows = (fold_of(12, 3, probe_seed(5, probe.seed)) == probe.fold)[pool.groups]
        expected = score_rows(probe.trained.network, torch.from_numpy(pool.features)).numpy()[rows]
        np.testing.assert_allclose(pieces[probe.loss].q[probe.seed, rows], expected, rtol=1e-5, atol=1e-6)


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
    results = measure.evaluate("t", "p", "pool", pool, None, {1.0: scores}, SETTINGS, k=2, seed=0, paper=paper)
    assert {entry.method: entry.paper for entry in results.rows if entry.paper is not None} == paper


def sweep_of(*numbers: float) -> list[SweepProbe]:
    sweep = []
    for place, number in enumerate(numbers):
        network = ProbeNetwork(3, (2,), torch.Generator().manual_seed(place))
        torch.nn.init.constant_(network.biases[1], number)
        trained = TrainedProbe(network, beta=0.1, steps=place, chosen=bool(place), held_out_mixed=4, learning_rate=0.1)
        sweep.append(SweepProbe("reward_mse", place, place or None, trained))
    return sweep


INPUTS = {"losses": ("a", "b"), "k": 3}


def test_a_sweep_is_read_back_bit_for_bit_and_only_for_its_inputs(tmp_path: Path) -> None:
    assert load_sweep(tmp_path, INPUTS) is None
    made = sweep_of(0.5, -1.25)
    save_sweep(made, tmp_path, INPUTS)
    read = load_sweep(tmp_path, INPUTS)
    assert read is not None
    for probe, expected in zip(read, made, strict=True):
        assert torch.equal(parameters(probe), parameters(expected))
        same = dataclasses.replace(probe.trained, network=expected.trained.network)
        assert dataclasses.replace(probe, trained=same) == expected
    assert load_sweep(tmp_path, INPUTS | {"k": 4}) is None


def test_a_sweep_whose_writing_was_cut_off_is_none_of_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sweep(sweep_of(0.5, -1.25), tmp_path, INPUTS)

    def killed(path: Path, content: bytes) -> None:
        files.write_whole(path, content)
        raise KeyboardInterrupt  # after the weights, before the rest

    monkeypatch.setattr("qprobe.evaluation.sweep.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        save_sweep(sweep_of(7.0, 8.0), tmp_path, INPUTS | {"k": 4})
    # Going back to the first inputs must not meet the second one's weights.
    assert load_sweep(tmp_path, INPUTS) is None


@pytest.mark.parametrize(
    ("file", "damage"),
    [(f"sweep.{kind}", damage) for kind in ("json", "safetensors") for damage in ("cut", "other")]
    + [("sweep.safetensors", "gone")],  # without sweep.json there is no sweep, which is no damage
)
def test_a_damaged_sweep_is_named(file: str, damage: str, tmp_path: Path) -> None:
    save_sweep(sweep_of(0.5, -1.25), tmp_path, INPUTS)
    path = tmp_path / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "gone":
        path.unlink()
    elif file == "sweep.json":
        path.write_text("[]")
    else:
        save_sweep(sweep_of(0.5), tmp_path / "other", INPUTS)
        path.write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(ValueError, match=r"holds a damaged sweep of probes \(.+\): delete the folder"):
        load_sweep(tmp_path, INPUTS)


def test_the_example_is_the_mixed_prompt_with_the_widest_gap() -> None:
    pool = joined([[0, 0, 0], [0, 1, 0], [1, 0, 1]])
    q = [[9, -9, 0, 0, 1, 2, 5, 4, 8], [9, -9, 0, 0, 1, 2, 5, 6, 4]]  # means in prompt 2: 5, 5, 6
    found = measure.example(pool, {"reward_mse": scored(q)}, "reward_mse")
    assert found == measure.Example("p001", "completion 5", "failed", "completion 3", "failed")
    q = [[9, -9, 0, 0, 1, 2, 5, 4, 8]]
    found = measure.example(pool, {"reward_mse": scored(q)}, "reward_mse")
    assert found == measure.Example("p002", "completion 8", "passed", "completion 7", "failed")
    wordless = dataclasses.replace(joined([[0.25, 1]]), verdicts=["", ""])  # a reward is its own verdict then
    found = measure.example(wordless, {"reward_mse": scored([[2, 1]])}, "reward_mse")
    assert found == measure.Example("p000", "completion 0", "reward 0.25", "completion 1", "reward 1")
    assert measure.example(joined([[1, 1], [0, 0]]), {"reward_mse": scored([[0, 1, 2, 3]])}, "reward_mse") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(joined([[1, 0]]), {}, k=3), "k is 3, but a prompt of this pool has 2 samples"),
        (lambda: EvaluationSettings(losses=("reward_mse", "x")), "no loss named 'x'"),
        (lambda: EvaluationSettings(losses=()), "at least one loss"),
        (lambda: EvaluationSettings(seeds=0), "seeds >= 1"),
        (lambda: EvaluationSettings(folds=1), "folds >= 2"),
        (lambda: EvaluationSettings(bootstrap=10), "bootstrap >= 100"),
        (lambda: EvaluationSettings(train_share=0.0), "train_share is 0.0"),
        (lambda: EvaluationSettings(k=0), "evaluation.k is 0"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
