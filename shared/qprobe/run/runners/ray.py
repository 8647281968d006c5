"""Stages as pools of Ray Data actors: items of work flow from one step to the next, over the machines of a cluster.

An item is small (which pool, which batch): what a step makes it writes to the run folder, which every machine must see. So a
lost worker costs the batch that it had in work, which Ray gives to another one, and no rows travel between machines. While
one batch is sampled on a GPU, the one before is rewarded on CPUs.

Where it stops: a run folder on a file system that all machines share; Ray's own retries, as often as it takes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

Item = Any  # JSON-able
FAILED = "failed "  # no JSON begins so


@dataclass(frozen=True)
class Step:
    """What is done with every item, by how many actors.

    Args:
        name: for messages.
        start: called once in every actor; gives the function that does the work on an item.
        workers: actors, >= 1.
        cpus, gpus: that each of them takes, >= 0; gpus may be a fraction.
    """

    name: str
    start: Callable[[], Callable[[Item], None]]
    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 0 or self.gpus < 0:
            raise ValueError(
                f"runner.{self.name}: workers={self.workers} must be at least 1, cpus={self.cpus} and gpus={self.gpus} 0 or more."
            )


def run_steps(items: Sequence[Item], steps: Sequence[Step], address: str | None = None, progress: bool = True) -> None:
    """Take every item through all the steps, in any order of items.

    Args:
        items: JSON-able.
        steps: in order.
        address: of a cluster, such as "auto"; None starts Ray on this machine.

    Raises:
        RuntimeError: the steps ask for more than the cluster has, or a step failed.
        ModuleNotFoundError: ray is missing.
    """
    try:
        # Ray Data reports usage over the network unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: install it with `pip install 'qprobe[ray]'`.", name="ray") from error
    if not items:
        return
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (RayError, ConnectionError, ValueError) as error:
            raise RuntimeError(f"Ray does not start at {address or 'this machine'}: {error}.") from error
    try:
        _check_room(steps, ray.cluster_resources())
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data = ray.data.from_items([json.dumps(item) for item in items], override_num_blocks=len(items))
        for step in steps:
            data = data.map_batches(
                _Worker,
                fn_constructor_args=(step.start,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=step.workers),
                num_cpus=step.cpus,
                num_gpus=step.gpus,
            )
        with tqdm(total=len(items), desc="ray", unit=" batches", disable=not progress, mininterval=0.5) as bar:
            for row in data.iter_rows():
                if row["item"].startswith(FAILED):
                    raise RuntimeError(f"{row['item'].removeprefix(FAILED)} What was written stays.")
                bar.update()
    except RayError as error:
        raise RuntimeError(f"Ray failed ({error}). What was written stays; the same command goes on.") from error
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """An actor of a step.

    A fault travels to the end in place of its item: Ray's own way wraps it into pages of other things.
    """

    def __init__(self, start: Callable[[], Callable[[Item], None]]) -> None:
        self._work = start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"item": [self._done(str(text)) for text in batch["item"]]}

    def _done(self, text: str) -> str:
        if text.startswith(FAILED):
            return text
        try:
            self._work(json.loads(text))
        except Exception as error:
            return f"{FAILED}{type(error).__name__}: {error}"
        return text


def _check_room(steps: Sequence[Step], there: dict[str, float]) -> None:
    for name, key, spare in (("cpus", "CPU", 1.0), ("gpus", "GPU", 0.0)):
        wanted = sum(step.workers * getattr(step, name) for step in steps)
        # Actors that take every CPU leave Ray Data none for its own tasks, and all wait for ever.
        if wanted and wanted + spare > there.get(key, 0.0):
            raise RuntimeError(
                f"The steps take {wanted:g} {name} together and Ray Data needs {spare:g} more, but the cluster has "
                f"{there.get(key, 0.0):g}: lower the workers of runner, or give Ray more."
            )
