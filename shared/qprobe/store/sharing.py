"""Run folders that share: a table takes the parts that another folder has of it, made from the same inputs, as links."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qprobe.files import write_whole
from qprobe.store.parts import StoreError, inputs_of

# A file of a run folder that names the others, and how far above the folder of a table's run it may lie (run/policies/<name>).
NAME, DEPTH = "shared.json", 3


def share(run: Path, others: Sequence[Path]) -> None:
    """Have the tables of a run folder take what other run folders have of them.

    Args:
        run: made where it is not there.
        others: need not be there yet.
    """
    write_whole(run / NAME, json.dumps([str(other.absolute()) for other in others], indent=2).encode())


def take(run: Path, folder: Path, inputs: dict[str, Any]) -> None:
    """Link the parts that the others of a run folder have of a table, where it is made from the same inputs.

    Args:
        run: the folder, or one inside it.
        folder: of the table.
        inputs: what the table is made from.
    """
    shared = next((above for above in (run, *run.parents)[:DEPTH] if (above / NAME).exists()), None)
    if shared is None:
        return
    wanted, manifest = json.loads(json.dumps(inputs)), folder / "manifest.json"
    if manifest.exists() and _inputs(manifest) != wanted:
        return  # whoever adds to it says so
    for other in json.loads((shared / NAME).read_text()):
        source = Path(other) / folder.relative_to(shared)
        if not (source / "manifest.json").exists() or _inputs(source / "manifest.json") != wanted:
            continue
        lacking = [part for part in sorted(source.glob("part-*.parquet")) if not (folder / part.name).exists()]
        if lacking and not manifest.exists():
            write_whole(manifest, (source / "manifest.json").read_bytes())
        for part in lacking:
            _link(folder / part.name, part)


def _inputs(manifest: Path) -> Any:
    """What a manifest names; None where it cannot be read, which its own table says."""
    try:
        return inputs_of(manifest)
    except StoreError:
        return None


def _link(path: Path, part: Path) -> None:
    try:
        path.hardlink_to(part)
    except FileExistsError:  # another process of this run was quicker
        return
    except OSError:  # another file system, or one without links
        write_whole(path, part.read_bytes())
