"""What was made of a model once, for later starts and for other programs: folders that are written whole or not at all.

The cache is `$QPROBE_CACHE`, or else `~/.cache/qprobe`; what is in it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qprobe.models.language_model import ModelSpec


class CacheError(OSError):
    """The cache cannot be written."""


def cache_root() -> Path:
    """The folder of the cache, which need not be there."""
    return Path(os.environ.get("QPROBE_CACHE") or "~/.cache/qprobe").expanduser()


def cache_folder(stem: str, spec: ModelSpec, kind: str) -> Path:
    """Where what is made of a model is kept: known by its content, wherever the model lies.

    Args:
        stem: for people who look.
        kind: what is made.
    """
    identity = spec.identity()
    if identity["content"] is not None:
        del identity["name"]  # it may lie anywhere
    del identity["dtype"]
    known_by = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / "converted"
    made = sorted(folder.glob(f"*-{known_by}-{kind}"))  # under another name of the file, too
    return made[0] if made else folder / f"{stem}-{known_by}-{kind}"


def made_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """A folder, made by `write` where it is not there yet.

    Raises:
        CacheError: it cannot be written, in a sentence.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
            making_it = Path(making) / "model"
            write(making_it)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                # Another process was faster: a folder that is there and not empty is not replaced.
                making_it.rename(folder)
    except (OSError, SafetensorError) as error:
        if folder.is_dir():
            return folder
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CacheError(
            f"{folder} could not be written ({said}): make room there, or set the environment variable QPROBE_CACHE to "
            "another folder."
        ) from error
    return folder


def save_dense(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that was unpacked from GGUF or has an adapter merged; nothing may say that it is still packed."""
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
