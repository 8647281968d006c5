"""Tests that a model wrote: what it is shown of a problem, and what of its text is a test."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings

from qprobe_code_gen.programs import Problem, mbpp
from qprobe_code_gen.sandbox import Reference
from qprobe_code_gen.sandbox.plan import plan

_LONGEST = 20  # lines of a test
_EXAMPLES = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", re.MULTILINE)  # doctests, each to an empty line
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def stub(problem: Problem) -> str:
    """A problem as a function whose body is `pass`, without doctests and without MBPP's assertions, which are its unit tests."""
    try:
        (docstring,) = parsed(problem.docstring.strip()).body
        text = str(ast.literal_eval(docstring.value)) if isinstance(docstring, ast.Expr) else problem.description
    except _UNREADABLE:  # something stands beside it, or there is none
        if problem.signature:
            return f"{problem.code_prompt.rstrip()}\n    pass"
        text = problem.description
    text = text.partition(mbpp.REQUEST)[0]
    said = textwrap.indent(inspect.cleandoc(_EXAMPLES.sub("", text)), "    ").strip()
    signature = problem.signature or _signature(problem)
    return f'{problem.header}{signature.rstrip()}\n    """{said}\n    """\n    pass'


def _signature(problem: Problem) -> str:
    """That of the solution, where the problem gives none."""
    for node in parsed(problem.solution).body:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point:
            return f"def {node.name}({ast.unparse(node.args)}):"
    return f"def {problem.entry_point}(*args):"


def nothing(problem: Problem) -> str:
    """A program that no test should be passed by."""
    return f"def {problem.entry_point}(*args, **named):\n    raise NotImplementedError\n"


def reference(problem: Problem) -> Reference:
    """What is known of a program that is tested: its name, and the problem's own code before it."""
    return Reference(problem.header, f"def {problem.entry_point}(*args): ...")


def tests(text: str, problem: Problem) -> list[str]:
    """The assertions of a text, one or several lines each, that call the function and need no more of it than its results."""
    lines, found = text.split("\n"), []
    for first, line in enumerate(lines):
        if not line.lstrip().startswith("assert"):
            continue
        for last in range(first + 1, min(first + _LONGEST, len(lines)) + 1):
            if (test := _assertion("\n".join(lines[first:last]).strip())) is not None:
                calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
                own = any(isinstance(name, ast.Name) and name.id == problem.entry_point for name in calls)
                if own and not plan(ast.unparse(test), "", reference(problem)).reason:
                    found.append(ast.unparse(test))
                break
    return found


def _assertion(source: str) -> ast.Assert | None:
    """A statement, where it is one assertion."""
    try:
        body = parsed(source).body
    except _UNREADABLE:
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], ast.Assert) else None


def parsed(source: str) -> ast.Module:
    """As `ast.parse`; what Python warns of in code that is not ours is not said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)
