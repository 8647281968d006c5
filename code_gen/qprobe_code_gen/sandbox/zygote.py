"""The zygote: the event loop that gives programs and tests to their processes, watches them, and sees them reaped.

It is started by the executor as a fresh interpreter (never forked from a process that may hold threads and a loaded torch),
and imports what tests usually import. Then it forks once: one half is the nursery, from which all slots are forked, the
other is this loop. It forks no slot itself: what it was sent would stay in the memory of every fork, and a process that
forks pays for every page it touches afterwards. Standard library only: what it loads, every fork copies.
"""

# ruff: noqa: PTH102, PTH106
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from typing import Any, NoReturn

from . import kernel, nursery, slots, wire
from .child import MODULE
from .layers import STOPS, Bounds, Isolation
from .nursery import Nursery
from .running import End, Running
from .slots import CANDIDATE, JUDGE, TOGETHER, Slot

# Imported once here instead of once in every program: what HumanEval and MBPP programs and their tests ask for. Not hashlib,
# which brings OpenSSL, nor numpy: every fork would pay for them.
PRELOADED = """
    abc bisect cmath collections collections.abc copy dataclasses datetime decimal enum fractions functools heapq io
    itertools math numbers operator os random re statistics string struct sys time traceback types typing warnings
"""
_FIRST_LOOK = 0.02  # seconds; most programs have ended by then and are never looked at
_LOOK_EVERY = 0.05  # seconds between looks at a program that goes on
_GRACE = 1.0  # seconds that a program has to write out what it printed, once it has been judged
_MOST_QUEUED = 5.0  # times the wall limit that a program may wait for a processor on top of it
ATTEMPTS = 250  # to start a program, with 20 ms between: a machine that is full for seconds is no reason to stop


