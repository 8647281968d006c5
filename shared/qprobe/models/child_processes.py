"""Processes that end with the one that started them, however it ends: a process that is killed cannot end anything itself.

A guard is a bare Python beside them (it runs this file). It reads a pipe whose other end only the starting process holds;
when that breaks it kills all processes that carry its mark in their environment, those that they have started included.

Where it stops: the marks are read in /proc, so on Linux; elsewhere a guard does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "QPROBE_PARENT_"
# Looks for marked processes, seconds apart: what is being started at the first has its environment by the last.
_LOOKS, _PAUSE = 5, 0.2


class Guard:
    """Ends the processes that are started with its `environment`, once this process is dead."""

    def __init__(self) -> None:
        # Libraries that rename their processes (setproctitle) write over the environment unless told not to.
        mark = f"{MARK}{uuid.uuid4().hex}"
        self.environment = {mark: "1", "SPT_NOENV": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what is pressed at a terminal is not meant for it
        )

    def dismiss(self) -> None:
        """The processes have ended, or may go on by themselves."""
        self._process.kill()
        self._process.communicate()


def marked(mark: str) -> list[int]:
    """The processes, by their ids, that were started with a mark."""
    wanted, found = f"{mark}=1".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main() -> None:
    sys.stdin.read()
    for _ in range(_LOOKS):
        for pid in marked(sys.argv[1]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
