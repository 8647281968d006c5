"""What a judge behind an API has answered so far, by content, as JSON lines: a killed run pays for nothing twice.

Every process writes a file of its own, one line a write, and reads all files of the folder when it begins. A line that a
kill cut short is skipped, and asked for again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reply:
    """A judge's answer to one pair in one order.

    Args:
        letter: "A" or "B", the answer that it prefers; None where it gave no verdict.
        share: P(A) / (P(A) + P(B)) from the verdict's token; None where that was not asked for or not given.
        asked: how often it was asked for a verdict.
        text: what it said last.
        why: where there is no letter: "refused", or for the process that asked "unparsed", "failed" or "too_long".
    """

    letter: str | None
    share: float | None = None
    asked: int = 1
    text: str = ""
    why: str = ""


class ReplyCache:
    """Replies by key, in memory and in a folder.

    Args:
        folder: made when the first reply is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, Reply] | None = None

    def get(self, key: str) -> Reply | None:
        with self._lock:
            return self._read().get(key)

    def add(self, key: str, reply: Reply, keep: bool = True) -> None:
        """Remember a reply, and write it down where `keep`.

        Raises:
            OSError: it could not be written, in one sentence.
        """
        with self._lock:
            self._read()[key] = reply
            if keep:
                self._append([key, dataclasses.asdict(reply)])

    def _read(self) -> dict[str, Reply]:
        if self._known is None:
            self._known = {}
            for path in sorted(self.folder.glob("replies-*.jsonl")):
                for line in path.read_bytes().split(b"\n"):
                    try:
                        key, values = json.loads(line)
                        self._known[key] = Reply(**values)
                    except (ValueError, TypeError):
                        continue  # cut short by a kill or a full disk
        return self._known

    def _append(self, record: list[object]) -> None:
        path = self.folder / f"replies-{platform.node()}-{os.getpid()}.jsonl"
        # A line of an earlier process of this number may have been cut short: an empty line before ours does no harm.
        content = b"\n" + json.dumps(record).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                written = file.write(content)
            if written != len(content):
                raise OSError("the disk is full")
        except OSError as error:
            raise OSError(
                f"{path} could not be written ({error.strerror or error}): free disk space or correct the permissions, and start "
                "the same command again; replies written before are kept."
            ) from error
