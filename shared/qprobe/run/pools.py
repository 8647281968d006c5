"""Splits, and pools of completions with the tables that hang on them.

A *pool* is one set of completions: a split's prompts under one sampler. Its batches are fixed groups of prompts, cut from
the sorted task ids before finished work is taken out; every table of the pool uses the same batches. So a part that was
lost is made anew from the same batch as the first time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qprobe import store
from qprobe.embedding import LIKELIHOOD, Embedder, columns_identity
from qprobe.files import fingerprint
from qprobe.models.likelihood import Likelihood
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, Sampler, sample_seeds
from qprobe.sampling.base import Batch, Refills
from qprobe.store.table import Table

Keys = tuple[str, ...]
KEY_COLUMNS = ("task_id", "sample")
OF_SPLIT = ("sample", "greedy")  # kinds of pools that answer the split's prompts as they are, by the run's own model


@dataclass(frozen=True)
class Split:
    """Prompts that belong together, such as HumanEval or MBPP's test split.

    Args:
        name: short, used in paths and tables.
        prompts: in any order, task ids unique.
        source: what decides the prompts (data set, content, style), JSON-able.
        recorded: completions that are there already, by task id, as many as each prompt has; None: they are drawn.
        reward: its own reward stage; None: the pipeline's.
        clusters: task id -> name of what must stay together, such as the prompt of several preference pairs: no part of a
            cluster is trained on where another is held out or tested, and intervals resample clusters. None: every task id is
            a cluster of its own.
    """

    name: str
    prompts: Sequence[Prompt]
    source: dict[str, Any]
    recorded: Mapping[str, Sequence[str]] | None = None
    reward: Reward | None = None
    clusters: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"The split {self.name} has no prompts: check the data set and `limit`.")
        ids = [prompt.task_id for prompt in self.prompts]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"The split {self.name} has the task id {twice} twice: task ids must be unique.")
        if self.recorded is not None and (empty := [i for i in ids if not self.recorded.get(i)]):
            raise ValueError(
                f"The split {self.name} has no completion of {empty[0]}: give one at least, or drop the prompt."
            )
        if self.clusters is not None and (loose := [i for i in ids if i not in self.clusters]):
            raise ValueError(
                f"The split {self.name} has no cluster for {loose[0]}: name one for every task id, or none."
            )

    @functools.cached_property
    def recorded_identity(self) -> dict[str, Any]:
        """What decides the completions that are there already: worked out once, however many pools and batches ask."""
        recorded = self.recorded or {}
        texts = [[key, *recorded[key]] for key in sorted(prompt.task_id for prompt in self.prompts)]
        return {"completions": fingerprint(texts), "rows": sum(len(text) - 1 for text in texts)}


@dataclass(frozen=True)
class RewardRow:
    """What a completion earned: reward, a word on why, the seconds it took, a short detail."""

    reward: float
    verdict: str = ""
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class RewardBatch:
    """Completions to be rewarded, all samples of some prompts: rows of (task_id, sample, completion)."""

    keys: Keys
    rows: list[tuple[str, int, str]]


class Reward(Protocol):
    """A reward stage: unit tests, a judge, a user's function. A failure of its own is raised, never a zero."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What decides the rewards. A number under "version" counts up: older rewards are made anew."""

    def check(self) -> None:
        """Raise, in a sentence, what can be known to fail before any completion is drawn: it is said before hours of work."""

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        """Every batch with one RewardRow a completion, in any order of batches; several may be in work at once."""


