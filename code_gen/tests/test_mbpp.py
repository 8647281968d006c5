"""MBPP as problems: splits, set-up code, prompts, and its own solutions."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from qprobe_code_gen.problems.mbpp import OWN_FILE, SPLITS, load, problem_from_row
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.sandbox import Executor, Limits, Program, Reference

ROW = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def add_one(x):\r\n  return x + 1",
    "test_setup_code": "",
    "test_list": ["assert add_one(1) == 2", "assert add_one(2) == 3", "assert add_one(-1) == 0"],
}
# One reference solution (MBPP/123, by trial division) takes 2 CPU seconds on a quiet machine.
LIMITS = Limits(cpu_seconds=20.0)


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_splits_have_the_published_sizes() -> None:
    assert {name: len(load(name).problems) for name in SPLITS} == {
        "mbpp-fewshot": 10,
        "mbpp-test": 500,
        "mbpp-train": 374 + 90,
    }


def test_the_file_in_the_package_is_the_published_one() -> None:
    # The sum that the data set's text has on the hub.
    content = gzip.decompress(OWN_FILE.read_bytes())
    assert hashlib.sha256(content).hexdigest() == "143559fa164408d45cab058238471288b0e447507ce55db3057c56113d9dccb4"


def test_a_row_becomes_a_problem() -> None:
    problem = problem_from_row(ROW)
    assert problem.task_id == "MBPP/011"
    assert problem.entry_point == "add_one"
    assert problem.tests == "assert add_one(1) == 2\nassert add_one(2) == 3\nassert add_one(-1) == 0"
    assert problem.description.startswith(
        "Write a function to add one.\nYour code should pass these tests:\n\nassert add_one(1)"
    )
    assert problem.code_prompt.startswith('"""\nWrite a function to add one.\n')
    assert "\r" not in problem.solution


@pytest.mark.parametrize(
    ("code", "tests", "name"),
    [
        ("def f(x): return x", "assert int(f(1)) == int(1.2)", "f"),
        ("def sum(a, b): return a", "assert sum(1, 2) == 1", "sum"),
        ("def g(x): return x\ndef f(x): return g(x)", "assert set(f(1)) == {1}\nassert g(2)", "f"),
        ("class Pair: pass\ndef f(x): return x", "assert f([Pair()]) == 4", "f"),
        ("def f(x: return", "assert f(1)", ""),
        ("x = 1", "assert abs(x) == 1", ""),
    ],
)
def test_the_entry_point_is_the_function_that_the_tests_call_and_the_solution_defines(
    code: str, tests: str, name: str
) -> None:
    assert problem_from_row(ROW | {"code": code, "test_list": [tests]}).entry_point == name


def test_set_up_code_runs_after_the_program_and_before_the_tests() -> None:
    row = ROW | {"test_setup_code": "one = add_one(0)", "test_list": ["assert one == 1"]}
    problem = problem_from_row(row)
    with Executor(workers=1) as executor:
        assert executor.execute(Program(problem.solution, problem.tests)).verdict == "passed"


def test_completions_of_a_program_with_several_functions_survive() -> None:
    style, problem = PromptStyle("zero_shot"), problem_from_row(ROW)
    completion = "def one():\n    return 1\n\ndef add_one(x):\n    return x + one()\n"
    namespace: dict[str, object] = {}
    exec(style.program(problem, completion), namespace)
    assert callable(namespace["add_one"])


def test_the_entry_point_is_what_the_solution_defines() -> None:
    row = ROW | {"test_list": ["assert int(add_one(1)) == 2"], "code": "def add_one(x):\n    return x + 1.0"}
    assert problem_from_row(row).entry_point == "add_one"


def test_plain_and_gzipped_files_give_the_same_problems(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "mbpp.jsonl", [ROW])
    packed = tmp_path / "mbpp.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert load("mbpp-test", plain).identity() == load("mbpp-test", str(packed)).identity()


def test_bad_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.jsonl"):
        load("mbpp-test", str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="line 2 is no problem of MBPP: it has no code"):
        load("mbpp-test", write_rows(tmp_path / "a", [ROW, {k: v for k, v in ROW.items() if k != "code"}]))
    with pytest.raises(ValueError, match="has no problem of the split mbpp-train"):
        load("mbpp-train", write_rows(tmp_path / "b", [ROW]))
    with pytest.raises(ValueError, match="MBPP/011 has no tests"):
        load("mbpp-test", write_rows(tmp_path / "c", [ROW | {"test_list": []}]))
    packed = gzip.compress(b"x" * 1000)
    for damaged in (packed[:20], packed[:10] + b"\xff" * 10 + packed[20:]):
        (tmp_path / "d").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged gzip"):
            load("mbpp-test", str(tmp_path / "d"))
    (tmp_path / "e").write_text("{not json\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        load("mbpp-test", str(tmp_path / "e"))


def test_reference_solutions_pass_their_tests() -> None:
    problems = [problem for name in SPLITS for problem in load(name).problems]
    assert len(problems) == 974
    with Executor(workers=2, limits=LIMITS) as executor:
        programs = (
            Program(problem.solution, problem.tests, reference=Reference(problem.header, problem.solution))
            for problem in problems
        )
        found = {problems[i].task_id: execution for i, execution in executor.run(programs)}
    assert {name: str(execution.verdict) for name, execution in found.items() if not execution.passed} == {}
    # Their tests build objects of classes that the program defines; all others are judged apart.
    together = {name for name, execution in found.items() if not execution.apart}
    assert together == {"MBPP/367", "MBPP/601", "MBPP/927"}
