"""The nursery: the process that slots are forked from. It is never sent a test, an expected value or a token.

What a process was sent once can be read in the memory of everything that is forked from it afterwards, freed or not. So the
zygote, through which every test passes, forks nothing; this process was forked apart from it before the first message, and
hears of nothing but bounds, folders and process numbers. It is the first process of the pid namespace: when it ends, all
end. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from typing import Any, NoReturn

from . import slots
from .layers import Bounds, Isolation
from .slots import Slot

LONGEST = 1 << 14  # bytes of a message


class Nursery:
    """The nursery as the zygote sees it.

    Args:
        channel: socket to the nursery; every message is answered.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def make(self, kind: str, bounds: Bounds, folder: str) -> Slot:
        """A new slot.

        Raises:
            OSError: no further process can be started.
        """
        own, slots_end = socket.socketpair()
        wanted = {"kind": kind, "bounds": vars(bounds), "folder": folder}
        try:
            answer = self._ask(wanted, [slots_end.fileno()])
        finally:
            slots_end.close()
        if "fault" in answer:
            own.close()
            raise OSError(answer["fault"])
        return Slot(kind, answer["pid"], own, bounds, folder)

    def end(self, slot: Slot) -> None:
        """Kill a slot and everything in it, and see it reaped."""
        slot.control.close()
        self._ask({"end": slot.pid}, [])

    def _ask(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        socket.send_fds(self.channel, [json.dumps(message).encode()], fds)
        answer = self.channel.recv(LONGEST)
        if not answer:  # it was killed, and with it every slot
            os._exit(1)
        return json.loads(answer)  # type: ignore[no-any-return]


def live(channel: socket.socket, zygote: int, isolation: Isolation) -> NoReturn:
    """The nursery's own life.

    Args:
        channel: socket to the zygote (of messages, not of bytes).
        zygote: its process.
        isolation: how slots are confined.
    """
    living: set[int] = set()
    while True:
        message, fds, _, _ = socket.recv_fds(channel, LONGEST, 1)
        if not message:
            break
        wanted = json.loads(message)
        if "end" in wanted:
            living.discard(wanted["end"])
            _end(wanted["end"])
            if not isolation.active("pid namespace"):
                isolation.kill_orphans(living | {zygote})
            answer: dict[str, Any] = {}
        else:
            answer = _make(wanted, socket.socket(fileno=fds[0]), isolation)
            living.update(answer.values() if "pid" in answer else [])
        channel.send(json.dumps(answer).encode())
    for pid in living:
        _end(pid)
    if not isolation.active("pid namespace"):
        isolation.kill_orphans({zygote})
    _, status = os.waitpid(zygote, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _make(wanted: dict[str, Any], control: socket.socket, isolation: Isolation) -> dict[str, Any]:
    try:
        pid = isolation.fork()
    except OSError as fault:
        control.close()
        return {"fault": str(fault)}
    if pid == 0:
        slots.live(wanted["kind"], control, isolation, Bounds(**wanted["bounds"]), wanted["folder"])
    control.close()
    return {"pid": pid}


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
