"""Which top-level statements of an answer belong to its program: definitions do, demonstrations do not.

A model shows its function at work: assertions, prints, calls of the function, a main guard, tests. None of them says whether the
function is right, and each can fail, wait for input or print without end. What the function needs stays, whatever it is.
"""

from __future__ import annotations

import ast
import builtins
import functools
import symtable
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__"}
_SHOWS = frozenset({"print", "pprint", "display", "input", "exit", "quit", "help", "breakpoint", "open"})
_SHOWS_OF_MODULES = frozenset(
    {("sys", "exit"), ("os", "_exit"), ("unittest", "main"), ("pytest", "main"), ("sys", "stdin"), ("sys", "stdout")}
    | {("doctest", name) for name in ("testmod", "testfile", "run_docstring_examples")}
)
# Nothing but tests needs these, and they are not part of Python.
_TEST_PACKAGES = frozenset({"pytest", "hypothesis", "nose"})
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)


@dataclass(frozen=True, eq=False)
class Statement:
    """One top-level statement that compiles.

    Args:
        text: its lines, with the comments behind it.
        node: the same, parsed.
    """

    text: str
    node: ast.stmt

    @functools.cached_property
    def binds(self) -> frozenset[str]:
        """Names that it defines, assigns or imports."""
        return frozenset(s.get_name() for s in self._table.get_symbols() if s.is_assigned() or s.is_imported())

    @functools.cached_property
    def touches(self) -> frozenset[str]:
        """`binds`, and names whose elements or attributes it sets or whose methods it calls."""
        found = set(self.binds)
        for node in ast.walk(self.node):
            if isinstance(node, ast.Subscript | ast.Attribute) and (
                isinstance(node.ctx, ast.Store) or (isinstance(self.node, ast.Expr) and isinstance(node, ast.Attribute))
            ):
                base: ast.AST = node
                while isinstance(base, ast.Subscript | ast.Attribute):
                    base = base.value
                if isinstance(base, ast.Name):
                    found.add(base.id)
        return frozenset(found)

    @functools.cached_property
    def runs(self) -> frozenset[str]:
        """Global names that are read when the statement is executed, not only when a function of it is called."""
        return frozenset(self._read_when_run)

    @functools.cached_property
    def uses(self) -> frozenset[str]:
        """Global names that are read when it is executed, or by its functions."""
        return self.runs.union(*(_globals(table) for table in _below(self._table)))

    @functools.cached_property
    def _table(self) -> symtable.SymbolTable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return symtable.symtable(self.text, "<answer>", "exec")

    @property
    def _read_when_run(self) -> set[str]:
        found = {s.get_name() for s in self._table.get_symbols() if s.is_referenced()}
        for table in self._table.get_children():
            if not isinstance(self.node, FUNCTIONS) and not (
                isinstance(self.node, ast.ClassDef) and table.get_type() == "function"
            ):
                found |= _globals(table)
                if not isinstance(self.node, ast.ClassDef):  # comprehensions are functions of their own
                    found |= {name for inner in _below(table) for name in _globals(inner)}
        return found


def _globals(table: symtable.SymbolTable) -> set[str]:
    return {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}


def _below(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    waiting = list(table.get_children())
    while waiting:
        waiting += (found := waiting.pop()).get_children()
        yield found


def is_stub(node: ast.stmt) -> bool:
    """Whether it is a function without a body: a docstring, `pass`, `...` or `raise NotImplementedError` alone."""
    return isinstance(node, FUNCTIONS) and all(_says_nothing(inner) for inner in node.body)


def _says_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise) and node.exc is not None:
        return ast.unparse(node.exc).startswith("NotImplementedError")
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def defines(statement: Statement, entry_point: str) -> bool:
    """Whether a statement gives the entry point a body; any function or class does where no name is known."""
    if is_stub(statement.node):
        return False
    return entry_point in statement.binds if entry_point else isinstance(statement.node, (*FUNCTIONS, ast.ClassDef))


