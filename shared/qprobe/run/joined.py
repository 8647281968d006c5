"""A pool's finished tables, read and joined on (task_id, sample): what training and evaluation see of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qprobe.embedding import Embedder
from qprobe.models.likelihood import Likelihood
from qprobe.run.pools import KEY_COLUMNS, Pool, Reward
from qprobe.store.table import StoreError


@dataclass(frozen=True)
class Joined:
    """Completions, rewards and (where asked for) features of a pool, joined on (task_id, sample).

    Args:
        task_ids: P task ids, sorted.
        groups: (N,) int64, index into task_ids; rows by task id, then sample.
        completions: N texts.
        rewards: (N,) float32.
        verdicts: N words.
        features: (N, D) float16 or float32, a mapped temporary file where it is large; None where not asked for.
        clusters: (P,) int64, dense ids of what stays together; None where every prompt is its own.
        tokens: (N,) int64 lengths; None where the tokens of a completion are unknown.
        logprobs: (N,) float32, the base model's, summed over tokens, in nats, NaN where unknown; None: all unknown.
    """

    task_ids: list[str]
    groups: np.ndarray
    completions: list[str]
    rewards: np.ndarray
    verdicts: list[str]
    features: np.ndarray | None
    clusters: np.ndarray | None = None
    tokens: np.ndarray | None = None
    logprobs: np.ndarray | None = None

    @property
    def cluster_of_prompt(self) -> np.ndarray:
        """(P,) the cluster of every prompt."""
        return np.arange(len(self.task_ids)) if self.clusters is None else self.clusters


def join(
    pool: Pool,
    reward_stage: Reward,
    embedder: Embedder | None = None,
    layer: int | None = None,
    likelihood: Likelihood | None = None,
) -> Joined:
    """Read a pool's finished tables; with a likelihood, tokens and log-probabilities are those that it read.

    Raises:
        StoreError: a table is unfinished, or a row is missing, foreign or there twice.
    """
    completions = pool.completions.read(pool.batches, [*KEY_COLUMNS, "completion", "token_ids", "logprob"])
    rewards = pool.rewards(reward_stage).read(pool.batches, [*KEY_COLUMNS, "reward", "verdict"])
    _check(pool, "completions", _keys_of(completions))
    _check(pool, "rewards", _keys_of(rewards))
    lengths, logprobs = pc.list_value_length(completions["token_ids"]), completions["logprob"]
    if likelihood is not None:
        read = pool.likelihoods(likelihood).read(pool.batches)
        _check(pool, "likelihoods", _keys_of(read))
        lengths, logprobs = read["tokens"], read["logprob"]
    task_ids = pool.task_ids
    groups = np.repeat(np.arange(len(task_ids)), list(map(pool.samples, task_ids)))
    joined = Joined(
        task_ids,
        groups,
        completions["completion"].to_pylist(),
        np.array(rewards["reward"].to_numpy()),
        rewards["verdict"].to_pylist(),
        None,
        pool.clusters,
        None if lengths.null_count else lengths.to_numpy().astype(np.int64),
        np.array(logprobs.to_numpy()),
    )
    return joined if embedder is None or layer is None else with_layer(joined, pool, embedder, layer)


def with_layer(joined: Joined, pool: Pool, embedder: Embedder, layer: int) -> Joined:
    """The same rows with the features of a layer.

    Raises:
        StoreError: as `join`.
    """
    keys, features = pool.features(embedder, layer).read_embeddings(pool.batches)
    _check(pool, "features", keys)
    return dataclasses.replace(joined, features=features)


def _check(pool: Pool, name: str, found: list[tuple[str, int]]) -> None:
    expected = [(key, sample) for keys in pool.batches for key in keys for sample in range(pool.samples(key))]
    if found != expected:
        raise StoreError(
            f"The {name} of {pool.name} do not hold every (task_id, sample) once and in order, as for "
            f"{_first_wrong(found, expected)}: delete that table."
        )


def _keys_of(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(*(table[name].to_pylist() for name in KEY_COLUMNS), strict=True))


def _first_wrong(found: list[tuple[str, int]], expected: list[tuple[str, int]]) -> tuple[str, int]:
    """A key that is missing or there twice; else one that is foreign or in another's place."""
    counts = Counter(found)
    for key in expected:
        if counts[key] != 1:
            return key
    return next(key for key, other in zip_longest(found, expected) if key != other)
