"""`qprobe-sandbox`: one line of JSON whatever the verdict, and sentences for input that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qprobe_code_gen.sandbox.__main__ import main


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("tests", "verdict"), [("assert f(1) == 1", "passed"), ("assert f(1) == 2", "failed"), ("f()", "error")]
)
def test_execute_prints_one_line_of_json_and_ends_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tests: str, verdict: str
) -> None:
    program = write(tmp_path / "program.py", "print('hello')\ndef f(x):\n    return x\n")
    assert main(["execute", program, "--tests", write(tmp_path / "tests.py", tests), "--expression", "f(2)"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    line = json.loads(out)
    assert (line["verdict"], line["output"]) == (verdict, "hello\n")
    assert line["value"] == ("2" if verdict == "passed" else None)
    assert sorted(line) == ["apart", "detail", "output", "seconds", "value", "verdict"]


def test_timeout_and_memory_are_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy = write(tmp_path / "busy.py", "while True:\n    pass")
    assert main(["execute", busy, "--timeout", "0.2"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "timeout"
    large = write(tmp_path / "large.py", "x = bytearray(200 << 20)")
    assert main(["execute", large, "--memory", "128"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "out_of_memory"


def lines(path: Path, *rows: dict[str, object]) -> str:
    return write(path, "".join(json.dumps(row) + "\n\n" for row in rows))


def test_a_file_of_programs_gives_a_line_each_in_order_and_a_bar_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = "import time\ntime.sleep(0.5)\ndef f():\n    return 1"
    rows: list[dict[str, object]] = [
        {"program": slow, "tests": "assert f() == 1", "id": 7},
        {"program": "def f():\n    return 2", "tests": "assert f() == 1"},
        {"program": "def f(:", "tests": "assert f() == 1"},
        {"program": "class Node:\n    pass", "tests": "root = Node()\nroot.left = 1"},
        # The reference says that `sum` is the program's, and the header is the judge's.
        {
            "program": "def two():\n    return 3\ndef sum(a, b):\n    return a - b",
            "tests": "assert sum(3, 1) == two()",
            "header": "def two():\n    return 2\n",
            "reference": "def two():\n    return 2\ndef sum(a, b):\n    return a - b",
        },
    ]
    assert main(["execute", lines(tmp_path / "programs.jsonl", *rows), "--workers", "2"]) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["verdict"] for line in found] == ["passed", "failed", "syntax_error", "passed", "passed"]
    assert all(sorted(line) == ["detail", "seconds", "verdict"] for line in found)
    assert "AssertionError" in found[1]["detail"]
    assert "in one process" in found[3]["detail"]
    assert "5/5" in err


@pytest.mark.parametrize(
    ("text", "options", "word"),
    [
        ('{"program": "x"', [], "line 1"),
        ('{"program": "x", "tests": ""}\n[1]', [], "line 2"),
        ('{"program": "x"}', [], "line 1"),
        ('{"program": 1, "tests": ""}', [], "line 1"),
        ("", [], "no line"),
        ('{"program": "x", "tests": ""}', ["--expression", "x"], "own tests"),
        ('{"program": "", "tests": "assert Node().left == 1"}', ["--apart"], "line 1"),
        ('{"program": "", "tests": ""}', ["--workers", "0"], "workers"),
    ],
)
def test_a_file_that_cannot_be_used_is_answered_before_anything_is_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str], word: str
) -> None:
    assert main(["execute", write(tmp_path / "programs.jsonl", text), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["execute", "no-such-file.py"], "no-such-file.py"),
        (["execute", "PROGRAM", "--tests", "no-tests.py"], "no-tests.py"),
        (["execute", "PROGRAM", "--timeout", "-1"], "cpu_seconds"),
        (["execute", "PROGRAM", "--memory", "1"], "memory_mib"),
        (["execute", "BINARY"], "UTF-8"),
    ],
)
def test_bad_input_is_answered_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    names = {"PROGRAM": write(tmp_path / "program.py", "x = 1"), "BINARY": str(tmp_path / "binary")}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qprobe-sandbox: ")
    assert word in err
    assert err.count("\n") == 1


def test_info_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert len(layers) == 16
    for layer in layers:
        assert f"stops {layer['stops']}" in table
        assert ("active" if layer["active"] else "ABSENT") in table
