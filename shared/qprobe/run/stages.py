"""The stages that make completions, rewards and features: each turns batches of one table into parts of the next.

A *pool* is one set of completions: a split's prompts under one sampler. Its batches are fixed groups of prompts, cut from
the sorted task ids before finished work is taken out; every table of the pool uses the same batches. So a part that was
lost is made anew from the same batch as the first time.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from torch import Tensor
from tqdm import tqdm

from qprobe import models, store
from qprobe.embedding import Embedder, ReadsTokens, tokens_to_read
from qprobe.embedding.hf import HFEmbedder
from qprobe.files import fingerprint
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.models.openai_client import Metered
from qprobe.prompts import Prompt
from qprobe.run.runners.local import Work, run_stage
from qprobe.sampling import Completion, Sampler, sample_seeds
from qprobe.sampling.law import TellsDrawn, Verifies, compare, noted
from qprobe.store.table import Table

Keys = tuple[str, ...]

KEY_COLUMNS = ("task_id", "sample")
SAID = ("reward", "verdict")  # what later stages read of a reward
# Share of a table's rows that say nothing (empty completions, replies that could not be read) from which it is said.
MANY = 0.1
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


@runtime_checkable
class Asks(Protocol):
    """A reward stage that asks somebody whose replies may be of no use: then it gives a verdict of `unread` for now. The next
    command asks again."""

    unread: frozenset[str]

    def replies(self, verdict: str, detail: str) -> tuple[int, int]:
        """How many replies a row rests on, and how many of them could not be read."""


@runtime_checkable
class HoldsEngine(Protocol):
    """A sampler or embedder that holds more than a model in this process, such as vLLM's engine."""

    def check(self) -> None:
        """Raise, before any work, where it cannot run here."""

    def close(self) -> None:
        """Give back what it holds; the next call takes it again."""


def check(back_end: object) -> None:
    """Let a back end say before hours of work that it cannot run here."""
    if isinstance(back_end, HoldsEngine):
        back_end.check()


def give_back(back_end: object) -> None:
    """The memory of a stage's back end is the next stage's."""
    if isinstance(back_end, HoldsEngine):
        back_end.close()


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

    def draw(self, keys: Keys, prompts: Sequence[list[int]]) -> list[list[Completion]]:
        """The completions of a batch: the sampler's, or those that are there already."""
        if self.split.recorded is None:
            return self.sampler.sample(prompts, [sample_seeds(self.seed, key, self.samples(key)) for key in keys])
        return [[Completion(text, None, "imported", math.nan, -1) for text in self.split.recorded[key]] for key in keys]

    def rewards(self, reward: Reward) -> Table:
        inputs = {"completions": self.completions.identity, "reward": reward.identity()}
        return store.open_table(self.run, "rewards", self.name, reward.name, inputs=inputs, schema=store.REWARDS)

    def likelihoods(self, model: Likelihood) -> Table:
        inputs = {"completions": self.completions.identity, "likelihood": model.identity(), "end": "included"}
        return store.open_table(self.run, "likelihoods", self.name, inputs=inputs, schema=store.LIKELIHOODS)

    def features(self, embedder: Embedder, layer: int) -> Table:
        inputs = {"completions": self.completions.identity, "embedder": embedder.identity(), "layer": layer}
        return store.open_table(
            self.run, "features", self.name, embedder.folder_name(), f"layer={layer:02d}", inputs=inputs
        )


def render_prompts(pool: Pool) -> None:
    """Write the split's prompts as the sampler's model reads them."""
    table, keys = pool.prompts, pool.task_ids
    table.begin()
    if table.has(keys):
        return
    by_id = {prompt.task_id: prompt for prompt in pool.split.prompts}
    rendered = [(by_id[key], *pool.sampler.render(by_id[key])) for key in keys]
    columns = {
        "task_id": keys,
        "messages": [json.dumps(prompt.messages) if prompt.messages else None for prompt, _, _ in rendered],
        "prompt": [text for _, text, _ in rendered],
        "prompt_token_ids": [ids for _, _, ids in rendered],
    }
    table.write(keys, pa.table(columns, schema=store.PROMPTS))


