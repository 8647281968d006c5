"""The layers of isolation: found once, applied to the nursery what all programs can share, and to each child the rest.

A layer that the kernel refuses is left out and reported with the reason; whether that is tolerable is the caller's choice
(`strict`). The order in `confine` matters: mounts need capabilities, capabilities go before the program comes, and the
system-call filter is last because it forbids what the other layers are made of. Standard library only.
"""

# ruff: noqa: PTH109, PTH102, PTH110, PTH118, PTH123, PTH208
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from . import kernel, landlock, seccomp
from .filesystem import DEVICES, SYSTEM, Tree, interpreter_folders, virtual_environment
from .hidden import around
from .processes import Processes

STOPS = {
    "unprivileged id": "acting as root on anything that the other layers leave in reach",
    "user namespace": "every capability outside; counts each program's processes apart from all others",
    "pid namespace": "seeing and signalling other processes, outliving the program: the kernel kills all its descendants",
    "network namespace": "every connection: the programs' network has no interface, not even a loopback",
    "ipc namespace": "message queues, semaphores and shared memory of other processes",
    "mount namespace": "reading home and secrets, writing anywhere but in an empty /tmp of its own, filling the disk",
    "no new privileges": "gaining rights by running set-user-id programs",
    "hidden answers": "reading the benchmarks' solutions out of installed packages, caches and recordings",
    "landlock": "opening any file beyond the interpreter, the system's libraries and /tmp, a second time",
    "seccomp": "ptrace, sockets, mounts, namespaces, keys, bpf, io_uring and other calls no honest program makes",
    "resource limits": "more CPU time, address space, file size or open files than allowed; core dumps",
    "process bound": "fork bombs and thread bombs",
    "total bound": "more memory or CPU time in all processes of a program together (looked at every 50 ms)",
    "parent death": "programs that outlive a killed harness",
    "bounded output": "endless output",
    "empty environment": "reading secrets from environment variables",
}
_OWN_NAMESPACES = {
    "mount namespace": kernel.CLONE_NEWNS,
    "ipc namespace": kernel.CLONE_NEWIPC,
    "network namespace": kernel.CLONE_NEWNET,
}
_EVERYWHERE = ("resource limits", "bounded output", "empty environment")  # what needs no Linux
_NOBODY = 65534
_OPEN_FILES = 256
_RESERVE = 32 << 20  # bytes of address space that a program which ran out of memory gets back to report it


@dataclass(frozen=True)
class Bounds:
    """Those limits of a program that its slot puts on; units as in `Limits`."""

    memory_mib: int
    processes: int
    disk_mib: int


