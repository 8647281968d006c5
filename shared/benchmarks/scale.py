"""How much memory the stages train and evaluate take at the paper's full size, through the real pipeline.

    python shared/benchmarks/scale.py                       # 2.3 GB of disk in a temporary folder
    python shared/benchmarks/scale.py --folder /data/scale  # a folder of yours; its tables are kept and used again
    python shared/benchmarks/scale.py --shrink 10           # a tenth of the prompts

464 prompts to train on, 500 and 164 to test on, 200 samples each, 4,096 float16 features. Their tables are written first, with
random features and rewards; then a process of its own runs both stages, so that the writing is not counted. Reported are the
peak of all resident memory and of what belongs to the process alone: the rest are pages of files, which the kernel takes back
when it needs the room. Prints JSON, then one sentence for the goal; exits 1 where it is missed. Memory does not depend on the
steps, so few are made; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from qprobe import store
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split

PROMPTS = {"train": 464, "mbpp": 500, "humaneval": 164}
SAMPLES = 200
DIMENSION = 4096
GOAL_GIB = 6.0


class Identities:
    """Sampler, embedder and reward of a run whose tables are all there: asked only who they are."""

    name = "random"
    layers = (26,)
    settings = SimpleNamespace(n=SAMPLES)

    def identity(self) -> dict[str, Any]:
        return {"model": {"name": "random numbers"}, "n": SAMPLES}

    prompt_identity = identity

    def tokenizer_fingerprint(self) -> str:
        return "none"

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        return str(prompt.text), [0]

    def folder_name(self) -> str:
        return "random"


def pipeline(run: Path, shrink: int, seeds: int, steps: int, draws: int) -> Pipeline:
    """The run at the paper's settings, but for the few steps and draws, which do not move memory."""
    splits = [
        Split(name, [Prompt(f"{name}/{i:04d}", text="x") for i in range(-(-count // shrink))], {"name": name})
        for name, count in PROMPTS.items()
    ]
    nobody: Any = Identities()
    return Pipeline(
        run=run,
        title="full size",
        tests=splits[1:],
        training_split=splits[0],
        reward=nobody,
        sampler=nobody,
        greedy=None,
        embedder=nobody,
        training=TrainingSettings(steps=steps),
        settings=EvaluationSettings(seeds=seeds, k=48, train_share=0.9, draws=draws, bootstrap=1000),
        progress=sys.stderr.isatty(),
    )


def write_tables(pool: Pool, made: Pipeline) -> None:
    """Prompts, completions, rewards and features of every batch that is not there yet."""
    stages.render_prompts(pool)
    completions, rewards = pool.completions, pool.rewards(made.reward)
    features = pool.features(made.embedder, made.probe_layer)
    for table in (completions, rewards, features):
        table.begin()
    text = "    return [value for value in values if value > threshold]\n" * 8
    for number, keys in enumerate(pool.batches):
        if features.has(keys):
            continue
        rng = np.random.default_rng([len(pool.name), number])
        ids, samples = [key for key in keys for _ in range(SAMPLES)], list(range(SAMPLES)) * len(keys)
        rows = len(ids)
        values = rng.standard_normal((rows, DIMENSION), dtype=np.float32)
        good = values[:, :16].sum(axis=1) + 4 * rng.standard_normal(rows) > rng.normal(scale=4)
        columns: dict[str, Any] = {"task_id": ids, "sample": samples, "seed": samples, "completion": [text] * rows}
        columns |= {"token_ids": [list(range(250))] * rows, "finish_reason": ["stop"] * rows, "logprob": [0.0] * rows}
        completions.write(keys, pa.table(columns, schema=store.COMPLETIONS))
        columns = {"task_id": ids, "sample": samples, "reward": good.astype(np.float32), "verdict": ["passed"] * rows}
        columns |= {"seconds": [0.0] * rows, "detail": [""] * rows}
        rewards.write(keys, pa.table(columns, schema=store.REWARDS))
        features.write(keys, store.feature_rows(ids, samples, values)[0])


class Memory:
    """Peaks of this process's memory while a stage runs, GiB, looked at fifty times a second."""

    def __init__(self) -> None:
        self.peaks = {"VmRSS": 0.0, "RssAnon": 0.0, "RssFile": 0.0}

    def during(self, work: Callable[[], None]) -> dict[str, float]:
        """Run it; its seconds and peaks."""
        self.peaks = dict.fromkeys(self.peaks, 0.0)
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        started = time.perf_counter()
        try:
            work()
        finally:
            done.set()
            watcher.join()
        return {"seconds": time.perf_counter() - started, **self.peaks}

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.02):
            for name, value in resident().items():
                self.peaks[name] = max(self.peaks.get(name, 0.0), value)


def resident() -> dict[str, float]:
    """What the kernel says of this process's memory, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    wanted = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile"))}
    return {name: int(kib) / 2**20 for name, kib in wanted.items()}


def measure(made: Pipeline) -> dict[str, Any]:
    """Run both stages."""
    memory = Memory()
    figures: dict[str, Any] = {"before": resident()}
    for stage in ("train", "evaluate"):
        figures[stage] = memory.during(lambda stage=stage: made.execute([stage]))  # type: ignore[misc]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    figures["peak RSS GiB"] = int(peak.split()[1]) / 2**20
    figures["peak RssAnon GiB"] = max(figures[stage]["RssAnon"] for stage in ("train", "evaluate"))
    return figures


def main() -> int:
    """Write the tables, run the stages in a child, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the tables go, and stay; a temporary folder without it")
    parser.add_argument("--shrink", type=int, default=1, help="take one prompt of so many")
    parser.add_argument("--seeds", type=int, default=10, help="probes of each of the three losses")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--draws", type=int, default=4, help="random subsets of a prompt; the paper's tables take 200")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is None:
        with tempfile.TemporaryDirectory(prefix="qprobe-scale-") as folder:
            return main_in(Path(folder), arguments)
    return main_in(arguments.folder, arguments)


def main_in(folder: Path, arguments: argparse.Namespace) -> int:
    """The benchmark in a folder."""
    made = pipeline(folder, arguments.shrink, arguments.seeds, arguments.steps, arguments.draws)
    if arguments.child:
        print(json.dumps(measure(made)))
        return 0
    started = time.perf_counter()
    for pool in made.sample_pools:
        write_tables(pool, made)
    written = time.perf_counter() - started
    options = [f"--{name}={getattr(arguments, name)}" for name in ("shrink", "seeds", "steps", "draws")]
    for old in folder.glob("probes/*/sweep.json"):
        old.unlink()  # of a run before: it must be trained again
    child = subprocess.run(
        [sys.executable, __file__, "--child", f"--folder={folder}", *options], stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        print(f"The stages ended with exit code {child.returncode}: see the message above.")
        return 1
    figures = {
        "rows": {pool.split.name: len(pool.task_ids) * SAMPLES for pool in made.sample_pools},
        "dimension": DIMENSION,
        "features GiB": sum(len(pool.task_ids) for pool in made.sample_pools) * SAMPLES * DIMENSION * 2 / 2**30,
        "seconds of writing the tables": written,
        **json.loads(child.stdout.splitlines()[-1]),
        "load average of the last minute": os.getloadavg()[0],
    }
    print(json.dumps(figures, indent=2))
    peak = figures["peak RSS GiB"]
    print(
        f"Train and evaluate take {peak:.1f} GiB at most (goal {GOAL_GIB:g}), {figures['peak RssAnon GiB']:.1f} GiB of it their "
        "own; the rest are pages of files."
    )
    return 0 if peak <= GOAL_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