class _Zygote:
    """The event loop.

    Args:
        channel: connected socket to the executor.
        parent: a descriptor that becomes readable when the executor's process dies; None where there is none.
        workers: programs at the same time.
        isolation: what holds.
        nursery: makes and ends slots.
    """

    def __init__(
        self, channel: socket.socket, parent: int | None, workers: int, isolation: Isolation, nursery: Nursery
    ) -> None:
        self.channel = channel
        self.workers = workers
        self.isolation = isolation
        self.nursery = nursery
        self.inbox = wire.Inbox()
        self.outbox = bytearray()
        self.waiting: deque[dict[str, Any]] = deque()
        self.programs: list[Running] = []
        self.running: dict[int, Running] = {}  # by the pids of their slots
        self.idle: list[Slot] = []
        self.slots_made = 0
        self.retry_at = 0.0
        self.failures = 0
        self.channel.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.channel, selectors.EVENT_READ, "channel")
        if parent is not None:
            self.selector.register(parent, selectors.EVENT_READ, "parent")
        hello = {"problems": isolation.problems, "notes": isolation.notes, "layers": STOPS}
        self.send(hello | {"version": sys.version, "scratch": isolation.scratch})

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message to the executor."""
        self.outbox += wire.encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now; the selector says when it takes more."""
        wanted = selectors.EVENT_READ
        try:
            while self.outbox:
                del self.outbox[: self.channel.send(self.outbox)]
        except BlockingIOError:
            wanted |= selectors.EVENT_WRITE
        except OSError:  # the executor is gone: nobody is left to answer
            self.leave()
        if self.selector.get_key(self.channel).events != wanted:
            self.selector.modify(self.channel, wanted, "channel")

    def leave(self) -> None:
        """End every program, every slot and this process."""
        self.cancel()
        for slot in list(self.idle):
            self.discard(slot)
        with contextlib.suppress(OSError):
            os.rmdir(self.isolation.scratch or "/")
        os._exit(0)

    def serve(self) -> NoReturn:
        """The loop."""
        while True:
            self.fill()
            for key, mask in self.selector.select(self.pause()):
                if key.data == "channel":
                    if mask & selectors.EVENT_WRITE:
                        self.flush()
                    if mask & selectors.EVENT_READ:
                        self.receive()
                elif key.data == "parent":
                    self.leave()
                elif isinstance(key.data, Slot):
                    if key.data.control.fileno() >= 0:  # else it was discarded for an event before this one
                        self.hear(key.data)
                else:
                    running, name = key.data
                    running.drain(name, self.selector)
            now = time.monotonic()
            for running in self.programs:
                if now >= running.next_look:
                    self.look(running, now)

    def pause(self) -> float | None:
        """Seconds until something must be done without being woken; None: for ever."""
        times = [running.next_look for running in self.programs]
        if self.waiting and len(self.programs) < self.workers:
            times.append(self.retry_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def receive(self) -> None:
        """Take programs and cancellations from the executor."""
        try:
            data = self.channel.recv(wire.PIECE)
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
                self.send({"cancelled": True})
            else:
                self.waiting.append(message)

    def cancel(self) -> None:
        """Drop what waits, kill and reap what runs, answer nothing."""
        self.waiting.clear()
        for running in list(self.programs):
            self.abandon(running)

    def abandon(self, running: Running) -> None:
        """Kill and reap a program without an answer."""
        running.close_all(self.selector)
        self.programs.remove(running)
        for slot in running.slots:
            if self.running.get(slot.pid) is running:
                self.discard(slot)

    def fill(self) -> None:
        """Start programs while a worker is free."""
        while self.waiting and len(self.programs) < self.workers and time.monotonic() >= self.retry_at:
            message = self.waiting.popleft()
            try:
                self.start(message)
            except OSError as fault:
                self.again(message, f"no program could be started: {fault}")

    def again(self, message: dict[str, Any], why: str) -> None:
        """Put a program that could not be started back, or answer that the harness has failed."""
        self.failures += 1  # until a program has ended: that one could be given to a slot says nothing yet
        self.retry_at = time.monotonic() + 0.02
        if self.failures <= ATTEMPTS:
            self.waiting.appendleft(message)
        else:
            self.failures = 0
            self.send({"id": message["id"], "fault": why})

    def start(self, message: dict[str, Any]) -> None:
        """Give one program, and its tests, to slots.

        Raises:
            OSError: no further process or pipe can be made; try again later.
        """
        limits = message["limits"]
        bounds = Bounds(limits["memory_mib"], limits["processes"], limits["disk_mib"])
        token = os.urandom(16).hex().encode()
        body = message["request"].encode("ascii")
        numbers = (limits["cpu_seconds"], limits["output_kib"] << 10)
        taken: list[Slot] = []
        readers: list[int] = []
        writers: list[int] = []
        channel: socket.socket | None = None
        try:
            for _ in range(3):
                reader, writer = os.pipe()
                readers.append(reader)
                writers.append(writer)
            if message["together"]:
                taken.append(self.take_slot(TOGETHER, bounds))
                slots.send(taken[0], *numbers, token, body, writers)
            else:
                taken.append(self.take_slot(CANDIDATE, bounds))
                taken.append(self.take_slot(JUDGE, bounds))
                channel, end = socket.socketpair()
                with end:
                    slots.send(taken[1], *numbers, token, body, [*writers, channel.fileno()])
                    slots.send(taken[0], *numbers, b"", b"", [*writers[:2], end.fileno()])
        except OSError:
            for slot in taken:
                self.discard(slot)
            for fd in readers:
                os.close(fd)
            if channel is not None:
                channel.close()
            raise
        finally:
            for fd in writers:
                os.close(fd)
        now = time.monotonic()
        judge = taken[1] if len(taken) > 1 else None
        running = Running(message, taken[0], judge, token, readers, channel, now, now + _FIRST_LOOK)
        self.programs.append(running)
        self.running.update(dict.fromkeys([slot.pid for slot in taken], running))

    def take_slot(self, kind: str, bounds: Bounds) -> Slot:
        """An idle slot of this kind with these bounds, or a new one.

        Raises:
            OSError: no further process can be started.
        """
        alike = [slot for slot in self.idle if slot.kind == kind]
        for slot in alike:
            if slot.bounds == bounds:
                self.idle.remove(slot)
                return slot
        if alike:
            self.discard(alike[0])
        folder = ""
        if self.isolation.scratch:
            self.slots_made += 1
            folder = f"{self.isolation.scratch}/{self.slots_made}"
            os.mkdir(folder, 0o700)
        try:
            slot = self.nursery.make(kind, bounds, folder)
        except OSError:
            if folder:
                os.rmdir(folder)
            raise
        self.selector.register(slot.control, selectors.EVENT_READ, slot)
        return slot

    def discard(self, slot: Slot) -> None:
        """End a slot, and remove what its programs left behind."""
        self.running.pop(slot.pid, None)
        if slot in self.idle:
            self.idle.remove(slot)
        self.selector.unregister(slot.control)
        self.nursery.end(slot)
        if slot.folder:
            remove(slot.folder)

    def hear(self, slot: Slot) -> None:
        """Take a slot's reply, or the end of its socket, for the end of what ran in it."""
        try:
            reply = slot.control.recv(slots.LONGEST_REPLY)
        except ConnectionResetError:  # it ended with a request unread
            reply = b""
        running = self.running.pop(slot.pid, None)
        status, seconds, then = signal.SIGKILL, 0.0, slots.ENDS
        if len(reply) >= slots.REPLY.size:
            status, seconds, then = slots.REPLY.unpack_from(reply)
        if running is not None and slot.pid in running.killed:
            then = slots.ENDS  # it may have said otherwise just before
        if then == slots.AGAIN:
            self.idle.append(slot)
        else:
            self.discard(slot)
        if running is None:
            return
        if why := slots.fault_in(reply):
            self.abandon(running)
            self.again(running.message, why)
        elif running.ended(slot, End(status, seconds), time.monotonic(), _GRACE):
            self.conclude(running)

    def conclude(self, running: Running) -> None:
        """All processes of a program have ended: answer, or try once more."""
        self.failures = 0
        self.programs.remove(running)
        running.drain_all(self.selector)
        if running.may_try_again():
            running.message["second"] = True
            self.waiting.appendleft(running.message)
        else:
            self.send(running.answer())

    def look(self, running: Running, now: float) -> None:
        """Watch a program that has not ended at once: its outputs, its clocks, its descendants."""
        running.watch(self.selector)
        limits = running.limits
        cpu_left = limits["cpu_seconds"]
        processes = self.isolation.processes
        alive = [slot for slot in running.slots if slot.pid not in running.ends]
        if processes is not None:
            for slot in alive:
                usage = running.look(slot, processes)
                left = limits["cpu_seconds"] - usage.cpu_seconds
                cpu_left = min(cpu_left, left)
                if usage.processes > 1 and usage.memory > limits["memory_mib"] << 20:
                    detail = f"more than {limits['memory_mib']} MiB in {usage.processes} processes"
                    running.stop("out_of_memory", detail)
                if left <= 0:
                    running.stop("timeout", running.too_slow(slot))
        wall_left = running.started + limits["wall_seconds"] - now
        finish_left = running.finish_by - now
        if min(wall_left, finish_left) <= 0 and processes is not None:
            # Waiting for a processor is the machine's doing; still, nothing may hold a worker for ever.
            queued = sum(processes.queued_below(slot.name_in_proc) for slot in alive)
            wall_left += min(queued, _MOST_QUEUED * limits["wall_seconds"])
            finish_left += min(queued, _MOST_QUEUED * _GRACE)
        if finish_left <= 0:
            running.hurry()
        elif wall_left <= 0 and running.finish_by == float("inf"):
            running.stop("timeout", f"more than {limits['wall_seconds']:g} s on the clock", settled=False)
        running.next_look = now + max(0.005, min(_LOOK_EVERY, wall_left, cpu_left, finish_left))


def remove(folder: str) -> None:
    """Remove a program's folder, however deep and whatever its modes."""
    try:
        os.rmdir(folder)  # most leave nothing
    except OSError:
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            pid = os.posix_spawnp(command[0], command, {"PATH": "/usr/bin:/bin"})
            os.waitpid(pid, 0)


def main() -> None:
    """Entry of the process: settings as JSON in the only argument."""
    settings = json.loads(sys.argv[1])
    sys.argv[:] = [""]
    sys.path[:] = [*sys.path, *settings["packages"]]
    os.umask(0o022)  # the caller's would be that of the programs' files, and of the tree of files that they need
    for name in PRELOADED.split():
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # three descriptors a worker; some systems refuse their own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16) if hard > 0 else 1 << 16, hard))
    isolation = Isolation(settings["workers"], settings["temporary"], settings["answers"])
    isolation.prepare()
    # Programs shall import what they name, not what the harness is made of, and not be told how it was started.
    for name in [name for name in sys.modules if name.split(".")[0] == "qprobe_code_gen"]:
        del sys.modules[name]
    sys.modules[MODULE.__name__] = MODULE  # dataclasses, pickle and typing look a class's module up
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"})
    gc.collect()
    gc.freeze()  # the collector then does not touch, and so does not copy, the pages that forks share
    part(settings["channel"], settings["parent"], settings["workers"], isolation)


def part(channel: int, parent: int | None, workers: int, isolation: Isolation) -> NoReturn:
    """Fork into nursery and event loop, before the first message has been read."""
    own, nurserys = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if kernel.LINUX else socket.SOCK_DGRAM)
    pid = os.fork()
    if pid:
        for fd in (channel, parent):
            if fd is not None:
                os.close(fd)
        own.close()
        nursery.live(nurserys, pid, isolation)
    nurserys.close()
    if kernel.LINUX:
        isolation.die_with_the_nursery()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # every test and token passes through here
    _Zygote(socket.socket(fileno=channel), parent, workers, isolation, Nursery(own)).serve()
