"""What happens in the forked child: run the program, then its tests, and say how it ended. Standard library only.

The child says "passed" by writing the token, which only the harness knows, after the tests have returned. An exit status
proves nothing: `os._exit(0)` is one line. What is needed after the program has run is bound to names of this module, which has
builtins of its own: what the program patches does not reach it.
"""

from __future__ import annotations

import builtins
import sys
import types
from dataclasses import dataclass
from os import _exit as exit_now
from os import getpid, write
from resource import RLIMIT_AS, getrlimit, setrlimit
from typing import NoReturn

SHARED_BUILTINS = builtins.__dict__  # what programs get, and may patch
globals()["__builtins__"] = dict(SHARED_BUILTINS)  # what the functions below use

PROGRAM, TESTS, EXPRESSION = "<program>", "<tests>", "<expression>"
PLACES = {PROGRAM: "the program", TESTS: "the tests", EXPRESSION: "the expression"}
RECURSION_LIMIT = 1000  # CPython's default
EXEC_FRAMES = 1  # the level that `exec` itself adds; a test compares with plain CPython


@dataclass(frozen=True)
class Source:
    """The three texts of a program as UTF-8 (with surrogates passed on, which models do write)."""

    code: bytes
    tests: bytes
    expression: bytes


def run(source: Source, token: bytes, result_fd: int, value_bytes: int) -> NoReturn:
    """Run a program and its tests in this process, write the record, leave.

    Args:
        source: the program.
        token: proof of the harness, hexadecimal ASCII.
        result_fd: where the record goes: token, verdict, detail and value, one a line.
        value_bytes: largest value of the expression, bytes.
    """
    mine = getpid()
    stdout = sys.stdout
    verdict, detail, value = "error", "", b""
    try:
        verdict, detail, value = judge(source, value_bytes)
    except BaseException as fault:  # out of memory while reporting: what happened is still known
        verdict = "out_of_memory" if type(fault) is MemoryError else "error"
        detail = "the harness could not describe the exception"
    if getpid() != mine:  # a forked copy of the program came this far: only the original may report
        exit_now(0)
    for stream in (sys.stdout, stdout):
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


def judge(source: Source, value_bytes: int) -> tuple[str, str, bytes]:
    """Verdict, detail and value of a program that returns or raises."""
    name = PROGRAM
    try:
        code = compile(source.code, PROGRAM, "exec", 0, True)
        name = TESTS
        tests = compile(source.tests, TESTS, "exec", 0, True)
        name = EXPRESSION
        # Leading blanks are an indentation error in eval mode and mean nothing in an expression.
        expression = compile(source.expression.strip(), EXPRESSION, "eval", 0, True) if source.expression else None
    except MemoryError:
        return "out_of_memory", f"MemoryError while {PLACES[name]} was compiled", b""
    except RecursionError:
        return "error", f"RecursionError while {PLACES[name]} was compiled", b""
    except (SyntaxError, ValueError, OverflowError) as fault:
        line = f" at line {fault.lineno}" if isinstance(fault, SyntaxError) and fault.lineno else ""
        return "syntax_error", f"{type(fault).__name__}{line} of {PLACES[name]}", b""
    module = types.ModuleType("program")
    module.__dict__["__builtins__"] = SHARED_BUILTINS
    sys.modules["program"] = module  # dataclasses, pickle and typing look a class's module up
    namespace = module.__dict__
    # A program must find as many free levels as under plain CPython: what stands below it does not count.
    sys.setrecursionlimit(RECURSION_LIMIT + depth() + EXEC_FRAMES)
    try:
        exec(code, namespace)
        exec(tests, namespace)
        if expression is None:
            return "passed", "", b""
        value = repr(eval(expression, namespace)).encode("utf-8", "backslashreplace")
    except BaseException as fault:
        return describe(fault)
    if len(value) > value_bytes:
        return "output_limit", f"the value of the expression is longer than {value_bytes} bytes", b""
    return "passed", "", value


def text(source: bytes) -> str:
    """Source as the str it was."""
    return source.decode("utf-8", "surrogatepass")


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


def depth() -> int:
    """Number of Python frames below and including the caller."""
    frame: types.FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    return count


def clean(detail: str) -> bytes:
    """A detail as one bounded line."""
    return " ".join(detail.split())[:300].encode("utf-8", "backslashreplace")
