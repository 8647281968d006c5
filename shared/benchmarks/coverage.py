"""How often 95 % intervals hold the truth, over planted sets of prompts: `python shared/benchmarks/coverage.py --sets 2000`.

Values are as tables have them (see `planted`). Beside the interval of `metrics.bootstrap_mean` stand others that were
looked at: plain percentiles, Student's t, BCa and the studentised bootstrap, each as in Efron and Tibshirani (1993).
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from qprobe.probe.intervals import tails

DRAWS = 1500
KINDS = ("rates", "gains", "sparse gains", "one choice", "wins of clusters")
METHODS = ("expanded (ours)", "percentile", "Student's t", "BCa", "studentised")


def planted(kind: str, count: int, lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """(P,) values of prompts, (P,) clusters, and the mean of the law that they are drawn from."""
    alone, base = np.arange(count), lot.integers(1, 8, count) / 8
    if kind == "rates":  # pass@1 of 8 samples: most problems are easy or hard
        return lot.binomial(8, lot.beta(0.3, 0.7, count)) / 8, alone, 0.3
    if kind == "one choice":  # greedy
        return (lot.random(count) < 0.3).astype(float), alone, 0.3
    if kind.endswith("gains"):  # of five probes over pass@1, on the prompts that are mixed
        mixed = 0.2 if kind.startswith("sparse") else 0.5
        taken = lot.binomial(5, base + 0.3 * (1 - base)) / 5
        return np.where(lot.random(count) < mixed, taken - base, 0.0), alone, mixed * 0.3 * 0.5
    clusters = np.repeat(alone, lot.geometric(0.5, count))[:count]
    return (lot.random(count) < lot.beta(1, 1, count)[clusters]).astype(float), clusters, 0.5


def intervals(values: np.ndarray, clusters: np.ndarray, lot: np.random.Generator) -> dict[str, tuple[float, float]]:
    """The ends by every method."""
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters)
    count, mean = len(sums), float(values.mean())
    taken = lot.integers(count, size=(DRAWS, count))
    s, w = sums[taken], sizes[taken]
    means = s.sum(axis=1) / w.sum(axis=1)
    influence = (sums - mean * sizes) / sizes.mean()
    error = float(np.sqrt((influence**2).sum() / (count - 1) / count))
    t = float(stats.t.ppf(0.975, count - 1))
    # BCa: the bias of the median, and the skewness of the jackknife.
    share = np.clip(((means < mean).mean() + (means <= mean).mean()) / 2, 0.5 / DRAWS, 1 - 0.5 / DRAWS)
    bias, spread = stats.norm.ppf(share), (influence**2).sum()
    skew = (influence**3).sum() / (6 * spread**1.5) if spread else 0.0
    z = bias + np.array([-1.959964, 1.959964])
    ends = stats.norm.cdf(bias + z / (1 - skew * z))
    # Studentised: a resample without spread is endlessly far away.
    own = np.sqrt(((s - means[:, None] * w) ** 2).sum(axis=1) / (count - 1) / count) / w.mean(axis=1)
    away = np.divide(
        means - mean, own, out=np.where(means == mean, 0.0, np.copysign(np.inf, means - mean)), where=own > 0
    )
    low, high = np.quantile(away, [0.025, 0.975], method="inverted_cdf")
    return {
        "expanded (ours)": tuple(np.quantile(means, tails(count))),
        "percentile": tuple(np.quantile(means, [0.025, 0.975])),
        "Student's t": (mean - t * error, mean + t * error),
        "BCa": tuple(np.quantile(means, ends)),
        "studentised": (mean - high * error, mean - low * error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[30, 100, 464])
    arguments = parser.parse_args()
    print(f"| prompts | values | {' | '.join(METHODS)} |\n|---:|---|{'---:|' * len(METHODS)}")
    for count in arguments.prompts:
        for kind in KINDS:
            held = dict.fromkeys(METHODS, 0)
            for seed in range(arguments.sets):
                lot = np.random.default_rng([seed, count])
                values, clusters, truth = planted(kind, count, lot)
                for method, (low, high) in intervals(values, clusters, lot).items():
                    held[method] += low <= truth <= high
            shares = " | ".join(f"{100 * hits / arguments.sets:.1f}" for hits in held.values())
            print(f"| {count} | {kind} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
