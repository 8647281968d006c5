"""A program that is being executed, as the zygote sees it: its pipes, its clocks, its end. Standard library only."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from typing import Any

from .processes import Processes, Usage
from .slots import Slot

PIPES = ("output", "errors", "result")


class Running:
    """A program that is being executed.

    Args:
        message: the request, as it came from the executor.
        slot: where it runs.
        token: what its record must begin with.
        fds: descriptors to read its output, errors and result from.
        started: monotonic seconds.
        next_look: when the zygote looks at it next, monotonic seconds.
    """

    def __init__(
        self,
        message: dict[str, Any],
        slot: Slot,
        token: bytes,
        fds: list[int],
        started: float,
        next_look: float,
    ) -> None:
        self.message = message
        self.limits: dict[str, Any] = message["limits"]
        self.slot = slot
        self.started = started
        self.next_look = next_look
        self.fds = dict(zip(PIPES, fds, strict=True))
        self._token = token
        self._data = {name: bytearray() for name in PIPES}
        self._watched: set[str] = set()
        self._cpu_seconds = 0.0
        self._settled = True
        self._verdict = ""
        self._detail = ""
        for fd in fds:
            os.set_blocking(fd, False)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Read its pipes as it writes from now on (until the first look, what fits into a pipe may wait there)."""
        for name in self.fds.keys() - self._watched:
            self._watched.add(name)
            selector.register(self.fds[name], selectors.EVENT_READ, (self, name))

    def drain(self, name: str, selector: selectors.BaseSelector) -> None:
        """Read what it has written to one of its pipes, up to the limit."""
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
            if not piece or len(data) >= limit:
                self.close(name, selector)

    def drain_all(self, selector: selectors.BaseSelector) -> None:
        """Read what is left in its pipes after its end, and close them."""
        for name in PIPES:
            if name in self.fds:
                self.drain(name, selector)
        self.close_all(selector)

    def close_all(self, selector: selectors.BaseSelector) -> None:
        """Stop reading its pipes."""
        for name in list(self.fds):
            self.close(name, selector)

    def close(self, name: str, selector: selectors.BaseSelector) -> None:
        """Stop reading one of its pipes."""
        fd = self.fds.pop(name)
        if name in self._watched:
            selector.unregister(fd)
        os.close(fd)

    def look(self, processes: Processes) -> Usage:
        """What its processes use now."""
        try:
            if not self.slot.name_in_proc:
                self.slot.name_in_proc = processes.children_of_zygote()[self.slot.pid]
            usage = processes.below(self.slot.name_in_proc)
        except (OSError, KeyError, ValueError):  # the slot has just ended
            usage = Usage(0, 0.0, 0)
        self._cpu_seconds = max(self._cpu_seconds, usage.cpu_seconds)
        return usage

    def stop(self, verdict: str, detail: str, settled: bool = True) -> None:
        """Kill it, with its slot, for a reason; the first reason stays.

        Args:
            verdict: of the seven.
            detail: in words.
            settled: whether another execution would end the same way, whatever else the machine does.
        """
        if not self._verdict:
            self._verdict, self._detail, self._settled = verdict, detail, settled
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.slot.pid, signal.SIGKILL)

    def may_try_again(self, status: int, seconds: float) -> bool:
        """Whether it was killed by nobody we know of, for the first time.

        It may have been the machine: out of memory, perhaps because of something else. Once may be bad luck; twice is taken
        for an answer.
        """
        known = bool(self._verdict) or seconds > self.limits["cpu_seconds"]
        return self._killed(status) and not known and "second" not in self.message

    def _killed(self, status: int) -> bool:
        return not self._verdict and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    def answer(self, status: int, seconds: float) -> dict[str, Any]:
        """The message to the executor about its end.

        Args:
            status: as wait gave it.
            seconds: CPU time.
        """
        verdict, detail, value = self._judge(status, seconds)
        answer: dict[str, Any] = {"id": self.message["id"], "seconds": max(seconds, self._cpu_seconds)}
        if verdict == "fault":
            return answer | {"fault": detail}
        output = self._data["output"].decode("utf-8", "replace")
        answer |= {"verdict": verdict, "detail": detail, "output": output, "value": value}
        return answer | {"settled": self._settled and not self._killed(status)}

    @property
    def too_slow(self) -> str:
        """The detail of a CPU timeout."""
        return f"more than {self.limits['cpu_seconds']:g} s of CPU time"

    def _judge(self, status: int, seconds: float) -> tuple[str, str, str | None]:
        if self._verdict:
            return self._verdict, self._detail, None
        if seconds > self.limits["cpu_seconds"]:
            return "timeout", self.too_slow, None
        record = bytes(self._data["result"]).split(b"\n", 3)
        if len(record) == 4 and record[0] == self._token:
            has_value = record[1] == b"passed" and bool(self.message["expression"])
            value = record[3].decode("utf-8", "replace") if has_value else None
            return record[1].decode(), record[2].decode("utf-8", "replace"), value
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return "error", f"left with status {code} before the tests had returned", None
        if -code == signal.SIGKILL:
            return "out_of_memory", "killed, as the kernel does when memory runs out", None
        if -code == signal.SIGXCPU:
            return "timeout", self.too_slow, None
        return "error", f"died of {signal.Signals(-code).name}", None
