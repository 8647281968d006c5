"""Recorded completions as blocks of features: hidden states, likelihood columns, untrained scores, and what each earned."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from qprobe import store
from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED
from qprobe.probe.solvers import Rows
from qprobe.run.recording import LIKELIHOOD

RECORDING = Path(str(files("qprobe_code_gen"))) / "recorded" / "qwen2.5-coder-1.5b"
HIDDEN, LIKELIHOODS = "layer 18", "likelihood"
BLOCKS = {"both": (HIDDEN, LIKELIHOODS), "hidden state": (HIDDEN,), "likelihood": (LIKELIHOODS,)}


def rows_of(run: Path, pool: str, blocks: tuple[str, ...] = (HIDDEN, LIKELIHOODS), layer: int = 18) -> Rows:
    """Every recorded completion of a pool that a finished run of `experiment=recorded_mbpp` rewarded.

    Likelihood columns lose the mean of their prompt, which moves no choice within a prompt.
    """
    parts = sorted((run / "rewards" / pool / "unit_tests").glob("*.parquet"))
    if not parts:
        raise SystemExit(f"{run} has no rewards of {pool}: run make recorded_mbpp first.")
    rewards = pd.concat([pd.read_parquet(part) for part in parts])[["task_id", "sample", "reward"]]
    rewards = rewards.sort_values(["task_id", "sample"]).reset_index(drop=True)
    groups = pd.factorize(rewards.task_id)[0]
    keys = list(zip(rewards.task_id, rewards["sample"], strict=True))
    columns = pd.DataFrame(_features(pool, LIKELIHOOD, keys).astype(np.float64), columns=list(COLUMNS))
    made = {
        HIDDEN: _features(pool, layer, keys).astype(np.float32),
        LIKELIHOODS: (columns - columns.groupby(groups).transform("mean")).to_numpy(),
    }
    untrained = {name: sign * columns[name].to_numpy() for name, sign in UNTRAINED.items() if name in COLUMNS}
    return Rows({name: made[name] for name in blocks}, rewards.reward.to_numpy(), groups, anchors=untrained)


def _features(pool: str, layer: int, keys: list[tuple[str, int]]) -> np.ndarray:
    table = pq.read_table(RECORDING / "features" / f"{pool}.layer={layer:02d}.parquet")
    place = {
        key: n for n, key in enumerate(zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
    }
    return store.embeddings_of(table)[[place[key] for key in keys]]
