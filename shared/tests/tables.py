"""Small pools with known scores, and the tables that an evaluation makes of them."""

import dataclasses
from typing import Any

import numpy as np

from qprobe.evaluation import evaluate as evaluation
from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import (
    EvaluationSettings,
)
from qprobe.probe.training import TrainingSettings
from qprobe.report.results import Results, Row
from qprobe.run.joined import Joined

TRAINING = TrainingSettings(
    steps=30, learning_rate=0.05, held_out=0.3, minimum_mixed=2, check_every=5, chunks_per_batch=6
)


SETTINGS = EvaluationSettings(seeds=2, folds=3, curve_shares=(), draws=20, bootstrap=200)


def joined(rewards: Any, features: np.ndarray | None = None) -> Joined:
    """(P, n) rewards of P prompts."""
    table = np.asarray(rewards, dtype=np.float32)
    prompts, samples = table.shape
    return Joined(
        [f"p{number:03d}" for number in range(prompts)],
        np.repeat(np.arange(prompts), samples),
        [f"completion {row}" for row in range(prompts * samples)],
        table.ravel(),
        ["passed" if reward else "failed" for reward in table.ravel()],
        features,
    )


def planted(prompts: int = 12, samples: int = 5, seed: int = 0) -> Joined:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts * samples, 4)).astype(np.float16)
    return joined((features[:, 0] > 0).reshape(prompts, samples), features)


def scored(q: Any, beta: Any = 0.0) -> Scored:
    """(S, N) scores at one temperature, or (S, P) temperatures."""
    q = np.asarray(q, dtype=np.float32)
    return Scored(q, np.asarray(beta, dtype=float), [])


def evaluate(
    pool: Joined,
    scores: dict[str, Scored],
    k: int,
    greedy: Any = None,
    parts: dict[float, dict[str, Scored]] | None = None,
    **changes: Any,
) -> Results:
    settings = dataclasses.replace(SETTINGS, **changes)
    greedy = None if greedy is None else np.asarray(greedy, dtype=np.float32)
    return evaluation.evaluate(pool, Scores({1.0: scores} | (parts or {})), settings, k=k, seed=0, greedy=greedy)


def row(results: Results, method: str) -> Row:
    (found,) = [entry for entry in results.rows if entry.method == method]
    return found


def mostly_alike(prompts: int, mixed: int) -> Joined:
    """Of so many prompts the first `mixed` have good and bad completions, and a feature says which."""
    rng = np.random.default_rng(1)
    rewards = rng.integers(0, 2, (prompts, 1)).repeat(4, axis=1)
    rewards[:mixed] = [0, 1, 0, 1]
    features = rng.normal(size=(prompts * 4, 3)).astype(np.float32)
    features[:, 0] += 2 * rewards.ravel()
    return joined(rewards, features)
