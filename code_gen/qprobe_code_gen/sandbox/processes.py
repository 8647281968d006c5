"""Looking at a program's processes through /proc: how many there are, what they use together. Standard library only.

The nursery may live in a pid namespace of its own, while /proc belongs to the outer one; names in /proc are therefore
resolved through what /proc itself says ("self", "NSpid") and never taken from getpid or fork.
"""

# ruff: noqa: PTH208
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import os
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a group of processes uses.

    Args:
        processes: how many there are.
        cpu_seconds: CPU time, ended and awaited children included, seconds.
        memory: resident anonymous memory beyond what each shares with the nursery it was forked from, bytes.
    """

    processes: int
    cpu_seconds: float
    memory: int


class Processes:
    """A view of /proc.

    Args:
        proc: descriptor of /proc.

    Raises:
        OSError: this kernel does not list the children of a process.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc
        self._self = os.readlink("self", dir_fd=proc)
        self.baseline = self._anonymous(self._self)
        self._read(f"{self._self}/task/{self._self}/children")

    def slots(self) -> dict[int, str]:
        """The nursery's children: pid as the nursery and the zygote know it -> name in /proc."""
        found: dict[int, str] = {}
        for name in self._children(self._self):
            for line in self._read(f"{name}/status").splitlines():
                if line.startswith("NSpid:"):
                    inside = line.split()
                    # The columns go inwards, from the namespace of /proc to the process's own; the zygote's is where
                    # its own pid would stand.
                    found[int(inside[self._column()])] = name
        return found

    def _column(self) -> int:
        for line in self._read(f"{self._self}/status").splitlines():
            if line.startswith("NSpid:"):
                return len(line.split()) - 1
        return 1

    def below(self, name: str) -> Usage:
        """What all descendants of a process use.

        Args:
            name: of the process in /proc.
        """
        count, ticks, memory = 0, 0, 0
        pending = self._children(name)
        while pending:
            current = pending.pop()
            try:
                fields = self._read(f"{current}/stat").rpartition(")")[2].split()
                memory += max(0, self._anonymous(current) - self.baseline)
                pending += self._children(current)
            except (OSError, IndexError):  # it has ended meanwhile
                continue
            count += 1
            ticks += sum(int(x) for x in fields[11:15])  # utime, stime, cutime, cstime
        return Usage(count, ticks / _TICKS, memory)

    def queued_below(self, name: str) -> float:
        """How long the first process below another has stood in the queue for a processor, seconds; 0 if unknown."""
        try:
            return int(self._read(f"{self._children(name)[0]}/schedstat").split()[1]) / 1e9
        except (OSError, IndexError):  # it has ended, or the kernel does not count this
            return 0.0

    def _anonymous(self, name: str) -> int:
        _, resident, shared, *_ = self._read(f"{name}/statm").split()
        return (int(resident) - int(shared)) * _PAGE

    def _children(self, name: str) -> list[str]:
        names: list[str] = []
        directory = os.open(f"{name}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
        try:
            threads = os.listdir(directory)
        finally:
            os.close(directory)
        for thread in threads:
            names += self._read(f"{name}/task/{thread}/children").split()
        return names

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY, dir_fd=self._proc)
        try:
            pieces = []
            while piece := os.read(fd, 1 << 16):
                pieces.append(piece)
        finally:
            os.close(fd)
        return b"".join(pieces).decode("ascii", "replace")
