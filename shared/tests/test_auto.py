"""The probes of `auto`: the block that carries the signal is taken, and what was solved is what is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from qprobe.embedding import LIKELIHOOD
from qprobe.evaluation import auto, controls
from qprobe.evaluation.auto import Blocks, settings_of
from qprobe.evaluation.scoring import score
from qprobe.evaluation.sweep import EvaluationSettings, SweepProbe, fold_of, load_sweep, probe_seed, save_sweep
from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED
from qprobe.models.question import QUESTION_COLUMNS
from qprobe.probe import blocks
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.training import TrainingSettings, score_rows
from qprobe.run.joined import Joined

PROMPTS, ROWS, WIDTH = 60, 6, 5


def joined(features: np.ndarray, rewards: np.ndarray, prompts: int = PROMPTS) -> Joined:
    groups = np.repeat(np.arange(prompts), ROWS)
    names = [f"t/{number:03d}" for number in range(prompts)]
    texts = [f"text {number}" for number in range(len(groups))]
    return Joined(names, groups, texts, rewards.astype(np.float32), [""] * len(groups), features)


def planted(carrier: str | None, seed: int = 0) -> tuple[Blocks, dict[int, Joined]]:
    """Two layers and likelihood columns, of which one (or none) holds what decides the rewards, and prompts that differ."""
    lot = np.random.default_rng(seed)
    count = PROMPTS * ROWS
    made = {
        3: lot.normal(size=(count, WIDTH)),
        7: lot.normal(size=(count, WIDTH)),
        LIKELIHOOD: lot.normal(size=(count, len(COLUMNS))),
    }
    hidden = lot.normal(size=count)
    if carrier is not None:
        layer = {"layer 3": 3, "layer 7": 7, "likelihood": LIKELIHOOD}[carrier]
        made[layer][:, 2] = hidden
    made[LIKELIHOOD] += 20 * np.repeat(lot.normal(size=(PROMPTS, len(COLUMNS))), ROWS, axis=0)
    rewards = (hidden + 0.3 * lot.normal(size=count) > 0).astype(float)
    return Blocks((3, 7, LIKELIHOOD)), {
        layer: joined(values.astype(np.float32), rewards) for layer, values in made.items()
    }


def within(values: np.ndarray) -> float:
    """Deviation within prompts."""
    by_prompt = values.reshape(PROMPTS, ROWS)
    return float(np.std(by_prompt - by_prompt.mean(axis=1, keepdims=True)))


def swept(
    own: Blocks, at: dict[int, Joined], folded: bool, curve: tuple[float, ...] = ()
) -> tuple[Joined, list[SweepProbe]]:
    rows = own.joined(at.__getitem__)
    settings = settings_of(EvaluationSettings(folds=4, curve_shares=curve))
    return rows, own.sweep(rows, TrainingSettings(), settings, k=ROWS, seed=0, progress=False, folded=folded)


def scored(probe: SweepProbe, rows: Joined) -> np.ndarray:
    assert rows.features is not None
    return score_rows(probe.trained.network, torch.from_numpy(rows.features)).numpy()


@pytest.mark.parametrize("carrier", ["layer 3", "layer 7", "likelihood"])
def test_the_block_that_carries_the_signal_is_found(carrier: str) -> None:
    own, at = planted(carrier)
    rows, probes = swept(own, at, folded=True)
    assert [probe.fold for probe in probes] == [0, 1, 2, 3]
    fold = fold_of(PROMPTS, 4, probe_seed(0, 0))
    scores = np.empty(len(rows.rewards))
    for probe in probes:
        assert probe.prompts == PROMPTS * 3 // 4
        out = (fold == probe.fold)[rows.groups]
        scores[out] = scored(probe, rows)[out]
        assert rows.features is not None
        slices = own.slices(rows.features.shape[1])
        weights = probe.trained.network.weights[0][0].detach().numpy()
        spread = {name: within(rows.features[:, place] @ weights[place]) for name, place in slices.items()}
        assert max(spread, key=lambda name: spread[name]) == carrier
        assert probe.trained.chosen
    assert np.nanmean(within_prompt_auc(scores, rows.rewards, rows.groups)) > 0.85


def test_where_nothing_carries_it_no_probe_orders_better_than_chance() -> None:
    aucs = []
    for seed in range(4):
        own, at = planted(None, seed)
        rows, probes = swept(own, at, folded=True)
        fold = fold_of(PROMPTS, 4, probe_seed(0, 0))
        scores = np.empty(len(rows.rewards))
        for probe in probes:
            out = (fold == probe.fold)[rows.groups]
            scores[out] = scored(probe, rows)[out]
        aucs.append(np.nanmean(within_prompt_auc(scores, rows.rewards, rows.groups)))
    assert abs(np.mean(aucs) - 0.5) < 0.04


@pytest.mark.parametrize("seed", range(3))
def test_the_network_scores_as_the_solution_but_for_a_constant_of_every_prompt(seed: int) -> None:
    own, at = planted("likelihood", seed)
    rows = own.joined(at.__getitem__)
    solution = blocks.auto(own.rows(rows))
    wanted = solution.score(own.rows(rows).blocks, own.rows(rows).anchors)
    assert rows.features is not None
    found = score_rows(own.network(solution, rows.features.shape[1]), torch.from_numpy(rows.features)).numpy()
    apart = (found - wanted).reshape(PROMPTS, ROWS)
    assert np.ptp(apart, axis=1).max() < 1e-3 * np.std(wanted)


def test_an_anchors_weight_is_put_on_its_column() -> None:
    own, at = planted(None)
    rows = own.joined(at.__getitem__)
    assert rows.features is not None
    made = blocks.auto(own.rows(rows))
    nothing = {name: np.zeros_like(of_block) for name, of_block in made.coefficients.items()}
    for name in own.rows(rows).anchors:
        sign = UNTRAINED[name]
        solution = dataclasses.replace(made, anchor=name, anchor_weight=2.0, bias=0.0, coefficients=nothing)
        found = score_rows(own.network(solution, rows.features.shape[1]), torch.from_numpy(rows.features)).numpy()
        column = at[LIKELIHOOD].features
        assert column is not None
        assert np.allclose(found, 2.0 * sign * column[:, COLUMNS.index(name)], atol=1e-4)


def test_a_training_set_gives_one_probe_of_all_its_prompts() -> None:
    own, at = planted("layer 3")
    _, (probe,) = swept(own, at, folded=False)
    assert (probe.fold, probe.prompts, probe.seed) == (None, PROMPTS, 0)
    assert "layer 3" in probe.trained.note


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_where_there_is_nothing_to_learn_all_score_alike_and_it_is_said(reward: float) -> None:
    own, at = planted("layer 3")
    same = {layer: dataclasses.replace(rows, rewards=np.full(PROMPTS * ROWS, reward)) for layer, rows in at.items()}
    rows, (probe,) = swept(own, same, folded=False)
    assert not probe.trained.chosen
    assert not scored(probe, rows).any()
    assert "differ" in probe.trained.note


def test_the_learning_curve_has_a_probe_a_share_of_fewer_of_the_same_prompts() -> None:
    own, at = planted("layer 3")
    rows, probes = swept(own, at, folded=False, curve=(0.25, 0.5))
    assert [(probe.share, probe.prompts) for probe in probes] == [(1.0, PROMPTS), (0.25, 15), (0.5, 30)]
    rising = [
        np.nanmean(within_prompt_auc(scored(probe, rows), rows.rewards, rows.groups))
        for probe in sorted(probes, key=lambda probe: probe.share)
    ]
    assert rising[0] > 0.8
    assert rising[0] < rising[2] + 0.02
    folded = swept(own, at, folded=True, curve=(0.5,))[1]
    assert [(probe.share, probe.fold, probe.prompts) for probe in folded] == [
        *((1.0, fold, 45) for fold in range(4)),
        *((0.5, fold, 22) for fold in range(4)),
    ]


def test_the_answer_to_a_question_is_an_untrained_score_beside_the_others() -> None:
    _, at = planted(None)
    lot = np.random.default_rng(5)
    knows = at[3].rewards + 0.3 * lot.normal(size=PROMPTS * ROWS)
    columns = np.c_[at[LIKELIHOOD].features, knows, lot.normal(size=PROMPTS * ROWS)].astype(np.float32)
    at[LIKELIHOOD] = dataclasses.replace(at[LIKELIHOOD], features=columns)
    own = Blocks((3, LIKELIHOOD), (*COLUMNS, *QUESTION_COLUMNS))
    rows = own.joined(at.__getitem__)
    made = own.rows(rows)
    assert {name: block.shape[1] for name, block in made.blocks.items()} == {
        "layer 3": WIDTH,
        "likelihood": len(COLUMNS) + len(QUESTION_COLUMNS),
    }
    assert made.anchors["question_log_odds"] == pytest.approx(knows, abs=1e-5)
    _, (probe,) = swept(own, at, folded=False)
    assert "question_log_odds" in probe.trained.note
    assert np.nanmean(within_prompt_auc(scored(probe, rows), rows.rewards, rows.groups)) > 0.95
    asked = controls.of_columns(
        at[LIKELIHOOD], EvaluationSettings(controls=("likelihood_columns",)), (*COLUMNS, *QUESTION_COLUMNS)
    )
    assert asked["highest log-odds of Yes"] is not None
    assert asked["highest log-odds of Yes"][0] == pytest.approx(knows, abs=1e-5)


def test_without_likelihood_columns_there_are_layers_alone() -> None:
    _, at = planted("layer 7")
    own = Blocks((3, 7))
    rows = own.rows(own.joined(at.__getitem__))
    assert (list(rows.blocks), list(rows.anchors)) == (["layer 3", "layer 7"], [])
    _, (probe,) = swept(own, at, folded=False)
    assert probe.trained.network.dimension == 2 * WIDTH


def test_how_likely_a_choice_is_right_is_said_by_probes_that_did_not_see_the_prompt_and_kept(tmp_path: Path) -> None:
    own, at = planted(None)
    rows, probes = swept(own, at, folded=True)
    assert rows.features is not None
    hidden = rows.features.shape[1] - len(COLUMNS)
    save_sweep(probes, tmp_path, {})
    again = load_sweep(tmp_path, {})
    assert again is not None
    settings = dataclasses.replace(settings_of(EvaluationSettings(folds=4)), seeds=1)
    right = score(again, rows, settings, 0)[1.0]["auto"].right
    assert right is not None
    fold = fold_of(PROMPTS, 4, probe_seed(0, 0))
    for probe in probes:
        made, out = probe.trained.calibration, (fold == probe.fold)[rows.groups]
        assert made is not None
        assert made.weights[:hidden].any()
        assert not made.weights[hidden:].any()  # likelihoods lie elsewhere on other prompts
        assert right[0, out] == pytest.approx(made.probabilities(rows.features[out], rows.groups[out]), abs=1e-6)


@pytest.mark.parametrize(("most", "prompts"), [(10 * ROWS, 10), (PROMPTS * ROWS, PROMPTS), (1, 1)])
def test_of_more_rows_than_a_solver_holds_prompts_are_drawn_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, most: int, prompts: int
) -> None:
    own, at = planted("layer 3")
    rows = own.joined(at.__getitem__)
    assert rows.features is not None
    monkeypatch.setattr(auto, "MOST_COORDINATES", most * rows.features.shape[1])
    monkeypatch.setattr(auto.math, "isqrt", lambda _: 0)
    kept = auto._that_fit(rows, np.ones(PROMPTS, dtype=bool), seed=0)
    assert kept.sum() == prompts
    if prompts > 1:
        note = own.solved(rows, np.ones(PROMPTS, dtype=bool), 0).note
        assert ("by lot" in note) == (prompts < PROMPTS)


@pytest.mark.parametrize("large", ["MOST_BESIDE", "MOST_IN_FLOAT64", ""])
def test_probes_of_small_tables_are_solved_side_by_side_and_are_those_of_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    own, at = planted("layer 7")
    width = 2 * WIDTH + len(COLUMNS)
    most = {"MOST_BESIDE": PROMPTS * ROWS * width, "MOST_IN_FLOAT64": width}
    together, met, solved = threading.Barrier(2, timeout=0.5), [], Blocks.solved

    def waiting(*arguments: Any) -> Any:
        """A solver that two threads are in at once, or that finds itself alone; as many threads of the products' library."""
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()
            met.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return solved(*arguments)

    alone = swept(own, at, folded=True)[1]
    monkeypatch.setattr(Blocks, "solved", waiting)
    for name, value in most.items():
        monkeypatch.setattr(auto, name, value - (name == large))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with threadpool_limits(2, user_api="blas"):
        before = threadpool_info()
        beside = swept(own, at, folded=True)[1]
        assert threadpool_info() == before
    assert met == ([] if large else 4 * [{1}])
    for one, other in zip(alone, beside, strict=True):
        assert (one.fold, one.trained.note, one.trained.beta) == (other.fold, other.trained.note, other.trained.beta)
        assert torch.allclose(one.trained.network.weights[0], other.trained.network.weights[0], atol=1e-9)
