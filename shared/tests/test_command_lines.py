"""What the command `qprobe` says to words that are right, misspelt or missing, from a folder that is not the project's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qprobe
from qprobe.cli import command, main

# The command line, its status, and what the first or last line that it prints must hold.
LINES = [
    ("", 2, "usage: qprobe"),
    ("--help", 0, "usage: qprobe"),
    ("-h", 0, "usage: qprobe"),
    ("--version", 0, "qprobe 0."),
    *(
        (f"{name} --help", 0, f"usage: qprobe {name}")
        for name in ("run", "import", "answer", "export", "inspect", "report", "pack")
    ),
    *(
        (name, 2, "the following arguments are required")
        for name in ("run", "import", "answer", "export", "inspect", "report", "pack")
    ),
    ("rnu", 2, "did you mean run?"),
    ("inspekt x", 2, "did you mean inspect?"),
    ("run p.jsonl --rewrad a:b", 2, "did you mean --reward?"),
    ("--vresion", 2, "did you mean --version?"),
    ("run p.jsonl --reward a.py:f samplr.n=3", 2, "did you mean sampler.n?"),
    ("run p.jsonl --reward a.py:f temperature=1", 2, "did you mean sampler.temperature?"),
    ("run p.jsonl --reward a.py:f sampler=vlm", 2, "did you mean vllm?"),
    ("run p.jsonl --reward a.py:f sampler.n=1,2", 2, "--multirun"),
    ("run p.jsonl --reward a.py:f sampler.n=[", 2, "cannot be read"),
    ("run p.jsonl --reward a.py:f", 1, "There is no file p.jsonl"),
    ("run p.jsonl --reward a.py:f --multirun seed=0,1 sed=1", 2, "did you mean seed?"),
    ("import c.jsonl --run r evaluation.fold=2", 2, "did you mean evaluation.folds?"),
    ("import c.jsonl --run r", 1, "There is no file c.jsonl"),
    ("answer hello --probe nowhere", 1, "nowhere"),
    ("answer --probe nowhere", 2, "--prompts"),
    ("answer hello --probe nowhere --prompts p.jsonl", 2, "either"),
    ("answer hello --probe nowhere --output out.jsonl", 2, "--output"),
    ("answer --probe nowhere --prompts p.jsonl", 1, "There is no file p.jsonl"),
    ("export nowhere --to sequence-classification folder", 1, "nowhere"),
    ("export nowhere --to onnx folder", 2, "invalid choice"),
    ("inspect nowhere", 1, "nowhere is no run folder"),
    ("inspect nowhere a=1", 2, "unrecognized arguments: a=1"),
    ("report nowhere", 1, "nowhere"),
    ("pack nowhere folder --note x", 1, "--note"),
    ("--completion", 2, "say --completion bash or --completion zsh"),
    ("--completion fish", 2, "say --completion bash or --completion zsh"),
    ("--completion bash", 0, "complete -F _qprobe qprobe"),
    ("--completion zsh", 0, "compdef _qprobe qprobe"),
]


@pytest.mark.parametrize(("line", "status", "said"), LINES, ids=[line for line, *_ in LINES])
def test_every_command_line_ends_in_its_status_and_a_line_that_helps(
    line: str, status: int, said: str, ends: Callable[..., str]
) -> None:
    printed = ends(main.main, line, status, said)
    assert (printed == "") == (status != 0)


def test_help_lists_every_group_and_choice_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n  qprobe ") >= 3
    for path in (Path(qprobe.__file__).parent / "conf").glob("*/*.yaml"):
        first = next(x for x in path.read_text().splitlines() if x.startswith("#") and "@package" not in x)
        assert f"\n {path.parent.name}\n" in text
        assert f"  {path.stem:<22} {first[2:]}\n" in text


def test_the_module_is_the_command_and_debug_shows_where(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qprobe", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    plain, debug = run("inspect", "nowhere"), run("inspect", "nowhere", "--debug")
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (TypeError("odd"), 1, r"name: TypeError: odd \(.*test_command_lines\.py, line .* fault of the program"),
        (KeyError("k"), 1, "name: KeyError: 'k' "),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError("full"), 1, "name: full"),
    ],
)
def test_what_nobody_thought_of_is_a_line_too(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert command.guarded("name", work) == status
    printed = capsys.readouterr().err
    assert re.search(said, printed)
    assert "Traceback" not in printed
    command.guarded("name", work, debug=True)
    assert ("Traceback" in capsys.readouterr().err) == (status == 1)


def complete(line: str, script: str) -> set[str]:
    """What bash offers at the end of a line, as readline calls the function: words are cut at = too."""
    words = line.replace("=", " = ").split(" ")
    words = [word for place, word in enumerate(words) if word or place == len(words) - 1]
    if line.endswith("="):
        words = [*words[:-1], ""] if words[-1] else words
    lines = [
        script,
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})",
        f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}",
        "compopt() { :; }",
        "_qprobe",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_options_settings_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete("qprobe in", script) == {"inspect"}
    assert complete("qprobe run --re", script) == {"--reward"}
    assert complete("qprobe run p.jsonl sampler.temp", script) == {"sampler.temperature="}
    assert complete("qprobe run p.jsonl model=e", script) == {"embedded"}
    assert complete("qprobe import c.jsonl sampler=", script) == {"hf", "openai", "recorded", "vllm"}
    assert "sampler.n=" not in complete("qprobe inspect s", script)
