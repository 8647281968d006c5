"""Whole pipelines on fakes, killed at random moments: they end as if undisturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qprobe import store
from qprobe.pipeline.steps import STAGES

# A process that has imported everything forks one child a run: a child is killed, and the next starts in milliseconds.
SERVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fakes
import qprobe.report.figures
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings

def work(run):
    print("pid", os.getpid(), flush=True)
    pipeline = Pipeline(
        run=run, title="Numbers", tests=[fakes.split("numbers", 30)], reward=fakes.Reward(seconds=0.01),
        sampler=fakes.Sampler(seconds=0.01), greedy=fakes.Sampler(1, temperature=0.0, seconds=0.01),
        embedder=fakes.Embedder((1, 2), seconds=0.01), batch_rows=4, progress=False,
        baselines=[fakes.Ranker(trains=False, seconds=0.01)],
        training=TrainingSettings(steps=150, learning_rate=0.05, minimum_mixed=2),
        settings=EvaluationSettings(seeds=2, folds=3, draws=50, bootstrap=2000),
    )
    for stage in STAGES:
        print("begins", stage, flush=True)
        pipeline.execute([stage])
    print("finished", flush=True)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(Path(line.strip()))
        os._exit(0)
    print("gone", os.waitpid(child, 0)[1], flush=True)
"""


class Server:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        return line.split()

    def start(self, run: Path) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{run}\n")
        self.process.stdin.flush()
        return int(self.line()[1])

    def finish(self, run: Path) -> dict[str, float]:
        """Run to the end; seconds of each stage."""
        self.start(run)
        marks = []
        while (line := self.line())[0] != "gone":
            marks.append((line[-1], time.monotonic()))
        assert line[1] == "0"
        return {name: after - start for (name, start), (_, after) in pairwise(marks)}

    def kill(self, run: Path, stage: str, after: float) -> bool:
        """Kill a run some seconds after a stage began; whether it was in that stage still."""
        child = self.start(run)
        while self.line() != ["begins", stage]:
            pass
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        line = self.line()
        landed = line == ["gone", str(signal.SIGKILL.value)]
        while line[0] != "gone":
            line = self.line()
        return landed


@contextmanager
def server() -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        started = Server(process)
        assert started.line() == ["ready"]
        yield started
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs that are killed are forked")
def test_killed_at_random_moments_of_every_stage_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    lot = random.Random(0)
    landed = dict.fromkeys(STAGES, 0)
    with server() as running:
        seconds = running.finish(whole)
        for stage in STAGES:
            for _ in range(20):
                # What a killed run had done stays done: several kills share one stage.
                landed[stage] += running.kill(killed, stage, lot.uniform(0, 0.3) * seconds[stage])
                if landed[stage] == 4:
                    break
        running.finish(killed)
    assert min(landed.values()) >= 3, landed
    for kind in ("tables", "results", "figures", "probes"):
        files = sorted(path.relative_to(whole) for path in (whole / kind).rglob("*") if path.is_file())
        assert files
        for file in files:
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    manifests = sorted(path.parent.relative_to(whole) for path in whole.rglob("manifest.json"))
    assert (
        len(manifests) == 8
    )  # prompts; completions and rewards of two pools; a ranker's scores; features of two layers
    for folder in manifests:
        parts = [sorted(path.name for path in (run / folder).glob("*")) for run in (whole, killed)]
        assert parts[0] == parts[1]  # none more, none less, nothing half written
        for name in parts[0]:
            if name != "manifest.json":
                assert (killed / folder / name).read_bytes() == (whole / folder / name).read_bytes()
        found = store.found_table(killed / folder).folder
        if "prompts" not in folder.parts:
            tables = [pq.read_table(part, partitioning=None) for part in sorted(found.glob("*.parquet"))]
            keys = [key for t in tables for key in zip(t["task_id"].to_pylist(), t["sample"].to_pylist(), strict=True)]
            samples = 1 if "numbers.greedy" in folder.parts else 4
            assert sorted(keys) == [(f"t-{number:03d}", sample) for number in range(30) for sample in range(samples)]
