"""Models as other programs read them: safetensors made of a GGUF file or of a merged adapter, once, into a cache."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from qprobe.models.cache import CacheError, cache_folder, made_once, save_dense
from qprobe.models.language_model import ModelSpec
from qprobe.models.loading import load, quiet_transformers, skeleton, unpacked

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

    Raises:
        OSError: the model cannot be had or the cache cannot be written, in one sentence.
    """
    folder, gguf = spec.source()
    if gguf is None and spec.adapter is None:
        return folder, spec.revision
    dtype = str(spec.resolved_dtype()).removeprefix("torch.")
    # On the CPU, and not kept as `load` keeps models: the device's memory is the other program's.
    here = dataclasses.replace(spec, device="cpu", device_map=None, dtype=dtype)

    def write(target: Path) -> None:
        merged = load.__wrapped__(here)
        with quiet_transformers():
            save_dense(merged.model, merged.tokenizer, target)

    try:
        if spec.adapter is None:
            return str(unpacked(here)), None
        return str(made_once(cache_folder(Path(gguf or folder).stem, here, dtype), write)), None
    except CacheError as error:
        raise OSError(f"Model {spec.name!r} could not be converted: {error}") from error
