"""The Makefile: every experiment of both halves is a target, `make` alone lists all, a misspelt one is told from those."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {
    path.stem: command
    for command, package in (("code-gen", "code_gen"), ("preference", "preference"))
    for path in (ROOT / package / f"qprobe_{package}" / "conf" / "experiment").glob("*.yaml")
}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_experiment_is_a_target_and_listed() -> None:
    names = sorted(set(EXPERIMENTS) - {"demo"})  # whose target runs a recorded run first
    commands = [line for line in make("-n", *names, "ARGS=seed=3").stdout.splitlines() if "experiment=" in line]
    found = {tuple(line.rpartition("/qprobe-")[2].split()) for line in commands}
    assert found == {(EXPERIMENTS[name], f"experiment={name}", "seed=3") for name in names}
    listed = make().stdout.splitlines()
    assert all(sum(line.startswith(f"  make {name} ") for line in listed) == 1 for name in EXPERIMENTS)


def test_a_misspelt_target_is_told_from_its_neighbours() -> None:
    done = make("tabel1")
    assert done.returncode != 0
    assert "did you mean table1" in done.stderr
