"""Files that appear whole or not at all, and fingerprints of what is written."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import os
import platform
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it and a rename; its folder is made, an older file is replaced.

    Raises:
        OSError: the file could not be written (a full disk, permissions), in one sentence; nothing of it is left and an
            older file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder could not be made there is nothing to remove
            temporary.unlink()
        raise OSError(
            f"{path} could not be written ({error.strerror or error}): it is absent or as it was before, and what else was "
            "written stays; make room or correct the permissions, then start the same command again."
        ) from error


def read_unpacked(path: Path) -> bytes:
    """The content of a file, unpacked where it is packed by gzip, bzip2 or Zstandard (by its first bytes, whatever its name).

    Args:
        path: "-" is the standard input.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file.
    """
    if str(path) == "-":
        raw = sys.stdin.buffer.read()
    elif path.is_dir() or not path.exists():
        raise FileNotFoundError(f"There is no file {path}{' but a folder' if path.is_dir() else ''}: check the name.")
    else:
        raw = path.read_bytes()
    for kind, (start, unpack) in _PACKED.items():
        if raw.startswith(start):
            try:
                return unpack(raw)
            except (OSError, EOFError, zlib.error, ValueError) as error:
                raise ValueError(f"{path} is a damaged {kind} file ({error}): fetch it again.") from error
    return raw


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, otherwise as `read_unpacked`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one that is no text.
    """
    try:
        return read_unpacked(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error


def _unzstd(raw: bytes) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.BufferReader(raw), "zstd") as stream:
        unpacked: bytes = stream.read()
    return unpacked


# How packed files begin.
_PACKED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "gzip": (b"\x1f\x8b", gzip.decompress),
    "bzip2": (b"BZh", bz2.decompress),
    "Zstandard": (b"\x28\xb5\x2f\xfd", _unzstd),
}


def fingerprint(value: Any) -> str:
    """Of anything JSON can write; equal for equal content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files that dead processes of this machine left in a folder."""
    if not Path("/proc/self").exists():
        return  # which processes live cannot be seen here; the files do no harm
    for path in folder.glob(f".*.{platform.node()}.*.tmp"):
        if not Path("/proc", path.name.split(".")[-2]).exists():
            path.unlink(missing_ok=True)
