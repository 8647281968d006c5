"""The demo's stages on Ray by the command's own words, a worker killed on the way: the tables of the local runner."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qprobe_code_gen.__main__ as command

AFTER = "stages=[reward,embed,train,evaluate,report]"


def kill_one(run: Path, table: str, killed: list[int]) -> None:
    """Wait for the first part of a table, then kill an actor that has a batch in work."""
    end = time.monotonic() + 120
    while not list(run.glob(f"{table}/**/part-*")) and time.monotonic() < end:
        time.sleep(0.01)
    while not killed and time.monotonic() < end:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if name.startswith("ray::MapWorker") and ".submit" in name and not killed:
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(int(entry.name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the actors in /proc")
def test_reward_and_embed_of_the_demo_on_two_workers_of_which_one_is_killed(
    six_cpus: Any, composed: Callable[..., dict[str, Any]], tiny_words: list[str], tmp_path: Path
) -> None:
    def run(folder: Path, *more: str) -> Path:
        """Eight problems, four completions each, a batch a problem."""
        own = ["experiment=demo", "limit=8", "sampler.n=4", "sampler.max_new_tokens=12", "sampler.batch_rows=4"]
        command.run(composed([*own, *tiny_words, f"paths.runs={folder}", *more]))
        return folder / "demo-limit8"

    local = run(tmp_path / "local", "stages=[sample]")
    shutil.copytree(local, tmp_path / "ray" / local.name)
    run(tmp_path / "local", AFTER)
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "ray" / local.name, "rewards", killed))
    killer.start()
    two = ("runner=ray", "runner.reward.workers=2", "runner.embed.workers=2", "sandbox.workers=1")
    by_ray = run(tmp_path / "ray", AFTER, *two)
    killer.join()
    assert len(killed) == 1
    tables = sorted(path.name for path in (local / "tables").iterdir())
    assert len(tables) == 4
    for name in tables:
        assert (by_ray / "tables" / name).read_bytes() == (local / "tables" / name).read_bytes()
    for table in ("rewards", "features"):
        parts = sorted(path.relative_to(local) for path in (local / table).rglob("part-*"))
        assert parts == sorted(path.relative_to(by_ray) for path in (by_ray / table).rglob("part-*"))
    assert not list(by_ray.rglob("*.tmp"))
