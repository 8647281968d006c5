"""Embeddings of prompt + completion from a model's hidden layers: one protocol, one module a back end."""

from qprobe.embedding.base import Embedder, tokens_to_embed

__all__ = ["Embedder", "tokens_to_embed"]
