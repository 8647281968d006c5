"""kill -9 in any stage, then the same command: the final tables of an undisturbed run, no row twice, none lost."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qprobe.pipeline.steps import STAGES

KILLS = 3
OUTPUTS = {
    "sample": ("prompts", "completions"),
    "reward": ("rewards",),
    "embed": ("features",),
    "baselines": ("rewards/humaneval.sample/self_consistency",),
    "train": ("probes",),
    "evaluate": ("results",),
    "report": ("tables", "figures"),
}


def command(tiny: list[str], run: Path, stage: str) -> list[str]:
    own = ["experiment=demo", "limit=40", "sampler.n=4", "sampler.max_new_tokens=12", "sampler.batch_rows=16"]
    # Long enough to be killed in.
    later = ["embedder.layers=[2,3]", "probe.steps=400", "evaluation.seeds=5", "evaluation.bootstrap=10000"]
    later += ["baselines.names=[self_consistency]"]
    return [sys.executable, "-m", "qprobe_code_gen", *own, *tiny, *later, f"paths.run={run}", f"stages=[{stage}]"]


def keys(run: Path, table: str) -> list[tuple[str, int]]:
    parts = sorted((run / table).glob("*.parquet"))
    rows = [
        row
        for part in parts
        for row in pq.read_table(part, partitioning=None).select(["task_id", "sample"]).to_pylist()
    ]
    return sorted((row["task_id"], row["sample"]) for row in rows)


@pytest.mark.slow
def test_three_random_kills_in_every_stage_leave_the_tables_of_an_undisturbed_run(
    tiny_words: list[str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = {}
    for stage in STAGES:
        start = time.monotonic()
        subprocess.run(command(tiny_words, whole, stage), check=True, capture_output=True)
        seconds[stage] = time.monotonic() - start
    lot = random.Random(0)
    for stage in STAGES:
        landed = 0
        for _ in range(4 * KILLS):
            if landed == KILLS:
                break
            start = time.monotonic()
            process = subprocess.Popen(
                command(tiny_words, killed, stage), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                # The first half of the time is imports; the work lies behind it.
                process.wait(lot.uniform(0.5, 0.95) * seconds[stage])
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                landed += 1
            else:
                # It was too fast to be killed: its work is undone, and the next blow comes sooner.
                seconds[stage] = time.monotonic() - start
                for made in OUTPUTS[stage]:
                    shutil.rmtree(killed.with_name("killed-limit40") / made, ignore_errors=True)
        assert landed == KILLS, stage
        subprocess.run(command(tiny_words, killed, stage), check=True, capture_output=True)
    whole, killed = whole.with_name("whole-limit40"), killed.with_name("killed-limit40")
    tables = sorted(path.name for path in (whole / "tables").iterdir())
    assert tables == ["humaneval.csv", "humaneval.md", "humaneval.tex", "humaneval.txt"]
    for name in tables:
        assert (killed / "tables" / name).read_text() == (whole / "tables" / name).read_text()
    for table in (
        "completions/humaneval.sample",
        "rewards/humaneval.sample/unit_tests",
        "completions/humaneval.greedy",
    ):
        found = keys(killed, table)
        assert len(set(found)) == len(found)
        assert found == keys(whole, table)
    for layer in sorted((whole / "features").rglob("layer=*")):
        relative = str(layer.relative_to(whole))
        assert keys(killed, relative) == keys(whole, relative)
    for table in ("completions", "rewards", "features"):
        assert not list((killed / table).rglob("*.tmp"))
