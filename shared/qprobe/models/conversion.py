"""Models as other programs read them: safetensors made of a GGUF file or of a merged adapter, once, into a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from qprobe.models.language_model import LanguageModel, ModelSpec, load, quiet_transformers, skeleton

# Rows of an output head that are compared with the embeddings. Two quantisations of one matrix are .01 to .3 of its norm apart,
# different matrices 1.4.
_HEAD_ROWS, _HEAD_DISTANCE = 256, 0.5


@functools.lru_cache(maxsize=4)
def repeated_head(spec: ModelSpec) -> int:
    """Numbers in a GGUF file's output head where that is its token embeddings once more, quantised otherwise; else 0.

    Such a model was trained with one matrix for both: it has the parameters once, though they are unpacked twice.
    """
    folder, gguf_name = spec.source()
    if gguf_name is None or skeleton(spec).config.get_text_config(decoder=True).tie_word_embeddings:
        return 0
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {tensor.name: tensor for tensor in GGUFReader(Path(folder) / gguf_name).tensors}
    embeddings, head = found.get("token_embd.weight"), found.get("output.weight")
    if embeddings is None or head is None or list(embeddings.shape) != list(head.shape):
        return 0
    rows = np.linspace(0, len(head.data) - 1, min(len(head.data), _HEAD_ROWS)).astype(int)
    one, other = (dequantize(tensor.data[rows], tensor.tensor_type) for tensor in (embeddings, head))
    same = bool(np.linalg.norm(one - other) < _HEAD_DISTANCE * np.linalg.norm(other))
    return int(np.prod(head.shape)) if same else 0


def safetensors(spec: ModelSpec) -> tuple[str, str | None]:
    """(folder or hub id, revision) for programs that read no GGUF and merge no adapter: those are converted once, into the cache.

    The cache is `$QPROBE_CACHE`, or else `~/.cache/qprobe`; a converted model may be deleted at any time.

    Raises:
        OSError: the model cannot be had or the cache cannot be written, in one sentence.
    """
    folder, gguf = spec.source()
    if gguf is None and spec.adapter is None:
        return folder, spec.revision
    cache = Path(os.environ.get("QPROBE_CACHE") or "~/.cache/qprobe").expanduser()
    dtype = str(spec.resolved_dtype()).removeprefix("torch.")
    identity = spec.identity()
    if identity["content"] is not None:
        del identity["name"]  # it may lie anywhere
    known_by = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    made = cache / "converted" / f"{Path(gguf or folder).stem}-{known_by}-{dtype}"
    if not made.is_dir():
        # Not kept as `load` keeps models: its memory is the other program's.
        converted = load.__wrapped__(dataclasses.replace(spec, device="cpu", device_map=None, dtype=dtype))
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-") as making, quiet_transformers():
                _save_dense(converted, Path(making) / "model")
                with contextlib.suppress(OSError):  # another process was faster, with the same model
                    (Path(making) / "model").rename(made)
        except OSError as error:
            raise OSError(
                f"Model {spec.name!r} could not be converted into {made} ({error.strerror or error}): make room there, or "
                "set the environment variable QPROBE_CACHE to another folder."
            ) from error
    return str(made), None


def _save_dense(language_model: LanguageModel, folder: Path) -> None:
    """Write a model that was unpacked from GGUF or has an adapter merged; nothing may say that it is still packed."""
    model = language_model.model
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
