"""The stages that draw and embed completions: each turns batches of one table into parts of the next."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from qprobe import models, store
from qprobe.embedding import LIKELIHOOD, Embedder, ReadsTokens, tables_of, tokens_to_read
from qprobe.embedding.given import GivenEmbedder
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.models.openai_client import Metered
from qprobe.run.handing import can_hand, handing
from qprobe.run.pools import Keys, Pool, completions_of
from qprobe.run.runners.local import Work, run_stage
from qprobe.sampling import Completion, Sampler
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.law import TellsDrawn, Verifies, compare, noted
from qprobe.store.table import Table

# Share of a table's rows that say nothing (empty completions, replies that could not be read) from which it is said.
MANY = 0.1


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


def sample(pool: Pool, progress: bool = True, embedder: Embedder | None = None, greedy: Pool | None = None) -> None:
    """Draw the pool's completions, or write down those that are there already.

    Args:
        embedder: it is to read them: a sampler that can hand over what it would read (`qprobe.run.handing`) does, and the
            features of what is drawn are written with it.
        greedy: the greedy completions of the same prompts: of one model they are drawn beside the others, where none is there
            yet. What is left of them is drawn when they are a stage's own pool.
    """
    pool.prompts.check_inputs()  # its message names what differs; the completions know the prompts by their fingerprint
    table = pool.completions
    table.begin()
    if all(table.has(keys) for keys in pool.own_batches):
        return
    render_prompts(pool)
    prompt_ids = {row["task_id"]: row["prompt_token_ids"] for row in pool.prompts.read([pool.task_ids]).to_pylist()}

    features, beside, sampler = None, None, pool.sampler
    if isinstance(sampler, HFSampler) and pool.split.recorded is None:
        _ = sampler.passes  # copies share them, and what they know of the memory stays for the next pool
    if embedder is not None and can_hand(sampler, embedder, layers := tables_of(embedder)):
        sampler = handing(sampler, embedder, layers)
        features = _Features(pool, embedder)
        features.begin()
    if greedy is not None and (both := _drawn_beside(pool, sampler, greedy)):
        sampler, beside = both, _Beside(greedy)
    drawing = dataclasses.replace(pool, sampler=sampler)
    verifies = sampler if isinstance(sampler, Verifies) and pool.split.recorded is None else None

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, list[list[Completion]]]]:
        nonlocal verifies
        for keys, completions in drawing.draw(batches, prompt_ids):
            if verifies is not None:  # before anything of it is kept
                law = noted(verifies.verify())
                for checked in [table, *([beside.table] if beside else [])]:
                    checked.note("law", law)
                verifies = None
            yield keys, completions

    def write(keys: Keys, completions: list[list[Completion]]) -> None:
        own = [of_prompt[: pool.samples(key)] for key, of_prompt in zip(keys, completions, strict=True)]
        rows = _rows_of(keys, own)
        table.write(keys, rows)
        states = [completion.states for of_prompt in own for completion in of_prompt]
        brought = [of_one for of_one in states if of_one is not None]
        if features is not None and len(brought) == len(states):  # else `embed` reads them
            together = {layer: torch.stack([of_one[layer] for of_one in brought]) for layer in features.tables}
            features.write(keys, features.rows(rows["task_id"].to_pylist(), rows["sample"].to_pylist(), together))
        if beside is not None:
            beside.write(keys, [of_prompt[-1] for of_prompt in completions])

    works = [Work(keys, pool.rows(keys), table.has(keys)) for keys in pool.own_batches]
    run_stage(f"sample {pool.kind}", works, _metered(pool.sampler, table, stage), write, progress=progress)
    for drawn in (pool, greedy) if greedy is not None and beside is not None else (pool,):
        if said := empties(drawn):
            tqdm.write(said, file=sys.stderr)


def _rows_of(keys: Keys, completions: Sequence[Sequence[Completion]]) -> pa.Table:
    """A part of completions, those of each prompt."""
    flat = [(key, number, c) for key, own in zip(keys, completions, strict=True) for number, c in enumerate(own)]
    columns = {
        "task_id": [key for key, _, _ in flat],
        "sample": [number for _, number, _ in flat],
        "seed": [c.seed for _, _, c in flat],
        "completion": [c.text for _, _, c in flat],
        "token_ids": [c.token_ids for _, _, c in flat],
        "finish_reason": [c.finish_reason for _, _, c in flat],
        "logprob": [c.logprob for _, _, c in flat],
    }
    return pa.table(columns, schema=store.COMPLETIONS)


def _drawn_beside(pool: Pool, sampler: Sampler, greedy: Pool) -> Sampler | None:
    """The sampler, made to draw another pool's greedy completions beside its own; None where they are drawn by themselves."""
    if not isinstance(sampler, HFSampler) or pool.split.recorded is not None or pool.shard[1] > 1:
        return None  # a shard of one pool has other prompts than a shard of the other
    if any(greedy.completions.has(keys) for keys in greedy.batches):
        return None
    return sampler.beside(greedy.sampler)


