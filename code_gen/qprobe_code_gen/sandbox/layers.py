"""The layers of isolation: found once, applied to the zygote what all programs can share, and to each child the rest.

A layer that the kernel refuses is left out and reported with the reason; whether that is tolerable is the caller's choice
(`strict`). The order in `confine` matters: mounts need capabilities, capabilities go before the program comes, and the
system-call filter is last because it forbids what the other layers are made of. Standard library only.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from . import kernel
from .filesystem import Tree, interpreter_folders

STOPS = {
    "unprivileged id": "acting as root; without it nothing bounds root's processes",
    "user namespace": "every capability outside; other programs' processes do not count against this one's bound",
    "pid namespace": "seeing, signalling or outliving: when the program ends, the kernel kills all its descendants",
    "network namespace": "every connection: there is no network, not even a loopback",
    "ipc namespace": "System V and POSIX message queues, semaphores and shared memory of others",
    "mount namespace": "reading home and secrets, writing anywhere but in a /tmp of its own",
    "resource limits": "more CPU time, address space, file size or open files than allowed, core dumps",
    "process bound": "fork bombs and thread bombs",
    "total bound": "more memory or CPU time in all processes of a program together (looked at every 50 ms)",
    "parent death": "programs that outlive a killed harness",
}
NOBODY = 65534
OPEN_FILES = 256


@dataclass(frozen=True)
class Bounds:
    """The limits of one program as the child applies them."""

    cpu_seconds: float
    memory_mib: int
    processes: int
    disk_mib: int


class Isolation:
    """Which layers hold, and how they are put on.

    Args:
        workers: programs that run at the same time.
    """

    def __init__(self, workers: int) -> None:
        self.problems: dict[str, str] = {}
        self.workers = workers
        self.tree = Tree(interpreter_folders())
        self.home = os.getpid()
        self.proc: int | None = None
        self._own_pid_namespace: int | None = None
        self._pidfd: int | None = None
        self._processes_before = 0

    def active(self, layer: str) -> bool:
        """Whether a layer holds."""
        return layer not in self.problems

    def prepare(self) -> None:
        """Put the shared layers on this process and find out which of the others work."""
        if not kernel.LINUX:
            for name in STOPS:
                if name not in ("resource limits",):
                    self.problems[name] = f"needs Linux, this is {sys.platform}"
            return
        try:
            self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as fault:
            self.problems["total bound"] = f"/proc cannot be read: {fault}"
        root = os.geteuid() == 0
        if root:
            self._try_in_a_copy("mount namespace", self._enter_tree)
            self._become_nobody()
        elif os.getuid() == 0:
            self.problems["unprivileged id"] = "the real user is root"
        self._try_in_a_copy("user namespace", self._enter_user_namespace)
        for name, flag in (("network namespace", kernel.CLONE_NEWNET), ("ipc namespace", kernel.CLONE_NEWIPC)):
            self._try_in_a_copy(name, lambda flag=flag: kernel.unshare(flag))
        if not root:
            self._try_in_a_copy("mount namespace", self._enter_tree)
        self._try_in_a_copy("pid namespace", self._enter_pid_namespace)
        self._pidfd = os.pidfd_open(os.getpid())
        if not self.active("pid namespace"):
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        if not self.active("user namespace"):
            self._processes_before = self._count_processes()
            self.problems.setdefault("process bound", "") if os.getuid() == 0 else None

    def _try_in_a_copy(self, layer: str, action: Callable[[], None]) -> None:
        # A refused step can leave a process half moved, so a forked copy goes first.
        problem = attempt(action)
        if problem:
            self.problems[layer] = problem
        else:
            action()

    def _enter_tree(self) -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        self.tree.build()

    def _become_nobody(self) -> None:
        def drop() -> None:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            # A change of id makes a process undumpable, and then its own /proc entries belong to root.
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
            with open(os.__file__, "rb"):
                pass  # an interpreter that only root can read would turn honest imports into errors

        self._try_in_a_copy("unprivileged id", drop)

    def _enter_user_namespace(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(kernel.CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self.proc)
            os.write(fd, text.encode())
            os.close(fd)

    def _enter_pid_namespace(self) -> None:
        # A process moves into a pid namespace by being born in it. The one that stays outside only waits: were it killed,
        # the kernel kills the one inside, and with it every process that was ever started there.
        outside = os.pidfd_open(os.getpid())
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            os.closerange(0, 1 << 20)
            _, status = os.waitpid(pid, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if ended(outside):
            os._exit(1)
        self._own_pid_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=self.proc)
        kernel.unshare(kernel.CLONE_NEWPID)
        kernel.setns(self._own_pid_namespace, kernel.CLONE_NEWPID)

    def _count_processes(self) -> int:
        if self.proc is None:
            return 0
        return sum(name.isdigit() for name in os.listdir(self.proc))

    def fork(self) -> int:
        """Fork a child; 0 in the child, which is the first process of its own pid namespace.

        Raises:
            OSError: the kernel has no room for another process.
        """
        if self._own_pid_namespace is None or not self.active("pid namespace"):
            return os.fork()
        kernel.unshare(kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
        except BaseException:
            kernel.setns(self._own_pid_namespace, kernel.CLONE_NEWPID)
            raise
        if pid:
            kernel.setns(self._own_pid_namespace, kernel.CLONE_NEWPID)
        return pid

    def confine(self, bounds: Bounds) -> None:
        """Put every layer that is left on this child, for good.

        Raises:
            OSError: a layer that worked before is refused now: the harness has failed, not the program.
        """
        os.setsid()
        if self.active("mount namespace"):
            kernel.unshare(kernel.CLONE_NEWNS)
            self.tree.enter_own_tmp(bounds.disk_mib)
        if self.active("ipc namespace"):
            kernel.unshare(kernel.CLONE_NEWIPC)
        if self.active("user namespace"):
            kernel.unshare(kernel.CLONE_NEWUSER)
            kernel.drop_capabilities()
        self._limit(bounds)
        if kernel.LINUX:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the ids: a change of them clears it
            self._leave_if_orphaned()

    def _leave_if_orphaned(self) -> None:
        # The zygote may have died before the death signal was asked for; getppid() is 0 in a pid namespace.
        if self._pidfd is not None and ended(self._pidfd):
            os._exit(1)

    def _limit(self, bounds: Bounds) -> None:
        memory = bounds.memory_mib << 20
        seconds = int(bounds.cpu_seconds) + 2  # the zygote's own look at the clock comes first and is finer
        lower(resource.RLIMIT_CPU, seconds, seconds)
        lower(resource.RLIMIT_CORE, 0, 0)
        lower(resource.RLIMIT_FSIZE, bounds.disk_mib << 20, bounds.disk_mib << 20)
        lower(resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        if kernel.LINUX:
            lower(resource.RLIMIT_AS, memory, memory + (32 << 20))
        processes = bounds.processes
        if not self.active("user namespace"):  # the bound counts everything that runs under this id
            processes = self._processes_before + self.workers * bounds.processes
        lower(resource.RLIMIT_NPROC, processes, processes)


def ended(pidfd: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    return bool(select.select([pidfd], [], [], 0)[0])


def lower(kind: int, soft: int, hard: int) -> None:
    """Set a resource limit, never above the one in force."""
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def attempt(action: Callable[[], None]) -> str:
    """Try something in a forked copy.

    Returns:
        What went wrong, in words; empty when it worked.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os.write(writer, b"worked")
        except Exception as fault:
            os.write(writer, (str(fault) or traceback.format_exc(limit=1)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode()
    os.waitpid(pid, 0)
    return "" if answer == "worked" else answer or "the attempt died"
