"""The filter of system calls: what no honest program needs is refused with an error. Classic BPF, assembled here.

A list of refusals, not of permissions: what a numerical library may call is not known beforehand, and the other layers
stand behind this one. Refused calls fail with EPERM (clone3 with ENOSYS, so that the C library falls back to clone, whose
flags a filter can read). Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from . import kernel

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_X32_BIT = 0x40000000  # x86_64 only: the same calls under other numbers

# name: (number on x86_64, number on aarch64); None where the machine has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # network, and memory that belongs to no process and so to no bound
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # ways into the kernel that have often been holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # priorities of others: the slot that runs a program is one of them
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    # the machine
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}
CLONE, CLONE3, PRCTL = (56, 220), (435, 435), (157, 167)
# Calls that signal the process in their first argument; without a pid namespace only a program's own is allowed.
SIGNALLING = {"kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
SIGNALLING_OTHERWISE = {"tkill": (200, 130), "pidfd_send_signal": (424, 424)}
FORKING: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
_NAMESPACES, _THREAD = 0x7E020080, 0x00010000  # every CLONE_NEW* flag of clone(2); CLONE_THREAD

# Calls that name a process in their first argument: only 0, the caller itself, is allowed.
ON_ITSELF = {
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
}

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of the first argument
NOTHING = [(_JUMP_AT_LEAST, 0, 0, 0)]  # goes on with the next instruction whatever it finds
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_MODE_FILTER = 1


def assemble(machine: str, own_pid: int | None = None, threads_only: bool = False) -> bytes:
    """The filter as BPF instructions.

    Args:
        machine: "x86_64" or "aarch64".
        threads_only: refuse new processes altogether, for where nothing else bounds their number.
        own_pid: without a pid namespace, the only process that may be signalled; None leaves signals alone.

    Raises:
        OSError: this machine's system calls are not known here.
    """
    if machine not in ARCHITECTURES:
        raise OSError(f"the system calls of {machine} are not known: only {', '.join(ARCHITECTURES)}")
    column = 0 if machine == "x86_64" else 1
    refuse, unknown = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    code = [
        (_LOAD, 0, 0, ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, unknown),  # 32-bit calls from a 64-bit process have other numbers
        (_LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        code += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, unknown)]
    code += [(_JUMP_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, unknown)]
    # Calls that depend on the first argument: load it, decide, return.
    code += [(_JUMP_EQUAL, 0, 6, CLONE[column]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_ANY_BIT, 0, 1, _NAMESPACES)]
    code += [(_RETURN, 0, 0, refuse)]
    code += [(_JUMP_ANY_BIT, 1, 0, _THREAD), (_RETURN, 0, 0, refuse)] if threads_only else NOTHING * 2
    code += [(_RETURN, 0, 0, _ALLOW)]
    code += [(_JUMP_EQUAL, 0, 4, PRCTL[column]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_EQUAL, 0, 1, kernel.PR_SET_PDEATHSIG)]
    code += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]
    for numbers in ON_ITSELF.values():
        code += [(_JUMP_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_EQUAL, 1, 0, 0)]
        code += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]
    if own_pid is not None:
        for numbers in SIGNALLING.values():
            code += [(_JUMP_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARGUMENT), (_JUMP_EQUAL, 1, 0, own_pid)]
            code += [(_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]
    refused = {numbers[column] for numbers in REFUSED.values()}
    if own_pid is not None:
        refused |= {numbers[column] for numbers in SIGNALLING_OTHERWISE.values()}
    if threads_only:
        refused |= {numbers[column] for numbers in FORKING.values()}
    listed = sorted(number for number in refused if number is not None)
    code += _refuse_listed(listed, refuse)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _refuse_listed(numbers: list[int], refuse: int) -> list[tuple[int, int, int, int]]:
    # Binary search: the kernel runs a new filter over every call number once, in every child.
    if len(numbers) <= 3:
        tests = [(_JUMP_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
        return [*tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, refuse)]
    half = len(numbers) // 2
    below, above = _refuse_listed(numbers[:half], refuse), _refuse_listed(numbers[half:], refuse)
    return [(_JUMP_AT_LEAST, len(below), 0, numbers[half]), *below, *above]


def install(own_pid: int | None = None, threads_only: bool = False) -> None:
    """Put the filter on this process and all its descendants, for good (after no-new-privileges).

    Args:
        own_pid: see `assemble`.
        threads_only: see `assemble`.

    Raises:
        OSError: no filter for this machine, or the kernel refused.
    """
    code = assemble(kernel.MACHINE, own_pid, threads_only)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions))
    kernel.syscall("seccomp", _MODE_FILTER, 0, program)
