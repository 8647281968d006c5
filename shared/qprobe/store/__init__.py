"""The files of a run folder: tables of Parquet parts, and JSON lines. It knows files and nothing of what they mean."""

from qprobe.store.parts import (
    COMPLETIONS,
    LIKELIHOODS,
    PROMPTS,
    REWARDS,
    StoreError,
    embeddings_of,
    feature_rows,
)
from qprobe.store.table import REMADE, Table, found_table, open_table

__all__ = [
    "COMPLETIONS",
    "LIKELIHOODS",
    "PROMPTS",
    "REMADE",
    "REWARDS",
    "StoreError",
    "Table",
    "embeddings_of",
    "feature_rows",
    "found_table",
    "open_table",
]
