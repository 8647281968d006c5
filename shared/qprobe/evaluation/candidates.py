"""Every candidate of an evaluation with what the probes say of it: kept beside the results, and read back for the run's page.

RUN/results/<split>.candidates.parquet holds a row a candidate: the prompt as rendered, the completion, what it earned, and for
every loss its score Q and its chance of being picked, by probes that never saw its prompt.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from qprobe import store
from qprobe.evaluation.scoring import Scored
from qprobe.files import write_whole
from qprobe.probe.selection import selection_weights
from qprobe.report.explored import Explored, ScoredPrompt
from qprobe.report.results import Results
from qprobe.run.joined import Joined
from qprobe.run.pools import Pool, Reward
from qprobe.store.table import StoreError

MADE_FROM = b"made_from"
SCORE, CHANCE = "q.", "probability."


def path_of(results: Path) -> Path:
    """Where the candidates of results lie."""
    return results.with_suffix(".candidates.parquet")


def write(pool: Pool, reward: Reward, joined: Joined, scored: dict[str, Scored], results: Results, path: Path) -> None:
    """Write all candidates of a pool, whole or not at all.

    Args:
        joined: the pool's rows.
        scored: loss -> scores of these rows.
        results: those that the scores were made for.
        path: of the results.
    """
    prompts = store.found_table(pool.prompts.folder, store.PROMPTS).read(columns=["task_id", "prompt"]).to_pylist()
    rendered = {row["task_id"]: row["prompt"] for row in prompts}
    rewarded = pool.rewards(reward).read(pool.batches, ["task_id", "sample", "detail"])
    columns = {
        "task_id": rewarded["task_id"],
        "sample": rewarded["sample"],
        "prompt": pa.array([rendered[joined.task_ids[group]] for group in joined.groups]).dictionary_encode(),
        "completion": joined.completions,
        "reward": joined.rewards,
        "verdict": joined.verdicts,
        "detail": rewarded["detail"],
    }
    for loss, scores in scored.items():
        columns |= {SCORE + loss: scores.q.mean(axis=0), CHANCE + loss: _chances(scores, joined.groups)}
    table = pa.table(columns).replace_schema_metadata({MADE_FROM: results.made_from.encode()})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    write_whole(path_of(path), out.getvalue())


def read(run: Path) -> list[Explored]:
    """Everything that a run's page shows, a split at a time, by name.

    Args:
        run: the run folder.

    Returns: for each split with results: these, and its prompts by task id with their candidates.

    Raises:
        StoreError: there is no such run, nothing was evaluated yet, or the candidates are not those of the results.
        ValueError: a file of the folder is damaged.
    """
    if not run.is_dir():
        raise StoreError(f"There is no run {run}: give the folder of a run, such as runs/demo.")
    paths = sorted((run / "results").glob("*.json"))
    if not paths:
        raise StoreError(
            f"{run} has not been evaluated yet: run the stage evaluate first (the command that began the run goes on from "
            "where it is)."
        )
    return [_explored(Results.read(path), path) for path in paths]


def _explored(results: Results, path: Path) -> Explored:
    try:
        table = pq.read_table(path_of(path))
    except FileNotFoundError:
        table = None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path_of(path)} is damaged ({str(error).splitlines()[0]}): delete it, and run the stage evaluate again."
        ) from error
    if table is None or (table.schema.metadata or {}).get(MADE_FROM) != results.made_from.encode():
        raise StoreError(
            f"{path} has not the candidates that it was made from beside it: run the stage evaluate again (the command that "
            "began the run does)."
        )
    return Explored(results, list(_prompts(table)))


def _prompts(table: pa.Table) -> Iterator[ScoredPrompt]:
    """Prompts by task id, their candidates by sample."""
    losses = [name.removeprefix(SCORE) for name in table.column_names if name.startswith(SCORE)]
    task_ids = np.array(table["task_id"].to_pylist())
    for rows in np.split(np.arange(len(table)), np.flatnonzero(task_ids[1:] != task_ids[:-1]) + 1):
        own = table.slice(rows[0], len(rows))
        yield ScoredPrompt(
            task_id=str(task_ids[rows[0]]),
            prompt=own["prompt"][0].as_py(),
            completions=own["completion"].to_pylist(),
            rewards=own["reward"].to_numpy(),
            verdicts=own["verdict"].to_pylist(),
            details=own["detail"].to_pylist(),
            q={loss: own[SCORE + loss].to_numpy() for loss in losses},
            probability={loss: own[CHANCE + loss].to_numpy() for loss in losses},
        )


def _chances(scores: Scored, groups: np.ndarray) -> np.ndarray:
    """(N,) probability that a probe picks each candidate out of all of its prompt, mean over seeds."""
    chances = np.zeros(len(groups))
    for number, rows in enumerate(np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1)):
        for q, beta in zip(scores.q[:, rows], scores.beta[:, number], strict=True):
            chances[rows] += selection_weights(torch.from_numpy(q).double(), float(beta)).numpy() / len(scores.q)
    return chances
