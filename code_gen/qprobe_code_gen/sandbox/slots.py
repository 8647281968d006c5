"""Slots: confined processes that each run one program after the other, every program in a fork of its own.

All that is dear in isolation (namespaces, mounts, filters) is put on a slot once; a fork inherits it for nothing. The slot is
the first process of its pid namespace and the programs are its children: a program cannot signal it, and after each one
the slot kills and reaps whatever is left. It takes the next program if and only if /tmp is exactly as it was made;
otherwise it ends, and a new slot takes its place. Standard library only.
"""
# ruff: noqa: PTH208

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
from dataclasses import dataclass
from typing import NoReturn

from . import child
from .layers import Bounds, Isolation, lower

# CPU seconds of the program, bytes of its value, token, lengths of code, tests and expression; then these three.
REQUEST = struct.Struct("=dq32sIII")
# Wait status, CPU seconds, whether the slot takes another program; after FAULT a sentence follows.
REPLY = struct.Struct("=idB")
AGAIN, ENDS, FAULT = 0, 1, 2
RESULT = 3  # the descriptor of the result in a program
HIGHEST = 1 << 16  # above every descriptor that the zygote can have


@dataclass
class Slot:
    """A slot as the zygote sees it.

    Args:
        pid: its process.
        control: socket to it.
        bounds: what its programs may use.
        folder: where its programs may write, as the zygote sees it; empty when that is in its own mount namespace.
    """

    pid: int
    control: socket.socket
    bounds: Bounds
    folder: str
    name_in_proc: str = ""


def pack_request(texts: list[bytes], token: bytes, cpu_seconds: float, value_bytes: int) -> bytes:
    """One program (code, tests, expression) as bytes."""
    return REQUEST.pack(cpu_seconds, value_bytes, token, *map(len, texts)) + b"".join(texts)


def live(control: socket.socket, isolation: Isolation, bounds: Bounds, folder: str) -> NoReturn:
    """The life of a slot, in its own process: confine it, then run programs until the zygote hangs up."""
    try:
        child.allow_recursion()
        reusable = isolation.slots_are_reusable
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        isolation.confine(bounds, folder)
        tmp = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        # A change time cannot be set back, but its clock is coarse: a file of the very first tick shows in the list.
        pristine = (os.fstat(tmp).st_ctime_ns, os.listdir(tmp))
        keep = sorted({control.fileno(), tmp, *isolation.kept_in_slot})
        for below, above in zip([2, *keep], [*keep, HIGHEST], strict=True):
            os.closerange(below + 1, above)
        while True:
            status, seconds = _run_next(control, isolation)
            clean = reusable and (os.fstat(tmp).st_ctime_ns, os.listdir(tmp)) == pristine
            control.sendall(REPLY.pack(status, seconds, AGAIN if clean else ENDS))
            if not clean:
                os._exit(0)
    except BaseException as fault:
        control.sendall(REPLY.pack(0, 0.0, FAULT) + repr(fault)[:300].encode())
        os._exit(1)


def _run_next(control: socket.socket, isolation: Isolation) -> tuple[int, float]:
    data, fds, _, _ = socket.recv_fds(control, 1 << 16, 3)
    if not data:
        os._exit(0)
    _, _, _, *lengths = REQUEST.unpack_from(data)
    whole = REQUEST.size + sum(lengths)
    while len(data) < whole:
        data += control.recv(whole - len(data))
    pid = os.fork()
    if pid == 0:
        _become_program(data, fds, isolation)
    _, status, usage = os.wait4(pid, 0)
    isolation.kill_leftovers(pid)
    # Not before: while the fork lives, every page that this process touches must be copied.
    for fd in fds:
        os.close(fd)
    return status, usage.ru_utime + usage.ru_stime


def _become_program(data: bytes, fds: list[int], isolation: Isolation) -> NoReturn:
    output, errors, result = fds
    cpu_seconds, value_bytes, token, code, tests, _ = REQUEST.unpack_from(data)
    try:
        os.setsid()
        seconds = int(cpu_seconds) + 2  # the zygote's own look at the clock comes first and is finer
        lower(resource.RLIMIT_CPU, seconds, seconds)
        isolation.confine_program()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.dup2(result, RESULT)  # the last one: 0 to 2 are never among those that came, this number may be
        os.closerange(RESULT + 1, HIGHEST)  # above all the slot's own socket: who has it can speak for the slot
    except BaseException as fault:
        os.write(result, token + b"\nfault\n" + repr(fault)[:300].encode() + b"\n")
        os._exit(1)
    start = REQUEST.size
    middle = start + code
    last = middle + tests
    child.run(data[start:middle], data[middle:last], data[last:], token, RESULT, value_bytes)


def end(slot: Slot) -> None:
    """Kill a slot and everything in it, and reap it."""
    slot.control.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(slot.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(slot.pid, 0)
