"""The zygote: a small process that forks once per program, watches the children and always reaps them.

It is started by the executor as a fresh interpreter (never forked from a process that may hold threads and a loaded torch),
imports what tests usually import, and then is one event loop. Standard library only: what it loads, every child pays for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from . import child, wire
from .layers import STOPS, Bounds, Isolation

PRELOADED = (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy csv dataclasses datetime "
    "decimal enum fractions functools hashlib heapq io itertools json math numbers operator os os.path pprint queue random "
    "re statistics string struct sys textwrap threading time traceback types typing unicodedata warnings"
).split()
FIRST_LOOK = 0.02  # seconds; most programs have ended by then and are never looked at
LOOK_EVERY = 0.05  # seconds between looks at a program that goes on
FORK_ATTEMPTS = 50  # with 20 ms between: a machine that is full for a second is no reason to stop


@dataclass
class Running:
    """A program that is being executed."""

    ident: int
    pid: int
    token: bytes
    limits: dict[str, Any]
    fds: dict[str, int]
    started: float
    next_look: float
    has_expression: bool
    data: dict[str, bytearray] = field(
        default_factory=lambda: {"out": bytearray(), "err": bytearray(), "result": bytearray()}
    )
    watched: set[str] = field(default_factory=set)
    verdict: str = ""
    detail: str = ""


class Zygote:
    """The event loop.

    Args:
        channel: connected socket to the executor.
        parent: a descriptor that becomes readable when the executor's process dies; None where there is none.
        workers: programs at the same time.
    """

    def __init__(self, channel: socket.socket, parent: int | None, workers: int) -> None:
        self.channel = channel
        self.workers = workers
        self.isolation = Isolation(workers)
        self.inbox = wire.Inbox()
        self.outbox = bytearray()
        self.waiting: deque[dict[str, Any]] = deque()
        self.running: dict[int, Running] = {}
        self.selector = selectors.DefaultSelector()
        self.retry_fork_at = 0.0
        self.fork_failures = 0
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else os.pipe()
        os.set_blocking(wake_reader, False)
        os.set_blocking(wake_writer, False)
        self.wake = wake_reader
        self.wake_writer = wake_writer
        self.selector.register(wake_reader, selectors.EVENT_READ, "wake")
        self.selector.register(channel, selectors.EVENT_READ, "channel")
        if parent is not None:
            self.selector.register(parent, selectors.EVENT_READ, "parent")
        self.null = os.open(os.devnull, os.O_RDONLY)

    def prepare(self) -> None:
        """Put the shared layers on and tell the executor what holds."""
        self.isolation.prepare()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_writer, warn_on_full_buffer=False)
        self.channel.setblocking(False)
        self.send({"problems": self.isolation.problems, "layers": STOPS, "version": sys.version})

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message to the executor."""
        self.outbox += wire.encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now; the selector says when it takes more."""
        try:
            while self.outbox:
                del self.outbox[: self.channel.send(self.outbox)]
        except BlockingIOError:
            self.selector.modify(self.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, "channel")
        except OSError:  # the executor is gone: nobody is left to answer
            self.leave()
        else:
            self.selector.modify(self.channel, selectors.EVENT_READ, "channel")

    def leave(self) -> None:
        """End every program and this process."""
        for running in list(self.running.values()):
            self.kill(running)
        for pid in list(self.running):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        os._exit(0)

    def serve(self) -> None:
        """The loop; it never returns."""
        while True:
            self.fill()
            events = self.selector.select(self.pause())
            for key, mask in events:
                if key.data == "channel":
                    if mask & selectors.EVENT_WRITE:
                        self.flush()
                    if mask & selectors.EVENT_READ:
                        self.receive()
                elif key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake, 4096)
                elif key.data == "parent":
                    self.leave()
                else:
                    running, name = key.data
                    self.drain(running, name)
            self.reap()
            now = time.monotonic()
            for running in list(self.running.values()):
                if now >= running.next_look:
                    self.look(running, now)

    def pause(self) -> float | None:
        """Seconds until something must be done without being woken."""
        times = [running.next_look for running in self.running.values()]
        if self.waiting and len(self.running) < self.workers:
            times.append(self.retry_fork_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def receive(self) -> None:
        """Take programs and cancellations from the executor."""
        try:
            data = self.channel.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.leave()
        self.inbox.feed(data)
        while self.inbox.ready:
            message = self.inbox.ready.popleft()
            if "cancel" in message:
                self.cancel()
            else:
                self.waiting.append(message)

    def cancel(self) -> None:
        """Kill and reap everything, then say so."""
        self.waiting.clear()
        for running in self.running.values():
            self.stop(running, "error", "cancelled")
        while self.running:
            self.reap(block=True)
        self.send({"cancelled": True})

    def fill(self) -> None:
        """Start programs while there is room."""
        while self.waiting and len(self.running) < self.workers and time.monotonic() >= self.retry_fork_at:
            try:
                self.start(self.waiting[0])
            except OSError as fault:
                self.fork_failures += 1
                self.retry_fork_at = time.monotonic() + 0.02
                if self.fork_failures > FORK_ATTEMPTS:
                    self.send(
                        {"id": self.waiting.popleft()["id"], "fault": f"no new process could be started: {fault}"}
                    )
                    self.fork_failures = 0
                return
            self.fork_failures = 0
            self.waiting.popleft()

    def start(self, message: dict[str, Any]) -> None:
        """Fork one program."""
        limits = message["limits"]
        token = os.urandom(16).hex().encode()
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
            started = time.monotonic()
            pid = self.isolation.fork()
        except OSError:
            for fd in pipes:
                os.close(fd)
            raise
        if pid == 0:
            self.become_program(message, token, pipes)
        for fd in pipes[1::2]:
            os.close(fd)
        fds = dict(zip(("out", "err", "result"), pipes[::2], strict=True))
        for fd in fds.values():
            os.set_blocking(fd, False)
        self.running[pid] = Running(
            message["id"], pid, token, limits, fds, started, started + FIRST_LOOK, bool(message["expression"])
        )

    def become_program(self, message: dict[str, Any], token: bytes, pipes: list[int]) -> None:
        """In the child: confine it and run the program; never returns."""
        limits = message["limits"]
        result = 3
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            bounds = Bounds(limits["cpu_seconds"], limits["memory_mib"], limits["processes"], limits["disk_mib"])
            self.isolation.confine(bounds)
            # High copies first: one of the pipes' own numbers may be among 0 to 3.
            ends = [os.dup(fd) for fd in (self.null, pipes[1], pipes[3], pipes[5])]
            for fd, copy in enumerate(ends):
                os.dup2(copy, fd)
            os.closerange(4, 1 << 20)
        except BaseException as fault:
            os.write(pipes[5], token + b"\nfault\n" + repr(fault)[:300].encode() + b"\n")
            os._exit(1)
        source = child.Source(message["code"], message["tests"], message["expression"])
        child.run(source, token, result, limits["output_kib"] << 10)

    def look(self, running: Running, now: float) -> None:
        """Watch a program that has not ended at once: its clocks, its outputs, its descendants."""
        for name in running.fds.keys() - running.watched:
            running.watched.add(name)
            self.selector.register(running.fds[name], selectors.EVENT_READ, (running, name))
        limits = running.limits
        wall_left = running.started + limits["wall_seconds"] - now
        cpu_left = limits["cpu_seconds"] - self.cpu_seconds(running)
        if cpu_left <= 0:
            self.stop(running, "timeout", f"more than {limits['cpu_seconds']:g} s of CPU time")
        elif wall_left <= 0:
            self.stop(running, "timeout", f"more than {limits['wall_seconds']:g} s on the clock")
        running.next_look = now + max(0.001, min(LOOK_EVERY, wall_left, cpu_left))

    def cpu_seconds(self, running: Running) -> float:
        """CPU time of the program's first process so far, all its threads."""
        try:
            return time.clock_gettime((~running.pid << 3) | 2)  # the kernel's name for a process's CPU clock
        except OSError:
            return 0.0

    def drain(self, running: Running, name: str) -> None:
        """Read what a program has written, up to its limit."""
        fd = running.fds.get(name)
        if fd is None:
            return
        limit = (running.limits["output_kib"] << 10) + (4096 if name == "result" else 0)
        data = running.data[name]
        while True:
            try:
                piece = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not piece:
                self.close(running, name)
                return
            data += piece
            if len(data) > limit:
                del data[limit:]
                kind = "the result" if name == "result" else "an output"
                self.stop(running, "output_limit", f"{kind} is longer than {running.limits['output_kib']} KiB")
                self.close(running, name)
                return

    def close(self, running: Running, name: str) -> None:
        """Stop reading one of a program's pipes."""
        fd = running.fds.pop(name)
        if name in running.watched:
            self.selector.unregister(fd)
        os.close(fd)

    def stop(self, running: Running, verdict: str, detail: str) -> None:
        """Kill a program for a reason; the first reason stays."""
        if not running.verdict:
            running.verdict, running.detail = verdict, detail
        self.kill(running)

    def kill(self, running: Running) -> None:
        """Kill a program and its process group (in a pid namespace the kernel kills the rest)."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(running.pid, signal.SIGKILL)

    def reap(self, block: bool = False) -> None:
        """Collect the children that have ended.

        Args:
            block: wait until all have.
        """
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if block else os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            running = self.running.pop(pid, None)
            if running is not None:
                self.finish(running, status, usage.ru_utime + usage.ru_stime)

    def finish(self, running: Running, status: int, seconds: float) -> None:
        """Read what is left, decide the verdict, answer."""
        for name in list(running.fds):
            self.drain(running, name)
        for name in list(running.fds):
            self.close(running, name)
        verdict, detail, value = self.judge(running, status, seconds)
        answer: dict[str, Any] = {"id": running.ident, "seconds": seconds}
        if verdict == "fault":
            answer["fault"] = detail
        else:
            output = running.data["out"].decode("utf-8", "replace")
            answer |= {"verdict": verdict, "detail": detail, "output": output, "value": value}
        self.send(answer)

    def judge(self, running: Running, status: int, seconds: float) -> tuple[str, str, str | None]:
        """Verdict, detail and value of a program that has ended."""
        if running.verdict:
            return running.verdict, running.detail, None
        record = bytes(running.data["result"]).split(b"\n", 3)
        if seconds > running.limits["cpu_seconds"]:
            return "timeout", f"more than {running.limits['cpu_seconds']:g} s of CPU time", None
        if len(record) == 4 and record[0] == running.token:
            has_value = record[1] == b"passed" and running.has_expression
            value = record[3].decode("utf-8", "replace") if has_value else None
            return record[1].decode(), record[2].decode(), value
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return "error", f"left with status {code} before the tests had returned", None
        if -code == signal.SIGKILL:
            return "out_of_memory", "killed by the kernel", None
        if -code == signal.SIGXCPU:
            return "timeout", f"more than {running.limits['cpu_seconds']:g} s of CPU time", None
        return "error", f"died of {signal.Signals(-code).name}", None


def main() -> None:
    """Entry of the process: settings as JSON in the only argument."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = [*sys.path, *settings["packages"]]
    for name in (*PRELOADED, *settings["preload"]):
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    channel = socket.socket(fileno=settings["channel"])
    channel.set_inheritable(False)
    zygote = Zygote(channel, settings["parent"], settings["workers"])
    zygote.prepare()
    for name in [name for name in sys.modules if name.split(".")[0] == "qprobe_code_gen"]:
        del sys.modules[name]  # programs import what they name, not what the harness is made of
    gc.collect()
    gc.freeze()  # the collector does not touch, and so does not copy, the pages that children share
    zygote.serve()
