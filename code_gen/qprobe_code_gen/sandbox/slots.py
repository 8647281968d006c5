"""Slots: confined processes that each run one program or one judge after the other, every one in a fork of its own.

All that is dear in isolation (namespaces, mounts, filters) is put on a slot once; a fork inherits it for nothing. The slot is
the first process of its pid namespace and what it runs are its children: a program cannot signal it, and after each one
the slot kills and reaps whatever is left. It takes the next one if and only if /tmp is exactly as it was made; otherwise it
ends, and a new slot takes its place. A slot keeps to its kind, since what a process was sent once stays in its memory: the
slots of candidates are never sent anything but descriptors. Standard library only.
"""
# ruff: noqa: PTH208

from __future__ import annotations

import json
import os
import resource
import socket
import struct
from dataclasses import dataclass
from typing import NoReturn

from . import candidate, child, judge, kernel
from .layers import Bounds, Isolation, lower

CANDIDATE, JUDGE, TOGETHER = "candidate", "judge", "together"
# CPU seconds, bytes of the value, token, length of the JSON that follows (none for a candidate).
REQUEST = struct.Struct("=dq32sI")
# Wait status, CPU seconds, whether the slot takes another program; after _FAULT a sentence follows.
REPLY = struct.Struct("=idB")
AGAIN, ENDS, _FAULT = 0, 1, 2
LONGEST_REPLY = 4096
# Descriptors in the programs: after standard output and error come, for a judge, result and channel; for a program with its
# tests the result; for a candidate the channel.
_FIRST, _SECOND = 3, 4
_DESCRIPTORS = {CANDIDATE: 3, JUDGE: 4, TOGETHER: 3}
FRAMES = {CANDIDATE: child.FRAMES - 1, JUDGE: child.FRAMES, TOGETHER: child.FRAMES}
_HIGHEST = 1 << 16  # above every descriptor that the zygote can have


@dataclass
class Slot:
    """A slot as the zygote sees it.

    Args:
        kind: what it runs.
        pid: its process.
        control: socket to it.
        bounds: what its programs may use.
        folder: where its programs may write, as the zygote sees it; empty when that is in its own mount namespace.
    """

    kind: str
    pid: int
    control: socket.socket
    bounds: Bounds
    folder: str
    name_in_proc: str = ""


def send(slot: Slot, cpu_seconds: float, value_bytes: int, token: bytes, body: bytes, fds: list[int]) -> None:
    """Give a slot what it shall run.

    Raises:
        OSError: it is not there any more; the text says why, if it said so.
    """
    request = REQUEST.pack(cpu_seconds, value_bytes, token, len(body)) + body
    try:
        sent = socket.send_fds(slot.control, [request], fds)
        if sent < len(request):
            slot.control.sendall(memoryview(request)[sent:])
    except OSError:
        slot.control.setblocking(False)
        if why := fault_in(slot.control.recv(LONGEST_REPLY)):
            raise OSError(why) from None
        raise


def fault_in(reply: bytes) -> str:
    """The sentence in a slot's reply that says what the harness could not do; empty in every other reply."""
    if len(reply) < REPLY.size or REPLY.unpack_from(reply)[2] != _FAULT:
        return ""
    return "a layer of isolation that held before is refused now: " + reply[REPLY.size :].decode("utf-8", "replace")


def live(kind: str, control: socket.socket, isolation: Isolation, bounds: Bounds, folder: str) -> NoReturn:
    """The life of a slot, in its own process: confine it, then run programs until the zygote hangs up."""
    try:
        child.allow_recursion(FRAMES[kind])
        reusable = isolation.slots_are_reusable
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        isolation.confine(bounds, folder)
        if kind == JUDGE and kernel.LINUX:
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no process of the same id may look into it
        tmp = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        # A change time cannot be set back, but its clock is coarse: a file of the very first tick shows in the list.
        pristine = (os.fstat(tmp).st_ctime_ns, os.listdir(tmp))
        keep = sorted({control.fileno(), tmp, *isolation.kept_in_slot})
        for below, above in zip([2, *keep], [*keep, _HIGHEST], strict=True):
            os.closerange(below + 1, above)
        while True:
            status, seconds = _run_next(kind, control, isolation)
            clean = reusable and (os.fstat(tmp).st_ctime_ns, os.listdir(tmp)) == pristine
            control.sendall(REPLY.pack(status, seconds, AGAIN if clean else ENDS))
            if not clean:
                os._exit(0)
    except BaseException as fault:
        control.sendall(REPLY.pack(0, 0.0, _FAULT) + repr(fault)[:300].encode())
        os._exit(1)


def _run_next(kind: str, control: socket.socket, isolation: Isolation) -> tuple[int, float]:
    data, fds, _, _ = socket.recv_fds(control, 1 << 16, _DESCRIPTORS[kind])
    if not data:
        os._exit(0)
    whole = REQUEST.size + REQUEST.unpack_from(data)[3]
    while len(data) < whole:
        data += control.recv(whole - len(data))
    pid = os.fork()
    if pid == 0:
        _become_program(kind, data, fds, control, isolation)
    if kind == CANDIDATE:  # else the judge would not see its program close the channel
        os.close(fds.pop())
    _, status, usage = os.wait4(pid, 0)
    isolation.kill_leftovers(pid)
    # Not before: while the fork lives, every page that this process touches must be copied.
    for fd in fds:
        os.close(fd)
    return status, usage.ru_utime + usage.ru_stime


def _become_program(kind: str, data: bytes, fds: list[int], control: socket.socket, isolation: Isolation) -> NoReturn:
    cpu_seconds, value_bytes, token, _ = REQUEST.unpack_from(data)
    try:
        os.setsid()
        seconds = int(cpu_seconds) + 2  # the zygote's own look at the clock comes first and is finer
        lower(resource.RLIMIT_CPU, seconds, seconds + 1)
        isolation.confine_program()
        # Numbers were given from 3 on in rising order, so none that is still to be moved is overwritten.
        for number, fd in enumerate(fds, 1):
            os.dup2(fd, number)
        os.closerange(len(fds) + 1, _HIGHEST)  # above all the slot's own socket: who has it can speak for the slot
    except BaseException as fault:
        control.sendall(REPLY.pack(0, 0.0, _FAULT) + repr(fault)[:300].encode())
        os._exit(1)
    if kind == CANDIDATE:
        candidate.run(_FIRST)
    request = json.loads(data[REQUEST.size :])
    if kind == JUDGE:
        judge.run(request, _SECOND, token, _FIRST, value_bytes)
    child.run_in_one_process(request, token, _FIRST, value_bytes)
