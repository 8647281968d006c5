"""The zygote: a small process whose forks, the slots, run the programs; it watches them and always reaps them.

It is started by the executor as a fresh interpreter (never forked from a process that may hold threads and a loaded torch),
imports what tests usually import, and then is one event loop. It does not fork the programs itself: a process that forks
pays for every page it touches afterwards, and this one touches many. Standard library only: what it loads, every fork
copies.
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
from typing import Any

from . import slots, wire
from .child import MODULE
from .layers import STOPS, Bounds, Isolation
from .running import Running
from .slots import Slot

# Imported once here instead of once in every program: what HumanEval and MBPP programs and their tests ask for. Not hashlib,
# which brings OpenSSL, nor numpy: every fork would pay for them; `preload` adds them where most programs want them.
PRELOADED = """
    abc bisect cmath collections collections.abc copy dataclasses datetime decimal enum fractions functools heapq io
    itertools math numbers operator os random re statistics string struct sys time traceback types typing warnings
"""
FIRST_LOOK = 0.02  # seconds; most programs have ended by then and are never looked at
LOOK_EVERY = 0.05  # seconds between looks at a program that goes on
MOST_QUEUED = 5.0  # times the wall limit that a program may wait for a processor on top of it
ATTEMPTS = 250  # to start a program, with 20 ms between: a machine that is full for seconds is no reason to stop


class Zygote:
    """The event loop.

    Args:
        channel: connected socket to the executor.
        parent: a descriptor that becomes readable when the executor's process dies; None where there is none.
        workers: programs at the same time.
        temporary: folder for temporary files.
    """

    def __init__(self, channel: socket.socket, parent: int | None, workers: int, temporary: str) -> None:
        self.channel = channel
        self.parent = parent
        self.workers = workers
        self.isolation = Isolation(workers, temporary)
        self.inbox = wire.Inbox()
        self.outbox = bytearray()
        self.waiting: deque[dict[str, Any]] = deque()
        self.running: dict[int, Running] = {}
        self.idle: list[Slot] = []
        self.slots_made = 0
        self.retry_at = 0.0
        self.failures = 0

    def prepare(self) -> None:
        """Put the shared layers on, get ready to listen, and tell the executor what holds."""
        self.isolation.prepare()
        self.channel.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.channel, selectors.EVENT_READ, "channel")
        if self.parent is not None:
            self.selector.register(self.parent, selectors.EVENT_READ, "parent")
        isolation = self.isolation
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

    def serve(self) -> None:
        """The loop; it never returns."""
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
                    self.hear(key.data)
                else:
                    running, name = key.data
                    running.drain(name, self.selector)
            now = time.monotonic()
            for running in self.running.values():
                if now >= running.next_look:
                    self.look(running, now)

    def pause(self) -> float | None:
        """Seconds until something must be done without being woken; None: for ever."""
        times = [running.next_look for running in self.running.values()]
        if self.waiting and len(self.running) < self.workers:
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
        for running in list(self.running.values()):
            running.close_all(self.selector)
            self.discard(running.slot)

    def fill(self) -> None:
        """Start programs while there is room."""
        while self.waiting and len(self.running) < self.workers and time.monotonic() >= self.retry_at:
            try:
                self.start(self.waiting[0])
            except OSError as fault:
                self.failures += 1
                self.retry_at = time.monotonic() + 0.02
                if self.failures > ATTEMPTS:
                    self.fail(self.waiting.popleft(), f"no program could be started: {fault}")
                return
            self.failures = 0
            self.waiting.popleft()

    def fail(self, message: dict[str, Any], why: str) -> None:
        """Answer that the harness has failed."""
        self.failures = 0
        self.send({"id": message["id"], "fault": why})

    def start(self, message: dict[str, Any]) -> None:
        """Give one program to a slot.

        Raises:
            OSError: there is no room for another process or its pipes; try again later.
        """
        limits = message["limits"]
        token = os.urandom(16).hex().encode()
        texts = [message[name].encode("utf-8", "surrogatepass") for name in ("code", "tests", "expression")]
        request = slots.pack_request(texts, token, limits["cpu_seconds"], limits["output_kib"] << 10)
        slot = self.take_slot(Bounds(limits["memory_mib"], limits["processes"], limits["disk_mib"]))
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
            sent = socket.send_fds(slot.control, [request], pipes[1::2])
            slot.control.sendall(request[sent:])
        except OSError:
            self.discard(slot)
            for fd in pipes[::2]:
                os.close(fd)
            raise
        finally:
            for fd in pipes[1::2]:
                os.close(fd)
        started = time.monotonic()
        self.running[slot.pid] = Running(message, slot, token, pipes[::2], started, started + FIRST_LOOK)

    def take_slot(self, bounds: Bounds) -> Slot:
        """An idle slot with these bounds, or a new one.

        Raises:
            OSError: there is no room for another process.
        """
        for index, slot in enumerate(self.idle):
            if slot.bounds == bounds:
                return self.idle.pop(index)
        if self.idle:
            self.discard(self.idle[0])
        folder = ""
        if self.isolation.scratch:
            self.slots_made += 1
            folder = f"{self.isolation.scratch}/{self.slots_made}"
            os.mkdir(folder, 0o700)
        ours, theirs = socket.socketpair()
        pid = self.isolation.fork()
        if pid == 0:
            slots.live(theirs, self.isolation, bounds, folder)
        theirs.close()
        slot = Slot(pid, ours, bounds, folder)
        self.selector.register(ours, selectors.EVENT_READ, slot)
        return slot

    def discard(self, slot: Slot) -> None:
        """End a slot, and remove what its programs left behind."""
        self.running.pop(slot.pid, None)
        if slot in self.idle:
            self.idle.remove(slot)
        self.selector.unregister(slot.control)
        slots.end(slot)
        if not self.isolation.active("pid namespace"):
            self.kill_orphans()
        if slot.folder:
            remove(slot.folder)

    def hear(self, slot: Slot) -> None:
        """Take a slot's word, or its silence, for the end of a program."""
        reply = slot.control.recv(4096)
        running = self.running.pop(slot.pid, None)
        status, seconds, then = signal.SIGKILL, 0.0, slots.ENDS
        if len(reply) >= slots.REPLY.size:
            status, seconds, then = slots.REPLY.unpack_from(reply)
        if running is not None:
            running.drain_all(self.selector)
        if then == slots.AGAIN:
            self.idle.append(slot)
        else:
            self.discard(slot)
        if running is None:
            return
        if then == slots.FAULT:
            self.failures += 1
            self.retry_at = time.monotonic() + 0.02
            if self.failures > ATTEMPTS:
                why = reply[slots.REPLY.size :].decode("utf-8", "replace")
                self.fail(running.message, f"a layer of isolation that held before is refused now: {why}")
            else:
                self.waiting.appendleft(running.message)
        elif running.may_try_again(status, seconds):
            running.message["second"] = True
            self.waiting.appendleft(running.message)
        else:
            self.send(running.answer(status, seconds))

    def look(self, running: Running, now: float) -> None:
        """Watch a program that has not ended at once: its outputs, its clocks, its descendants."""
        running.watch(self.selector)
        limits = running.limits
        cpu_left = limits["cpu_seconds"]
        if self.isolation.processes is not None:
            usage = running.look(self.isolation.processes)
            cpu_left -= usage.cpu_seconds
            if usage.processes > 1 and usage.memory > limits["memory_mib"] << 20:
                running.stop("out_of_memory", f"more than {limits['memory_mib']} MiB in {usage.processes} processes")
        wall_left = running.started + limits["wall_seconds"] - now
        if wall_left <= 0 and self.isolation.processes is not None:
            # Waiting for a processor is the machine's doing; still, nothing may hold a worker for ever.
            queued = self.isolation.processes.queued_below(running.slot.name_in_proc)
            wall_left += min(queued, MOST_QUEUED * limits["wall_seconds"])
        if cpu_left <= 0:
            running.stop("timeout", running.too_slow)
        elif wall_left <= 0:
            running.stop("timeout", f"more than {limits['wall_seconds']:g} s on the clock", settled=False)
        running.next_look = now + max(0.005, min(LOOK_EVERY, wall_left, cpu_left))

    def kill_orphans(self) -> None:
        """Without a pid namespace: kill what programs have left; orphans are this process's children."""
        if self.isolation.processes is None:
            return
        known = {slot.pid for slot in self.idle} | self.running.keys()
        while orphans := self.isolation.processes.children_of_zygote().keys() - known:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


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
    for name in (*PRELOADED.split(), *settings["preload"]):
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # three descriptors a worker; some systems refuse their own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16) if hard > 0 else 1 << 16, hard))
    channel = socket.socket(fileno=settings["channel"])
    zygote = Zygote(channel, settings["parent"], settings["workers"], settings["temporary"])
    zygote.prepare()
    # Programs shall import what they name, not what the harness is made of, and not be told how it was started.
    for name in [name for name in sys.modules if name.split(".")[0] == "qprobe_code_gen"]:
        del sys.modules[name]
    sys.modules[MODULE.__name__] = MODULE  # dataclasses, pickle and typing look a class's module up
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"})
    gc.collect()
    gc.freeze()  # the collector then does not touch, and so does not copy, the pages that forks share
    zygote.serve()
