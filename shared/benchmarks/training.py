"""How long a sweep of the paper's size trains: 30 probes together, and what they would take one after the other.

    python shared/benchmarks/training.py            # epochs are timed, 150 of them extrapolated
    python shared/benchmarks/training.py --full     # all 150 epochs of the sweep are run
    python shared/benchmarks/training.py --prompts 100 --samples 50 --dimension 1024   # a small machine

464 prompts x 200 samples x 4,096 float16 features (MBPP's training set under CodeLlama-7B); three losses x ten seeds, each
seed on its own 90 % of the prompts. The features are random with a planted direction: the time does not depend on them.
Prints JSON, then one sentence for the goal; exits 1 where it is missed. The ratio is taken twice, of time and of processor
time, and the smaller one counts: on a busy machine the second is the one to trust, and minutes are to be trusted on an idle
one alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from qprobe.probe.training import Data, ProbeTask, TrainingSettings, train

LOSSES = ("reward_mse", "reward_cross_entropy", "policy_gradient")
PAPER_EPOCHS = 150
TIMES_ONE_BY_ONE = 5.0


def rows(prompts: int, samples: int, dimension: int) -> Data:
    """Random float16 features, rewards of 0 and 1 from a direction of them and noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.empty(prompts * samples, dimension, dtype=torch.float16)
    margin = torch.empty(len(features))
    direction = torch.randn(dimension, generator=generator) / dimension**0.5
    for part, own in zip(features.split(4096), margin.split(4096), strict=True):
        values = torch.randn(part.shape, generator=generator)
        part.copy_(values)
        own.copy_(values @ direction + torch.randn(len(part), generator=generator))
    return Data(features, (margin > 0.5).float(), torch.arange(prompts).repeat_interleave(samples))


def tasks_of(data: Data, seeds: int) -> list[ProbeTask]:
    """Every loss with every seed, each seed on its own 90 % of the prompts."""
    prompts, tasks = len(data.sizes), []
    for loss in LOSSES:
        for seed in range(seeds):
            drawn = torch.zeros(prompts, dtype=torch.bool)
            lot = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed))
            drawn[lot[: round(0.9 * prompts)]] = True
            tasks.append(ProbeTask(loss, seed, drawn))
    return tasks


def seconds(data: Data, tasks: Sequence[ProbeTask], epochs: int) -> np.ndarray:
    """(time, processor time) of a whole training: statistics, passes, looks at held-out prompts, the choice of beta."""
    settings = TrainingSettings(steps=None, epochs=epochs, patience=None)
    started, used = time.perf_counter(), time.process_time()
    train(data, tasks, settings, k=48, progress=sys.stderr.isatty())
    return np.array([time.perf_counter() - started, time.process_time() - used])


def estimated(data: Data, tasks: Sequence[ProbeTask], epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """(seconds of PAPER_EPOCHS, seconds of an epoch), from trainings of 1 and 1 + epochs epochs."""
    once = seconds(data, tasks, 1)
    epoch = (seconds(data, tasks, 1 + epochs) - once) / epochs
    return once + (PAPER_EPOCHS - 1) * epoch, epoch


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=464)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--dimension", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=10, help="probes of each of the three losses")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are timed")
    parser.add_argument("--full", action="store_true", help=f"run all {PAPER_EPOCHS} epochs of the sweep")
    arguments = parser.parse_args()
    data = rows(arguments.prompts, arguments.samples, arguments.dimension)
    tasks = tasks_of(data, arguments.seeds)
    together, epoch = estimated(data, tasks, arguments.epochs)
    if arguments.full:
        together = seconds(data, tasks, PAPER_EPOCHS)
    single = [estimated(data, [task], arguments.epochs) for task in tasks[:: arguments.seeds]]
    one_by_one = arguments.seeds * np.sum([whole for whole, _ in single], axis=0)
    ratios = one_by_one / together
    ratio = float(ratios.min())
    figures = {
        "probes": len(tasks),
        "rows": len(data.features),
        "dimension": arguments.dimension,
        "threads": torch.get_num_threads(),
        "minutes together": together[0] / 60,
        "minutes together are": "measured" if arguments.full else "extrapolated from the epochs that were timed",
        "minutes one by one (extrapolated)": one_by_one[0] / 60,
        "processor seconds of an epoch together": epoch[1],
        "processor seconds of an epoch alone": dict(zip(LOSSES, (each[1] for _, each in single), strict=True)),
        "times one by one": {"time": ratios[0], "processor time": ratios[1]},
        "peak RSS GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "features GiB": data.features.nbytes / 2**30,
        "load average of the last minute": os.getloadavg()[0],
    }
    print(json.dumps(figures, indent=2))
    print(
        f"{len(tasks)} probes together train {ratio:.1f} times as fast as one after the other (goal {TIMES_ONE_BY_ONE:g}): "
        f"{PAPER_EPOCHS} epochs take {together[0] / 60:.1f} minutes "
        f"({figures['minutes together are']})."
    )
    return 0 if ratio >= TIMES_ONE_BY_ONE else 1


if __name__ == "__main__":
    sys.exit(main())