def sample(pool: Pool, progress: bool = True) -> None:
    """Draw the pool's completions, or write down those that are there already."""
    pool.prompts.check_inputs()  # its message names what differs; the completions know the prompts by their fingerprint
    table = pool.completions
    table.begin()
    if all(table.has(keys) for keys in pool.own_batches):
        return
    render_prompts(pool)
    prompt_ids = {row["task_id"]: row["prompt_token_ids"] for row in pool.prompts.read([pool.task_ids]).to_pylist()}

    sampler: Any = pool.sampler
    verifies = isinstance(sampler, Verifies) and pool.split.recorded is None
    verified = False

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, pa.Table]]:
        nonlocal verified
        for keys in batches:
            completions = pool.draw(keys, [prompt_ids[key] for key in keys])
            if verifies and not verified:  # before anything of it is kept
                table.note("law", noted(sampler.verify()))
                verified = True
            flat = [completion for of_prompt in completions for completion in of_prompt]
            columns = {
                "task_id": [key for key in keys for _ in range(pool.samples(key))],
                "sample": [number for key in keys for number in range(pool.samples(key))],
                "seed": [c.seed for c in flat],
                "completion": [c.text for c in flat],
                "token_ids": [c.token_ids for c in flat],
                "finish_reason": [c.finish_reason for c in flat],
                "logprob": [c.logprob for c in flat],
            }
            yield keys, pa.table(columns, schema=store.COMPLETIONS)

    _run(pool, f"sample {pool.kind}", table, _metered(pool.sampler, table, stage), progress)
    if said := empties(pool):
        tqdm.write(said, file=sys.stderr)


def empties(pool: Pool) -> str | None:
    """A sentence on a pool's empty completions, where a tenth or more are; None where fewer are, or some are to be drawn."""
    table = pool.completions
    if not all(table.has(keys) for keys in pool.own_batches):
        return None
    rows = table.read(pool.own_batches, ["completion", "finish_reason"])
    reasons = [reason for text, reason in zip(*(column.to_pylist() for column in rows), strict=True) if not text]
    if len(reasons) < MANY * rows.num_rows:
        return None
    counted = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
    return (
        f"{len(reasons)} of {rows.num_rows} completions of {pool.name} are empty (how they ended: {counted}): look at the "
        "prompts, the stop texts and sampler.max_new_tokens."
    )


def reward(pool: Pool, reward_stage: Reward, progress: bool = True) -> None:
    """Reward the pool's completions."""
    table = pool.rewards(reward_stage)
    table.check_inputs()
    begun = False
    again = {keys for keys in pool.own_batches if table.has(keys) and _is_unread(table, keys, reward_stage)}

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, pa.Table]]:
        nonlocal begun
        waiting: dict[Keys, Keys] = {}  # the runner knows a batch by its own object

        def reward_batches() -> Iterator[RewardBatch]:
            for keys in batches:
                waiting[keys] = keys
                rows = completions_of(pool, keys)
                yield RewardBatch(keys, [(r["task_id"], r["sample"], r["completion"]) for r in rows])

        for batch, rewarded in reward_stage(reward_batches()):
            if batch.keys not in waiting:
                raise RuntimeError(
                    f"The reward {reward_stage.name} gave the batch of {batch.keys[0]} twice, or was never given it."
                )
            if len(rewarded) != len(batch.rows):
                raise RuntimeError(
                    f"The reward {reward_stage.name} gave {len(rewarded)} rows for {len(batch.rows)} completions."
                )
            columns = {
                "task_id": [task_id for task_id, _, _ in batch.rows],
                "sample": [number for _, number, _ in batch.rows],
                "reward": [_finite(r.reward, reward_stage.name) for r in rewarded],
                "verdict": [r.verdict for r in rewarded],
                "seconds": [r.seconds for r in rewarded],
                "detail": [r.detail for r in rewarded],
            }
            if not begun:  # a reward that fails at once is corrected, and must not meet a table of its former self
                table.begin()
                begun = True
            yield waiting.pop(batch.keys), pa.table(columns, schema=store.REWARDS)

    def write(keys: Keys, rows: pa.Table) -> None:
        if keys in again:
            if rows.select(SAID).equals(table.read([keys], SAID)):
                return
            table.note(store.REMADE, (table.noted(store.REMADE) or 0) + 1)
        table.write(keys, rows)

    works = [Work(keys, pool.rows(keys), table.has(keys) and keys not in again) for keys in pool.own_batches]
    run_stage(f"reward {pool.kind}", works, stage, write, progress=progress)
    unread, asked = _replies(pool, reward_stage)
    if 2 * unread > asked:
        raise RuntimeError(
            f"{_unread_words(unread, asked, pool, reward_stage)} Most could not, so nothing is concluded from them."
        )
    if said := unread_words(pool, reward_stage):
        tqdm.write(said, file=sys.stderr)


