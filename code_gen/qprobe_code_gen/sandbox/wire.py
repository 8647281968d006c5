"""Messages between the executor and its zygote: JSON objects, each behind its length in four bytes."""

from __future__ import annotations

import json
import struct
from collections import deque
from typing import Any

HEADER = struct.Struct("!I")
PIECE = 1 << 16  # bytes to receive at once; more would be mapped, cleared and unmapped for every message
Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One message as bytes (JSON keeps lone surrogates, which models do write)."""
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


class Inbox:
    """Collects bytes into whole messages.

    `ready` holds the complete messages that nobody has taken yet, in order.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.ready: deque[Message] = deque()

    def feed(self, data: bytes) -> None:
        """Add received bytes.

        Args:
            data: any number of bytes; messages may be cut anywhere.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            self.ready.append(json.loads(self._buffer[start + HEADER.size : end]))
            start = end
        del self._buffer[:start]
