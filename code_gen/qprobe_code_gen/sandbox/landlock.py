"""Landlock: which files a process may open, without any privilege; from its sixth version on also signals and sockets.

Standard library only.
"""

# ruff: noqa: PTH112
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from . import kernel

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_BITS_OF_FILES = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights each version knows; 16 from the fifth on
_NETWORK = 0b11  # bind and connect TCP, from version 4 on
_SCOPES = 0b11  # abstract unix sockets and signals stay inside, from version 6 on
_RULE_PATH_BENEATH = 1
_CREATE_RULESET_VERSION = 1


def version() -> int:
    """The kernel's Landlock version.

    Raises:
        OSError: there is none.
    """
    return kernel.syscall("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)


class Rules:
    """What may be read, and what may be changed besides the program's own folder.

    Args:
        readable: files and folders.
        listed: folders whose names alone may be read.
        own_folder: where everything is allowed but device files.

    Raises:
        OSError: the kernel refused.
    """

    def __init__(self, readable: Iterable[str], listed: Iterable[str], own_folder: str) -> None:
        abi = version()
        self._files = (1 << _BITS_OF_FILES.get(abi, 16)) - 1
        fields = [self._files]
        if abi >= 4:
            fields.append(_NETWORK)
        if abi >= 6:
            fields.append(_SCOPES)
        attributes = struct.pack(f"{len(fields)}Q", *fields)
        self._ruleset = kernel.syscall("landlock_create_ruleset", attributes, len(attributes), 0)
        for path in readable:
            self._allow(path, _READ if os.path.isdir(path) else _READ & ~_READ_DIR)
        for path in listed:
            self._allow(path, _READ_DIR)
        self._allow(os.devnull, _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV)
        self._allow(own_folder, ~(_MAKE_CHAR | _MAKE_BLOCK))

    def apply(self) -> None:
        """Confine this process and its descendants, for good (after no-new-privileges).

        Raises:
            OSError: the kernel refused.
        """
        kernel.syscall("landlock_restrict_self", self._ruleset, 0)
        os.close(self._ruleset)

    def _allow(self, path: str, rights: int) -> None:
        fd = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights & self._files, fd)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        kernel.syscall("landlock_add_rule", self._ruleset, _RULE_PATH_BENEATH, buffer, 0)
        os.close(fd)