@dataclass(frozen=True)
class Pool:
    """One set of completions in a run folder, with the tables that hang on it.

    Args:
        run: the run folder.
        split: its prompts.
        kind: "sample", "greedy", ...; the pool's name is split.kind.
        sampler: draws the completions.
        seed: of the run.
        batch_rows: completions in a batch; a batch has at least one prompt.
        shard: (number, count): this process makes every count-th batch, from the number-th on, number 1..count.
    """

    run: Path
    split: Split
    kind: str
    sampler: Sampler
    seed: int
    batch_rows: int = 64
    shard: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        return f"{self.split.name}.{self.kind}"

    # What every batch asks for is worked out once a pool: else a stage takes a time that grows with the square of its rows.
    @functools.cached_property
    def task_ids(self) -> list[str]:
        return sorted(prompt.task_id for prompt in self.split.prompts)

    def samples(self, task_id: str) -> int:
        """Completions that the pool has of a prompt."""
        recorded = self.split.recorded
        return self.sampler.settings.n if recorded is None else len(recorded[task_id])

    def rows(self, keys: Keys) -> int:
        """Completions in a batch."""
        return sum(map(self.samples, keys))

    @property
    def smallest(self) -> int:
        """Completions of the prompt that has fewest."""
        return min(map(self.samples, self.task_ids))

    def check_size(self, k: int | None) -> None:
        """Raise ValueError where a prompt has fewer than k completions."""
        if k is not None and k > self.smallest:
            if self.split.recorded is not None:
                raise ValueError(
                    f"evaluation.k is {k}, but a prompt of {self.split.name} has {self.smallest} candidates: lower k or leave "
                    "such prompts out."
                )
            raise ValueError(
                f"evaluation.k is {k}, but only n={self.smallest} completions are sampled for a prompt: lower k or raise "
                "sampler.n."
            )

    @property
    def clusters(self) -> np.ndarray | None:
        """(P,) int64 cluster of every task id, numbered in their order; None where each is its own."""
        if self.split.clusters is None:
            return None
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(self.split.clusters[i], len(numbers)) for i in self.task_ids])

    @functools.cached_property
    def batches(self) -> list[Keys]:
        """Prompts by task id, as many as fit into `batch_rows` completions."""
        batches: list[list[str]] = []
        room = 0
        for task_id in self.task_ids:
            if not batches or self.samples(task_id) > room:
                batches.append([])
                room = self.batch_rows
            batches[-1].append(task_id)
            room -= self.samples(task_id)
        return [tuple(batch) for batch in batches]

    @property
    def own_batches(self) -> list[Keys]:
        """Those that this process makes: all, or its shard."""
        number, count = self.shard
        return self.batches[number - 1 :: count]

    @functools.cached_property
    def prompts(self) -> Table:
        inputs = {
            "split": self.split.source,
            "prompts": len(self.split.prompts),
            "model": self.sampler.prompt_identity(),
        }
        # A split's own prompts are shared; who puts them in another way, or to another model, has a table of its own.
        name = self.split.name if self.kind in OF_SPLIT else self.name
        return store.open_table(self.run, "prompts", name, inputs=inputs, schema=store.PROMPTS)

    @functools.cached_property
    def completions(self) -> Table:
        inputs: dict[str, Any] = {"prompts": self.prompts.identity, "batch_rows": self.batch_rows}
        if self.split.recorded is None:
            inputs |= {"sampler": self.sampler.identity(), "seed": self.seed}
        else:
            inputs["recorded"] = self.split.recorded_identity
        return store.open_table(self.run, "completions", self.name, inputs=inputs, schema=store.COMPLETIONS)

    def draw(
        self, batches: Iterable[Keys], prompts: Mapping[str, list[int]]
    ) -> Iterator[tuple[Keys, list[list[Completion]]]]:
        """Batches with their completions, in any order: the sampler's, or those that are there already.

        Args:
            prompts: token ids of every prompt.
        """
        sampler, recorded = self.sampler, self.split.recorded
        if recorded is not None:
            for keys in batches:
                yield (
                    keys,
                    [[Completion(text, None, "imported", math.nan, -1) for text in recorded[key]] for key in keys],
                )
            return

        def asked(keys: Keys) -> Batch:
            return [prompts[key] for key in keys], [sample_seeds(self.seed, key, self.samples(key)) for key in keys]

        if not isinstance(sampler, Refills):
            for keys in batches:
                yield keys, sampler.sample(*asked(keys))
            return
        begun: list[Keys] = []

        def each() -> Iterator[Batch]:
            for keys in batches:
                begun.append(keys)
                yield asked(keys)

        for number, completions in sampler.sample_batches(each()):
            yield begun[number], completions

    def rewards(self, reward: Reward) -> Table:
        inputs = {"completions": self.completions.identity, "reward": reward.identity()}
        return store.open_table(self.run, "rewards", self.name, reward.name, inputs=inputs, schema=store.REWARDS)

    def likelihoods(self, model: Likelihood) -> Table:
        inputs = {"completions": self.completions.identity, "likelihood": model.identity(), "end": "included"}
        return store.open_table(self.run, "likelihoods", self.name, inputs=inputs, schema=store.LIKELIHOODS)

    def features(self, embedder: Embedder, layer: int) -> Table:
        """The table of a layer, or of the likelihood columns (`LIKELIHOOD`)."""
        inputs = {"completions": self.completions.identity, "embedder": embedder.identity(), "layer": layer}
        name = f"layer={layer:02d}"
        if layer == LIKELIHOOD:
            inputs["likelihood"], name = columns_identity(embedder, [layer]), "likelihood"
        return store.open_table(self.run, "features", self.name, embedder.folder_name(), name, inputs=inputs)


def completions_of(pool: Pool, keys: Keys) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pool.completions.read([keys]).to_pylist()
    return rows
