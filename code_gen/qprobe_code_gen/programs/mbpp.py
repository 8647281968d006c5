"""MBPP: 974 problems (Austin et al. 2021), out of this package (CC BY 4.0: mbpp.NOTICE) or from a local JSON-lines file.

Splits by task id, as published: 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 training. The paper trains on
training and validation together, 374 + 90 problems.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from qprobe_code_gen import problem_sets
from qprobe_code_gen.problem_sets import ProblemSet
from qprobe_code_gen.programs.problem import Problem

OWN_FILE = Path(__file__).parent / "mbpp.jsonl.gz"
SPLITS = {"mbpp-fewshot": range(1, 11), "mbpp-test": range(11, 511), "mbpp-train": range(511, 975)}
_COLUMNS = {"task_id", "text", "code", "test_list", "test_setup_code"}
# CPU seconds of solutions of the data set's own (on a machine at rest) that are near the usual limit of a program.
SLOW = {"MBPP/123": 2.5}
REQUEST = "Your code should pass these tests:"


def load(split: str, mbpp_file: str | None = None) -> ProblemSet[Problem]:
    """One split.

    Args:
        split: a name of `SPLITS`.
        mbpp_file: a JSON-lines file with MBPP's fields, plain or gzipped; None takes the published one, which is in this package.

    Raises:
        OSError: no such file.
        ValueError: a line that is no problem of MBPP, a file without problems of this split.
    """
    found = problem_sets.from_file(mbpp_file or str(OWN_FILE), _COLUMNS, "MBPP", "mbpp_file")
    problems = [problem_from_row(row) for _, row in found if int(row["task_id"]) in SPLITS[split]]
    if not problems:
        raise ValueError(f"{mbpp_file or OWN_FILE} has no problem of the split {split} (task ids {SPLITS[split]}).")
    return ProblemSet(split, sorted(problems, key=lambda p: p.task_id), {"data": "mbpp"})


def problem_from_row(row: dict[str, Any]) -> Problem:
    """A problem from one row of MBPP: a sentence and three assertions; the solution gives names and signature."""
    tests = "\n".join(str(test).strip() for test in row["test_list"])
    # Most of the published file has Windows line ends.
    code = str(row["code"]).replace("\r\n", "\n").strip() + "\n"
    setup = str(row.get("test_setup_code") or "").replace("\r\n", "\n").strip()
    docstring = f'"""\n{str(row["text"]).strip()}\n{REQUEST}\n{tests}\n"""\n'
    return Problem(
        task_id=f"MBPP/{int(row['task_id']):03d}",
        description=f"{str(row['text']).strip()}\n{REQUEST}\n\n{tests}",
        header="",
        signature="",
        docstring=docstring,
        entry_point=entry_point(code, tests),
        # Two problems' set-up builds objects of classes that the program defines, so it runs after the program.
        tests=f"{setup}\n{tests}" if setup and tests else tests,
        solution=docstring + code,
    )


def entry_point(code: str, tests: str) -> str:
    """The function that the tests are about: the first of those that they call which the solution defines.

    Args:
        code: the data set's own solution.
        tests: its assertions.

    Returns: a name; empty where the two do not parse, or have none in common.
    """
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        names = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name) and node.id in defined]
    except (SyntaxError, ValueError):
        return ""
    return min(names, key=lambda name: (name.lineno, name.col_offset)).id if names else ""
