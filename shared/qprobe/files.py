"""Files that appear whole or not at all, and fingerprints of what is written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
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
