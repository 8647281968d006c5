"""The benchmarks run, shrunk: they are started by hand, and nothing else would tell that they no longer fit the code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    """The figures and the sentence of a benchmark; whether its goal is met says nothing at this size."""
    child = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, capture_output=True, text=True)
    assert child.returncode in (0, 1), child.stderr
    *figures, sentence = child.stdout.strip().splitlines()
    return json.loads("\n".join(figures)), sentence


@pytest.mark.slow
def test_training() -> None:
    small = ("--prompts=60", "--samples=20", "--dimension=64", "--seeds=2", "--epochs=1")
    figures, sentence = run("training.py", *small)
    assert (figures["probes"], figures["rows"]) == (6, 1200)
    # No bound on a time: in so few steps noise decides, even the sign of a difference.
    assert set(figures["times one by one"]) == {"time", "processor time"}
    assert "extrapolated" in sentence


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the Linux kernel")
def test_scale(tmp_path: Path) -> None:
    small = ("scale.py", "--shrink=50", "--seeds=2", f"--folder={tmp_path}")
    figures, sentence = run(*small)
    assert figures["rows"] == {"train": 2000, "mbpp": 2000, "humaneval": 800}
    assert 0.1 < figures["peak RssAnon GiB"] < figures["peak RSS GiB"] < 3
    assert "goal 6" in sentence
    again, _ = run(*small)  # the tables stay, the probes are trained again
    assert again["seconds of writing the tables"] < figures["seconds of writing the tables"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks the Linux kernel")
def test_serving() -> None:
    figures, _ = run("serving.py", "--seconds=6", "--clients=4", "--k=2", "--tokens=4")
    assert figures["errors"] == []
    equal, compared = figures["replies equal"]
    assert equal == compared > 0


@pytest.mark.slow
def test_solvers() -> None:
    figures, sentence = run("solvers.py", "--prompts=40", "--samples=4", "--columns=30", "--peer-columns=30")
    assert (figures["rows"], figures["columns"]) == (160, 90)
    for loss in ("reward_mse", "centred_mse"):
        assert figures[loss]["left-out scores against float64, over their deviation"] < 1e-3
    assert figures["scikit-learn"]["RidgeCV over ours"] > 0
    assert "10 s for one weighting" in sentence
