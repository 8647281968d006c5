"""Stages on Ray: the same tables as the local runner's, also when a worker is killed in the middle."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline import ray_cluster
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings
from qprobe.run.runners.ray import Step, run_steps

ONE = {"workers": 1, "cpus": 1.0, "gpus": 0.0}
TWO = {"workers": 2, "cpus": 1.0, "gpus": 0.0}


def make(folder: str, run: Path, seconds: float = 0.0, seen: Path | None = None) -> Pipeline:
    """The pipeline of numbers; an actor finds the fakes by their folder.

    Args:
        seconds: that sampling a batch takes.
        seen: a folder for what the actors do: a file `reward-PID` or `embed-PID` where one works on a batch, which then takes
            half a second; `held-PID` and `given-back-PID` where a sampler takes and gives back its engine, a letter each time.
    """
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    import fakes  # type: ignore[import-not-found]

    def note(what: str) -> None:
        if seen is not None:
            with (seen / f"{what}-{os.getpid()}").open("a") as file:
                file.write("x")
            time.sleep(0.5 if what in ("reward", "embed") else 0)

    class Reward(fakes.Reward):  # type: ignore[misc, name-defined]
        def rows(self, batch: Any) -> Any:
            note("reward")
            return super().rows(batch)

    class Embedder(fakes.Embedder):  # type: ignore[misc, name-defined]
        def embed(self, *given: Any) -> Any:
            note("embed")
            return super().embed(*given)

    class Sampler(fakes.Sampler):  # type: ignore[misc, name-defined]
        held = False

        def check(self) -> None:
            pass

        def sample(self, *given: Any) -> Any:
            if not self.held:
                note("held")
            self.held = True
            return super().sample(*given)

        def close(self) -> None:
            note("given-back")
            self.held = False

    return Pipeline(
        run=run,
        title="Numbers",
        tests=[fakes.split("numbers", 24)],
        reward=Reward(),
        sampler=Sampler(seconds=seconds),
        greedy=fakes.Sampler(1, temperature=0.0),
        embedder=Embedder(),
        training=TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5),
        settings=EvaluationSettings(seeds=2, folds=3, draws=5, bootstrap=100),
        batch_rows=8,
        progress=False,
    )


def kill_a_worker(run: Path, killed: list[int]) -> None:
    """Wait until the run is under way, then kill an actor that has a batch in work."""
    deadline = time.monotonic() + 120
    while len(list(run.glob("completions/*/part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for line in subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, _, name = line.strip().partition(" ")
        if name.startswith("ray::MapWorker") and ".submit" in name:
            os.kill(int(pid), signal.SIGKILL)
            killed.append(int(pid))
            return


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_costs_its_batch_and_the_tables_are_the_local_runners(six_cpus: Any, tmp_path: Path) -> None:
    folder = str(Path(__file__).parent)
    local = make(folder, tmp_path / "local")
    local.execute()
    run, killed = tmp_path / "ray", []  # type: tuple[Path, list[int]]
    killer = threading.Thread(target=kill_a_worker, args=(run, killed))
    killer.start()
    make_slow = functools.partial(make, folder, run, 0.5)
    pipeline = ray_cluster.execute(make_slow, STAGES, {"address": None, "sample": TWO, "reward": TWO, "embed": ONE})
    killer.join()
    assert len(killed) == 1
    assert ray_cluster.batches_left(pipeline, STAGES) == []
    assert sum(pipeline.sampler.calls) == 0  # type: ignore[attr-defined] - the actors did it all
    for table in (local.run / "tables").iterdir():
        assert (run / "tables" / table.name).read_bytes() == table.read_bytes()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["reward", "embed"])
def test_a_worker_killed_while_it_rewards_or_embeds_changes_no_table(six_cpus: Any, tmp_path: Path, stage: str) -> None:
    folder, seen = str(Path(__file__).parent), tmp_path / "seen"
    seen.mkdir()
    local, run = make(folder, tmp_path / "local"), tmp_path / "ray"
    local.execute()
    make(folder, run).execute(["sample"])
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            killed.extend(int(path.name.partition("-")[2]) for path in list(seen.glob(f"{stage}-*"))[:1])
            time.sleep(0.05)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    names = ["reward", "embed", "train", "evaluate", "report"]
    make_seen = functools.partial(make, folder, run, 0.0, seen)
    ray_cluster.execute(make_seen, names, {"address": None, "sample": ONE, "reward": TWO, "embed": TWO})
    killer.join()
    workers = {path.name for path in seen.glob(f"{stage}-*")}
    assert f"{stage}-{killed[0]}" in workers
    assert len(workers) >= 2
    for table in (local.run / "tables").iterdir():
        assert (run / "tables" / table.name).read_bytes() == table.read_bytes()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_actor_keeps_its_engine_from_batch_to_batch_and_gives_it_back_at_its_end(
    six_cpus: Any, tmp_path: Path
) -> None:
    folder, seen, run = str(Path(__file__).parent), tmp_path / "seen", tmp_path / "run"
    seen.mkdir()
    make_seen = functools.partial(make, folder, run, 0.1, seen)
    ray_cluster.execute(make_seen, ["sample"], {"address": None, "sample": TWO, "reward": ONE, "embed": ONE})
    assert len(list(run.glob("completions/numbers.sample/part-*"))) == 12
    held = {path.name.partition("-")[2]: path.read_text() for path in seen.glob("held-*")}
    assert held
    assert set(held.values()) == {"x"}
    end = time.monotonic() + 20
    while len(list(seen.glob("given-back-*"))) < len(held) and time.monotonic() < end:
        time.sleep(0.1)
    assert {path.name.rpartition("-")[2] for path in seen.glob("given-back-*")} >= set(held)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_step_that_fails_and_one_that_finds_no_room_are_sentences(six_cpus: Any) -> None:
    with pytest.raises(RuntimeError, match="cpus"):
        run_steps([1], [Step("sample", fail, workers=6)], progress=False)
    with pytest.raises(RuntimeError, match="gpus"):
        run_steps([1], [Step("sample", fail, gpus=1.0)], progress=False)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run_steps([1], [Step("sample", fail)], progress=False)


def fail() -> Any:
    def work(item: Any) -> None:
        raise OSError(f"item {item}: the disk is full.")

    return work


def test_a_shard_on_ray_is_refused_before_any_work(tmp_path: Path) -> None:
    def sharded() -> Pipeline:
        return dataclasses.replace(make(str(Path(__file__).parent), tmp_path / "run"), shard=(1, 2))

    with pytest.raises(ValueError, match="runner"):
        ray_cluster.execute(sharded, STAGES, {"address": None, "sample": ONE, "reward": ONE, "embed": ONE})
    assert not (tmp_path / "run").exists()


def test_a_step_without_workers_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"runner\.sample"):
        Step("sample", fail, workers=0)
