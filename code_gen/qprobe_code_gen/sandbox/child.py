"""What happens in the forked child: run the program, then its tests, and say how it ended. Standard library only.

The child says "passed" by writing the token, which only the harness knows, after the tests have returned. An exit status
proves nothing: `os._exit(0)` is one line. What is needed after the program has run is bound to names of this module, which has
builtins of its own: what the program patches does not reach it.
"""

from __future__ import annotations

import builtins
import sys
import types
from os import _exit as exit_now
from os import getpid, write
from resource import RLIMIT_AS, getrlimit, setrlimit
from typing import NoReturn

SHARED_BUILTINS = builtins.__dict__  # what programs get, and may patch
# The program's module, made before the forks: each has a copy of its own, and no fork needs to enlarge `sys.modules`.
MODULE = types.ModuleType("program")
MODULE.__dict__["__builtins__"] = SHARED_BUILTINS
globals()["__builtins__"] = dict(SHARED_BUILTINS)  # what the functions below use

PROGRAM, TESTS, EXPRESSION = "<program>", "<tests>", "<expression>"
PLACES = {PROGRAM: "the program", TESTS: "the tests", EXPRESSION: "the expression"}
RECURSION_LIMIT = 1000  # CPython's default
FRAMES = 5  # run_next, become_program, run, judge and `exec` itself; a test compares with plain CPython


# Every page of memory that a fork touches must be copied for it: the way to the program goes through few objects.


def run(code: bytes, tests: bytes, expression: bytes, token: bytes, result_fd: int, value_bytes: int) -> NoReturn:
    """Run a program and its tests in this process, write the record, leave.

    Args:
        code: the program as UTF-8 (with surrogates passed on, which models do write).
        tests: the same.
        expression: the same; empty for none.
        token: proof of the harness, hexadecimal ASCII.
        result_fd: where the record goes: token, verdict, detail and value, one a line.
        value_bytes: largest value of the expression, bytes.
    """
    mine = getpid()
    stdout = sys.stdout
    verdict, detail, value = "error", "", b""
    try:
        verdict, detail, value = judge(code, tests, expression, value_bytes)
    except BaseException as fault:  # out of memory while reporting: what happened is still known
        verdict = "out_of_memory" if type(fault) is MemoryError else "error"
        detail = "the harness could not describe the exception"
    if getpid() != mine:  # a forked copy of the program came this far: only the original may report
        exit_now(0)
    for stream in (stdout,) if sys.stdout is stdout else (sys.stdout, stdout):
        try:
            stream.flush()
        except BaseException:  # a closed or replaced stream is the program's own affair
            continue
    try:
        record = memoryview(token + b"\n" + verdict.encode() + b"\n" + clean(detail) + b"\n" + value)
        while record:
            record = record[write(result_fd, record) :]
    except BaseException:  # the program closed the channel: without a record it did not pass
        exit_now(1)
    exit_now(0)


def judge(code: bytes, tests: bytes, expression: bytes, value_bytes: int) -> tuple[str, str, bytes]:
    """Verdict, detail and value of a program that returns or raises."""
    name = PROGRAM
    try:
        compiled_code = compile(code, PROGRAM, "exec", 0, True)
        name = TESTS
        compiled_tests = compile(tests, TESTS, "exec", 0, True)
        name = EXPRESSION
        # Leading blanks are an indentation error in eval mode and mean nothing in an expression.
        compiled_expression = compile(expression.strip(), EXPRESSION, "eval", 0, True) if expression else None
    except MemoryError:
        return "out_of_memory", f"MemoryError while {PLACES[name]} was compiled", b""
    except RecursionError:
        return "error", f"RecursionError while {PLACES[name]} was compiled", b""
    except (SyntaxError, ValueError, OverflowError) as fault:
        line = f" at line {fault.lineno}" if isinstance(fault, SyntaxError) and fault.lineno else ""
        return "syntax_error", f"{type(fault).__name__}{line} of {PLACES[name]}", b""
    namespace = MODULE.__dict__
    try:
        exec(compiled_code, namespace)
        exec(compiled_tests, namespace)
        if compiled_expression is None:
            return "passed", "", b""
        value = repr(eval(compiled_expression, namespace)).encode("utf-8", "backslashreplace")
    except BaseException as fault:
        return describe(fault)
    if len(value) > value_bytes:
        return "output_limit", f"the value of the expression is longer than {value_bytes} bytes", b""
    return "passed", "", value


def describe(fault: BaseException) -> tuple[str, str, bytes]:
    """Verdict and detail of an exception."""
    if isinstance(fault, MemoryError):
        setrlimit(RLIMIT_AS, (getrlimit(RLIMIT_AS)[1],) * 2)
    line, place = 0, ""
    trace = BaseException.__dict__["__traceback__"].__get__(fault)  # a subclass may shadow the attribute
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if filename in PLACES:
            line, place = trace.tb_lineno, PLACES[filename]
        trace = trace.tb_next
    kind = type.__dict__["__name__"].__get__(type(fault))
    detail = f"{kind} at line {line} of {place}" if place else str(kind)
    if isinstance(fault, AssertionError):
        verdict = "failed"
    elif isinstance(fault, MemoryError):
        verdict = "out_of_memory"
    else:
        verdict = "error"
    try:
        message = str(fault)
    except BaseException:  # str() of a hostile exception: the detail does without
        message = ""
    return verdict, f"{detail}: {message[:120]}" if message else detail, b""


def allow_recursion() -> None:
    """Give programs that the caller forks as many free levels as they find under plain CPython.

    What stands below a program does not count: the frames down to the caller, and `FRAMES` from there.
    """
    frame: types.FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    sys.setrecursionlimit(RECURSION_LIMIT + count + FRAMES)


def clean(detail: str) -> bytes:
    """A detail as one bounded line."""
    return " ".join(detail.split())[:300].encode("utf-8", "backslashreplace")
