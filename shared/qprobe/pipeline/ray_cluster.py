"""A pipeline's first stages on Ray: every batch is sampled, rewarded and embedded by actors that make the pipeline themselves."""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qprobe.embedding import tables_of
from qprobe.pipeline import needs
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import SHARDED
from qprobe.run import rewarding, stages
from qprobe.run.runners.ray import Item, Step, run_steps
from qprobe.settings import build

Make = Callable[[], Pipeline]


def execute(make: Make, names: Sequence[str], runner: dict[str, Any], more: Sequence[str] = ()) -> Pipeline:
    """Run a pipeline's stages: those that work batch by batch on Ray, the others here.

    Args:
        make: makes the pipeline; it is sent to every actor, so it must be picklable. Its run folder, and this process's
            working directory, must be seen by every machine.
        names: of the stages.
        runner: `address`, and for every stage on Ray its workers, cpus and gpus.
        more: lines on what the application needs besides.

    Returns: the pipeline that did the rest.

    Raises:
        ValueError: a shard was asked for as well, or a setting of the runner that cannot be.
    """
    pipeline = make()
    if pipeline.shard[1] > 1:
        raise ValueError("shard and runner=ray both part the work: give one of them.")
    needs.tell(pipeline, names, more, here=False)
    pipeline.check(names)
    on_ray = [name for name in SHARDED if name in names]
    workers = functools.partial(_worker, make, names, Path.cwd())
    steps = [
        build(Step, runner[name], f"runner.{name}", name=name, start=functools.partial(workers, name))
        for name in on_ray
    ]
    run_steps(batches_left(pipeline, on_ray), steps, runner["address"], pipeline.progress)
    pipeline.execute([name for name in names if name not in on_ray])
    return pipeline


def batches_left(pipeline: Pipeline, names: Sequence[str]) -> list[Item]:
    """(pool, number of the batch) wherever a stage that works batch by batch has something left to do."""
    left = []
    for pool in pipeline.pools:
        tables = [pool.completions] if "sample" in names else []
        tables += [pool.rewards(pipeline.reward_of(pool.split))] if "reward" in names else []
        if "embed" in names and pool.kind == "sample":
            tables += [pool.features(pipeline.embedder, layer) for layer in tables_of(pipeline.embedder)]
            if model := pipeline.reads(pool):
                tables.append(pool.likelihoods(model))
        keys = enumerate(pool.batches, start=1)
        left += [(pool.name, number) for number, k in keys if not all(table.has(k) for table in tables)]
    return left


def make_batch(pipeline: Pipeline, name: str, pool_name: str, number: int) -> None:
    """Do one stage's work on one batch, if it is not done yet."""
    pool = next(pool for pool in pipeline.pools if pool.name == pool_name)
    one = dataclasses.replace(pool, shard=(number, len(pool.batches)))
    if name == "sample":
        stages.sample(one, False, pipeline.reader(pool))
    elif name == "reward":
        rewarding.reward(one, pipeline.reward_of(pool.split), progress=False)
    elif pool.kind == "sample":  # greedy completions are not embedded
        stages.embed(one, pipeline.embedder, progress=False)
        if model := pipeline.reads(pool):
            stages.likelihood(one, model, progress=False)


def _worker(make: Make, names: Sequence[str], directory: Path, stage: str) -> Callable[[Item], None]:
    os.chdir(directory)  # paths of the configuration may be relative to it
    pipeline = make()
    pipeline.chosen = names

    def work(item: Item) -> None:
        pool, number = item
        make_batch(pipeline, stage, pool, number)

    # An engine stays from batch to batch. It ends when Ray lets go of the actor; a killed actor's ends by its guard.
    weakref.finalize(work, pipeline.give_back, stage)
    return work
