"""The Linux system calls that Python has no name for, by ctypes. Standard library only; importable on every system."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

LINUX = sys.platform.startswith("linux")
MACHINE = platform.machine()

CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MS_NOSUID, MS_NODEV = 0x2, 0x4
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x1, 0x2

# Numbers that differ between the two machines this knows; those from 424 on are the same everywhere.
_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "seccomp": 277},
}
_NUMBERS_EVERYWHERE = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}

_libc = ctypes.PyDLL(None, use_errno=True) if LINUX else None  # PyDLL: one thread, nothing gained by releasing the GIL


def number(name: str) -> int:
    """The number of a system call on this machine.

    Raises:
        OSError: not known here.
    """
    if name in _NUMBERS_EVERYWHERE:
        return _NUMBERS_EVERYWHERE[name]
    try:
        return _NUMBERS[MACHINE][name]
    except KeyError:
        raise OSError(f"the number of the system call {name} is not known on {MACHINE}") from None


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _function(name: str) -> ctypes._NamedFuncPointer:
    if _libc is None:
        raise OSError(f"{name}: this is {sys.platform}, not Linux")
    return getattr(_libc, name)  # type: ignore[no-any-return]


def syscall(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A raw system call; integers are passed as long.

    Raises:
        OSError: the kernel's answer, with the name of the call.
    """
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_function("syscall")(ctypes.c_long(number(name)), *values), name)


def unshare(flags: int) -> None:
    """Move this process (for CLONE_NEWPID: its next child) into new namespaces."""
    _checked(_function("unshare")(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move this process (for CLONE_NEWPID: its next child) into the namespace behind `fd`."""
    _checked(_function("setns")(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _checked(
        _function("prctl")(ctypes.c_int(option), *(ctypes.c_ulong(x) for x in (value, 0, 0, 0))), f"prctl {option}"
    )


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    _checked(
        _function("mount")(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() if options else None,
        ),
        f"mount on {target}",
    )


def detach(target: str) -> None:
    """Take a mount out of the tree; who holds a descriptor in it keeps it."""
    _checked(_function("umount2")(os.fsencode(target), ctypes.c_int(_MNT_DETACH)), f"umount {target}")


def make_read_only(target: str) -> None:
    """Make every mount at and below `target` read-only and without set-user-id (Linux 5.12)."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    syscall("mount_setattr", _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes, len(attributes))


def drop_capabilities() -> None:
    """Give up every capability of this process in its user namespace."""
    version_3 = struct.pack("Ii", 0x20080522, 0)
    syscall("capset", version_3, bytes(24))
