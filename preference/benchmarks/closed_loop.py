"""The closed loop on known preferences, over the embeddings of a run folder: does L_QP find what the pairs were drawn from?
Without a run folder the embeddings are Gaussian, with a falling spectrum.

A direction theta is drawn in the space of standardised embeddings; a completion's utility is theta . phi, scaled so that two
completions of one prompt differ by `--spread` (standard deviation, logits). Pairs are drawn from the Bradley-Terry model,
P(w over l) = sigmoid(u_w - u_l), on some prompts; probes learn from 100, 300, ... of them. On all other prompts:

    correlation   of Q's differences with the utility's, over all pairs of completions of one prompt
    accuracy      expected share of pairs, drawn by the same model, that Q orders as they were; the best there is: theta's own
    win rate      of the best of K by Q against one further completion of the prompt: expected exactly from theta, and as a
                  judge's verdicts, drawn once, give it through `qprobe_preference.winrates`; the last column says how many of
                  `--judges` such judges have an interval that holds the expected rate

    python preference/benchmarks/closed_loop.py [RUN] [--pairs 100 300 1000] [--thetas 3] [--json FILE]

Exit status 1 when the correlation at the most pairs is below 0.9, on the mean over thetas.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qprobe import QProbe
from qprobe.store.table import embeddings_of, found_table
from qprobe_preference.winrates import Judgements, WinRate, win_rate

GOAL = 0.9


@dataclass(frozen=True)
class World:
    """Completions whose utility is known.

    Args:
        features: (N, D) float32, standardised.
        groups: (N,) int64, prompts 0..P-1, at least two rows each.
        utility: (N,) float64, logits.
    """

    features: np.ndarray
    groups: np.ndarray
    utility: np.ndarray

    def rows_of(self, prompt: int) -> np.ndarray:
        return np.flatnonzero(self.groups == prompt)


@dataclass(frozen=True)
class Outcome:
    """What one probe's choices are worth at one K on held-out prompts.

    Args:
        expected: win rate of the choices, exactly, from the utilities.
        judged: the same from one judge's verdicts.
        covered: share of all judges whose 95 % interval holds the expected rate.
    """

    expected: float
    judged: WinRate
    covered: float


def draw_world(features: np.ndarray, groups: np.ndarray, spread: float, rng: np.random.Generator) -> World:
    """Standardise the features and draw a theta."""
    standard = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    standard /= np.maximum(standard.std(axis=0), 1e-6)
    utility = standard @ rng.normal(size=features.shape[1])
    means = np.bincount(groups, utility) / np.bincount(groups)
    # Two independent draws differ by sqrt(2) standard deviations of one.
    within = np.sqrt(2) * np.std(utility - means[groups])
    return World(standard.astype(np.float32), groups, utility * spread / within)


def draw_pairs(world: World, prompts: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) rows, preferred first: two completions of a random prompt, ordered by the Bradley-Terry model."""
    pairs = np.stack([rng.choice(world.rows_of(p), 2, replace=False) for p in rng.choice(prompts, count)])
    logits = world.utility[pairs[:, 0]] - world.utility[pairs[:, 1]]
    lost = rng.random(count) >= 1 / (1 + np.exp(-logits))
    pairs[lost] = pairs[lost, ::-1]
    return pairs


def all_pairs(world: World, prompts: np.ndarray) -> np.ndarray:
    """(M, 2) rows, every pair of completions of each prompt once."""
    return np.concatenate(
        [rows[np.stack(np.triu_indices(len(rows), 1), axis=1)] for rows in map(world.rows_of, prompts)]
    )


def train(world: World, pairs: np.ndarray, **options: object) -> QProbe:
    """L_QP on the pairs."""
    better, worse = world.features[pairs[:, 0]], world.features[pairs[:, 1]]
    return QProbe(loss="bradley_terry", **options).fit_pairs(better, worse, world.groups[pairs[:, 0]])


