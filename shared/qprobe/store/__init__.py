"""The files of a run folder: tables of Parquet parts, and JSON lines. It knows files and nothing of what they mean."""

from qprobe.store.table import (
    COMPLETIONS,
    LIKELIHOODS,
    PROMPTS,
    REMADE,
    REWARDS,
    StoreError,
    Table,
    embeddings_of,
    feature_rows,
    features_schema,
    found_table,
    open_table,
)

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
    "features_schema",
    "found_table",
    "open_table",
]
