"""A finished run read from its folder alone: the scores are those of the results, and what is not finished is said."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe.cli import main
from qprobe.evaluation import candidates
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.report.explored import Explored
from qprobe.run.pools import Split
from qprobe.store.table import StoreError

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """Pipelines of 4 samples a prompt, evaluated."""

    def made(tests: list[Split], training_split: Split | None = None) -> Pipeline:
        pipeline = Pipeline(
            run=tmp_path / "run",
            title="Numbers",
            tests=tests,
            training_split=training_split,
            reward=fakes.Reward(),
            sampler=fakes.Sampler(),
            greedy=None,
            embedder=fakes.Embedder((1, 2)),
            layer=1,
            training=TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5),
            settings=EvaluationSettings(losses=("reward_mse", "policy_gradient"), seeds=2, folds=3, bootstrap=100),
            batch_rows=12,
            progress=False,
        )
        pipeline.execute(("sample", "reward", "embed", "train", "evaluate"))
        return pipeline

    return made


def assert_earns_what_the_table_says(split: Explored) -> None:
    """With as many candidates as samples the softmax has a closed form, which the table's row is the mean of."""
    rows = {row.method: row.value for row in split.results.rows}
    for loss, symbol in (("reward_mse", "L_Q"), ("policy_gradient", "L_PG")):
        earned = [float(prompt.probability[loss] @ prompt.rewards) for prompt in split.prompts]
        assert np.mean(earned) == pytest.approx(rows[f"Q-probe {symbol}"], abs=1e-6)
    assert np.mean([prompt.rewards.mean() for prompt in split.prompts]) == pytest.approx(rows["pass@1"])


def test_a_cross_validated_run(make: Make, fakes: ModuleType) -> None:
    pipeline = make([fakes.split("numbers", 12)])
    (split,) = candidates.read(pipeline.run)
    assert_earns_what_the_table_says(split)
    assert [prompt.task_id for prompt in split.prompts] == [f"t-{number:03d}" for number in range(12)]
    for prompt in split.prompts:
        assert prompt.prompt == f"task {prompt.task_id[2:]}: "
        assert prompt.rewards.tolist() == [fakes.passes(prompt.task_id, text) for text in prompt.completions]
        assert prompt.verdicts == ["passed" if reward else "failed" for reward in prompt.rewards]


def test_a_run_that_was_trained_on_one_set_and_tested_on_others(make: Make, fakes: ModuleType) -> None:
    tests = [fakes.split("first", 8, 100), fakes.split("second", 5, 200)]
    first, second = candidates.read(make(tests, fakes.split("training", 12)).run)
    assert (first.results.pool, second.results.pool) == ("first", "second")
    assert (len(first.prompts), len(second.prompts)) == (8, 5)
    assert_earns_what_the_table_says(first)
    assert_earns_what_the_table_says(second)


def test_results_of_other_candidates_are_refused(make: Make, fakes: ModuleType) -> None:
    run = make([fakes.split("numbers", 12)]).run
    path = run / "results" / "numbers.json"
    results: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(results | {"made_from": "something else"}))
    with pytest.raises(StoreError, match=r"numbers\.json"):
        candidates.read(run)


def test_candidates_that_are_lost_or_damaged_are_said_and_made_again(make: Make, fakes: ModuleType) -> None:
    pipeline = make([fakes.split("numbers", 12)])
    path = candidates.path_of(pipeline.run / "results" / "numbers.json")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"numbers\.candidates\.parquet"):
        candidates.read(pipeline.run)
    path.unlink()
    with pytest.raises(StoreError, match="evaluate"):
        candidates.read(pipeline.run)
    pipeline.execute(["evaluate"])
    assert path.read_bytes() == whole


def test_the_command(make: Make, fakes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make([fakes.split("numbers", 12)]).run
    assert main.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'} (")
    assert "<h1>Numbers</h1>" in (run / "report.html").read_text()
    (run / "results" / "numbers.json").unlink()
    assert main.main(["report", str(run)]) == 1
    assert f"{run} has not been evaluated yet: run the stage evaluate first" in capsys.readouterr().err
    assert main.main(["report", str(tmp_path / "none")]) == 1
    assert f"There is no run {tmp_path / 'none'}: give the folder" in capsys.readouterr().err