class Isolation:
    """Which layers hold, and how they are put on.

    Args:
        workers: programs that run at the same time.
        temporary: where folders for programs are made when there is no mount namespace.
        answers: folders with answers that no program may read, wherever they are.
    """

    def __init__(self, workers: int, temporary: str, answers: list[str]) -> None:
        self.problems: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.workers = workers
        self.processes: Processes | None = None
        self.scratch = ""  # the folder of the programs' folders, when they need one
        self._temporary = os.path.realpath(temporary)
        self._tree = Tree(interpreter_folders(), answers)
        self._readable: tuple[list[str], list[str]] | None = None  # by Landlock alone
        self._proc = -1
        self._own_pid_namespace = -1
        self._nursery = -1
        self._processes_before = 0
        self._threads_only = False

    def active(self, layer: str) -> bool:
        """Whether a layer holds."""
        return layer not in self.problems

    def prepare(self) -> None:
        """Put the shared layers on this process and find out which of the others work."""
        if not kernel.LINUX:
            self.problems = {name: f"needs Linux, this is {sys.platform}" for name in STOPS if name not in _EVERYWHERE}
        else:
            self._prepare_linux()
        if not self.active("mount namespace"):
            self.scratch = os.path.join(self._temporary, f"qprobe-sandbox-{os.urandom(8).hex()}")
            os.mkdir(self.scratch, 0o700)

    @property
    def slots_are_reusable(self) -> bool:
        """Whether a slot may run another program: nothing of the one before can have stayed in it, or have reached it."""
        return all(self.active(x) for x in ("pid namespace", "seccomp", "mount namespace"))

    @property
    def kept_in_slot(self) -> list[int]:
        """Descriptors that `confine_program` and `kill_leftovers` need."""
        return [self._nursery] if kernel.LINUX and not self.active("pid namespace") else []

    def _prepare_linux(self) -> None:
        try:
            self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as fault:
            self.problems["total bound"] = f"/proc cannot be read: {fault}"
        root = os.geteuid() == 0
        if root:  # what lies in root's home can be shown to programs only while this is root
            self._try("mount namespace", self._enter_tree)
            self._try("unprivileged id", self._become_nobody)
        self._try("user namespace", self._enter_user_namespace)
        if not root:
            self._try("mount namespace", self._enter_tree)
        self._try("pid namespace", self._enter_pid_namespace)
        if not self.active("pid namespace"):
            # Orphans then come to the nursery, which kills them.
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self._nursery = os.pidfd_open(os.getpid())
        if self.active("total bound"):
            try:
                self.processes = Processes(self._proc)
            except OSError as fault:
                self.problems["total bound"] = f"/proc does not list the children of a process: {fault}"
        if not self.active("user namespace"):
            self._processes_before = sum(name.isdigit() for name in os.listdir(self._proc)) if self._proc >= 0 else 0
        self._probe_layers_of_a_slot()
        if not self.active("mount namespace") and not self.active("landlock"):
            self.problems["hidden answers"] = "needs a mount namespace or Landlock"
        if attempt(self._be_bounded):
            # The kernel sets root no bound. Where another id could not be taken, the filter refuses every new process.
            self._threads_only = self.active("seccomp")
            why = "the kernel sets this user no bound"
            if self._threads_only:
                self.notes["process bound"] = f"{why}: programs may start threads, but no process at all"
            else:
                self.problems["process bound"] = why

    def _be_bounded(self) -> None:
        if self.active("user namespace"):
            kernel.unshare(kernel.CLONE_NEWUSER)
        kernel.drop_capabilities()
        lower(resource.RLIMIT_NPROC, 1, 1)
        try:
            pid = os.fork()
        except OSError:
            return
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        raise OSError("a second process could be started where one is allowed")

    def _try(self, layer: str, action: Callable[[], None]) -> None:
        # A refused step can leave a process half moved, so a forked copy goes first.
        problem = attempt(action)
        if problem:
            self.problems[layer] = problem
        else:
            action()

    def _enter_tree(self) -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        self._tree.build()

    def _become_nobody(self) -> None:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        # A change of id makes a process undumpable, and then its own entries in /proc belong to root.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        with open(os.__file__, "rb"):
            pass  # an interpreter that only root can read would turn honest imports into errors

    def _enter_user_namespace(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(kernel.CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self._proc)
            os.write(fd, text.encode())
            os.close(fd)

    def _enter_pid_namespace(self) -> None:
        # A process moves into a pid namespace by being born in it. The one that stays outside only waits: were it killed,
        # the kernel kills the one inside, and with it every process that was ever started there.
        outside = os.pidfd_open(os.getpid())
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            os.closerange(0, 1 << 16)
            _, status = os.waitpid(pid, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if ended(outside):
            os._exit(1)
        os.close(outside)
        self._own_pid_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=self._proc)
        kernel.unshare(kernel.CLONE_NEWPID)
        kernel.setns(self._own_pid_namespace, kernel.CLONE_NEWPID)

    def _probe_layers_of_a_slot(self) -> None:
        def own_user_namespace() -> None:
            kernel.unshare(kernel.CLONE_NEWUSER)
            kernel.drop_capabilities()

        def own_tmp() -> None:
            kernel.unshare(kernel.CLONE_NEWNS)
            self._tree.enter_own_tmp(1)

        def rules() -> None:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            self._landlock("/").apply()

        def filtered() -> None:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(1)

        probes = {
            "network namespace": lambda: kernel.unshare(kernel.CLONE_NEWNET),
            "ipc namespace": lambda: kernel.unshare(kernel.CLONE_NEWIPC),
            "user namespace": own_user_namespace,
            "mount namespace": own_tmp,
            "no new privileges": lambda: kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1),
            "landlock": rules,
            "seccomp": filtered,
        }
        for layer, probe in probes.items():
            problem = attempt(probe) if self.active(layer) else ""
            if problem:
                self.problems[layer] = problem

    def _landlock(self, own_folder: str) -> landlock.Rules:
        if self.active("mount namespace"):
            return landlock.Rules(["/"], [], own_folder)
        if self._readable is None:
            files = ("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", virtual_environment(), *DEVICES)
            present = [path for path in (*SYSTEM, *self._tree.folders, *files) if os.path.exists(path)]
            self._readable = around(present, self._tree.hidden)
        return landlock.Rules(*self._readable, own_folder)

    def fork(self) -> int:
        """Fork a child; 0 in the child, which is the first process of its own pid namespace.

        Raises:
            OSError: no further process can be started.
        """
        if not self.active("pid namespace"):
            return os.fork()
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid != 0:
                kernel.setns(self._own_pid_namespace, kernel.CLONE_NEWPID)
        return pid

    def confine(self, bounds: Bounds, folder: str) -> None:
        """Put on this process, a slot, every layer that its programs can inherit, for good.

        Args:
            bounds: limits of its programs.
            folder: where they may write, when there is no mount namespace.

        Raises:
            OSError: a layer that worked before is refused now: the harness has failed, not the program.
        """
        own = 0
        for layer, flag in _OWN_NAMESPACES.items():
            own |= flag if self.active(layer) else 0
        if own:
            kernel.unshare(own)
        if self.active("mount namespace"):
            self._tree.enter_own_tmp(bounds.disk_mib)
        else:
            os.chdir(folder)
            os.environ["TMPDIR"] = os.environ["HOME"] = folder
        if self.active("user namespace"):
            kernel.unshare(kernel.CLONE_NEWUSER)
        rules = self._landlock(os.getcwd()) if kernel.LINUX and self.active("landlock") else None
        self._limit(bounds)
        if kernel.LINUX:
            kernel.drop_capabilities()
            self.die_with_the_nursery()
            if self.active("no new privileges"):
                kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            if rules is not None:
                rules.apply()
            if self.active("seccomp") and self.active("pid namespace"):
                seccomp.install()

    def die_with_the_nursery(self) -> None:
        """Have the kernel kill this process, a child of the nursery, when the nursery ends."""
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the ids: a change of them clears it
        if ended(self._nursery):  # before the death signal was asked for; getppid() is 0 in a pid namespace
            os._exit(1)

    def confine_program(self) -> None:
        """Put on a program what it cannot inherit: nothing, where there is a pid namespace and processes are bounded."""
        if kernel.LINUX and not self.active("pid namespace"):
            self.die_with_the_nursery()
            if self.active("seccomp"):
                seccomp.install(os.getpid(), self._threads_only)
        elif self._threads_only:  # its slot itself must fork
            seccomp.install(threads_only=True)

    def kill_leftovers(self, program: int) -> None:
        """Kill and reap what a program that has ended left in this slot.

        Args:
            program: its first process, which leads its process group.
        """
        try:
            # In a pid namespace -1 is everything but this process; the kernel lets no fork slip through in between.
            os.kill(-1, signal.SIGKILL) if self.active("pid namespace") else os.killpg(program, signal.SIGKILL)
        except (
            ProcessLookupError,
            PermissionError,
        ):  # nothing is left; or, on other systems, only what is dead already
            return
        while self.active("pid namespace"):
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def kill_orphans(self, known: set[int]) -> None:
        """Without a pid namespace: kill what programs have left; orphans are this process's, the nursery's, children.

        Args:
            known: children that stay.
        """
        while self.processes is not None and (orphans := self.processes.slots().keys() - known):
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _limit(self, bounds: Bounds) -> None:
        lower(resource.RLIMIT_CORE, 0, 0)
        lower(resource.RLIMIT_FSIZE, bounds.disk_mib << 20, bounds.disk_mib << 20)
        lower(resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES)
        if kernel.LINUX:
            memory = bounds.memory_mib << 20
            lower(resource.RLIMIT_AS, memory, memory + _RESERVE)
            processes = bounds.processes + 1  # the slot itself
            if not self.active("user namespace"):  # the bound then counts everything that runs under this id
                processes = self._processes_before + self.workers * (bounds.processes + 1)
            # After the user namespace is made: a namespace keeps the bound it was made under for all programs together.
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
    """Try something in a forked copy of this process.

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
            os.write(writer, (str(fault) or repr(fault)).encode()[:500])
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode("utf-8", "replace")
    os.waitpid(pid, 0)
    return "" if answer == "worked" else answer or "the attempt died"
