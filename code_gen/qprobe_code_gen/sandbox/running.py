"""A program that is being executed, as the zygote sees it: its processes, its pipes, its clocks, its end.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
from dataclasses import InitVar, dataclass
from typing import Any

from .child import GONE
from .processes import Processes, Usage
from .slots import Slot

_PIPES = ("output", "errors", "result")
_SLACK = 0.2  # seconds by which the kernel's two counts of CPU time may differ


@dataclass(frozen=True)
class End:
    """How a process ended: wait status, CPU seconds."""

    status: int
    seconds: float

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


@dataclass(eq=False)
class Running:
    """A program that is being executed.

    Args:
        message: the request, as it came from the executor.
        program: the slot where it runs.
        judge: the slot where its tests run; None: with it.
        token: what the record must begin with.
        pipes: descriptors to read output, errors and result from.
        channel: the judge's end of the channel between the two; None where there is no judge.
        started: monotonic seconds.
        next_look: when the zygote looks at it next, monotonic seconds.
    """

    message: dict[str, Any]
    program: Slot
    judge: Slot | None
    token: bytes
    pipes: InitVar[list[int]]
    channel: socket.socket | None
    started: float
    next_look: float

    def __post_init__(self, pipes: list[int]) -> None:
        self.limits: dict[str, Any] = self.message["limits"]
        self.slots = [slot for slot in (self.program, self.judge) if slot is not None]
        self.ends: dict[int, End] = {}  # of the slots' processes, by the slot's pid
        self.killed: set[int] = set()  # slots that were killed here, by pid
        self.finish_by = float("inf")  # the program's last moment, once it has been judged
        self.fds = dict(zip(_PIPES, pipes, strict=True))
        self._data = {name: bytearray() for name in _PIPES}
        self._watched: set[str] = set()
        self._cpu_seconds = 0.0
        self._settled = True
        self._verdict = ""
        self._detail = ""
        self._hurried = False
        for fd in pipes:
            os.set_blocking(fd, False)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Read its pipes as it writes from now on (until the first look, what fits into a pipe may wait there)."""
        for name in self.fds.keys() - self._watched:
            self._watched.add(name)
            selector.register(self.fds[name], selectors.EVENT_READ, (self, name))

    def drain(self, name: str, selector: selectors.BaseSelector) -> None:
        """Read what it has written to one of its pipes, until it is beyond the limit."""
        limit = (self.limits["output_kib"] << 10) + (4096 if name == "result" else 0)
        data = self._data[name]
        while name in self.fds:
            try:
                piece = os.read(self.fds[name], 1 << 16)
            except BlockingIOError:
                return
            data += piece
            if len(data) > limit:
                del data[limit:]
                self.stop("output_limit", f"more than {self.limits['output_kib']} KiB of {name}")
                self.close(name, selector)
            elif not piece:
                self.close(name, selector)

    def drain_all(self, selector: selectors.BaseSelector) -> None:
        """Read what is left in its pipes after its end, and close them."""
        for name in _PIPES:
            if name in self.fds:
                self.drain(name, selector)
        self.close_all(selector)

    def close_all(self, selector: selectors.BaseSelector) -> None:
        """Stop reading its pipes."""
        for name in list(self.fds):
            self.close(name, selector)
        self.close_channel()

    def close(self, name: str, selector: selectors.BaseSelector) -> None:
        """Stop reading one of its pipes."""
        fd = self.fds.pop(name)
        if name in self._watched:
            selector.unregister(fd)
        os.close(fd)

    def close_channel(self) -> None:
        """Give up the zygote's copy of the channel: with the judge's own it is closed for the program."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def ended(self, slot: Slot, end: End, now: float, grace: float) -> bool:
        """Note that the process in one of its slots has ended.

        Args:
            now: monotonic seconds.
            grace: seconds that a program has for its last words once it has been judged.

        Returns:
            Whether all have.
        """
        self.ends[slot.pid] = end
        if len(self.ends) == len(self.slots):
            return True
        if slot is self.judge:
            self.close_channel()
            self.finish_by = now + grace
            self.next_look = min(self.next_look, self.finish_by)
        elif self.channel is not None:
            # A forked copy may still hold the program's end: the judge shall not wait for it.
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)
        return False

    def look(self, slot: Slot, processes: Processes) -> Usage:
        """What the processes of one of its slots use now."""
        usage = Usage(0, 0.0, 0)
        with contextlib.suppress(OSError, KeyError, ValueError):  # the slot has just ended
            if not slot.name_in_proc:
                slot.name_in_proc = processes.slots()[slot.pid]
            usage = processes.below(slot.name_in_proc)
        if slot is self.program:
            self._cpu_seconds = max(self._cpu_seconds, usage.cpu_seconds)
        return usage

    def stop(self, verdict: str, detail: str, settled: bool = True) -> None:
        """Kill it, with its slots, for a reason; the first reason stays.

        Args:
            verdict: of the seven.
            detail: in words.
            settled: whether another execution would end the same way, whatever else the machine does.
        """
        if not self._verdict:
            self._verdict, self._detail, self._settled = verdict, detail, settled
        for slot in self.slots:
            self._kill(slot)

    def hurry(self) -> None:
        """Kill a program that was judged and does not end."""
        self._hurried = True
        self._kill(self.program)

    def _kill(self, slot: Slot) -> None:
        if slot.pid not in self.ends:  # else another program may run there
            self.killed.add(slot.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.pid, signal.SIGKILL)

    def may_try_again(self) -> bool:
        """Whether the program was killed by nobody we know of, for the first time.

        It may have been the machine: out of memory, perhaps because of something else. Once may be bad luck; twice is taken
        for an answer.
        """
        return self._killed() and "second" not in self.message

    def _killed(self) -> bool:
        known = self._verdict or self._hurried or self._too_slow(self.ends[self.program.pid])
        return not known and self.ends[self.program.pid].killed and self._record()[0] in ("", GONE)

    def answer(self) -> dict[str, Any]:
        """The message to the executor about its end."""
        verdict, detail, value = self._judge()
        seconds = max(self.ends[self.program.pid].seconds, self._cpu_seconds)
        answer: dict[str, Any] = {"id": self.message["id"], "seconds": seconds}
        if verdict == "fault":
            return answer | {"fault": detail}
        output = self._data["output"].decode("utf-8", "replace")
        answer |= {"verdict": verdict, "detail": detail, "output": output, "value": value}
        return answer | {"settled": self._settled and not self._killed()}

    def too_slow(self, slot: Slot) -> str:
        """The detail of a CPU timeout."""
        who = "the tests used " if slot is self.judge else ""
        if slot.pid in self.ends and _at_ceiling(self.ends[slot.pid]):
            ceiling = resource.getrlimit(resource.RLIMIT_CPU)[1]
            return f"{who}more than {ceiling} s of CPU time, all that a process may use here (ulimit -t)"
        return f"{who}more than {self.limits['cpu_seconds']:g} s of CPU time"

    def _too_slow(self, end: End) -> bool:
        over = os.WIFSIGNALED(end.status) and os.WTERMSIG(end.status) == signal.SIGXCPU
        return bool(end.seconds > self.limits["cpu_seconds"] or over or _at_ceiling(end))

    def _record(self) -> tuple[str, str, str | None]:
        """Verdict, detail and value as the process with the tests wrote them; an empty verdict: it wrote none."""
        record = bytes(self._data["result"]).split(b"\n", 3)
        if len(record) < 4 or record[0] != self.token:
            return "", "", None
        verdict, detail, value = (part.decode("utf-8", "replace") for part in record[1:])
        return verdict, detail, value if verdict == "passed" and self.message["expression"] else None

    def _judge(self) -> tuple[str, str, str | None]:
        if self._verdict:
            return self._verdict, self._detail, None
        end = self.ends[self.program.pid]
        if self._too_slow(end):
            return "timeout", self.too_slow(self.program), None
        verdict, detail, value = self._record()
        if self.judge is not None and verdict != GONE:
            judged = self.ends[self.judge.pid]
            if self._too_slow(judged):
                return "timeout", self.too_slow(self.judge), None
            if judged.killed:
                return "fault", "the process of the judge was killed from outside", None
            if not verdict:
                return "failed", f"the tests ended before their last line ({in_words(judged.status)})", None
        if verdict and verdict != GONE:
            return verdict, detail, value
        if verdict == GONE and self._hurried:
            return "error", detail, None
        if end.killed:
            return "out_of_memory", "killed, as the kernel does when memory runs out", None
        if os.WIFEXITED(end.status):
            return "error", f"left with status {os.WEXITSTATUS(end.status)} before the tests had returned", None
        return "error", in_words(end.status), None


def _at_ceiling(end: End) -> bool:
    """Whether the kernel killed a process because it is allowed no more CPU time, whatever the program's own limit."""
    ceiling = resource.getrlimit(resource.RLIMIT_CPU)[1]
    return ceiling != resource.RLIM_INFINITY and end.killed and end.seconds > ceiling - _SLACK


def in_words(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"left with status {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
