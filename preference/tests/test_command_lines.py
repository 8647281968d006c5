"""What the command `qprobe-preference` says to words that are right, misspelt or missing, from another folder.

What the commands share is tested with the other two (shared/tests, code_gen/tests).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qprobe_preference.__main__ as command
from qprobe.cli import configuration

NAME = "qprobe-preference"
# The command line, its status, and what the first or last line that it prints must hold.
LINES = [
    ("", 2, f"usage: {NAME}"),
    ("--help", 0, f"usage: {NAME}"),
    ("experiment=trl --help", 0, f"usage: {NAME}"),
    ("--version", 0, f"{NAME} 0."),
    ("experiment=tlr", 2, "did you mean trl?"),
    ("seed=3", 2, "Say experiment=NAME: one of"),
    ("experiment=trl samplr.n=3", 2, "did you mean sampler.n?"),
    ("experiment=trl model=hubb", 2, "did you mean hub?"),
    ("experiment=trl seed=0,1", 2, "--multirun"),
    ("experiment=trl +speed=3", 1, "has no key speed"),
    ("experiment=trl sampler.n=many", 1, "sampler.n is 'many'"),
    ("-m experiment=trl,tlr", 2, "did you mean trl?"),
    ("--completion bash", 0, f"complete -F _qprobe_preference {NAME}"),
]


@pytest.mark.parametrize(("line", "status", "said"), LINES, ids=[line for line, *_ in LINES])
def test_every_command_line_ends_in_its_status_and_a_line_that_helps(
    line: str, status: int, said: str, ends: Callable[..., str]
) -> None:
    ends(command.main, line, status, said)


def test_help_lists_every_experiment_and_group_and_examples(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"\n  {NAME} ") >= 3
    for folder in (conf, Path(configuration.__file__).parent / "conf"):
        for path in folder.glob("*/*.yaml"):
            first = next(x for x in path.read_text().splitlines() if x.startswith("#") and "@package" not in x)
            assert f"  {path.stem:<22} {first[2:]}\n" in text
            assert path.parent.name == "experiment" or f"\n {path.parent.name}\n" in text


def test_the_module_is_the_command(tmp_path: Path) -> None:
    words = ["experiment=trl", f"paths.runs={tmp_path}", "stages=[none]", "sampler.n=many"]
    run = subprocess.run(
        [sys.executable, "-m", "qprobe_preference", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
