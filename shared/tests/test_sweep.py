"""Sweeps: which prompts each probe is trained on, that none scores them, and that a sweep is read back as it was."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from tables import SETTINGS, TRAINING, evaluate, mostly_alike, planted, row

from qprobe import files
from qprobe.evaluation import evaluate as evaluation
from qprobe.evaluation import layer_choice
from qprobe.evaluation.scoring import Scored, score
from qprobe.evaluation.sweep import (
    SweepProbe,
    cross_validate,
    fold_of,
    load_sweep,
    probe_seed,
    save_sweep,
    train_on_all,
)
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, score_rows, train
from qprobe.run.joined import Joined


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
    with pytest.raises(ValueError, match=r"evaluation\.folds"):
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
    with pytest.raises(ValueError, match="damaged"):
        load_sweep(tmp_path, INPUTS)


def test_runs_of_different_seeds_have_no_probe_in_common() -> None:
    seeds = {(run, number): probe_seed(run, number) for run in range(100) for number in range(10)}
    assert len(set(seeds.values())) == 1000
    pool, folds = planted(40), {}
    for run in (0, 1):
        sweep = cross_validate(pool, TRAINING, SETTINGS, k=3, seed=run, progress=False)
        folds[run] = {parameters(probe) for probe in sweep}
    assert not folds[0] & folds[1]


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
    results = evaluation.evaluate(pool, scores, settings, k=2, seed=0)
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
