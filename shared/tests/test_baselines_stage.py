"""The baselines of a pipeline on fakes: rows, what is trained once, what is refused, and what changes nothing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe import store
from qprobe.baselines.few_shot import FewShot, FewShotSettings
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.inspection import inspect
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings
from qprobe.report.results import Results, Row
from qprobe.store.table import StoreError

WORK = STAGES[:-1]  # all but the report, whose figures take a second
FEW_SHOT, GOODNESS = "few-shot (2 successes)", "Goodness"

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """Pipelines over one run folder: 12 prompts to train on, 8 to be tested on, 4 samples each, both sorts of baseline."""

    def made(**changes: Any) -> Pipeline:
        greedy = fakes.Sampler(1, temperature=0.0)
        settled: dict[str, Any] = {
            "tests": [fakes.split("test", 8, 100)],
            "training_split": fakes.split("training", 12),
            "greedy": greedy,
            "baselines": [FewShot(greedy, FewShotSettings(shots=2), lambda: None), fakes.Ranker()],
            "training": TrainingSettings(steps=5, minimum_mixed=2, check_every=5),
            "settings": EvaluationSettings(
                losses=("policy_gradient",), seeds=1, curve_shares=(), bootstrap=100, controls=("length",)
            ),
        }
        piped: Pipeline = fakes.pipeline(**{"run": tmp_path / "run"} | settled | changes)
        return piped

    return made


def results(pipeline: Pipeline) -> Results:
    return pipeline.results(pipeline.tests[0])


def rows(pipeline: Pipeline) -> dict[str, Row]:
    return {row.method: row for row in results(pipeline).rows}


def files(run: Path, *kinds: str) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for kind in kinds
        for path in (run / kind).rglob("*")
        if path.is_file()
    }


def test_rivals_follow_greedy_and_rankers_are_among_the_controls(make: Make, fakes: ModuleType) -> None:
    pipeline = make()
    pipeline.execute(WORK)
    remarks = {state.path: state.remark for state in inspect(pipeline.run)}
    assert remarks["rewards/test.sample/goodness"] == "a baseline's scores"
    assert remarks["rewards/test.few_shot/passes"].startswith("mean reward")
    table = rows(pipeline)
    assert list(table) == [
        *("pass@1", "greedy", FEW_SHOT, "longest (tokens)", "shortest (tokens)", GOODNESS),
        *("Q-probe L_PG", "skyline pass@4"),
    ]
    # The candidate that is best by its own number passes wherever one does.
    assert table[GOODNESS].value == table["skyline pass@4"].value
    assert table[GOODNESS].auc == 1
    assert table[GOODNESS].samples_per_prompt == 4
    answers = store.found_table(pipeline.run / "completions" / "test.few_shot", store.COMPLETIONS).read().to_pylist()
    earned = [fakes.passes(row["task_id"], row["completion"]) for row in answers]
    assert len(earned) == 8
    assert table[FEW_SHOT].value == np.mean(earned)
    assert table[FEW_SHOT].samples_per_prompt == 1
    prompts = store.found_table(pipeline.run / "prompts" / "test.few_shot", store.PROMPTS).read()["prompt"].to_pylist()
    for prompt in prompts:
        *shots, asked = prompt.split("\n\n")
        assert [asked.startswith("task 10"), len(shots)] == [True, 2]
        for shot in shots:
            task, _, completion = shot.partition(": ")
            assert fakes.passes(task.replace("task ", "t-"), completion)
            assert int(task.removeprefix("task ")) < 12


def test_what_was_not_run_is_a_row_that_says_so_until_it_is_run(make: Make) -> None:
    make().execute([name for name in WORK if name != "baselines"])
    assert rows(make())[FEW_SHOT] == Row(method=FEW_SHOT)
    assert rows(make())[GOODNESS].value is None
    later = make()
    later.execute(["baselines"])
    with pytest.raises(FileNotFoundError, match="evaluate"):
        results(later)
    later.execute(["evaluate"])
    assert rows(later)[FEW_SHOT].value is not None
    assert rows(later)[GOODNESS].value is not None
    next((later.run / "rewards" / "test.sample" / "goodness").glob("part-*")).unlink()
    torn = make()
    torn.execute(["evaluate"])
    assert rows(torn)[FEW_SHOT].value is not None
    assert rows(torn)[GOODNESS] == Row(method=GOODNESS)  # not all candidates are scored


def test_probes_and_their_rows_are_the_same_with_and_without_baselines(make: Make, tmp_path: Path) -> None:
    bare = make(run=tmp_path / "bare", baselines=())
    bare.execute(WORK)
    assert not (bare.run / "baselines").exists()
    full = make(run=tmp_path / "full")
    full.execute(WORK)
    # A ranker is one more control to be compared with.
    apart = {"over_control": None, "over_control_low": None, "over_control_high": None}
    without = {
        name: dataclasses.replace(row, **apart) for name, row in rows(full).items() if name not in (FEW_SHOT, GOODNESS)
    }
    assert without == {name: dataclasses.replace(row, **apart) for name, row in rows(bare).items()}
    probes = {path.relative_to(bare.run): content for path, (_, content) in files(bare.run, "probes").items()}
    assert probes == {path.relative_to(full.run): content for path, (_, content) in files(full.run, "probes").items()}


def test_a_second_run_trains_draws_and_scores_nothing(make: Make, fakes: ModuleType) -> None:
    make().execute(WORK)
    run = make().run
    before = files(run, "baselines", "prompts", "completions", "rewards", "results")
    again = make()
    again.execute(WORK)
    few, ranker = again.baselines
    assert isinstance(few, FewShot)
    assert isinstance(ranker, fakes.Ranker)
    assert (ranker.trained, ranker.calls, ranker.checked) == (0, [], 1)  # type: ignore[attr-defined]
    assert few.sampler.calls == []  # type: ignore[attr-defined]
    assert files(run, "baselines", "prompts", "completions", "rewards", "results") == before


def test_a_killed_baseline_goes_on_where_it_was(make: Make, fakes: ModuleType, tmp_path: Path) -> None:
    whole = make(run=tmp_path / "whole")
    whole.execute(WORK)
    greedy = fakes.Sampler(1, temperature=0.0)
    few = FewShot(greedy, FewShotSettings(shots=2), lambda: None)
    torn = make(baselines=[few, fakes.Ranker(fails=True)])
    with pytest.raises(RuntimeError, match="out of memory"):
        torn.execute(WORK)
    assert (torn.run / "baselines" / "goodness" / "weight").exists()  # and yet it was not trained
    done = files(torn.run, "baselines/few_shot", "completions/test.few_shot", "rewards/test.few_shot")
    scoring = make()
    (torn.run / "rewards" / "test.few_shot" / "passes").joinpath("manifest.json").unlink(missing_ok=False)
    for path in (torn.run / "rewards" / "test.few_shot").rglob("part-*"):
        path.unlink()
    scoring.execute(WORK)
    assert scoring.baselines[1].trained == 1  # type: ignore[attr-defined]
    assert results(scoring) == results(whole)
    kept = files(torn.run, "baselines/few_shot", "completions/test.few_shot")
    assert all(done[path] == value for path, value in kept.items())


def test_without_a_training_split_only_what_is_not_trained_has_a_row(make: Make, fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="few_shot, goodness need a training split"):
        make(training_split=None)
    crossed = make(training_split=None, baselines=[fakes.Ranker(trains=False)])
    crossed.execute(WORK)
    assert rows(crossed)[GOODNESS].auc == 1
    assert not (crossed.run / "baselines").exists()


def test_what_cannot_be_is_refused(make: Make, fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="goodness, goodness"):
        make(baselines=[fakes.Ranker(), fakes.Ranker()])
    make().execute(["sample"])
    with pytest.raises(StoreError, match=r"reward is missing 48 of 48 rows of training\.sample"):
        make().execute(["baselines"])
    next((make().run / "completions" / "test.sample").glob("part-*")).unlink()
    with pytest.raises(StoreError, match=r"sample is missing \d+ of 32 rows of test\.sample"):
        make(baselines=[fakes.Ranker(trains=False)]).execute(["baselines"])
    make().execute(WORK)
    greedy = fakes.Sampler(1, temperature=0.0)
    other = make(baselines=[FewShot(greedy, FewShotSettings(shots=3), lambda: None)])
    with pytest.raises(StoreError, match="shots was 2, now 3"):
        other.execute(["sample", "baselines"])
    assert other.sampler.calls == []  # type: ignore[attr-defined]
