"""The tree of files that programs see: the interpreter and the system's libraries, read-only, and a /tmp of their own.

The tree is built once, in the zygote's own mount namespace, on a small tmpfs; the old root then leaves the namespace, so
home folders, /proc, /sys and everything writable are not hidden but gone. A child copies the namespace and mounts an empty
tmpfs on /tmp. Standard library only.
"""

# ruff: noqa: PTH102, PTH100, PTH103, PTH110, PTH112, PTH113, PTH114, PTH115, PTH118, PTH120, PTH123, PTH211
# Files are named by descriptor here, and the zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import os
import sys
import sysconfig

from . import hidden, kernel

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_COPIED = ("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types")
WRITTEN = {
    "/etc/passwd": "root:x:0:0:root:/tmp:/bin/false\nnobody:x:65534:65534:nobody:/tmp:/bin/false\n",
    "/etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
_LINKED = {"/dev/shm": "/tmp", "/var/tmp": "/tmp"}
_STAGE = "/packages"  # where folders under /tmp wait: the child's own /tmp covers their place


def interpreter_folders() -> list[str]:
    """Folders, besides those of the system, that the interpreter and its packages are read from."""
    paths = sysconfig.get_paths()
    wanted = [
        paths["stdlib"],
        paths["platstdlib"],
        *(os.path.join(sys.base_prefix, x) for x in ("bin", "lib", "lib64")),
    ]
    wanted += [entry for entry in sys.path if os.path.isdir(entry)]
    if virtual_environment():  # else `sys.executable`, which is in it, would not exist
        wanted.append(os.path.dirname(sys.executable))
    return outermost([os.path.realpath(path) for path in wanted if os.path.isdir(path)] + wanted)


def virtual_environment() -> str:
    """The file that makes the interpreter's folder a virtual environment; empty where it is none."""
    path = os.path.join(os.path.dirname(os.path.dirname(sys.executable)), "pyvenv.cfg")
    return path if os.path.isfile(path) else ""


def outermost(paths: list[str]) -> list[str]:
    """The existing folders among `paths` that lie in no other of them and not in the system's."""
    kept = _system_folders()
    system = len(kept)
    for path in sorted({os.path.abspath(p) for p in paths if os.path.isdir(p)}, key=len):
        if path != "/" and not any(path == other or path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept[system:]


def _system_folders() -> list[str]:
    return [path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path)]


class Tree:
    """The files that programs see.

    Args:
        folders: what `interpreter_folders` gave, found before anything was mounted.
        answers: folders with answers, wherever they are.
    """

    def __init__(self, folders: list[str], answers: list[str]) -> None:
        self.folders = folders
        self.staged: set[str] = set()
        self.visible = [*_system_folders(), *folders]
        self.hidden = hidden.found(self.visible, answers)

    def build(self) -> None:
        """Make the tree and move this process (alone in its mount namespace) into it.

        Raises:
            OSError: the kernel refused; the namespace may be half built, so try it in a process that can be thrown away.
        """
        top = next(path for path in ("/tmp", "/mnt", "/var/tmp") if os.path.isdir(path))
        contents = {path: read(path) for path in (*_COPIED, virtual_environment()) if os.path.isfile(path)}
        sources = {path: os.open(path, os.O_PATH) for path in self._bound()}
        links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("qprobe", top, "tmpfs", kernel.MS_NOSUID, "size=4m,mode=0755")

        def place(path: str) -> str:
            return top + (_STAGE if path.startswith("/tmp/") else "") + path

        for path, fd in sources.items():
            target = place(path)
            if path.startswith("/tmp/"):
                self.staged.add(path.split("/")[2])
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if path in DEVICES:
                write(target, b"")
            else:
                os.makedirs(target, exist_ok=True)
            kernel.mount(f"/proc/self/fd/{fd}", target, None, kernel.MS_BIND | kernel.MS_REC)
            os.close(fd)
        for path in self.hidden:
            if os.path.isdir(place(path)):
                kernel.mount("hidden", place(path), "tmpfs", kernel.MS_NOSUID, "size=4k,mode=0000")
            elif os.path.isfile(place(path)):
                kernel.mount(top + "/dev/null", place(path), None, kernel.MS_BIND)
        for path, link in {**links, **_LINKED}.items():
            os.makedirs(os.path.dirname(top + path), exist_ok=True)
            os.symlink(link, top + path)
        for path, data in {**contents, **{path: text.encode() for path, text in WRITTEN.items()}}.items():
            os.makedirs(os.path.dirname(place(path)), exist_ok=True)
            write(place(path), data)
        os.makedirs(top + "/tmp", exist_ok=True)
        kernel.make_read_only(top)
        os.chdir(top)
        kernel.syscall("pivot_root", b".", b".")
        kernel.detach(".")
        os.chdir("/")

    def _bound(self) -> list[str]:
        return [*self.visible, *(path for path in DEVICES if os.path.exists(path))]

    def enter_own_tmp(self, disk_mib: int) -> None:
        """Give this process (alone in a copy of the namespace) an empty /tmp.

        Args:
            disk_mib: size of all files in it, MiB.

        Raises:
            OSError: the kernel refused.
        """
        options = f"size={disk_mib}m,nr_inodes=16384,mode=0700"
        kernel.mount("program", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        for name in self.staged:
            os.mkdir(f"/tmp/{name}")
            kernel.mount(f"{_STAGE}/tmp/{name}", f"/tmp/{name}", None, kernel.MS_BIND | kernel.MS_REC)
        os.chdir("/tmp")


def read(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def write(path: str, data: bytes) -> None:
    """Make a file with these bytes."""
    with open(path, "wb") as file:
        file.write(data)
