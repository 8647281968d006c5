"""Landlock: which files a process may open, without any privilege; from its sixth version on also signals and sockets.

Standard library only.
"""

# ruff: noqa: PTH112
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import ctypes
import os
import struct

from . import kernel

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
BITS_OF_FILES = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights each version knows; 16 from the fifth on
NETWORK = 0b11  # bind and connect TCP, from version 4 on
SCOPES = 0b11  # abstract unix sockets and signals stay inside, from version 6 on
RULE_PATH_BENEATH = 1
CREATE_RULESET_VERSION = 1


def version() -> int:
    """The kernel's Landlock version.

    Raises:
        OSError: there is none.
    """
    return kernel.syscall("landlock_create_ruleset", None, 0, CREATE_RULESET_VERSION)


class Rules:
    """What may be read, and what may be changed besides the program's own folder.

    Args:
        readable: folders and files, opened once here.
    """

    def __init__(self, readable: list[str]) -> None:
        self._version = version()
        self._files = (1 << BITS_OF_FILES.get(self._version, 16)) - 1
        fields = [self._files]
        if self._version >= 4:
            fields.append(NETWORK)
        if self._version >= 6:
            fields.append(SCOPES)
        self._attributes = struct.pack(f"{len(fields)}Q", *fields)
        self._readable = [(os.open(path, os.O_PATH), os.path.isdir(path)) for path in readable]
        self._null = os.open(os.devnull, os.O_PATH)

    def apply(self, own_folder: str) -> None:
        """Confine this process and its descendants, for good (after no-new-privileges).

        Args:
            own_folder: where everything is allowed but device files.

        Raises:
            OSError: the kernel refused.
        """
        own = os.open(own_folder, os.O_PATH)
        ruleset = kernel.syscall("landlock_create_ruleset", self._attributes, len(self._attributes), 0)
        for fd, is_folder in self._readable:
            self._allow(ruleset, fd, READ if is_folder else READ & ~READ_DIR)
        self._allow(ruleset, self._null, READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV)
        self._allow(ruleset, own, ~(MAKE_CHAR | MAKE_BLOCK))
        kernel.syscall("landlock_restrict_self", ruleset, 0)
        os.close(own)
        os.close(ruleset)

    def _allow(self, ruleset: int, fd: int, rights: int) -> None:
        rule = struct.pack("=Qi", rights & self._files, fd)
        kernel.syscall("landlock_add_rule", ruleset, RULE_PATH_BENEATH, ctypes.create_string_buffer(rule, len(rule)), 0)