def unread_words(pool: Pool, reward_stage: Reward) -> str | None:
    """A sentence on the replies behind a pool's rewards where a tenth or more could not be read; None where fewer are."""
    unread, asked = _replies(pool, reward_stage)
    return _unread_words(unread, asked, pool, reward_stage) if unread and unread >= MANY * asked else None


def _unread_words(unread: int, asked: int, pool: Pool, reward_stage: Reward) -> str:
    return (
        f"{unread} of {asked} replies of {reward_stage.name} on {pool.name} could not be read: their comparisons count half for "
        "now, and the same command asks for them again."
    )


def _replies(pool: Pool, reward_stage: Reward) -> tuple[int, int]:
    """How many replies behind a pool's rewards could not be read, and of how many."""
    if not isinstance(reward_stage, Asks):
        return 0, 0
    rows = pool.rewards(reward_stage).read(pool.own_batches, ["verdict", "detail"])
    counted = [reward_stage.replies(*row) for row in zip(*(column.to_pylist() for column in rows), strict=True)]
    return sum(unread for _, unread in counted), sum(asked for asked, _ in counted)


def _is_unread(table: Table, keys: Keys, reward_stage: Reward) -> bool:
    if not isinstance(reward_stage, Asks):
        return False
    return not reward_stage.unread.isdisjoint(table.read([keys], ["verdict"])["verdict"].to_pylist())


def embed(pool: Pool, embedder: Embedder, progress: bool = True) -> None:
    """Embed prompt + completion of every row of the pool, all layers in one pass."""
    tables = {layer: pool.features(embedder, layer) for layer in embedder.layers}
    for table in tables.values():
        table.begin()
    if all(table.has(keys) for table in tables.values() for keys in pool.own_batches):
        return
    prompts = {row["task_id"]: row for row in pool.prompts.read([pool.task_ids]).to_pylist()}
    said_exact = False

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, dict[int, pa.Table]]]:
        nonlocal said_exact
        for keys in batches:
            rows = completions_of(pool, keys)
            states = _embed_once(embedder, *tokens_of(pool, keys, rows, prompts, embedder))
            task_ids, samples = [r["task_id"] for r in rows], [r["sample"] for r in rows]
            parts = {}
            for layer in tables:
                parts[layer], exact = store.feature_rows(task_ids, samples, states[layer].numpy())
                if exact and not said_exact:
                    said_exact = True
                    tqdm.write(f"layer {layer} holds values beyond float16: such parts are stored as float32.")
            yield keys, parts

    def write(keys: Keys, parts: dict[int, pa.Table]) -> None:
        for layer, part in parts.items():
            # A layer may be ahead of the others; rows that were written stay as they are.
            if not tables[layer].has(keys):
                tables[layer].write(keys, part)

    works = [Work(k, pool.rows(k), all(t.has(k) for t in tables.values())) for k in pool.own_batches]
    metered = _metered(embedder, tables[min(tables)], stage)
    run_stage(f"embed {pool.kind}", works, metered, write, progress=progress)


def compare_law(pool: Pool, embedder: Embedder) -> None:
    """How far a sampler that computes elsewhere (vLLM, an API) is from its model, where the embedder has that model here.

    For information: said on stderr and noted with the completions of a first batch that this process drew.
    """
    sampler, spec = pool.sampler, getattr(embedder, "model", None)
    if isinstance(sampler, Verifies) or not isinstance(sampler, TellsDrawn) or not isinstance(embedder, HFEmbedder):
        return
    if not isinstance(spec, ModelSpec) or not sampler.draws_from(spec):
        return
    drawn = sampler.drawn(models.load_tokenizer(spec))
    if any(drawn):
        check = compare(models.load(spec), drawn)
        tqdm.write(f"For information: {check.sentence()}", file=sys.stderr)
        pool.completions.note("law", noted(check))