def relevant(statements: Sequence[Statement], entry_point: str) -> list[Statement]:
    """The statements that belong to the program, in order.

    Args:
        statements: all that an answer holds, the entry point among them.
        entry_point: the name that the tests call; empty where it is not known.
    """
    imports = [s for s in statements if entry_point in s.binds and isinstance(s.node, ast.Import | ast.ImportFrom)]
    others = [s for s in statements if defines(s, entry_point) and s not in imports]
    # A definition without a body never wins, nor an import of the function where the answer itself has it.
    winning = set(others or imports)
    kept = [s for s in statements if entry_point not in s.binds or s in winning]
    needed = _needed(kept, entry_point)
    reaching = _reaching(kept, entry_point, needed)
    known = BUILTINS.union(*(s.binds for s in kept))
    # Calls of a package that the function does not use, such as one that plots.
    reaching |= {name for s in kept if _is_foreign_import(s.node) for name in s.binds - needed}
    bound: set[str] = set()
    lost: set[str] = set()
    found: list[Statement] = []
    for statement in kept:
        if _stays(statement, entry_point, needed, reaching, known, lost):
            found.append(statement)
            bound |= statement.binds
        else:
            lost |= statement.binds
        lost -= bound
    shown = frozenset[str]().union(*(s.uses for s in set(kept) - set(found)))
    used = frozenset[str]().union(*(s.uses for s in found))
    return [s for s in found if not (_is_foreign_import(s.node) and s.binds & shown and not s.binds & used)]


def _stays(
    statement: Statement,
    entry_point: str,
    needed: set[str],
    reaching: set[str],
    known: frozenset[str],
    lost: set[str],
) -> bool:
    node = statement.node
    if isinstance(node, ast.If) and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}:
        return False
    if entry_point in statement.binds:
        return True
    if isinstance(node, _DEFINITIONS):
        return bool(statement.binds & needed) or not (statement.runs & lost or _of_tests(node))
    if isinstance(node, ast.Raise) or (isinstance(node, ast.AnnAssign) and node.value is None):
        return False
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    if isinstance(node, ast.Expr) and (not calls or statement.runs - known):
        return False
    if statement.touches & needed and not (isinstance(node, ast.Expr) and _shows(calls)):
        return True
    shows = _shows(calls) or any(isinstance(n, ast.Assert) for n in ast.walk(node))
    return not (shows or statement.runs & lost or (calls and statement.runs & reaching))


def _needed(statements: Sequence[Statement], entry_point: str) -> set[str]:
    """Names that the entry point reads, and what these read in turn."""
    needed: set[str] = set()
    waiting = [entry_point]
    touching: dict[str, list[Statement]] = {}
    for statement in statements:
        for name in statement.touches:
            touching.setdefault(name, []).append(statement)
    while waiting:
        for statement in touching.get(waiting.pop(), ()):
            # A call such as `show.update(total(2))` touches `show`: it is not what defines it.
            new = statement.uses - needed
            needed |= new
            waiting += new
    return needed


def _reaching(statements: Sequence[Statement], entry_point: str, needed: set[str]) -> set[str]:
    """The entry point and the names whose value comes from calling it, but for those that it needs itself."""
    users: dict[str, list[Statement]] = {}
    for statement in statements:
        for name in statement.uses:
            users.setdefault(name, []).append(statement)
    reaching, waiting = {entry_point}, [entry_point]
    while waiting:
        for statement in users.get(waiting.pop(), ()):
            new = statement.binds - reaching - needed
            reaching |= new
            waiting += new
    return reaching


def _shows(calls: Sequence[ast.Call]) -> bool:
    for call in calls:
        called: ast.expr = call.func
        if isinstance(called, ast.Name) and called.id in _SHOWS:
            return True
        while isinstance(called, ast.Attribute):
            if isinstance(called.value, ast.Name) and (called.value.id, called.attr) in _SHOWS_OF_MODULES:
                return True
            called = called.value
    return False


def _of_tests(node: ast.stmt) -> bool:
    """Whether it imports a package for tests."""
    return any(name in _TEST_PACKAGES for name in _packages(node))


def _is_foreign_import(node: ast.stmt) -> bool:
    """Whether it imports what is no part of Python, and may not be there."""
    return any(name not in sys.stdlib_module_names for name in _packages(node))


def _packages(node: ast.stmt) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [name.partition(".")[0] for name in names]
