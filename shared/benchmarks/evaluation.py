"""Evaluating every (k, beta) from one scoring pass, against scoring anew for every pair of settings.

500 problems x 200 samples with embeddings of 4,096 half-precision numbers; 24 values of k, 4 temperatures, 200 random subsets
wherever there is no closed form. The other way does what an evaluation script with `k` and `beta` as arguments does: it scores
all samples, draws as many random subsets, takes the softmax over each, and starts again for the next pair. Both give the
same values up to their simulation error, which is checked. Run it with

    python shared/benchmarks/evaluation.py [--pairs 12] [--json FILE]

The other way is run for `--pairs` of the 96 pairs, evenly spread, and extrapolated. Exit status 1 when the goal of 50 is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from qprobe.probe.metrics import reward_grid
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.training import score_rows

GOAL = 50.0
PROBLEMS, SAMPLES, DIMENSION, DRAWS = 500, 200, 4096, 200
KS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 100, 150, 200)
BETAS = (0.0, 0.05, 0.1, 0.5)


def one_pair(scores: np.ndarray, rewards: np.ndarray, k: int, beta: float, rng: np.random.Generator) -> float:
    """Mean reward at one (k, beta) from random subsets, (P, n) scores and rewards."""
    total = np.zeros(len(scores))
    for _ in range(DRAWS):
        chosen = rng.random(scores.shape).argpartition(k - 1, axis=1)[:, :k]
        q = np.take_along_axis(scores, chosen, axis=1)
        r = np.take_along_axis(rewards, chosen, axis=1)
        below = q - q.max(axis=1, keepdims=True)
        weights = (below == 0).astype(float) if beta == 0 else np.exp(below / beta)
        total += (weights * r).sum(axis=1) / weights.sum(axis=1)
    return float(total.mean() / DRAWS)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="pairs that the other way is run for, of 96")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(PROBLEMS * SAMPLES, DIMENSION, generator=generator).half()
    network = ProbeNetwork(DIMENSION)
    with torch.no_grad():
        network.weights[0].normal_(0, DIMENSION**-0.5, generator=generator)
    groups = np.repeat(np.arange(PROBLEMS), SAMPLES)
    rng = np.random.default_rng(0)
    rewards = (score_rows(network, features).numpy() + rng.normal(size=len(groups)) > 0.5).astype(np.float64)

    started = time.perf_counter()
    scores = score_rows(network, features).numpy()
    scoring = time.perf_counter() - started
    grid = reward_grid(scores, rewards, groups, KS, BETAS, draws=DRAWS, rng=rng).values.mean(axis=2)
    ours = time.perf_counter() - started

    pairs = [(k, beta) for k in KS for beta in BETAS]
    chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(arguments.pairs, len(pairs))).round().astype(int)]
    seconds = 0.0
    for k, beta in chosen:
        started = time.perf_counter()
        scores = score_rows(network, features).numpy()
        value = one_pair(scores.reshape(PROBLEMS, -1), rewards.reshape(PROBLEMS, -1), k, beta, rng)
        seconds += time.perf_counter() - started
        expected = float(grid[KS.index(k), BETAS.index(beta)])
        # 500 x 200 subsets of rewards in [0, 1]: a standard error below 0.5 / sqrt(100,000).
        if abs(value - expected) > 5 * 0.5 / np.sqrt(PROBLEMS * DRAWS):
            raise RuntimeError(f"k={k}, beta={beta}: {value:.4f} one by one, {expected:.4f} from one pass")
    anew = seconds / len(chosen) * len(pairs)
    figures = {
        "pairs": len(pairs),
        "seconds for all": ours,
        "of these scoring": scoring,
        "seconds one by one, extrapolated": anew,
        "pairs run one by one": len(chosen),
        "ratio": anew / ours,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{len(pairs)} pairs in {ours:.1f} s, {anew / ours:.0f} times as fast as one by one (goal {GOAL:g})")
    return 0 if anew / ours >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
