"""When programs agree: by their outputs on the tests' inputs, whatever these expect."""

import pytest

from qprobe_code_gen.programs import Problem, humaneval
from qprobe_code_gen.programs.agreement import OutputsAgree, calls_alone
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits

TESTS = "assert f(2) == {} and f(3) == 9, 'message'\nassert not f(4) != 16"


def agreement(*problems: Problem) -> OutputsAgree:
    return OutputsAgree(UnitTestReward(problems, PromptStyle("zero_shot"), Limits(cpu_seconds=0.5), workers=2))


def problem(tests: str, task_id: str = "p") -> Problem:
    return Problem(task_id, "Square.", "", "", '"""Square."""\n', "f", tests, "")


def keys(tests: str, *programs: str) -> list[object]:
    (found,) = agreement(problem(tests)).keys([[("p", program) for program in programs]])
    return list(found)


def test_programs_agree_where_every_output_is_the_same_and_not_where_one_differs() -> None:
    square, power, wrong, raises = keys(
        TESTS.format(4),
        "def f(x):\n    return x * x\n",
        "import math\ndef f(x):\n    return int(math.pow(x, 2))\n",
        "def f(x):\n    return x * x if x < 4 else 0\n",
        "def f(x):\n    if x == 3:\n        raise KeyError(x)\n    return x * x\n",
    )
    assert square == power
    assert len({square, wrong, raises, None}) == 4


def test_what_the_tests_expect_is_of_no_account() -> None:
    program = "def f(x):\n    return x * x\n"
    assert keys(TESTS.format(4), program) == keys(TESTS.format(5), program)


def test_what_returns_nothing_says_nothing() -> None:
    silent = keys(
        TESTS.format(4),
        "def g(x):\n    return x\n",  # not the function that is called
        "def f(x):\n    return x +\n",
        "def f(x):\n    raise ValueError\n",
        "def f(x):\n    while True: pass\n",
        "import os\ndef f(x):\n    os._exit(0)\n",
        "",
    )
    assert silent == [None] * 6
    (nothing,) = keys(TESTS.format(4), "def f(x):\n    pass\n")  # but None is an output
    assert nothing is not None


def test_an_address_and_a_random_input_are_no_differences() -> None:
    program = "def f(x):\n    return object()\n"
    tests = "import random\nfor _ in range(3):\n    x = random.random()\n    assert f(x) == 0"
    first, second = keys(tests, program, program + "\n")
    assert first == second
    first, second = keys(
        tests, "def f(x):\n    return x\n", "import random\nrandom.random()\ndef f(y):\n    return y\n"
    )
    assert first == second


@pytest.mark.parametrize(
    ("tests", "calls"),
    [
        ("assert set(f((1,))) == set(g(1))", ["f((1,))", "g(1)"]),
        ("assert sum(1, 2) == 3", ["sum(1, 2)"]),  # the function that is asked for has the name of a builtin
        ("def check(candidate):\n    assert h(candidate(1), 2) < e\ncheck(f)", ["candidate(1)"]),
        ("def check(candidate):\n    y = candidate(1)\n    assert y\ncheck(f)", ["candidate(1)"]),
        ("assert all(f(x) for x in y)\nassert f(f(1)) == 2", ["f(f(1))"]),
    ],
)
def test_the_outermost_calls_of_the_function_are_made(tests: str, calls: list[str]) -> None:
    made = calls_alone(tests)
    assert [line.strip() for line in made.splitlines() if "(lambda: " in line] == [
        f"_record_output(lambda: {call})" for call in calls
    ]
    assert "assert" not in made


def test_every_solution_of_humaneval_says_something() -> None:
    problems = list(humaneval.load().problems)[:60]
    assert "HumanEval/32" in [p.task_id for p in problems]  # its test calls the function outside of its assertion
    (found,) = agreement(*problems).keys([[(p.task_id, p.solution) for p in problems]])
    assert None not in found


def test_identity_holds_what_decides_the_outputs() -> None:
    own = agreement(problem(TESTS)).identity()
    assert own["agreement"] == "outputs"
    assert own["limits"]["cpu_seconds"] == 0.5
