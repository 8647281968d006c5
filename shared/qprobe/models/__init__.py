"""One language model and how it runs: loading, adapters, shared prefixes, memory, likelihoods, vLLM engines, API clients."""

from qprobe.models.language_model import (
    EMBEDDED,
    EMBEDDED_FILE,
    LanguageModel,
    ModelSpec,
    Tokenizer,
    is_out_of_memory,
    load,
    load_tokenizer,
    outline,
    repeated_head,
    safetensors,
    skeleton,
)

__all__ = [
    "EMBEDDED",
    "EMBEDDED_FILE",
    "LanguageModel",
    "ModelSpec",
    "Tokenizer",
    "is_out_of_memory",
    "load",
    "load_tokenizer",
    "outline",
    "repeated_head",
    "safetensors",
    "skeleton",
]
