"""Embeddings of prompt + completion from a model's hidden layers: one protocol, one module a back end."""

from qprobe.embedding.base import (
    LIKELIHOOD,
    Embedder,
    GivesLikelihoods,
    ReadsTokens,
    columns_identity,
    tables_of,
    tokens_to_read,
)

__all__ = [
    "LIKELIHOOD",
    "Embedder",
    "GivesLikelihoods",
    "ReadsTokens",
    "columns_identity",
    "tables_of",
    "tokens_to_read",
]
