"""The layer of a probe is chosen on held-out prompts, and the table of layers says what each would have earned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qprobe.evaluation import layer_choice
from qprobe.evaluation.sweep import EvaluationSettings, fold_of, probe_seed, training_data
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.estimator import QProbe
from qprobe.probe.ranking import mixed_prompts
from qprobe.probe.training import ProbeTask, TrainingSettings, score_rows, train, trainer
from qprobe.report import to_text
from qprobe.report.figures import write_figures
from qprobe.run.joined import join

pytestmark = pytest.mark.usefixtures("plain_figures")

SETTINGS = EvaluationSettings(
    losses=("reward_mse", "policy_gradient"), seeds=2, folds=3, controls=(), curve_shares=(0.5,), draws=5, bootstrap=100
)
TRAINING = TrainingSettings(steps=40, learning_rate=0.05, minimum_mixed=2, held_out=0.3, check_every=5)

Make = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def make(fakes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Pipelines of 30 prompts; of the layers 1, 2 and 3 only the second says which answers are good."""

    folder = tmp_path_factory.mktemp("layers")

    class Layered(fakes.Embedder):  # type: ignore[misc, name-defined]
        def embed(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[int, torch.Tensor]:
            states: dict[int, torch.Tensor] = super().embed(prompts, completions)
            for layer in {1, 3} & set(states):
                states[layer][:, 0] = 0.5
            return states

    def made(own: str = "best", **changes: Any) -> Pipeline:
        settled = {
            "tests": [fakes.split("numbers", 30)],
            "greedy": None,
            "embedder": Layered((3, 1, 2)),
            "batch_rows": 64,
        }
        settled |= {"layer": "best", "training": TRAINING, "settings": SETTINGS} | changes
        piped: Pipeline = fakes.pipeline(folder / own, **settled)
        return piped

    return made


@pytest.fixture(scope="module")
def finished(make: Make) -> Pipeline:
    """A run at the best of the layers."""
    pipeline = make()
    pipeline.execute(STAGES[:-1])
    return pipeline


def test_every_probe_takes_the_layer_of_its_lowest_held_out_loss(
    finished: Pipeline, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = finished
    sweep = pipeline.sweep(pipeline.test_pools[0])
    assert len(sweep) == 3 * 2 * 2 * 3 * 2  # layers, losses, seeds, folds, shares
    rivals: dict[tuple[Any, ...], list[Any]] = {}
    for probe in sweep:
        rivals.setdefault((probe.loss, probe.seed, probe.fold, probe.share), []).append(probe)
    for own in rivals.values():
        assert [probe.layer for probe in own] == [1, 2, 3]
        losses = [probe.trained.held_out_loss for probe in own]
        best = 2 if None in losses else int(np.argmin(losses))  # at half of the prompts some could hold none out
        assert [probe.taken for probe in own] == [place == best for place in range(3)]
    taken = [probe.layer for probe in sweep if probe.taken and probe.share == 1]
    assert taken.count(2) >= 10  # of 12
    for loss in SETTINGS.losses:
        source = QProbe.from_pretrained(pipeline.run / "probes" / "numbers" / loss).source
        assert source is not None
        assert source.layer == 2

    for place in ("qprobe.evaluation.layer_choice.train", "qprobe.evaluation.sweep.train"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("trained again"))
    again = make()
    again.execute(STAGES[:-1])
    assert again.results(again.tests[0]) == pipeline.results(pipeline.tests[0])


def test_the_table_of_layers_holds_what_a_run_at_each_of_them_earns(
    finished: Pipeline, make: Make, tmp_path: Path
) -> None:
    pipeline = finished
    results = pipeline.results(pipeline.tests[0])
    curve = results.reward_against_layer
    assert curve is not None
    assert curve.layers == [1, 2, 3]
    for place, layer in enumerate(curve.layers):
        alone = make(f"layer {layer}", layer=layer)
        alone.execute(STAGES[:-1])
        found = alone.results(alone.tests[0])
        assert found.reward_against_layer is None
        for row in found.rows:
            if row.method in curve.series:
                band = curve.series[row.method]
                assert (band.value[place], band.low[place], band.high[place]) == (row.value, row.low, row.high)
    rows = {row.method: row.value for row in results.rows}
    for method, band in curve.series.items():
        assert sum(curve.taken[method]) == 6
        if curve.taken[method] == [0, 6, 0]:
            assert rows[method] == band.value[1]
        assert band.value[1] > max(band.value[0], band.value[2])  # type: ignore[type-var, operator]
    text = to_text(results)
    lines = [line.split() for line in text.partition("taken by probes")[2].splitlines()]
    for method, band in curve.series.items():
        for layer, value, taken in zip(curve.layers, band.value, curve.taken[method], strict=True):
            (line,) = [line for line in lines if line[:3] == [*method.split(), str(layer)]]
            assert (line[3], line[-3:]) == (f"{value:.3f}", [str(taken), "of", "6"])
    assert "Rewards by layer are those on the tested prompts, for information" in " ".join(text.split())
    assert not any("read the highest layer" in note for note in results.notes)
    names = [path.name for path in write_figures(results, tmp_path)]
    assert "reward_against_layer.png" in names


def test_the_shown_scores_are_those_of_the_layer_that_was_taken(finished: Pipeline) -> None:
    pipeline = finished
    pool = pipeline.test_pools[0]
    sweep = pipeline.sweep(pool)
    scored = layer_choice.score_over(sweep, lambda layer: pipeline.rows(pool, layer), [1, 2, 3], SETTINGS, 0).by_share
    for probe in sweep:
        if not probe.taken:
            continue
        assert probe.layer is not None
        features = join(pool, pipeline.reward, pipeline.embedder, probe.layer).features
        assert features is not None
        expected = score_rows(probe.trained.network, torch.from_numpy(features)).numpy()
        own = (fold_of(30, 3, probe_seed(0, probe.seed)) == probe.fold).repeat(4)
        np.testing.assert_allclose(scored[probe.share][probe.loss].q[probe.seed, own], expected[own], atol=1e-5)


def test_where_nothing_can_be_held_out_the_highest_layer_is_read_and_it_is_said(make: Make) -> None:
    pipeline = make("blind", training=dataclasses.replace(TRAINING, minimum_mixed=1000))
    pipeline.execute(STAGES[:-1])
    assert {probe.layer for probe in pipeline.sweep(pipeline.test_pools[0]) if probe.taken} == {3}
    results = pipeline.results(pipeline.tests[0])
    assert any(
        note.startswith("12 of 12 probes read the highest layer, 3: no prompts could be") for note in results.notes
    )
    source = QProbe.from_pretrained(pipeline.final_probe()).source
    assert source is not None
    assert source.layer == 3
    with pytest.raises(ValueError, match="embedder"):
        make(layer="bset")


def test_the_held_out_loss_is_that_of_the_kept_weights_on_the_held_out_prompts(make: Make) -> None:
    pipeline = make("one", layer=2)
    pipeline.execute(STAGES[:3])
    data = training_data(pipeline.rows(pipeline.test_pools[0], 2))
    task = ProbeTask("reward_mse", 3, torch.ones(30, dtype=torch.bool))
    (probe,) = train(data, [task], TRAINING, k=4, seed=0)
    mixed = torch.from_numpy(mixed_prompts(data.rewards.numpy(), data.groups.numpy()))
    held = trainer._held_out(data, task, TRAINING, mixed).held[data.groups]
    errors = score_rows(probe.network, data.features)[held] - data.rewards[held]
    assert probe.held_out_loss == pytest.approx(float(errors.square().mean()), rel=1e-4)
    (none,) = train(data, [task], dataclasses.replace(TRAINING, held_out=0), k=4, seed=0)
    assert none.held_out_loss is None
