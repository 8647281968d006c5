"""Loading a frozen causal language model and its tokenizer; whoever asks for the same one in a process shares it.

A GGUF file is unpacked once, into the cache (`$QPROBE_CACHE`, or else `~/.cache/qprobe`), and mapped from there: unpacking takes
12 s for the embedded model and a minute for one of 1.5 billion parameters, mapping less than a second. The numbers are the same.
What is in the cache may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from qprobe.models import adapters
from qprobe.models.cache import CacheError, cache_folder, made_once, save_dense
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.tokenizer import Tokenizer


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
def collector_at_rest() -> Iterator[None]:
    """While transformers is imported and makes a model: a million objects that stay, and are not looked at again and again."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
        with quiet_transformers():
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
@collector_at_rest()
def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The tokenizer of a model; shared between calls."""
    folder, arguments = _loading_arguments(spec)

    def make() -> Path:
        return made_once(
            _cached(spec, "tokenizer"), lambda target: _tokenizer(spec, folder, arguments).save_pretrained(target)
        )

    source, options = _unpacked_or_packed(make, folder, arguments)
    return Tokenizer(_tokenizer(spec, source, options), spec.name)


def _tokenizer(spec: ModelSpec, folder: str, arguments: dict[str, Any]) -> Any:
    with _explained(spec):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, **arguments)


@functools.lru_cache(maxsize=2)
@collector_at_rest()
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
    folder, arguments = _unpacked_or_packed(lambda: unpacked(spec), *_loading_arguments(spec))
    if spec.device_map is not None:
        arguments["device_map"] = spec.device_map
    try:
        model = _weights(spec, folder, arguments)
    except OSError as error:
        if folder == _loading_arguments(spec)[0]:
            raise
        raise OSError(f"{error} It was unpacked into {folder}: delete that folder, and it is unpacked anew.") from error
    if spec.device_map is None:
        with _explained(spec):
            model = model.to(spec.resolved_device())
    if spec.adapter is not None:
        model = adapters.merge(model, spec.adapter, dataclasses.replace(spec, adapter=None).identity())
    return LanguageModel(model, tokenizer, spec)


def _weights(spec: ModelSpec, folder: str, arguments: dict[str, Any]) -> Any:
    with _explained(spec):
        from transformers import AutoModelForCausalLM, GgufConfig

        if "gguf_file" in arguments:
            # Packed weights compute in float32 only and are unpacked for every product; dense ones are several times faster.
            arguments = arguments | {"quantization_config": GgufConfig(dequantize=True)}
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=spec.resolved_dtype(), output_loading_info=True, **arguments
        )
        if missing := sorted(report["missing_keys"]):
            # transformers fills them with random numbers and says so in a log that is silent here.
            raise ValueError(f"it lacks {len(missing)} weights, {missing[0]} among them")
    return model


def unpacked(spec: ModelSpec) -> Path:
    """The folder of a GGUF file's weights and tokenizer as transformers writes them.

    Raises:
        CacheError: the cache cannot be written, in one sentence.
    """
    folder, arguments = _loading_arguments(spec)
    made = _cached(spec, _dtype(spec))
    if not made.is_dir():
        said = f"{Path(spec.name).name}: unpacking its weights to {_dtype(spec)}, once ({made.parent})."
        tqdm.write(said, file=sys.stderr)

    def write(target: Path) -> None:
        model, tokenizer = _weights(spec, folder, arguments), load_tokenizer(spec).tokenizer
        with quiet_transformers():
            save_dense(model, tokenizer, target)

    return made_once(made, write)


def _unpacked_or_packed(make: Callable[[], Path], folder: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What transformers is given: the unpacked folder, or, where the cache cannot be written, the GGUF file as it is."""
    if "gguf_file" not in arguments:
        return folder, arguments
    try:
        return str(make()), {}
    except CacheError as error:
        tqdm.write(f"{error} Until then the GGUF file is unpacked at every start.", file=sys.stderr)
        return folder, arguments


def _dtype(spec: ModelSpec) -> str:
    return str(spec.resolved_dtype()).removeprefix("torch.")


def _cached(spec: ModelSpec, kind: str) -> Path:
    """Where something made of a GGUF file is kept."""
    import transformers

    folder, gguf = spec.source()
    plain = ModelSpec(spec.name, dtype=spec.dtype, device=spec.device)
    return cache_folder(Path(gguf or folder).stem, plain, f"{kind}-{transformers.__version__}")


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

    def make() -> Path:
        return made_once(
            _cached(spec, "config"),
            lambda target: AutoConfig.from_pretrained(folder, **arguments).save_pretrained(target),
        )

    with _explained(spec):
        source, options = _unpacked_or_packed(make, folder, arguments)  # reading a GGUF file's head takes seconds
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