class _Beside:
    """Greedy completions that come beside others, written as soon as all of a part are there."""

    def __init__(self, pool: Pool) -> None:
        self.table = pool.completions
        self.table.begin()
        self._part_of = {key: keys for keys in pool.batches for key in keys}
        self._found: dict[str, Completion] = {}

    def write(self, keys: Keys, completions: Sequence[Completion]) -> None:
        self._found |= zip(keys, completions, strict=True)
        for part in {self._part_of[key] for key in keys}:
            if all(key in self._found for key in part):
                self.table.write(part, _rows_of(part, [[self._found.pop(key)] for key in part]))


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


class _Features:
    """The tables of all that an embedder gives of a pool's completions, which are written together."""

    def __init__(self, pool: Pool, embedder: Embedder) -> None:
        self.tables = {layer: pool.features(embedder, layer) for layer in tables_of(embedder)}
        self._given = isinstance(embedder, GivenEmbedder)
        self._said_exact = False

    def begin(self) -> None:
        for table in self.tables.values():
            table.begin()

    def has(self, keys: Keys) -> bool:
        return all(table.has(keys) for table in self.tables.values())

    def rows(self, task_ids: list[str], samples: list[int], states: Mapping[int, Tensor]) -> dict[int, pa.Table]:
        """The parts of every table: layer -> rows, of the states (N, D) of every layer."""
        parts = {}
        for layer in self.tables:
            # Sums of log-probabilities need more digits than float16 has, and so may a user's own numbers.
            own = layer == LIKELIHOOD or self._given
            parts[layer], exact = store.feature_rows(task_ids, samples, states[layer].numpy(), exact=own)
            if exact and not own and not self._said_exact:
                self._said_exact = True
                tqdm.write(f"layer {layer} holds values beyond float16: such parts are stored as float32.")
        return parts

    def write(self, keys: Keys, parts: Mapping[int, pa.Table]) -> None:
        for layer, part in parts.items():
            # A layer may be ahead of the others; rows that were written stay as they are.
            if not self.tables[layer].has(keys):
                self.tables[layer].write(keys, part)


def embed(pool: Pool, embedder: Embedder, progress: bool = True) -> None:
    """Embed prompt + completion of every row of the pool that nobody has handed over, all layers in one pass."""
    features = _Features(pool, embedder)
    features.begin()
    works = [Work(keys, pool.rows(keys), features.has(keys)) for keys in pool.own_batches]
    if all(work.done for work in works):
        return
    prompts = {row["task_id"]: row for row in pool.prompts.read([pool.task_ids]).to_pylist()}

    def stage(batches: Iterable[Keys]) -> Iterator[tuple[Keys, dict[int, pa.Table]]]:
        for keys in batches:
            rows = completions_of(pool, keys)
            states = _embed_once(embedder, *tokens_of(pool, keys, rows, prompts, embedder))
            yield keys, features.rows([row["task_id"] for row in rows], [row["sample"] for row in rows], states)

    metered = _metered(embedder, features.tables[min(embedder.layers)], stage)
    run_stage(f"embed {pool.kind}", works, metered, features.write, progress=progress)


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
