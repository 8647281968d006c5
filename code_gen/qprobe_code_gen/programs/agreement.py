"""When two programs agree: they give the same outputs on the inputs of their problem's tests.

The inputs are those of the tests' assertions; the values that these expect are not used, so nothing says which outputs are
right. Every call of the function inside an assertion is made, and the `repr` of what it returns, or the kind of its exception,
enters a digest. A program where no call returns, or that is stopped, agrees with none. Where it stops: a program may lie about
its outputs, and then agrees with other programs; 1 and 1.0 are not the same output; calls inside comprehensions are not seen,
for their variables are not.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from qprobe.baselines.consistency import Answer
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Program

CANDIDATE = "candidate"  # what HumanEval's tests call the function that they are given
_RECORD, _RECORDED = "_record_output", "_recorded_outputs"
# Tests that draw random inputs draw the same for all programs. An address in a `repr` is no output.
# hashlib is the last resort: it starts OpenSSL, which takes longer than a usual program and all around it.
_RECORDER = f"""
import random as _random, re as _re
try:
    from _sha2 import sha256 as _sha256
except ImportError:
    try:
        from _sha256 import sha256 as _sha256
    except ImportError:
        from hashlib import sha256 as _sha256
_random.seed(0)
_outputs, _returned = _sha256(), []
def {_RECORD}(call):
    try:
        output = _re.sub(" at 0x[0-9a-f]+", "", repr(call()))
        _returned.append(True)
    except Exception as fault:
        output = "!" + type(fault).__name__
    _outputs.update(output.encode("utf-8", "backslashreplace") + b"\\0")
def {_RECORDED}():
    return _outputs.hexdigest() if _returned else ""
"""


class OutputsAgree:
    """The agreement of programs by their outputs, executed in the sandbox as the unit tests are.

    Args:
        reward: knows the problems, how completions become programs, and what a program may use.
    """

    def __init__(self, reward: UnitTestReward) -> None:
        self.reward = reward
        self._tests: dict[str, str] = {}

    def identity(self) -> dict[str, Any]:
        return {"agreement": "outputs", **self.reward.identity()}

    def check(self) -> None:
        self.reward.check()

    def program(self, task_id: str, completion: str) -> Program:
        """What is executed for a completion: its program, then the calls of its tests."""
        if task_id not in self._tests:
            self._tests[task_id] = calls_alone(self.reward.problems[task_id].tests)
        program = self.reward.program(task_id, completion)
        return dataclasses.replace(program, tests=self._tests[task_id], expression=f"{_RECORDED}()")

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        begun: deque[tuple[list[Hashable | None], set[int]]] = (
            deque()
        )  # a batch's keys, and the places that have none yet
        place_of: dict[
            int, tuple[tuple[list[Hashable | None], set[int]], int]
        ] = {}  # program number -> its batch and place

        def programs() -> Iterator[Program]:
            """The executor's pool is fed across the borders of batches, so that it never waits for one."""
            number = 0
            for batch in batches:
                begun.append(([None] * len(batch), set(range(len(batch)))))
                for place, answer in enumerate(batch):
                    place_of[number] = begun[-1], place
                    number += 1
                    yield self.program(*answer)

        with self.reward.executor() as executor:
            for number, execution in executor.run(programs()):
                (keys, lacking), place = place_of.pop(number)
                # The value is the digest's `repr`, of an empty text where no call returned.
                keys[place] = execution.value if execution.passed and execution.value != "''" else None
                lacking.remove(place)
                while begun and not begun[0][1]:
                    yield begun.popleft()[0]
        yield from (keys for keys, _ in begun)


def calls_alone(tests: str) -> str:
    """Tests whose assertions are replaced by the calls inside them, recorded.

    Args:
        tests: a problem's own.

    Returns: code that raises for no output of the program, whatever the tests expect.
    """
    tree = ast.parse(tests)
    takes = any(isinstance(node, ast.arg) and node.arg == CANDIDATE for node in ast.walk(tree))
    asserted = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = {
        n.func.id for a in asserted for n in ast.walk(a) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    # A function may have the name of a builtin: then nothing else is called.
    asked = {CANDIDATE} if takes else {name for name in called if not hasattr(builtins, name)} or called
    return _RECORDER + ast.unparse(ast.fix_missing_locations(_Calls(asked).visit(tree)))


class _Calls(ast.NodeTransformer):
    """Assertions become recorded calls of the functions; an assignment with such a call stays, behind its recorded call."""

    def __init__(self, asked: set[str]) -> None:
        self.asked = asked

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [_recorded(call) for call in self._outermost(node.test)] or [ast.Pass()]

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        calls = self._outermost(node.value) if CANDIDATE in self.asked else []
        return [*(_recorded(call) for call in calls), node]

    def _outermost(self, node: ast.AST) -> Iterator[ast.Call]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.asked:
            yield node
            return
        if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            return  # their variables are known inside them alone
        for child in ast.iter_child_nodes(node):
            yield from self._outermost(child)


def _recorded(call: ast.Call) -> ast.stmt:
    no_arguments = ast.arguments([], [], None, [], [], None, [])
    record = ast.Call(ast.Name(_RECORD, ast.Load()), [ast.Lambda(no_arguments, call)], [])
    return ast.Expr(record)
