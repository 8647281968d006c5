"""Whole pipelines on fakes: end to end, nothing twice, and refused before any work."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe import store
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.closing import closing_words
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings
from qprobe.run.pools import RewardRow, Split
from qprobe.store.table import StoreError

pytestmark = pytest.mark.usefixtures("plain_figures")

TRAINING = TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5)
SETTINGS = EvaluationSettings(losses=("reward_mse", "policy_gradient"), seeds=2, folds=3, draws=5, bootstrap=100)
WORK = STAGES[:-1]  # all but the report, whose figures take a second
MAKERS = ("sampler", "greedy", "reward", "embedder")

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """12 prompts x 4 samples, cross-validated."""
    made: Make = fakes.maker(tmp_path / "run", training=TRAINING, settings=SETTINGS)
    return made


def calls(pipeline: Pipeline) -> dict[str, int]:
    return {name: sum(getattr(pipeline, name).calls) for name in MAKERS}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rows(path: Path) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in csv.DictReader(path.read_text().splitlines())}


def test_cross_validation_end_to_end(make: Make, fakes: ModuleType) -> None:
    pipeline = make()
    pipeline.execute()
    assert calls(pipeline) == {"sampler": 12, "greedy": 12, "reward": 24, "embedder": 12}
    run = pipeline.run
    tables = sorted(path.name for path in (run / "tables").iterdir())
    assert tables == ["numbers.csv", "numbers.md", "numbers.tex", "numbers.txt"]
    figures = sorted(path.name for path in (run / "figures" / "numbers").iterdir())
    names = ("reward_against_k", "reward_against_kl", "reward_against_prompts", "scores_per_prompt")
    assert figures == ["drawn.json", *(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))]
    table = rows(run / "tables" / "numbers.csv")
    controls = [
        "longest (tokens)",
        "shortest (tokens)",
        "highest logprob",
        "highest logprob per token",
        "random direction",
    ]
    assert list(table) == ["pass@1", "greedy", *controls, "Q-probe L_Q", "Q-probe L_PG", "skyline pass@4"]
    completions = store.found_table(run / "completions" / "numbers.sample", store.COMPLETIONS).read().to_pylist()
    passed: dict[str, list[bool]] = {}
    for row in completions:
        passed.setdefault(row["task_id"], []).append(fakes.passes(row["task_id"], row["completion"]))
    assert float(table["pass@1"]["value"]) == pytest.approx(sum(map(sum, passed.values())) / 48)
    assert float(table["skyline pass@4"]["value"]) == pytest.approx(sum(map(any, passed.values())) / 12)
    greedy = store.found_table(run / "completions" / "numbers.greedy", store.COMPLETIONS).read().to_pylist()
    assert float(table["greedy"]["value"]) == pytest.approx(
        sum(fakes.passes(row["task_id"], row["completion"]) for row in greedy) / 12
    )
    assert float(table["pass@1"]["value"]) < float(table["Q-probe L_PG"]["value"])
    assert table["Q-probe L_PG"]["protocol"] == "3-fold cross-validation over prompts"
    assert float(table["Q-probe L_PG"]["auc"]) > 0.7  # goodness is among the features


def test_trained_on_one_set_and_tested_on_others_end_to_end(make: Make, fakes: ModuleType) -> None:
    tests = [fakes.split("first", 8, 100), fakes.split("second", 5, 200)]
    pipeline = make(tests=tests, training_split=fakes.split("training", 12), greedy=None)
    pipeline.execute()
    assert sum(pipeline.sampler.calls) == sum(pipeline.embedder.calls) == 25  # type: ignore[attr-defined]
    for split in tests:
        table = rows(pipeline.run / "tables" / f"{split.name}.csv")
        assert {row["pool"] for row in table.values()} == {split.name}  # no split's table lies over another's
        assert table["pass@1"]["prompts"] == str(len(split.prompts))
        assert table["Q-probe L_PG"]["protocol"] == "trained on training, tested here"
        assert table["greedy"]["status"] == "not run"
        assert len(list((pipeline.run / "figures" / split.name).glob("*.png"))) == 4
    assert len(list((pipeline.run / "tables").iterdir())) == 8  # and none of the training set
    assert [path.name for path in (pipeline.run / "probes").iterdir()] == ["training"]
    sweep = pipeline.sweep(pipeline.training_pools[0])
    assert [(probe.loss, probe.seed, probe.fold) for probe in sweep] == [
        (loss, seed, None) for _share in (1.0, 0.25, 0.5) for loss in SETTINGS.losses for seed in range(2)
    ]
    pair = pipeline.example(tests[0], "policy_gradient")
    assert pair is not None
    assert 100 <= int(pair.task_id.removeprefix("t-")) < 108


def test_shards_together_make_the_tables_of_one_run(make: Make, tmp_path: Path) -> None:
    whole = make(run=tmp_path / "whole")
    whole.execute()
    shards = [make(run=tmp_path / "sharded", shard=(number, 3)) for number in (3, 1, 2)]
    for shard in shards:
        with pytest.raises(StoreError, match="missing"):
            make(run=tmp_path / "sharded").execute(["train"])
        shard.execute()
        assert not (shard.run / "probes").exists()
        assert closing_words(shard).startswith(f"shard {shard.shard[0]} of 3 is done")
    made = [sum(shard.sampler.calls) for shard in shards]  # type: ignore[attr-defined]
    assert sum(made) == 12  # every prompt once
    assert max(made) < 12
    last = make(run=tmp_path / "sharded")
    last.execute()
    assert calls(last) == dict.fromkeys(MAKERS, 0)
    for table in (whole.run / "tables").iterdir():
        assert (last.run / "tables" / table.name).read_bytes() == table.read_bytes()
    with pytest.raises(ValueError, match="shard"):
        make(shard=(4, 3))


def test_results_are_kept_and_those_of_other_settings_are_not_reported(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    first.execute(WORK)
    changed = make(settings=dataclasses.replace(SETTINGS, draws=7))
    with pytest.raises(FileNotFoundError, match=r"numbers\.json"):
        changed.execute(["report"])
    changed.execute(["evaluate", "report"])
    assert changed.results(changed.tests[0]).made_from != ""
    monkeypatch.setattr("qprobe.pipeline.evaluated.evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    make(settings=dataclasses.replace(SETTINGS, draws=7)).execute(WORK)


def test_a_second_run_does_nothing_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make()
    first.execute(WORK)
    kept = [first.run / name for name in ("prompts", "completions", "rewards", "features", "probes")]
    before = [times(folder) for folder in kept]
    results = first.results(first.tests[0])
    for place in ("qprobe.evaluation.layer_choice.train", "qprobe.evaluation.sweep.train"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("trained again"))
    second = make()
    second.execute(WORK)
    assert calls(second) == dict.fromkeys(MAKERS, 0)
    assert second.sampler.rendered == 0  # type: ignore[attr-defined]
    assert [times(folder) for folder in kept] == before
    assert second.results(second.tests[0]) == results


@pytest.mark.parametrize(
    ("changes", "trains"),
    [
        ({"training": {"learning_rate": 0.2}}, True),
        ({"settings": {"folds": 4}}, True),
        ({"settings": {"k": 2}}, True),  # beta is chosen for it
        ({"settings": {"bootstrap": 120, "draws": 6}}, False),  # these only measure
    ],
)
def test_other_training_disowns_no_completion_reward_or_feature(
    changes: dict[str, Any], trains: bool, make: Make
) -> None:
    first = make()
    first.execute(WORK)
    before = {name: times(first.run / name) for name in ("completions", "rewards", "features")}
    probes = times(first.run / "probes")
    replaced = {
        "training": TrainingSettings(**vars(TRAINING) | changes.get("training", {})),
        "settings": EvaluationSettings(**vars(SETTINGS) | changes.get("settings", {})),
    }
    second = make(**replaced)
    second.execute(WORK)
    assert calls(second) == dict.fromkeys(MAKERS, 0)
    assert {name: times(first.run / name) for name in before} == before
    after = times(first.run / "probes")
    assert after.keys() == probes.keys()
    assert all((after[path] != time) == trains for path, time in probes.items())
    third = make(**replaced)
    third.execute(WORK)
    assert times(first.run / "probes") == after


def test_another_reward_trains_anew_on_the_same_completions_and_features(
    make: Make, fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().execute(WORK)
    other = fakes.Reward()
    monkeypatch.setattr(other, "name", "fails")
    monkeypatch.setattr(other, "identity", lambda: {"reward": "fails"})
    monkeypatch.setattr(other, "rows", lambda batch: [RewardRow(1 - row.reward) for row in fakes.Reward().rows(batch)])
    pipeline = make(reward=other)
    features = times(pipeline.run / "features")
    first = {path: path.read_bytes() for path in (pipeline.run / "probes").rglob("*.safetensors")}
    pipeline.execute(WORK)
    assert calls(pipeline) == {"sampler": 0, "greedy": 0, "reward": 24, "embedder": 0}
    assert times(pipeline.run / "features") == features
    assert len(first) == 3
    assert all(path.read_bytes() != content for path, content in first.items())


def test_stages_can_be_called_alone_and_run_in_their_own_order(make: Make) -> None:
    make().execute(["embed", "sample"])
    pipeline = make()
    pipeline.execute(["reward"])
    assert calls(pipeline) == {"sampler": 0, "greedy": 0, "reward": 24, "embedder": 0}
    pipeline = make()
    pipeline.execute(["train"])
    make().execute(["evaluate"])
    assert calls(pipeline) == dict.fromkeys(MAKERS, 0)
    assert make().results(pipeline.tests[0]).prompts == 12


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ("reward", StoreError, r"numbers\.sample"),
        ("embed", StoreError, "prompts"),
        ("train", StoreError, r"numbers\.sample"),
        ("evaluate", StoreError, "missing"),
        ("report", FileNotFoundError, r"numbers\.json"),
    ],
)
def test_a_stage_before_its_inputs_says_what_is_missing(
    stage: str, error: type[Exception], message: str, make: Make
) -> None:
    with pytest.raises(error, match=message):
        make().execute([stage])


def test_an_unknown_stage_is_refused_before_any_work(make: Make) -> None:
    pipeline = make()
    with pytest.raises(ValueError, match="smaple"):
        pipeline.execute(["sample", "smaple"])
    assert not pipeline.run.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": EvaluationSettings(k=5, folds=3)}, r"evaluation\.k"),
        ({"layer": 7}, "embedder"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"settings": EvaluationSettings(folds=13)}, "prompts"),
        ({"tests": []}, "splits"),
        ({"tests": ["a", "a"]}, "splits"),
        ({"training_split": "numbers"}, "splits"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    changes: dict[str, Any], message: str, make: Make, fakes: ModuleType
) -> None:
    if "tests" in changes:
        changes = {"tests": [fakes.split(name) for name in changes["tests"]]}
    if "training_split" in changes:
        changes = {"training_split": fakes.split(changes["training_split"])}
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("which", ["reward", "embedder", "sampler"])
def test_tables_of_other_inputs_are_refused_before_the_stages_before_them(
    which: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    first.execute(WORK)
    for path in first.run.glob("completions/*/part-*"):
        path.unlink()  # hours of sampling would be due
    second = make()
    other = getattr(second, which)
    identity = other.identity() | {"version": 2}
    monkeypatch.setattr(other, "identity", lambda: identity)
    with pytest.raises(
        StoreError, match=rf"made from other inputs \((\w+\.)?version was 'not there', now 2|{which}\.version"
    ):
        second.execute(WORK)
    assert calls(second) == dict.fromkeys(MAKERS, 0)


def test_what_a_reward_lacks_is_said_before_any_work(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make()

    def lacks() -> None:
        raise RuntimeError("the judge is not installed")

    monkeypatch.setattr(pipeline.reward, "check", lacks)
    with pytest.raises(RuntimeError, match="installed"):
        pipeline.execute(WORK)
    assert not pipeline.run.exists()
    make().execute(["sample"])
    pipeline.execute(["embed"])  # needs no reward


def test_unequal_prompts_are_trained_and_measured_at_the_smallest_k(make: Make, fakes: ModuleType) -> None:
    prompts = fakes.prompts(9)
    texts = {
        prompt.task_id: [f"answer {(31 * place + 17 * n) % 100:02d}" for n in range(2 + place % 4)]
        for place, prompt in enumerate(prompts)
    }
    split = Split("mine", prompts, {"file": "mine"}, texts)
    pipeline = make(tests=[split], greedy=None)
    assert pipeline.k == 2
    pipeline.execute(WORK)
    results = pipeline.results(split)
    assert (results.k, results.prompts, results.samples, results.samples_per_prompt) == (2, 9, 30, 5)
    passed = [np.mean([fakes.passes(task_id, text) for text in own]) for task_id, own in texts.items()]
    row = next(row for row in results.rows if row.method == "pass@1")
    assert row.value == pytest.approx(np.mean(passed))  # every prompt counts alike, whatever its number of candidates
    for changes, message in [
        ({"settings": EvaluationSettings(k=3, folds=3)}, "evaluation.k is 3, but a prompt of mine has 2 candidates"),
        ({"greedy": fakes.Sampler(1, temperature=0.0)}, "The completions of mine are there already: greedy decoding"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**({"tests": [split], "greedy": None} | changes))


def test_a_training_split_that_is_tested_as_well_says_how_its_probes_fit(make: Make, fakes: ModuleType) -> None:
    learnt = fakes.split("train", 12)
    pipeline = make(training_split=learnt, tests=[learnt])
    pipeline.execute(STAGES[:-1])
    # One pool of samples, drawn once, and its greedy answers.
    assert [pool.name for pool in pipeline.pools] == ["train.sample", "train.greedy"]
    results = pipeline.results(learnt)
    assert "trained on train itself" in results.protocol
    assert results.scores_per_prompt is not None
    assert all(len(points) == 12 for points in results.scores_per_prompt.series.values())
    with pytest.raises(ValueError, match="name"):
        make(training_split=learnt, tests=[fakes.split("train", 12)])


def test_the_learning_curve_counts_prompts_where_it_is_told_to(make: Make, fakes: ModuleType) -> None:
    settings = EvaluationSettings(seeds=2, curve_shares=(), curve_prompts=(2, 5, 9, 40), bootstrap=100, draws=5)
    pipeline = make(
        training_split=fakes.split("train", 10), tests=[fakes.split("test", 8, start=100)], settings=settings
    )
    pipeline.execute(STAGES[:-1])
    curve = pipeline.results(pipeline.tests[0]).reward_against_prompts
    assert curve is not None
    # Two seeds leave a tenth of the ten prompts out: nine are all that there are, and forty are not there.
    assert curve.prompts == [2, 5, 9]
    assert dataclasses.replace(pipeline).settings == pipeline.settings
    # By three folds over ten prompts a probe learns from six or seven.
    folded = EvaluationSettings(folds=3, curve_shares=(0.5,), curve_prompts=(2, 7)).counted(10, None, folded=True)
    assert folded.curve_shares == pytest.approx((2 / (20 / 3), 0.5))
    clusters = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert EvaluationSettings(seeds=1, curve_shares=(), curve_prompts=(1,)).counted(
        10, clusters, False
    ).curve_shares == (0.2,)
    with pytest.raises(ValueError, match="curve_prompts"):
        EvaluationSettings(curve_prompts=(5, 2))
