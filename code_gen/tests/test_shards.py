"""Shards as submitit's local jobs, by the command of SCALING.md; one is killed and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qprobe import store


def command(tiny: list[str], folder: Path, *more: str) -> list[str]:
    own = ["experiment=demo", "limit=10", "sampler.n=2", "sampler.max_new_tokens=20", "sampler.batch_rows=2"]
    return [sys.executable, "-m", "qprobe_code_gen", *more, *own, *tiny, f"paths.runs={folder}"]


def jobs() -> dict[int, str]:
    """Processes that submitit has started for this test."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if "submitit.core._submit" in line:
                found[int(entry.name)] = line
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the jobs' processes in /proc")
def test_four_shards_of_which_one_is_killed_and_run_again_make_every_row_once(
    tiny_words: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `slurm` is not installed")
    shards = command(
        tiny_words,
        tmp_path,
        *("--multirun", "hydra/launcher=submitit_local", "shard=1/4,2/4,3/4,4/4"),
        f"hydra.sweep.dir={tmp_path / 'jobs'}",
    )
    run = tmp_path / "demo-limit10"
    with subprocess.Popen(shards, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        deadline = time.monotonic() + 240
        while not list(run.glob("completions/*/part-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        mine = [pid for pid, line in jobs().items() if str(tmp_path) in line]
        assert mine
        os.kill(mine[0], signal.SIGKILL)
        launcher.communicate(timeout=240)
    assert launcher.returncode != 0  # the launcher says that a job was lost
    parts = len(list(run.rglob("part-*.parquet")))
    again = subprocess.run(shards, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not (run / "probes").exists()
    assert len(list(run.rglob("part-*.parquet"))) > parts
    last = subprocess.run(
        command(tiny_words, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert last.returncode == 0, last.stderr[-3000:]
    assert "sample sample" not in last.stderr  # nothing was left to sample
    for pool, rows in (("humaneval.sample", 20), ("humaneval.greedy", 10)):
        table = store.found_table(run / "completions" / pool, store.COMPLETIONS).read()
        keys = list(zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
        assert len(keys) == len(set(keys)) == rows
