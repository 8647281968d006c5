"""What programs run in, and how an end is told: their module, the verdict of an exception, the record. Standard library only.

What is needed after a program has run is bound to names of this module, which has builtins of its own: what the program
patches does not reach it.
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

PROGRAM, HEADER, TESTS, EXPRESSION = "<program>", "<header>", "<tests>", "<expression>"
PLACES = {PROGRAM: "the program", HEADER: "the problem's header", TESTS: "the tests", EXPRESSION: "the expression"}
_RECURSION_LIMIT = 1000  # CPython's default
FRAMES = (
    5  # from the slot's life to a program's first line, `exec` itself among them; a test compares with plain CPython
)
GONE = "gone"  # a judge's word, and no verdict: the program's own end says what it was


class Refused(Exception):
    """A program does not compile; the arguments are verdict and detail."""


# Every page of memory that a fork touches must be copied for it: the way to the program goes through few objects.


def run_in_one_process(request: dict[str, str], token: bytes, result_fd: int, value_bytes: int) -> NoReturn:
    """Run a program and its tests in this process, write the record, leave.

    Args:
        request: code, tests and expression (empty for none).
        token: proof of the harness, hexadecimal ASCII.
        result_fd: where the record goes.
        value_bytes: largest value of the expression, bytes.
    """
    mine = getpid()
    stdout = sys.stdout
    verdict, detail, value = "error", "", b""
    try:
        verdict, detail, value = _judge_together(request, value_bytes)
    except BaseException as fault:  # out of memory while reporting: what happened is still known
        verdict = "out_of_memory" if type(fault) is MemoryError else "error"
        detail = "the harness could not describe the exception"
    if getpid() != mine:  # a forked copy of the program came this far: only the original may report
        exit_now(0)
    report(token, verdict, detail, value, result_fd, stdout)


def report(token: bytes, verdict: str, detail: str, value: bytes, result_fd: int, stdout: object) -> NoReturn:
    """Write the record (token, verdict, detail and value, one a line) behind all output, and leave."""
    flush(stdout)
    try:
        record = memoryview(token + b"\n" + verdict.encode() + b"\n" + clean(detail) + b"\n" + value)
        while record:
            record = record[write(result_fd, record) :]
    except BaseException:  # the program closed the channel: without a record it did not pass
        exit_now(1)
    exit_now(0)


def flush(stdout: object) -> None:
    """Write out what the standard output of now, and the one there was at first, still hold."""
    for stream in (stdout,) if sys.stdout is stdout else (sys.stdout, stdout):
        try:
            stream.flush()  # type: ignore[union-attr]
        except BaseException:  # a closed or replaced stream is the program's own affair
            continue


def compiled(source: str, name: str) -> types.CodeType:
    """Source as code. It is text, so a comment that names an encoding is a comment.

    Raises:
        Refused: it does not compile.
    """
    mode = "eval" if name == EXPRESSION else "exec"
    try:
        # Leading blanks are an indentation error in eval mode and mean nothing in an expression.
        return compile(source.strip() if name == EXPRESSION else source, name, mode, 0, True)
    except MemoryError:
        raise Refused("out_of_memory", f"MemoryError while {PLACES[name]} was compiled") from None
    except RecursionError:
        raise Refused("error", f"RecursionError while {PLACES[name]} was compiled") from None
    except (SyntaxError, ValueError, OverflowError) as fault:
        line = f" at line {fault.lineno}" if isinstance(fault, SyntaxError) and fault.lineno else ""
        raise Refused("syntax_error", f"{type(fault).__name__}{line} of {PLACES[name]}") from None


def _judge_together(request: dict[str, str], value_bytes: int) -> tuple[str, str, bytes]:
    """Verdict, detail and value of a program that returns or raises, with its tests in its own process."""
    try:
        code, tests = compiled(request["code"], PROGRAM), compiled(request["tests"], TESTS)
        expression = compiled(request["expression"], EXPRESSION) if request["expression"] else None
    except Refused as refusal:
        return (*refusal.args, b"")
    namespace = MODULE.__dict__
    try:
        exec(code, namespace)
        exec(tests, namespace)
        if expression is None:
            return "passed", "", b""
        value = repr(eval(expression, namespace)).encode("utf-8", "backslashreplace")
    except BaseException as fault:
        return (*describe(fault), b"")
    return within(value, value_bytes)


def within(value: bytes, value_bytes: int) -> tuple[str, str, bytes]:
    """Verdict, detail and value where all went well, but for the length of the value."""
    if len(value) > value_bytes:
        return "output_limit", f"the value of the expression is longer than {value_bytes} bytes", b""
    return "passed", "", value


def describe(fault: BaseException) -> tuple[str, str]:
    """Verdict and detail of an exception, by what it is: a class may claim anything."""
    bases = type.__dict__["__mro__"].__get__(type(fault))
    if MemoryError in bases:
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
    if MemoryError in bases:
        verdict = "out_of_memory"
    else:
        verdict = "failed" if AssertionError in bases else "error"
    message = text_of(fault)
    return verdict, f"{detail}: {message[:120]}" if message else detail


def text_of(fault: BaseException) -> str:
    """What an exception says; nothing where it cannot be asked."""
    try:
        return str.__str__(str(fault))
    except BaseException:  # str() of a hostile exception: the detail does without
        return ""


def allow_recursion(frames: int) -> None:
    """Give programs that the caller forks as many free levels as they find under plain CPython.

    What stands below a program does not count: the frames down to the caller, and those from there.

    Args:
        frames: from the caller to a program's first line, `exec` itself among them.
    """
    frame: types.FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    sys.setrecursionlimit(_RECURSION_LIMIT + count + frames)


def clean(detail: str) -> bytes:
    """A detail as one bounded line."""
    return " ".join(detail.split())[:300].encode("utf-8", "backslashreplace")