def _embed_once(embedder: Embedder, prompts: list[list[int]], completions: list[list[list[int]]]) -> dict[int, Tensor]:
    """The states of every row; where prompts are the same, as those of pairs may be, their equal rows are worked out once."""
    own: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}  # prompt -> completion -> its place among the prompt's
    keys = [(tuple(ids), tuple(row)) for ids, of_prompt in zip(prompts, completions, strict=True) for row in of_prompt]
    for prompt, row in keys:
        places = own.setdefault(prompt, {})
        places.setdefault(row, len(places))
    if len(own) == len(prompts):  # no prompt is shared: rows stay as they were drawn
        return embedder.embed(prompts, completions)
    starts = dict(zip(own, itertools.accumulate(map(len, own.values()), initial=0), strict=False))
    states = embedder.embed([list(prompt) for prompt in own], [[list(row) for row in rows] for rows in own.values()])
    rows = [starts[prompt] + own[prompt][row] for prompt, row in keys]
    return {layer: values[rows] for layer, values in states.items()}


def likelihood(pool: Pool, model: Likelihood, progress: bool = True) -> None:
    """How likely the pool's completions are to a model: for those that were not drawn from it here."""
    table = pool.likelihoods(model)
    table.begin()
    prompts = {row["task_id"]: row for row in pool.prompts.read([pool.task_ids]).to_pylist()}

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, pa.Table]]:
        for keys in batches:
            rows = completions_of(pool, keys)
            prompt_ids, completion_ids = tokens_of(pool, keys, rows, prompts, model)
            # With the end, as what is drawn: else an empty completion would be the likeliest.
            ended = [[[*ids, *model.end] for ids in of_prompt] for of_prompt in completion_ids]
            found = model.log_likelihood(prompt_ids, ended)
            columns = {
                "task_id": [row["task_id"] for row in rows],
                "sample": [row["sample"] for row in rows],
                "logprob": [value for of_prompt in found for value in of_prompt],
                "tokens": [len(ids) for of_prompt in completion_ids for ids in of_prompt],
            }
            yield keys, pa.table(columns, schema=store.LIKELIHOODS)

    _run(pool, f"read {pool.kind}", table, stage, progress)


def tokens_of(
    pool: Pool,
    keys: Keys,
    rows: Sequence[dict[str, Any]],
    prompts: Mapping[str, dict[str, Any]],
    reader: ReadsTokens,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The tokens of a batch as a reader reads them: of every prompt, and of its completions."""
    sampled = pool.sampler.tokenizer_fingerprint()
    prompt_ids, completion_ids = [], []
    for key in keys:
        own = [(row["completion"], row["token_ids"]) for row in rows if row["task_id"] == key]
        prompt = prompts[key]
        rendered = prompt["prompt"], prompt["prompt_token_ids"]
        ids, of_prompt = tokens_to_read(reader, sampled, rendered, own, templated=prompt["messages"] is not None)
        prompt_ids.append(ids)
        completion_ids.append(of_prompt)
    return prompt_ids, completion_ids


def _run(pool: Pool, name: str, table: Table, stage: Any, progress: bool) -> None:
    works = [Work(keys, pool.rows(keys), table.has(keys)) for keys in pool.own_batches]
    run_stage(name, works, stage, table.write, progress=progress)


def _metered(back_end: Any, table: Table, stage: Any) -> Any:
    """The stage; what its back end spends at an API is noted beside the table, batch by batch, failed ones included."""
    if not isinstance(back_end, Metered):
        return stage

    def metered(batches: Iterable[Keys]) -> Iterator[Any]:
        noted = Counter(back_end.usage())

        def note() -> None:
            nonlocal noted
            now = Counter(back_end.usage())
            table.note_usage(dict(now - noted))
            noted = now

        try:
            for rows in stage(batches):
                note()
                yield rows
        finally:
            note()

    return metered


def completions_of(pool: Pool, keys: Keys) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pool.completions.read([keys]).to_pylist()
    return rows


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):  # a user's function may give anything
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(f"The reward {name} gave {value!r}: a reward is a finite number.")
    return number
