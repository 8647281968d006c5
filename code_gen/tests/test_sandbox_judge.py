"""The judge apart: whose a name is, what crosses between the processes, how what goes wrong there ends, which way is taken."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qprobe_code_gen.programs import Problem, humaneval, mbpp
from qprobe_code_gen.sandbox import Execution, Executor, ExecutorError, Limits, Program, Reference, Verdict
from qprobe_code_gen.sandbox.plan import Plan, plan

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=8.0)


def judged(executor: Executor, code: str, tests: str, solution: str = "", header: str = "") -> Execution:
    reference = Reference(header, solution) if solution or header else None
    execution = executor.execute(Program(code, tests, reference=reference))
    assert execution.apart
    return execution


CROSS = {
    "an argument is changed": ("def f(x):\n    x.append(3)", "xs = [1]\nf(xs)\nassert xs == [1, 3]"),
    "an argument inside another is changed": (
        "def f(x):\n    x['a'][0].add(2)\n    x['b'] = 1",
        "d = {'a': ({1}, 5)}\nf(d)\nassert d == {'a': ({1, 2}, 5), 'b': 1}",
    ),
    "an argument is returned": ("def f(x):\n    return x", "xs = [1]\nassert f(xs) is xs"),
    "an argument is returned in another": (
        "def f(x):\n    return [x, x]",
        "d = {}\nassert f(d)[0] is d and f(d)[1] is d",
    ),
    "arguments are exchanged": (
        "def f(x, y):\n    x[:], y[:] = [y], [x]",
        "a, b = [1], [2]\nf(a, b)\nassert a[0] is b and b[0] is a",
    ),
    "an argument is changed before an exception": (
        "def f(x):\n    x.clear()\n    raise ValueError",
        "xs = [1]\ntry:\n    f(xs)\nexcept ValueError:\n    pass\nassert xs == []",
    ),
    "bytes and arrays are changed": (
        "def f(b, a):\n    b.extend(b'x')\n    a.append(2)",
        "import array\nb, a = bytearray(b'y'), array.array('i', [1])\nf(b, a)\nassert b == b'yx' and list(a) == [1, 2]",
    ),
    "keywords": ("def f(a, *, b=2):\n    return a - b", "assert f(b=1, a=3) == 2"),
    "a generator is listed": ("def f(n):\n    for i in range(n):\n        yield i", "assert list(f(3)) == [0, 1, 2]"),
    "an endless generator": (
        "import itertools\ndef f():\n    return itertools.count()",
        "assert [x for _, x in zip(range(3), f())] == [0, 1, 2]",
    ),
    "a map is passed on": (
        "def f(x):\n    return map(abs, x)\ndef g(x):\n    return sum(x)",
        "assert g(f([-1, 2])) == 3",
    ),
    "an iterator as an argument": (
        "def f(x):\n    return sum(x)",
        "assert f(iter([1, 2])) == f(x for x in (1, 2)) == 3",
    ),
    "a type as an argument": (
        "def f(x, t):\n    return [v for v in x if type(v) is t]",
        "assert f([1, 'a'], str) == ['a']",
    ),
    "an exception has its class and text": (
        "class Mine(KeyError):\n    pass\ndef f():\n    raise Mine('no')",
        "try:\n    f()\n    assert False\nexcept KeyError as e:\n    assert str(e) == repr('no')",
    ),
    "an exception with a text of its own": (
        "class Mine(ValueError):\n    def __str__(self):\n        return 'mine'\ndef f():\n    raise Mine(1, 2)",
        "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'mine'",
    ),
    "singletons": ("def f(x):\n    return x > 1", "assert f(2) is True and f(1) is False"),
    "a value of the program, as it is now": (
        "count = 0\ndef f():\n    global count\n    count += 1",
        "f()\nf()\nassert count == 2",
    ),
    "a function handed on": ("def f(x):\n    return -x", "assert sorted([1, 3, 2], key=f) == [3, 2, 1]"),
    "numpy": ("import numpy as np\ndef f(x):\n    return np.array(x) * 2", "assert (f([1, 2]) == [2, 4]).all()"),
    "an honest fork in a function": (
        "import os\ndef f():\n    pid = os.fork()\n    if pid == 0:\n        os._exit(3)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])",
        "assert f() == 3",
    ),
    "a forked copy that returns too": (
        "import os\ndef f():\n    os.fork()\n    return 1",
        "assert f() == 1 and f() == 1",
    ),
    "a megabyte there and back": ("def f(x):\n    return x[::-1]", "s = 'ab' * 10 ** 6\nassert f(s) == s[::-1]"),
}


@pytest.mark.parametrize("kind", CROSS)
def test_what_crosses_arrives(executor: Executor, kind: str) -> None:
    execution = judged(executor, *CROSS[kind])
    assert execution.verdict is Verdict.PASSED, execution


@pytest.mark.parametrize(
    ("code", "tests", "verdicts", "word"),
    [
        ("def f():\n    return lambda: 1", "f()", "failed", "result of f.* at line 1 of the tests .*function"),
        ("def f():\n    return open('/dev/null')", "f()", "failed", "TextIOWrapper"),
        ("def f():\n    return 'x' * (100 << 20)", "f()", "failed", "text of"),
        (
            "def f():\n    x = []\n    for _ in range(10 ** 6):\n        x = [x]\n    return x",
            "f()",
            "failed",
            "one in another",
        ),
        ("def f(x):\n    x.append(print)", "f([])", "failed", "function print"),
        ("def f():\n    yield object()", "\nlist(f())", "failed", "an item at line 2 of the tests"),
        ("import os\ndef f():\n    os.close(3)\n    return 1", "f()", "error", "left with status 1"),
        ("import os\ndef f():\n    os.write(3, b'x' * 99)", "f()", "error", "garbled"),
        ("import os\ndef f():\n    while 1: os.write(3, b'x' * 9999)", "f()", "error", "garbled"),
        ("import os\nos.write(3, b'x')\ndef f():\n    pass", "f()", "error", "garbled"),
        ("import threading, os\ndef f():\n    os._exit(0)", "f()", "error", "left with status 0"),
        ("def f():\n    raise SystemExit(0)", "try:\n    f()\nexcept BaseException:\n    pass", "error", "SystemExit"),
        (
            "def f():\n    raise KeyboardInterrupt",
            "try:\n    f()\nexcept BaseException:\n    pass",
            "error",
            "Keyboard",
        ),
        ("def f(x):\n    raise StopIteration", "for _ in map(f, [1]): pass", "error", "StopIteration"),
        ("def f():\n    raise GeneratorExit", "f()", "error", "GeneratorExit"),
        ("def f():\n    return bytearray(4 << 30)", "f()", "out_of_memory", "MemoryError"),
        ("def f():\n    return range(10 ** 18)", "list(f())", "failed timeout", "MemoryError|tests used"),
        ("def f():\n    return range(10 ** 12)", "sum(f())", "timeout", "the tests used more than 2 s"),
        ("from decimal import Decimal\ndef f():\n    return Decimal('1e999999999')", "int(f())", "failed timeout", ""),
        (
            "def f():\n    return {i * (2 ** 61 - 1) for i in range(1, 4)}",
            "assert f() == 1",
            "failed",
            "AssertionError",
        ),
        ("def f():\n    while True: pass", "f()", "timeout", "more than 2 s of CPU time"),
        ("def f():\n    assert False, 'own'", "f()", "failed", "AssertionError at line 2 of the program: own"),
        ("def g(): pass", "f()", "error", "NameError.*'f'"),
        ("def f(): return 1", "f(object())", "error", "what is sent to the program at line 1 of the tests"),
    ],
)
def test_what_goes_wrong_between_them_is_a_sentence(
    executor: Executor, code: str, tests: str, verdicts: str, word: str
) -> None:
    execution = judged(executor, code, tests)
    assert execution.verdict.value in verdicts.split(), execution
    assert re.search(word, execution.detail), execution
    assert executor.execute(Program("def f(): return 1", "assert f() == 1")).passed


def test_colliding_hashes_take_the_judge_s_time_and_end_there(executor: Executor) -> None:
    # 1 and 1 + (2**61 - 1) have one hash, and so have all of these: comparing them is quadratic in whoever builds the set.
    code = "def g():\n    return [[i * (2 ** 61 - 1) + 1 for i in range(60_000)]]"
    execution = judged(executor, code, "for x in g():\n    len(set(x))\nassert False")
    assert execution.verdict is Verdict.TIMEOUT
    assert "the tests used" in execution.detail
    assert execution.seconds < 1.0  # the program's own time is its own


def test_recursion_in_a_call_goes_as_deep_as_from_a_module(executor: Executor) -> None:
    code = "def f(n=0):\n    try:\n        return f(n + 1)\n    except RecursionError:\n        return n\nhere = f()"
    assert judged(executor, code, "assert f() == here").passed


NAMES = {
    "the program's own sorted is not the tests'": (
        "def sorted(x):\n    return []\ndef f(x):\n    return x[::-1]",
        "assert sorted(f([2, 1])) == sorted([1, 2])",
        "def f(x):\n    return x",
        "",
    ),
    "a reference's function with a builtin's name is the program's": (
        "def sum(a, b):\n    return a * b",
        "assert sum(3, 4) == 12",
        "def sum(a, b):\n    return b * a",
        "",
    ),
    "a helper of the header is the judge's": (
        "def poly(x):\n    return 0\ndef zero():\n    return 5",
        "assert poly(zero()) == 0",
        "def poly(x):\n    return x - 5\ndef zero():\n    return 5",
        "def poly(x):\n    return x - 5\n",
    ),
    "a second function of the reference is the program's": (
        "def f(x):\n    return g(x)\ndef g(x):\n    return x + 1",
        "def check(candidate):\n    assert candidate(1) == g(1) == 2\ncheck(f)",
        "def g(x):\n    return x + 1\ndef f(x):\n    return g(x)",
        "",
    ),
    "a module that only the reference imports": (
        "def f(x):\n    return 2.0",
        "assert f(4) == root(4)",
        "from math import sqrt as root\ndef f(x):\n    return root(x)",
        "",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_whose_a_name_is(executor: Executor, kind: str) -> None:
    code, tests, solution, header = NAMES[kind]
    assert judged(executor, code, tests, solution, header).passed


def test_a_helper_of_the_header_that_the_program_replaced_does_not_help_it(executor: Executor) -> None:
    header = "def poly(x):\n    return x - 5\n"
    solution = header + "def zero():\n    return 5"
    code = "def poly(x):\n    return 0\ndef zero():\n    return 7"
    assert judged(executor, code, "assert poly(zero()) == 0", solution, header).verdict is Verdict.FAILED


TOGETHER = [
    "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2",
    "assert f.calls == 2",
    "import sys, io\nsys.stdout = io.StringIO()\nf()",
    "from unittest.mock import patch\nwith patch('builtins.input', lambda: 1):\n    f()",
    "def check(candidate):\n    assert candidate.__doc__\ncheck(f)",
    "assert f(lambda x: x) == 1",
    "def g(x):\n    return x\nassert f(g) == 1",
    "x = f()\nassert x.own_method() == 1",
    "try:\n    f()\nexcept Mine:\n    pass",
    "assert isinstance(f(), Mine)",
    "import asyncio\nassert asyncio.run(f()) == 1",
    "f()\nassert open('out').read() == 'x'",
    "assert eval('f(1)') == 1",
]
APART = [
    "assert f(1) == 2",
    "def check(candidate):\n    assert candidate([1]) == 1\ncheck(f)",
    "x = f()\nassert x.strip().upper() == 'A'",
    "import math\nassert math.isclose(f(1), 2)",
    "try:\n    f()\nexcept ValueError:\n    pass",
    "assert isinstance(f(), list)",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 2)\nT('test').debug()",
    "assert f(len, int) == 1",
    "def g(x):\n    return x\nassert sorted(f(1), key=g) == [1]",
    "assert Sum([1]) == 1",
]


@pytest.mark.parametrize("tests", TOGETHER)
def test_tests_that_need_more_than_plain_results_share_the_program_s_process(tests: str) -> None:
    found = plan(tests, "", None)
    assert found.reason
    assert found == Plan(found.reason, found.calls, found.values, found.imports)


@pytest.mark.parametrize("tests", APART)
def test_all_others_are_judged_apart(tests: str) -> None:
    assert plan(tests, "", None).reason == ""


def way_of(problem: Problem) -> Plan:
    return plan(problem.tests, "", Reference(problem.header, problem.solution))


def test_every_problem_of_humaneval_is_judged_apart_by_its_entry_point() -> None:
    for problem in humaneval.load().problems:
        found = way_of(problem)
        assert (found.reason, found.calls, found.values) == ("", (problem.entry_point,), ()), problem.task_id


def test_three_problems_of_mbpp_need_one_process() -> None:
    problems = [p for name in mbpp.SPLITS for p in mbpp.load(name).problems]
    reasons = {problem.task_id: way_of(problem).reason for problem in problems}
    assert {name for name, reason in reasons.items() if reason} == {"MBPP/367", "MBPP/601", "MBPP/927"}


@pytest.fixture
def waiting(descendants: Callable[[int], list[int]]) -> Iterator[tuple[Iterator[Any], list[int]]]:
    """The results of a run whose tests wait, and the processes: at the end program's slot, program, judge's slot, judge."""
    tests = "import time\nf()\ntime.sleep(3600)"
    with Executor(workers=1, cache=False, limits=Limits(cpu_seconds=5, wall_seconds=3600)) as executor:
        results = executor.run([Program("def f(): pass", "f()"), Program("def f(): pass", tests)])
        next(results)
        time.sleep(0.5)
        yield results, descendants(executor.pid)


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")


@NEEDS_PROC
def test_a_judge_that_is_killed_from_outside_is_a_fault_and_no_verdict(
    waiting: tuple[Iterator[Any], list[int]],
) -> None:
    results, everything = waiting
    assert len(set(everything[-4:])) == 4
    os.kill(everything[-1], signal.SIGKILL)
    with pytest.raises(ExecutorError, match="judge"):
        next(results)


@NEEDS_PROC
def test_judge_and_zygote_cannot_be_looked_into(
    waiting: tuple[Iterator[Any], list[int]], descendants: Callable[[int], list[int]]
) -> None:
    _, everything = waiting
    judge_slot, judge = everything[-2:]
    zygote = next(pid for pid in everything if not descendants(pid))
    for pid in (zygote, judge_slot, judge):
        # The memory of a process that cannot be dumped belongs to root, whatever id the process has.
        assert Path(f"/proc/{pid}/mem").stat().st_uid == 0
