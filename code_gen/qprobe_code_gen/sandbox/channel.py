"""The two ends of the channel between judge and candidate: frames, numbers, and what may be believed. Standard library only.

The judge asks and the candidate answers, one frame each, in turns. A question carries a random number, which its answer must
repeat, so nothing that was said before the question can pass for its answer; a byte that nobody asked for is noticed at
the next answer, at the latest at the last one.
"""

from __future__ import annotations

import os
import select
import struct
from typing import NoReturn

from .codec import BYTES

HEADER = struct.Struct("<QIB")  # number of the question, bytes that follow, kind
PIECE = 1 << 16
_FITS = 1 << 15  # bytes that an empty socket takes at once
_NUMBERS = 32  # random numbers that are drawn at once

# Questions.
PROGRAM, CALL, NEXT, VALUE, FINISH = range(5)
# Answers.
RETURNED, RAISED, EXHAUSTED, UNSENDABLE, FUNCTION, ENDED = range(5, 11)


class Gone(Exception):
    """The candidate has closed its end, or has ended."""


class Unasked(Exception):
    """The candidate said what nobody asked for."""


class Asking:
    """The judge's end. It never waits for a candidate that does not read while that one waits for it.

    Args:
        fd: connected socket.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._numbers: list[int] = []
        self._number = 0

    def ask(self, kind: int, payload: bytes) -> None:
        """Send one question.

        Raises:
            Gone, Unasked: see there.
        """
        if not self._numbers:
            self._numbers = [number for (number,) in struct.iter_unpack("<Q", os.urandom(8 * _NUMBERS))]
        self._number = self._numbers.pop()
        data = HEADER.pack(self._number, len(payload), kind) + payload
        try:
            # The last question has been read, for it was answered: this one finds an empty buffer.
            sent = os.write(self._fd, data) if len(data) <= _FITS else 0
            if sent < len(data):
                self._ask_at_length(memoryview(data)[sent:])
        except OSError:
            raise Gone from None

    def _ask_at_length(self, data: memoryview) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLOUT)
        os.set_blocking(self._fd, False)
        while data:
            [(_, found)] = poll.poll()
            if found & select.POLLHUP:
                raise Gone
            if found & select.POLLIN:
                raise Unasked("bytes that nobody asked for")
            data = data[os.write(self._fd, data) :]
        os.set_blocking(self._fd, True)

    def answer(self) -> tuple[int, bytes]:
        """Wait for the answer: its kind and what it says.

        Raises:
            Gone, Unasked: see there.
        """
        data: bytes | bytearray = b""
        wanted = HEADER.size
        while len(data) < wanted:
            try:
                piece = os.read(self._fd, PIECE)
            except OSError:
                raise Gone from None
            if not piece:
                raise Gone
            if len(data) >= HEADER.size:
                data += piece
                continue
            data = bytearray(data + piece) if data or len(piece) == PIECE else piece
            if len(data) >= HEADER.size:
                number, length, _ = HEADER.unpack_from(data)
                if number != self._number or length > BYTES:
                    raise Unasked("an answer to another question")
                wanted = HEADER.size + length
        if len(data) > wanted:
            raise Unasked("bytes that nobody asked for")
        return data[HEADER.size - 1], bytes(data[HEADER.size :])


class Answering:
    """The candidate's end. Whatever the program does to it, it hurts the program alone.

    Args:
        fd: connected socket.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._number = 0
        self._read, self._write, self._leave, self._pid = os.read, os.write, os._exit, os.getpid
        self._own_pid = os.getpid()

    def question(self) -> tuple[int, bytes] | None:
        """Wait for a question: its kind and what it says; None: there will be no more."""
        data: bytes | bytearray = b""
        wanted = HEADER.size
        kind = 0
        while len(data) < wanted:
            try:
                piece = self._read(self._fd, PIECE)
            except OSError:
                return None
            if not piece:
                return None
            data += piece
            if wanted == HEADER.size and len(data) >= wanted:
                self._number, length, kind = HEADER.unpack_from(data)
                wanted += length
                data = bytearray(data) if len(data) < wanted else data
        return kind, bytes(data[HEADER.size :])

    def answer(self, kind: int, payload: bytes) -> None:
        """Answer the last question. A forked copy of the program leaves instead: only the original may answer."""
        if self._pid() != self._own_pid:
            self.leave(0)
        data = memoryview(HEADER.pack(self._number, len(payload), kind) + payload)
        try:
            while data:
                data = data[self._write(self._fd, data) :]
        except OSError:  # the program has closed the channel: there is nobody to speak to
            self.leave(1)

    def leave(self, status: int) -> NoReturn:
        """End this process at once."""
        self._leave(status)
        raise SystemExit(status)  # not reached; `os._exit` may have been replaced in the program's copy