def agreement(world: World, scores: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """Correlation of Q's differences with the utility's over pairs in both orders; expected accuracy of Q, and of theta."""
    pairs = all_pairs(world, prompts)
    q = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    u = world.utility[pairs[:, 0]] - world.utility[pairs[:, 1]]
    first = 1 / (1 + np.exp(-u))
    right, best = ((1 + np.sign(x)) / 2 for x in (q, u))  # an order that is not told is right half the time
    accuracy, ceiling = ((r * first + (1 - r) * (1 - first)).mean() for r in (right, best))
    # With each pair in both orders the means are 0: which of two came first decides nothing.
    size = np.sqrt((q @ q) * (u @ u))
    # A probe whose held-out loss no step made better stays at zero and orders nothing.
    return float(q @ u / size) if size > 0 else 0.0, float(accuracy), float(ceiling)


def outcome(
    world: World, scores: np.ndarray, prompts: np.ndarray, k: int, rng: np.random.Generator, judges: int = 200
) -> Outcome:
    """Win rate of the best of k by score against each prompt's last completion."""
    references = np.array([world.rows_of(p)[-1] for p in prompts])
    candidates = np.concatenate([world.rows_of(p)[:-1] for p in prompts])
    groups = world.groups[candidates]
    against = world.utility[references[np.searchsorted(prompts, groups)]]
    chance = 1 / (1 + np.exp(against - world.utility[candidates]))
    law = Judgements(chance, groups).probe_law(scores[candidates], k, 0.0)
    expected = float(law @ chance) / len(prompts)
    rates = [
        win_rate(Judgements((rng.random(len(chance)) < chance).astype(float), groups), law, draws=500, seed=judge)
        for judge in range(judges)
    ]
    covered = np.mean([r.rate.low <= expected <= r.rate.high for r in rates])
    return Outcome(expected, rates[0], float(covered))


def gaussian(prompts: int = 240, each: int = 8, dimension: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings like a model's: a falling spectrum, turned, a few coordinates far larger, prompts far apart."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    scale = np.arange(1, dimension + 1) ** -0.5
    of_prompt = 2 * rng.normal(size=(prompts, 1, dimension))
    features = ((of_prompt + rng.normal(size=(prompts, each, dimension))) * scale) @ turn
    features[..., :2] *= 30
    return features.reshape(-1, dimension).astype(np.float32), np.repeat(np.arange(prompts), each)


def read_run(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) features and (N,) prompts of the first features table of a run folder."""
    folders = sorted(run.glob("features/*/*/layer=*"))
    if not folders:
        raise SystemExit(f"{run} has no features: give the folder of a run that has embedded its completions.")
    table = found_table(folders[0]).read()
    return embeddings_of(table), np.unique(table["task_id"].to_pylist(), return_inverse=True)[1]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run folder with features; without it they are Gaussian")
    parser.add_argument("--pairs", type=int, nargs="+", default=[100, 300, 1000, 3000, 10_000, 30_000])
    parser.add_argument(
        "--thetas", type=int, default=3, help="directions drawn, each with its own split of the prompts"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first theta; the next ones count on")
    parser.add_argument("--spread", type=float, default=2.0, help="how far two completions differ, logits")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the prompts that is tested on")
    parser.add_argument(
        "--steps", type=int, default=2000, help="most steps of training; the default 500 is few for 10,000 pairs"
    )
    parser.add_argument("--judges", type=int, default=200, help="judges drawn for the share of intervals that hold")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    features, groups = read_run(arguments.run) if arguments.run else gaussian()
    prompts = groups.max() + 1
    ks = [k for k in (1, 2, 4, 7, 15, 31, 47) if k < np.bincount(groups).min()]
    lines = []
    for theta in range(arguments.seed, arguments.seed + arguments.thetas):
        rng = np.random.default_rng(theta)
        world = draw_world(features, groups, arguments.spread, rng)
        order = rng.permutation(prompts)
        tested = np.sort(order[: round(arguments.held_out * prompts)])
        pairs = draw_pairs(world, order[len(tested) :], max(arguments.pairs), rng)
        for count in arguments.pairs:
            started = time.perf_counter()
            probe = train(world, pairs[:count], seed=theta, steps=arguments.steps)
            seconds = time.perf_counter() - started
            scores = probe.score(world.features).astype(np.float64)
            correlation, accuracy, ceiling = agreement(world, scores, tested)
            of_k = {k: outcome(world, scores, tested, k, rng, arguments.judges) for k in ks}
            lines.append(
                {
                    "theta": theta,
                    "pairs": count,
                    "correlation": correlation,
                    "accuracy": accuracy,
                    "accuracy of theta": ceiling,
                    "seconds": seconds,
                    "steps": probe.training_["steps"],
                    "win rate": {
                        k: {
                            "expected": o.expected,
                            "judged": [o.judged.rate.value, o.judged.rate.low, o.judged.rate.high],
                            "covered": o.covered,
                        }
                        for k, o in of_k.items()
                    },
                }
            )
            wins = "  ".join(
                f"K={k}: {o.expected:.3f}, judged {o.judged.rate.value:.3f} [{o.judged.rate.low:.3f}, "
                f"{o.judged.rate.high:.3f}], {o.covered:.0%}"
                for k, o in of_k.items()
                if k in (ks[0], ks[-1])
            )
            print(
                f"theta {theta} {count:6} pairs: r {correlation:.3f}, accuracy {accuracy:.3f} of {ceiling:.3f}, ",
                end="",
            )
            print(f"{seconds:.1f} s, {probe.training_['steps']} steps; {wins}", flush=True)
    most = [line["correlation"] for line in lines if line["pairs"] == max(arguments.pairs)]
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2) + "\n")
    print(f"correlation {np.mean(most):.3f} with {max(arguments.pairs):,} pairs (goal {GOAL:g})")
    return 0 if np.mean(most) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
