"""The executor: gives programs to its zygote and streams back how they ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from . import hidden, wire
from .cache import Cache
from .kernel import LINUX
from .plan import Plan, plan
from .verdicts import Execution, ExecutorError, Layer, Limits, Program, Verdict

_START_SECONDS = 60.0  # a cold disk and a busy machine included
_SILENCE = 12.0  # times the wall limit: two that wait for a busy machine, one after the other
_GRACE_SECONDS = 60.0  # beyond the wall limit, before a silent zygote counts as hung

# The zygote imports its own files under their own names, but not the packages around them, which cost memory in every child.
BOOTSTRAP = """
import sys, types
for name, path in (("qprobe_code_gen", {package!r}), ("qprobe_code_gen.sandbox", {sandbox!r})):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from qprobe_code_gen.sandbox.zygote import main
del sys, types, name, path, module
main()
"""


class Executor:
    """Executes untrusted programs, many at a time, each in a confined process of its own.

    Args:
        workers: programs at the same time, >= 1.
        limits: what a program may use unless it brings its own limits.
        strict: refuse to start when a layer of isolation is missing.
        cache: execute the same program (code, tests, expression, limits) only once. Turn it off to measure time, or for
            programs that are meant to end differently each time.
        one_process: execute programs together with tests that need more of them than their functions' results (their own
            classes, their streams). Such a program can forge its verdict, which says so; False refuses it.

    Raises:
        ExecutorError: the zygote did not start, or `strict` and a layer is missing.
    """

    def __init__(
        self,
        workers: int = 2,
        limits: Limits | None = None,
        strict: bool = False,
        cache: bool = True,
        one_process: bool = True,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: give at least 1")
        self.workers = workers
        self.limits = Limits() if limits is None else limits
        self.one_process = one_process
        self._busy = False
        self._owner = os.getpid()
        self._next_ident = 0
        self._inbox = wire.Inbox()
        self._start()
        try:
            hello = self._receive(_START_SECONDS)
        except BaseException:
            self.close()
            raise
        self._use_cache = cache
        self._cache = Cache(hello["version"])
        self._scratch.extend([hello["scratch"]] if hello["scratch"] else [])
        self._layers = [
            Layer(name, name not in hello["problems"], stops, (hello["notes"] | hello["problems"]).get(name, ""))
            for name, stops in hello["layers"].items()
        ]
        missing = [f"{layer.name} ({layer.note})" for layer in self._layers if not layer.active]
        if strict and missing:
            self.close()
            raise ExecutorError(
                f"strict isolation was asked for and this machine lacks: {'; '.join(missing)}. "
                "Install it, or take strict=False and do without."
            )

    def _start(self) -> None:
        own, zygotes = map(_above_standard, socket.socketpair())
        parent = fcntl.fcntl(os.pidfd_open(os.getpid()), fcntl.F_DUPFD_CLOEXEC, 3) if LINUX else None
        packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
        settings = {
            "channel": zygotes.fileno(),
            "parent": parent,
            "workers": self.workers,
            "packages": packages,
            "temporary": tempfile.gettempdir(),
            "answers": hidden.caches() + hidden.registered(),
        }
        sandbox = Path(__file__).resolve().parent
        bootstrap = BOOTSTRAP.format(package=str(sandbox.parent), sandbox=str(sandbox))
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the order of a set of strings must not decide a verdict
            "MALLOC_ARENA_MAX": "1",  # an arena a thread would eat the address space that is limited
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the zygote
        self._zygote = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", bootstrap, json.dumps(settings)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[fd for fd in (zygotes.fileno(), parent) if fd is not None],
            start_new_session=True,  # Ctrl-C is for the executor, which then ends the zygote in order
            cwd="/",
        )
        zygotes.close()
        if parent is not None:
            os.close(parent)
        self._channel = own
        self._scratch: list[str] = []  # folders of programs, known when the zygote has started
        end = (self._zygote, own, self._errors, self._owner, self._scratch)
        self._finalizer = weakref.finalize(self, _shut_down, *end)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote and every program; safe to call twice."""
        self._finalizer()

    @property
    def pid(self) -> int:
        """The process that was started: the zygote, or the one that waits outside its pid namespace."""
        return self._zygote.pid

    def info(self) -> list[Layer]:
        """Which layers of isolation hold on this machine, what each stops, and why one is absent."""
        return list(self._layers)

    def run(self, programs: Iterable[Program]) -> Iterator[tuple[int, Execution]]:
        """Execute programs and yield each result as it comes.

        Args:
            programs: read only as far ahead as there is work, so a generator that is still sampling is welcome.

        Returns:
            (index in `programs`, Execution), in the order in which the programs end. Leaving the loop early kills what
            still runs.

        Raises:
            ExecutorError: the harness failed; no verdict is invented for what it was doing.
            ValueError: tests that need one process with their program, where `one_process` is False.
        """
        self._check_usable()
        self._busy = True
        try:
            yield from self._stream(iter(programs))
        finally:
            self._busy = False

    def check(self) -> None:
        """Execute a right and a wrong program, apart from their tests and together with them.

        Raises:
            ExecutorError: the harness fails, or gives a wrong verdict.
        """
        right, wrong = "def f(x):\n    return [x]", "def f(x):\n    return x"
        apart = "assert f(1) == [1]"
        ways = [apart, f"globals()\n{apart}"] if self.one_process else [apart]
        due = [(Program(code, tests), code is right) for tests in ways for code in (right, wrong)]
        for number, execution in self.run([program for program, _ in due]):
            program, passes = due[number]
            if execution.verdict is not (Verdict.PASSED if passes else Verdict.FAILED):
                raise ExecutorError(
                    f"the sandbox says {execution.verdict} ({execution.detail or 'without a detail'}) of {program.code!r} with "
                    f"the tests {program.tests!r}, which must be {'passed' if passes else 'failed'}: its verdicts cannot be "
                    "believed on this machine, or its limits are too tight for any program."
                )

    def execute(self, program: Program) -> Execution:
        """Execute one program."""
        for _, execution in self.run([program]):
            return execution
        raise ExecutorError("the zygote gave no answer")

    def _stream(self, programs: Iterator[Program]) -> Iterator[tuple[int, Execution]]:
        # Number of a request -> key of its program, why it is not judged apart.
        asked: dict[int, tuple[bytes, str]] = {}
        waiting: dict[bytes, list[int]] = {}  # key of a program -> indices that wait for it
        longest = 0.0
        # The least keeps every worker busy while this process does something else; several are sent at a time, so that the
        # zygote is not woken for every single one.
        least, most = 2 * self.workers, 4 * self.workers
        numbered = enumerate(programs)
        exhausted = False
        try:
            while True:
                wanted = most if len(asked) <= least else 0
                while not exhausted and len(asked) < wanted:
                    item = next(numbered, None)
                    if item is None:
                        exhausted = True
                        break
                    index, program = item
                    limits = program.limits or self.limits
                    longest = max(longest, limits.wall)
                    key = self._cache.key(program, limits) if self._use_cache else b"%d" % index
                    known = self._cache.get(key)
                    if known is not None:
                        yield index, known
                    elif key in waiting:
                        waiting[key].append(index)
                    else:
                        waiting[key] = [index]
                        way = self.plan(program)
                        asked[self._send_program(program, limits, way)] = key, way.reason
                if not asked:
                    return
                answer = self._receive(_SILENCE * longest + _GRACE_SECONDS)
                key, reason = asked.pop(answer["id"])
                execution = self._read(answer, reason)
                if self._use_cache and answer["settled"]:
                    self._cache.put(key, execution)
                for index in waiting.pop(key):
                    yield index, execution
        finally:
            if asked:
                self._cancel()

    def plan(self, program: Program) -> Plan:
        """How a program will be judged.

        Raises:
            ValueError: not apart, where `one_process` is False.
        """
        found = plan(program.tests, program.expression, program.reference)
        if found.reason and not self.one_process:
            raise ValueError(
                f"tests that use {found.reason} must run in one process with their program, which can then forge its "
                "verdict, and one_process=False refuses that: leave the problem out, or allow it."
            )
        return found

    def _send_program(self, program: Program, limits: Limits, way: Plan) -> int:
        ident = self._next_ident
        self._next_ident += 1
        request: dict[str, Any] = {"code": program.code, "tests": program.tests, "expression": program.expression}
        if not way.reason:
            header = program.reference.header if program.reference else ""
            request |= {"header": header, "imports": way.imports, "calls": way.calls, "values": way.values}
        self._send(
            {
                "id": ident,
                "request": json.dumps(request),  # read by the process that it is for, and by none between
                "expression": bool(program.expression),
                "together": bool(way.reason),
                "limits": vars(limits) | {"wall_seconds": limits.wall},
            }
        )
        return ident

    def _read(self, answer: wire.Message, reason: str) -> Execution:
        if "fault" in answer:
            raise ExecutorError(f"a program could not be executed: {answer['fault']}")
        detail = answer["detail"]
        if reason:
            detail = f"in one process, since the tests use {reason}" + (f"; {detail}" if detail else "")
        return Execution(
            Verdict(answer["verdict"]), answer["seconds"], detail[:300], answer["output"], answer["value"], not reason
        )

    def _cancel(self) -> None:
        # What was sent is answered or dropped; answers to a loop that was left must not reach the next one.
        if not self._finalizer.alive:
            return
        with contextlib.suppress(ExecutorError):
            self._send({"cancel": True})
            while "cancelled" not in self._receive(_GRACE_SECONDS):
                pass

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise ExecutorError("this executor belongs to the process that made it: make one in each process")
        if not self._finalizer.alive:
            raise ExecutorError("the executor is closed: make a new one")
        if self._busy:
            raise ExecutorError("the executor is still in a run: finish or close that iterator first")

    def _send(self, message: wire.Message) -> None:
        try:
            self._channel.sendall(wire.encode(message))
        except OSError as fault:
            raise self._broken(str(fault)) from fault

    def _receive(self, seconds: float) -> wire.Message:
        while True:
            if self._inbox.ready:
                return self._inbox.ready.popleft()
            if self._channel.gettimeout() != seconds:
                self._channel.settimeout(seconds)
            try:
                data = self._channel.recv(wire.PIECE)
            except TimeoutError as fault:
                raise self._broken(f"no answer for {seconds:.0f} s") from fault
            except OSError as fault:
                raise self._broken(str(fault)) from fault
            if not data:
                raise self._broken("it has ended")
            self._inbox.feed(data)

    def _broken(self, why: str) -> ExecutorError:
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode(errors="replace").strip()
        self.close()
        return ExecutorError(f"the executor's zygote failed ({why})" + (f"; it said:\n{said}" if said else ""))


def _above_standard(end: socket.socket) -> socket.socket:
    """The same socket under a number that none of the three standard streams has, though they may be closed."""
    fd = fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    end.close()
    return socket.socket(fileno=fd)


def _shut_down(
    zygote: subprocess.Popen[bytes], channel: socket.socket, errors: IO[bytes], owner: int, scratch: list[str]
) -> None:
    channel.close()
    errors.close()
    if os.getpid() != owner:  # a forked copy of the executor's process: the zygote is not its child
        return
    # The closed channel tells the zygote to kill and reap its programs and to leave.
    try:
        zygote.wait(timeout=10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.kill(zygote.pid, signal.SIGKILL)
        zygote.wait()
    for folder in scratch:  # only a killed zygote leaves one
        shutil.rmtree(folder, ignore_errors=True)
