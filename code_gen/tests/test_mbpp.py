"""MBPP as problems: splits, set-up code, prompts, and its own solutions."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe_code_gen.programs.mbpp import OWN_FILE, SPLITS, load, problem_from_row
from qprobe_code_gen.sandbox import Executor, Limits, Program, Reference

# One reference solution (MBPP/123, by trial division) takes 2 CPU seconds on a quiet machine.
LIMITS = Limits(cpu_seconds=20.0)
Row = Callable[..., dict[str, Any]]


def test_splits_have_the_published_sizes() -> None:
    sizes = {name: len(load(name).problems) for name in SPLITS}
    assert sizes == {"mbpp-fewshot": 10, "mbpp-test": 500, "mbpp-train": 374 + 90}


def test_the_file_in_the_package_is_the_published_one() -> None:
    # The sum that the data set's text has on the hub.
    content = gzip.decompress(OWN_FILE.read_bytes())
    assert hashlib.sha256(content).hexdigest() == "143559fa164408d45cab058238471288b0e447507ce55db3057c56113d9dccb4"


def test_a_row_becomes_a_problem(mbpp_row: Row) -> None:
    problem = problem_from_row(mbpp_row(11, test_list=["assert add_11(1) == 12", "assert add_11(2) == 13"]))
    assert problem.task_id == "MBPP/011"
    assert problem.entry_point == "add_11"
    assert problem.tests == "assert add_11(1) == 12\nassert add_11(2) == 13"
    assert problem.description.startswith(
        "Write a function to add 11.\nYour code should pass these tests:\n\nassert add_11(1)"
    )
    assert problem.code_prompt.startswith('"""\nWrite a function to add 11.\n')
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
    code: str, tests: str, name: str, mbpp_row: Row
) -> None:
    assert problem_from_row(mbpp_row(11, code=code, test_list=[tests])).entry_point == name


def test_set_up_code_runs_after_the_program_and_before_the_tests(mbpp_row: Row, executor: Executor) -> None:
    problem = problem_from_row(mbpp_row(11, test_setup_code="eleven = add_11(0)", test_list=["assert eleven == 11"]))
    assert executor.execute(Program(problem.solution, problem.tests)).passed


def test_plain_and_gzipped_files_give_the_same_problems(
    tmp_path: Path, mbpp_row: Row, jsonl: Callable[..., Path]
) -> None:
    plain, packed = jsonl([mbpp_row(11)]), tmp_path / "mbpp.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load("mbpp-test", str(plain)).identity() == load("mbpp-test", str(packed)).identity()


def test_bad_rows_are_refused(mbpp_row: Row, jsonl: Callable[..., Path]) -> None:
    without = {key: value for key, value in mbpp_row(12).items() if key != "code"}
    with pytest.raises(ValueError, match=r"line 2 .*code"):
        load("mbpp-test", str(jsonl([mbpp_row(11), without])))
    with pytest.raises(ValueError, match="mbpp-train"):
        load("mbpp-train", str(jsonl([mbpp_row(11)])))
    with pytest.raises(ValueError, match=r"MBPP/011.*tests"):
        load("mbpp-test", str(jsonl([mbpp_row(11, test_list=[])])))


PACKED = gzip.compress(b"x" * 1000, mtime=0)


@pytest.mark.parametrize(
    ("content", "word"),
    [(PACKED[:20], "gzip"), (PACKED[:10] + b"\xff" * 10 + PACKED[20:], "gzip"), (b"{not json\n", "line 1")],
)
def test_bad_files_are_refused(content: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mbpp_file"):
        load("mbpp-test", str(tmp_path / "nothing.jsonl"))
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        load("mbpp-test", str(tmp_path / "bad"))


@pytest.mark.slow  # 974 programs: six seconds
def test_reference_solutions_pass_their_tests(executor: Executor) -> None:
    problems = [problem for name in SPLITS for problem in load(name).problems]
    assert len(problems) == 974
    programs = (Program(p.solution, p.tests, reference=Reference(p.header, p.solution)) for p in problems)
    found = {problems[i].task_id: execution for i, execution in executor.run(programs)}
    assert {name: str(execution.verdict) for name, execution in found.items() if not execution.passed} == {}
    # Their tests build objects of classes that the program defines; all others are judged apart.
    together = {name for name, execution in found.items() if not execution.apart}
    assert together == {"MBPP/367", "MBPP/601", "MBPP/927"}
