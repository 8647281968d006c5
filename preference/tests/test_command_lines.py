"""What the command `qprobe-preference` says to words that are right, misspelt or missing, from another folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qprobe_preference
import qprobe_preference.__main__ as command
from qprobe.cli import configuration

NAME = "qprobe-preference"
# The command line, its status, and what the first or last line that it prints must hold.
LINES = [
    ("", 2, f"usage: {NAME}"),
    ("--help", 0, f"usage: {NAME}"),
    ("-h", 0, f"usage: {NAME}"),
    ("experiment=trl --help", 0, f"usage: {NAME}"),
    ("--version", 0, f"{NAME} 0."),
    ("experiment=tlr", 2, "did you mean trl?"),
    ("tlr", 2, "did you mean experiment=trl?"),
    ("experimnt=trl", 2, "experimnt=trl names no group or setting. Say experiment=NAME"),
    ("seed=3", 2, "Say experiment=NAME: one of"),
    ("experiment=trl samplr.n=3", 2, "did you mean sampler.n?"),
    ("experiment=trl temperature=1", 2, "did you mean sampler.temperature?"),
    ("experiment=trl modle=hub", 2, "did you mean model"),
    ("experiment=trl model=hubb", 2, "did you mean hub?"),
    ("experiment=trl seed", 2, "'seed' is no setting: write KEY=VALUE"),
    ("experiment=trl seed=0,1", 2, "--multirun"),
    ("experiment=trl sampler.stop=[", 2, "cannot be read"),
    ("experiment=trl +speed=3", 1, "has no key speed"),
    ("experiment=trl sampler.n=many", 1, "sampler.n is 'many'"),
    ("experiment=trl ~seed", 1, "seed"),
    ("experiment=trl --mutlirun", 2, "did you mean --multirun?"),
    ("-m experiment=trl,tlr", 2, "did you mean trl?"),
    ("-m experiment=trl sed=0,1", 2, "did you mean seed?"),
    ("--config-dir nowhere experiment=trl", 2, "There is no folder nowhere"),
    ("--config-dir", 2, "--config-dir names no folder"),
    ("--completion fish", 2, "say --completion bash or --completion zsh"),
    ("--completion bash", 0, f"complete -F _qprobe_preference {NAME}"),
    ("--completion zsh", 0, f"compdef _qprobe_preference {NAME}"),
]


@pytest.mark.parametrize(("line", "status", "said"), LINES, ids=[line for line, *_ in LINES])
def test_every_command_line_ends_in_its_status_and_a_line_that_helps(
    line: str, status: int, said: str, ends: Callable[..., str]
) -> None:
    ends(command.main, line, status, said)


def test_help_lists_every_experiment_and_group_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"\n  {NAME} ") >= 3
    for folder in (Path(qprobe_preference.__file__).parent, Path(configuration.__file__).parent):
        for path in (folder / "conf").glob("*/*.yaml"):
            first = next(x for x in path.read_text().splitlines() if x.startswith("#") and "@package" not in x)
            assert f"  {path.stem:<22} {first[2:]}\n" in text
            assert path.parent.name == "experiment" or f"\n {path.parent.name}\n" in text


def test_a_folder_of_ones_own_adds_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    own = (Path(qprobe_preference.__file__).parent / "conf/experiment/trl.yaml").read_text()
    (tmp_path / "experiment/mine.yaml").write_text(own + "seed: 77\n")
    words = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert command.main([*words, "--cfg", "job"]) == 0
    assert "seed: 77" in capsys.readouterr().out
    assert command.main([*words[:2], "experiment=mien"]) == 2
    assert "did you mean mine?" in capsys.readouterr().err


def test_the_module_is_the_command_and_debug_shows_where(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "qprobe_preference", "experiment=trl", f"paths.runs={tmp_path}"]
        return subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    plain, debug = run("stages=[none]", "sampler.n=many"), run("stages=[none]", "sampler.n=many", "--debug")
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
