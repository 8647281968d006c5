"""What the command `qprobe-code-gen` says to words that are right, misspelt or missing, from another folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qprobe_code_gen
import qprobe_code_gen.__main__ as command
from qprobe.cli import configuration

NAME = "qprobe-code-gen"
# The command line, its status, and what the first or last line that it prints must hold.
LINES = [
    ("", 2, f"usage: {NAME}"),
    ("--help", 0, f"usage: {NAME}"),
    ("-h", 0, f"usage: {NAME}"),
    ("experiment=demo --help", 0, f"usage: {NAME}"),
    ("--version", 0, f"{NAME} 0."),
    *((f"{name} --help", 0, f"usage: {NAME} {name}") for name in ("evaluate", "samples")),
    *((name, 2, "the following arguments are required") for name in ("evaluate", "samples")),
    ("evaluat x", 2, "did you mean evaluate?"),
    ("evaluate x --stlye raw", 2, "did you mean --style?"),
    ("evaluate absent.jsonl", 1, "absent.jsonl"),
    ("samples absent --format evalplus", 1, "absent"),
    ("experiment=dmeo", 2, "did you mean demo?"),
    ("dmeo", 2, "did you mean experiment=demo?"),
    ("experimnt=demo", 2, "experimnt=demo names no group or setting. Say experiment=NAME"),
    ("seed=3", 2, "Say experiment=NAME: one of"),
    ("experiment=demo samplr.n=3", 2, "did you mean sampler.n?"),
    ("experiment=demo temperature=1", 2, "did you mean sampler.temperature?"),
    ("experiment=demo modle=hub", 2, "did you mean model"),
    ("experiment=demo model=hubb", 2, "did you mean hub?"),
    ("experiment=demo seed", 2, "'seed' is no setting: write KEY=VALUE"),
    ("experiment=demo seed=0,1", 2, "--multirun"),
    ("experiment=demo sampler.stop=[", 2, "cannot be read"),
    ("experiment=demo +speed=3", 1, "has no key speed"),
    ("experiment=demo sampler.n=many", 1, "sampler.n is 'many'"),
    ("experiment=demo ~seed", 1, "seed"),
    ("experiment=demo --mutlirun", 2, "did you mean --multirun?"),
    ("-m experiment=demo,dmeo", 2, "did you mean demo?"),
    ("-m experiment=demo sed=0,1", 2, "did you mean seed?"),
    ("--config-dir nowhere experiment=demo", 2, "There is no folder nowhere"),
    ("--config-dir", 2, "--config-dir names no folder"),
    ("--completion fish", 2, "say --completion bash or --completion zsh"),
    ("--completion bash", 0, f"complete -F _qprobe_code_gen {NAME}"),
    ("--completion zsh", 0, f"compdef _qprobe_code_gen {NAME}"),
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
    for folder in (Path(qprobe_code_gen.__file__).parent, Path(configuration.__file__).parent):
        for path in (folder / "conf").glob("*/*.yaml"):
            first = next(x for x in path.read_text().splitlines() if x.startswith("#") and "@package" not in x)
            assert f"  {path.stem:<22} {first[2:]}\n" in text
            assert path.parent.name == "experiment" or f"\n {path.parent.name}\n" in text


def test_a_folder_of_ones_own_adds_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    own = (Path(qprobe_code_gen.__file__).parent / "conf/experiment/demo.yaml").read_text()
    (tmp_path / "experiment/mine.yaml").write_text(own + "seed: 77\n")
    words = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert command.main([*words, "--cfg", "job"]) == 0
    assert "seed: 77" in capsys.readouterr().out
    assert command.main([*words[:2], "experiment=mien"]) == 2
    assert "did you mean mine?" in capsys.readouterr().err


def test_the_module_is_the_command_and_debug_shows_where(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "qprobe_code_gen", "experiment=demo", f"paths.runs={tmp_path}"]
        return subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    plain, debug = run("stages=[none]", "sampler.n=many"), run("stages=[none]", "sampler.n=many", "--debug")
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
