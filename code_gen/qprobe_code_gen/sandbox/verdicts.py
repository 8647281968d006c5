"""What goes into the executor and what comes out: programs, limits, verdicts. Plain data, no behaviour of the system."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

JUDGE = 3  # version of what decides verdicts; it counts up with every change that may change one. 1: in one process


class ExecutorError(RuntimeError):
    """The harness itself failed. Never turned into a verdict: a broken harness must not look like a wrong program."""


class Verdict(StrEnum):
    """How an execution ended. Only `PASSED` means that program and tests ran to their end."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    SYNTAX_ERROR = "syntax_error"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    OUTPUT_LIMIT = "output_limit"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        cpu_seconds: processor time of the program and its descendants, seconds, > 0. The first limit: it does not move
            with the load of the machine.
        wall_seconds: time on the clock, seconds, >= cpu_seconds; None is four times cpu_seconds plus two. It stops programs
            that wait (sleep, a lock for ever); time in the queue for a processor does not count.
        memory_mib: address space of one process and resident memory of all its processes together, MiB, >= 64.
        output_kib: printed text (standard output and error, each) and the value of the expression, KiB, >= 1.
        processes: processes and threads together, >= 1.
        disk_mib: all files in the program's own /tmp, and the largest file, MiB, >= 1.
    """

    cpu_seconds: float = 3.0
    wall_seconds: float | None = None
    memory_mib: int = 1024
    output_kib: int = 1024
    processes: int = 64
    disk_mib: int = 64

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cpu_seconds) and self.cpu_seconds > 0):
            raise ValueError(f"cpu_seconds is {self.cpu_seconds}: give a positive number of seconds")
        if not self.wall >= self.cpu_seconds:
            raise ValueError(
                f"wall_seconds is {self.wall_seconds}, cpu_seconds is {self.cpu_seconds}: the wall limit must be the wider one"
            )
        for name, least in (("memory_mib", 64), ("output_kib", 1), ("processes", 1), ("disk_mib", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")

    @property
    def wall(self) -> float:
        """The wall-clock limit in force, seconds."""
        return 4 * self.cpu_seconds + 2 if self.wall_seconds is None else self.wall_seconds

    def relative_to(self, seconds: float, factor: float = 10.0, least: float = 0.5) -> Limits:
        """These limits with the CPU time bound to a reference solution's own time.

        Args:
            seconds: CPU time of the reference (`Execution.seconds`), >= 0.
            factor: how many times slower a program may be, >= 1.
            least: never less than this, seconds: below it, noise decides.

        Returns:
            New limits; the wall limit widens with the CPU limit (given or default).

        Raises:
            ValueError: an argument is out of its range.
        """
        if not (math.isfinite(seconds) and seconds >= 0 and math.isfinite(factor) and factor >= 1 and least > 0):
            raise ValueError(
                f"seconds={seconds}, factor={factor}, least={least}: need seconds >= 0, factor >= 1, least > 0"
            )
        cpu = max(least, factor * seconds)
        wall = None if self.wall_seconds is None else max(self.wall_seconds, cpu)
        return replace(self, cpu_seconds=cpu, wall_seconds=wall)


@dataclass(frozen=True)
class Reference:
    """What a problem says besides its tests: it decides which names of the tests are the program's.

    Args:
        header: Python source that the problem gives (imports, helper functions); the judge runs it before the tests.
        solution: a right program, never run here: the functions that its syntax tree defines are the program's.
    """

    header: str = ""
    solution: str = ""


@dataclass(frozen=True)
class Program:
    """One thing to execute.

    Args:
        code: Python source. `__name__` is "program", not "__main__".
        tests: Python source that calls the code's functions. It runs in a process of its own, unless it needs more of the
            program than its functions' results.
        expression: evaluated after the tests; its `repr` becomes `Execution.value`. Empty: nothing is evaluated.
        limits: this program's own limits; None takes the executor's.
        reference: of the problem; None: the program's are the names that neither the tests nor the built-ins define.
    """

    code: str
    tests: str = ""
    expression: str = ""
    limits: Limits | None = None
    reference: Reference | None = None

    def __post_init__(self) -> None:
        for name in ("code", "tests", "expression"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Program.{name} is {type(getattr(self, name)).__name__}: give Python source as str")


@dataclass(frozen=True)
class Execution:
    """How one program ended.

    Args:
        verdict: one of the seven.
        seconds: CPU time of the program and its waited-for descendants, seconds; not that of the judge.
        detail: "AssertionError at line 12 of the tests", at most 300 characters; empty when passed by a judge apart.
        output: what the program printed to standard output, bounded.
        value: `repr` of the program's expression, bounded; None when there was none or the program did not pass.
        apart: whether the tests ran in a process that the program could not reach; where not, `detail` says why.
    """

    verdict: Verdict
    seconds: float
    detail: str = ""
    output: str = ""
    value: str | None = None
    apart: bool = True

    @property
    def passed(self) -> bool:
        """Whether program and tests ran to their end."""
        return self.verdict is Verdict.PASSED


@dataclass(frozen=True)
class Layer:
    """One layer of isolation as it stands on this machine.

    Args:
        name: e.g. "pid namespace".
        active: whether it holds.
        stops: what it stops, in words.
        note: why it is absent or weaker than it could be; empty when there is nothing to say.
    """

    name: str
    active: bool
    stops: str
    note: str = ""
