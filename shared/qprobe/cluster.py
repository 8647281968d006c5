"""A pipeline's first stages on Ray: every batch is sampled, rewarded and embedded by actors that make the pipeline themselves."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qprobe import needs
from qprobe.pipeline import SHARDED, Pipeline
from qprobe.runners.ray import Item, Step, run_steps
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
    pipeline.check(names)
    needs.tell(pipeline, names, more, here=False)
    on_ray = [name for name in SHARDED if name in names]
    steps = [
        build(Step, runner[name], f"runner.{name}", name=name, start=functools.partial(_worker, make, name, Path.cwd()))
        for name in on_ray
    ]
    run_steps(pipeline.batches_left(on_ray), steps, runner["address"], pipeline.progress)
    pipeline.execute([name for name in names if name not in on_ray])
    return pipeline


def _worker(make: Make, stage: str, directory: Path) -> Callable[[Item], None]:
    os.chdir(directory)  # paths of the configuration may be relative to it
    pipeline = make()

    def work(item: Item) -> None:
        pool, number = item
        pipeline.make_batch(stage, pool, number)

    # An engine stays from batch to batch. It ends when Ray lets go of the actor; a killed actor's ends by its guard.
    weakref.finalize(work, pipeline.give_back, stage)
    return work
