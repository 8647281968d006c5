"""Several runs by one command: each has its own tables, what they share is made once, one table shows all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from qprobe import store
from qprobe.cli import composition, main, multirun
from qprobe.models.language_model import ModelSpec
from qprobe.report.results import Results
from qprobe.settings import UsageError
from qprobe.store import sharing

pytestmark = pytest.mark.usefixtures("plain_figures")


@pytest.fixture
def words(tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": f"Say {p}.", "completion": f"{p} and {s}", "reward": (p + s) % 2} for p in range(6) for s in range(3)
    ]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    quick = ["evaluation.seeds=1", "evaluation.folds=2", "evaluation.bootstrap=100", "probe.steps=3"]
    model = [f"model.name={tiny_model.name}", "model.dtype=float32", "model.device=cpu", "embedder.layers=[1,2]"]
    stages = "stages=[sample,reward,embed,train,evaluate]"
    return ["import", "mine.jsonl", "--run", "runs/mine", "-m", *model, *quick, stages]


def test_each_job_has_its_own_tables_and_one_shows_all(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*words, "layer=1,2", "evaluation.losses=[reward_mse]"]) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in Path().iterdir()) == ["mine.jsonl", "runs"]
    jobs = {1: Path("runs/mine-multirun/layer=1"), 2: Path("runs/mine-multirun/layer=2")}
    found = {layer: Results.read(folder / "results/prompts.json") for layer, folder in jobs.items()}
    assert found[1].made_from != found[2].made_from
    with Path("runs/mine-multirun/tables/multirun.csv").open() as file:
        table = list(csv.DictReader(file))
    expected = [
        (f"layer={layer}", row.method, "" if row.value is None else str(row.value))
        for layer, results in found.items()
        for row in results.rows
    ]
    assert [(row["job"], row["method"], row["reward"]) for row in table] == expected
    assert "runs/mine-multirun/tables" in said.out
    assert said.out.count("Q-probe L_Q") >= 2
    # What they share was made once: the second job's parts are the first's.
    for kind in ("completions", "rewards", "features"):
        parts = {layer: list((folder / kind).rglob("part-*")) for layer, folder in jobs.items()}
        assert len(parts[1]) == len(parts[2]) > 0
        assert {part.stat().st_ino for part in parts[1]} == {part.stat().st_ino for part in parts[2]}
    assert said.err.count("embed sample: 100%") == 1


def test_tables_of_other_inputs_are_made_anew_and_the_rest_is_shared(words: list[str]) -> None:
    assert main.main([*words, "seed=0,1", "evaluation.losses=[reward_mse]"]) == 0
    assert main.main([*words, "sampler.batch_rows=3,6", "evaluation.losses=[reward_mse]"]) == 0
    three, six = (Path(f"runs/mine-multirun/sampler.batch_rows={n}") for n in (3, 6))
    numbers = [len(list(folder.glob("features/*/*/layer=01/part-*"))) for folder in (three, six)]
    assert numbers[0] > numbers[1] > 0  # other batches: other tables, none taken
    rewards = [
        store.found_table(folder / "rewards/prompts.sample/imported", store.REWARDS).read() for folder in (three, six)
    ]
    assert sorted(rewards[0]["reward"].to_pylist()) == sorted(rewards[1]["reward"].to_pylist())


def test_what_a_run_has_already_is_taken(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    single = [word for word in words if word != "-m"]
    assert main.main([*single, "evaluation.losses=[reward_mse]"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/mine").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main.main([*words, "probe.learning_rate=1e-3,1e-2", "evaluation.losses=[reward_mse]"]) == 0
    assert "embed sample:" not in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_job_that_fails_is_said_and_the_others_go_on(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*words, "evaluation.k=2,9", "evaluation.losses=[reward_mse]"]) == 1
    said = capsys.readouterr()
    assert "qprobe: 1 of 2 jobs failed: evaluation.k=9." in said.err
    assert [path.name for path in sorted(Path("runs/mine-multirun").iterdir())] == ["evaluation.k=2"]


def test_a_value_that_cannot_be_is_said_before_any_job(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for word, status in (("probe.learning_rate=1e-3,fast", 1), ("probe=linear,lineer", 2), ("speed=1,2", 2)):
        assert main.main([*words, word]) == status
        assert not Path("runs").exists()
    assert "did you mean" in capsys.readouterr().err


def jobs(*words: str, folder: str = "runs/a") -> list[multirun.Job]:
    def compose(said: Any) -> dict[str, Any]:
        config = composition.composed("run", [word for word in said if not word.startswith("+name=")])
        name = next((word[6:] for word in said if word.startswith("+name=")), None)
        return {**config, "paths": {"run": folder if name is None else f"runs/{name}"}}

    return multirun.plan(words, compose, lambda config: Path(config["paths"]["run"]), lambda config: None)


def test_every_combination_is_a_job_with_a_folder_of_its_own() -> None:
    made = jobs("seed=0,1", "probe.steps=3,5", "sampler.n=4")
    assert [job.label for job in made] == [f"seed={s}, probe.steps={n}" for s in (0, 1) for n in (3, 5)]
    assert len({job.folder for job in made}) == 4
    assert all(job.folder.parent == Path("runs/a-multirun") for job in made)


def test_names_of_folders_differ_where_labels_do_and_can_be_written() -> None:
    values = ["[a/b]", "[a_b]", "[" + "x" * 300 + "]", "[" + "x" * 301 + "]"]
    made = jobs(f"sampler.stop={','.join(values)}")
    assert len({job.folder for job in made}) == 4
    assert all(len(job.folder.name) < 200 and "/" not in job.folder.name for job in made)


def test_jobs_with_run_folders_of_their_own_keep_them() -> None:
    assert [job.folder for job in jobs("+name=x,y")] == [Path("runs/x"), Path("runs/y")]
    assert [job.run for job in jobs("+name=x,y")] == [None, None]


def test_shards_meet_in_one_run_folder() -> None:
    assert {job.folder for job in jobs("shard=1/2,2/2")} == {Path("runs/a")}
    made = jobs("shard=1/2,2/2", "seed=0,1")
    assert len({job.folder for job in made}) == 2
    assert {job.label for job in made} == {"seed=0", "seed=1"}


def test_a_multirun_of_nothing_is_one_run() -> None:
    assert [job.folder for job in jobs("seed=3")] == [Path("runs/a")]
    with pytest.raises(UsageError, match="sed"):
        jobs("sed=0,1")


def test_parts_are_taken_from_tables_of_the_same_inputs_alone(tmp_path: Path) -> None:
    for name, inputs in (("one", {"a": 1}), ("two", {"a": 2})):
        table = store.open_table(tmp_path / name, "completions", "p", inputs=inputs)
        table.begin()
        (table.folder / "part-x.parquet").write_text(name)
    sharing.share(tmp_path / "three", [tmp_path / "none", tmp_path / "one", tmp_path / "two"])
    taken = store.open_table(tmp_path / "three", "completions", "p", inputs={"a": 2})
    assert [path.read_text() for path in taken.parts()] == ["two"]
    assert json.loads((taken.folder / "manifest.json").read_text())["inputs"] == {"a": 2}
    assert not store.open_table(tmp_path / "three", "completions", "q", inputs={"a": 2}).parts()
