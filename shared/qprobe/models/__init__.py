"""One language model and how it runs: loading, adapters, shared prefixes, memory, likelihoods, vLLM engines, API clients."""

from qprobe.models.conversion import repeated_head, safetensors
from qprobe.models.language_model import EMBEDDED, EMBEDDED_FILE, LanguageModel, ModelSpec
from qprobe.models.loading import load, load_tokenizer, outline, skeleton
from qprobe.models.tokenizer import Tokenizer

__all__ = [
    "EMBEDDED",
    "EMBEDDED_FILE",
    "LanguageModel",
    "ModelSpec",
    "Tokenizer",
    "load",
    "load_tokenizer",
    "outline",
    "repeated_head",
    "safetensors",
    "skeleton",
]
