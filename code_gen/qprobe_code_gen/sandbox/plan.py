"""How a program will be judged: decided from the problem and its tests alone, before a line of the program runs.

Apart, where the tests only call what the reference defines and look at plain values; in one process, where they need the
program's own objects. Whose a name is, is decided here too: the candidate's are those that the reference defines; what the
problem's header defines, the built-ins and all else are the judge's. Without a reference, the candidate's are the names
that the tests use and that neither the tests nor the built-ins define.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from .verdicts import Reference

BUILTINS = frozenset(vars(builtins))
_PLAIN = (
    *(int, float, complex, str, bytes, bytearray, bool, list, tuple, dict, set, frozenset, range, slice, memoryview),
    *(OrderedDict, defaultdict, Counter, deque, Decimal, Fraction, date, datetime, time, timedelta, timezone),
)
_PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN for name in dir(kind)) - {"__doc__"}
# Of numpy's arrays, which are plain values too.
_ARRAY_ATTRIBUTES = frozenset(
    (
        *("shape", "dtype", "ndim", "size", "T", "tolist", "item", "all", "any", "sum", "min", "max", "mean", "std"),
        *("astype", "reshape", "flatten", "ravel", "round"),
    )
)
# Words of tests that reach into the process of the program: its streams, files, modules, threads, frames.
_REACHES = {
    "its streams": "stdout stdin stderr redirect_stdout redirect_stderr capsys capfd",
    "its modules and names": "mock patch MagicMock Mock monkeypatch setattr delattr",
    "its files": "open os pathlib Path shutil glob tempfile",
    "its processes, threads and coroutines": "multiprocessing threading concurrent asyncio signal",
    "its source, frames and names": "inspect globals locals vars exec eval __import__ importlib gc dis getsource",
}
_CAPITAL_WORDS = re.compile(r"(?:[A-Z][a-z0-9]+)+")
_REACHED = {word: what for what, words in _REACHES.items() for word in words.split()}


@dataclass(frozen=True)
class Plan:
    """How a program is judged.

    Args:
        reason: why in one process, as the end of "in one process, because the tests use"; empty: apart.
        calls: names that the tests call in the candidate's process, in order.
        values: names whose values the tests read there.
        imports: source of imports that the tests rely on and only the program makes.
    """

    reason: str
    calls: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    imports: str = ""


@lru_cache(maxsize=4096)
def plan(tests: str, expression: str, reference: Reference | None) -> Plan:
    """The plan of a problem.

    Args:
        tests, expression: as in `Program`.
        reference: what is known of the problem besides; None: nothing.
    """
    try:
        used = _Uses(ast.parse(tests), ast.parse(expression.strip() or "None", mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Plan("")  # the judge says what is wrong with them
    solution = _Definitions(reference.solution if reference else "")
    header = _Definitions(reference.header if reference else "")
    known = solution.functions | solution.classes | solution.variables
    calls: list[str] = []
    values: list[str] = []
    sources: list[str] = []
    for name in used.free:
        if name in header.classes | solution.classes:
            return Plan(f"the class {name} of the program")
        if name in header.functions | header.variables | header.imports.keys():
            continue
        if name in known:
            (calls if name in used.called or name in solution.functions else values).append(name)
        elif name in solution.imports:
            sources.append(solution.imports[name])
        elif name in BUILTINS:
            continue
        elif used.is_module(name):
            sources.append(f"import {name}")
        elif not known:
            (calls if name in used.called else values).append(name)
    # Without a reference, a capital letter where there are other functions is all that tells a class.
    if not known and len(calls) > 1 and (classes := [name for name in calls if _CAPITAL_WORDS.fullmatch(name)]):
        return Plan(f"the class {classes[0]} of the program")
    reason = used.reach_of({*calls, *values}, header.functions)
    return Plan(reason, tuple(calls), tuple(values), "\n".join(dict.fromkeys(sources)))


class _Definitions:
    """What a program defines at its top level, by its syntax tree."""

    def __init__(self, source: str) -> None:
        self.functions: set[str] = set()
        self.classes: set[str] = set()
        self.variables: set[str] = set()
        self.imports: dict[str, str] = {}  # name -> the statement that makes it
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        for node in body:
            self._add(node)

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.functions.add(node.name)
        elif isinstance(node, ast.ClassDef):
            self.classes.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                one = ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), "names": [alias]}), node)
                self.imports[alias.asname or alias.name.partition(".")[0]] = ast.unparse(one)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for child in ast.iter_child_nodes(node):
                for statement in child.body if isinstance(child, ast.ExceptHandler) else [child]:
                    if isinstance(statement, ast.stmt):
                        self._add(statement)
        else:
            lambdas = isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            (self.functions if lambdas else self.variables).update(stored)


class _Uses:
    """What tests do with names.

    Args:
        tests, expression: their syntax trees.
    """

    def __init__(self, tests: ast.Module, expression: ast.Expression) -> None:
        self.nodes = [*ast.walk(tests), *ast.walk(expression)]
        self.bound = set(self._bound())
        loaded = [n.id for n in self.nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]
        self.free = [name for name in dict.fromkeys(loaded) if name not in self.bound]
        self.calls = [n for n in self.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        self.functions = {n.name: n.args.args for n in self.nodes if isinstance(n, ast.FunctionDef)}
        self.called = {_name(node.func) for node in self.calls}
        # In `check(f)` f is called, where `check` calls its parameter.
        self.called |= {_name(given) for parameter, given in self._handed_on() if parameter in self.called}
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def _bound(self) -> Iterator[str]:
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
            elif isinstance(node, ast.alias):
                yield node.asname or node.name.partition(".")[0]
            elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
                yield node.name

    def is_module(self, name: str) -> bool:
        """Whether a name can only be a module of the standard library: nothing but its attributes are used."""
        uses = [node for node in self.nodes if isinstance(node, ast.Name) and node.id == name]
        return name in sys.stdlib_module_names and all(isinstance(self.parents[n], ast.Attribute) for n in uses)

    def reach_of(self, own: set[str], given: set[str]) -> str:
        """What of the program's own the tests use besides its functions' results; empty: nothing.

        Args:
            own: names of the program.
            given: functions of the problem's header.
        """
        defined = [n for n in self.nodes if isinstance(n, ast.ClassDef)]
        cases = [n for n in defined if any(ast.unparse(base).endswith("TestCase") for base in n.bases)]
        classes = ({n.name for n in defined} - {n.name for n in cases}) & self.called
        if classes:
            return f"objects of their own class {min(classes)}, which the program would be given"
        functions = given | self.functions.keys()
        self._add_aliases(own)
        results = set(self._results(own))
        for node in self.nodes:
            found = (
                self._word(node, own)
                or self._attribute(node, own, results)
                or self._class(node, own)
                or self._function_given(node, own, functions)
            )
            if found:
                return found
        return ""

    def _add_aliases(self, own: set[str]) -> None:
        """Add the names by which the tests call the program's functions too, as `candidate` in `check(f)`."""
        for node in self.nodes:
            if isinstance(node, ast.Assign) and _name(node.value) in own:
                own.update(_name(target) for target in node.targets if isinstance(target, ast.Name))
        own.update([parameter for parameter, given in self._handed_on() if _name(given) in own])

    def _handed_on(self) -> Iterator[tuple[str, ast.AST]]:
        """Parameters of the tests' own functions, with what they are called with."""
        for call in self.calls:
            for parameter, given in zip(self.functions.get(_name(call.func), []), call.args, strict=False):
                yield parameter.arg, given

    def _word(self, node: ast.AST, own: set[str]) -> str:
        words: Iterable[str] = ()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            words = [node.id] if node.id not in self.bound | own else []
        elif isinstance(node, ast.Attribute):
            words = [node.attr] if node.attr in ("stdout", "stdin", "stderr", "patch") else []
        elif isinstance(node, ast.Import):
            words = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            words = [(node.module or "").partition(".")[0], *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith | ast.AsyncFunctionDef):
            words = ["asyncio"]
        return next((f"{word}, with which they reach {_REACHED[word]}" for word in words if word in _REACHED), "")

    def _results(self, own: set[str]) -> Iterator[str]:
        """Names that hold results of the program's functions."""
        for node in self.nodes:
            if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign) and self._is_result(node.value, own):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))

    def _is_result(self, node: ast.AST | None, own: set[str]) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in own

    def _attribute(self, node: ast.AST, own: set[str], results: set[str]) -> str:
        if not isinstance(node, ast.Attribute):
            return ""
        value = node.value
        if isinstance(value, ast.Name) and value.id in own:
            called = value.id in self.called
            of_function = called or node.attr not in _PLAIN_ATTRIBUTES | _ARRAY_ATTRIBUTES
            return f"the attribute {node.attr} of {value.id}" if of_function else ""
        held = isinstance(value, ast.Name) and value.id in results
        if (held or self._is_result(value, own)) and node.attr not in _PLAIN_ATTRIBUTES | _ARRAY_ATTRIBUTES:
            return f"the attribute {node.attr} of a result"
        return ""

    def _class(self, node: ast.AST, own: set[str]) -> str:
        """Whether a name of the program is used as only a class is."""
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.ExceptHandler):
            parts = [node.type, *(node.type.elts if isinstance(node.type, ast.Tuple) else [])]
        elif isinstance(node, ast.Raise):
            parts = [node.exc, node.exc.func if isinstance(node.exc, ast.Call) else None]
        elif isinstance(node, ast.ClassDef):
            parts = list(node.bases)
        elif isinstance(node, ast.MatchClass):
            parts = [node.cls]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2:
                second = node.args[1]
                parts = [second, *(second.elts if isinstance(second, ast.Tuple) else [])]
            elif node.func.id in ("raises", "assertRaises") and node.args:
                parts = [node.args[0]]
        elif isinstance(node, ast.Delete):
            parts = list(node.targets)
        names = [part.id for part in parts if isinstance(part, ast.Name) and part.id in own]
        return f"the class {names[0]} of the program" if names else ""

    def _function_given(self, node: ast.AST, own: set[str], functions: set[str]) -> str:
        """Whether the tests hand a function of their own to the program: it could not be called from there."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in own):
            return ""
        handed = [*node.args, *(keyword.value for keyword in node.keywords)]
        for part in (inner for value in handed for inner in self._handed(value)):
            if isinstance(part, ast.Lambda) or (isinstance(part, ast.Name) and part.id in functions | own):
                named = part.id if isinstance(part, ast.Name) else "a lambda"
                return f"{named} as an argument of {node.func.id}"
        return ""

    def _handed(self, value: ast.AST) -> Iterator[ast.AST]:
        """The parts of an argument that are handed over as they are, and not called or computed with."""
        yield value
        if isinstance(value, ast.List | ast.Tuple | ast.Set | ast.Starred | ast.Dict):
            for part in ast.iter_child_nodes(value):
                yield from self._handed(part)


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""
