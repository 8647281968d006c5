"""What more training problems bring, block by block: `make learning_curve`.

    python code_gen/evidence/learning_curve.py --run runs/recorded_mbpp [--draws 20] [--out docs]

Probes are solved on 8, 16, ... of MBPP's 464 training problems, drawn anew 20 times (all of them once), and tested on HumanEval
and on MBPP's test problems: what the best of k by the probe earns over one completion, and AUC within problems. One loss
(centred_mse), L2 chosen by left-out scores, both blocks at equal weights, no anchor: the curve is about problems and blocks, not
about choices. Intervals resample draws and tested problems. Writes a table, a CSV and a figure, row by row as it goes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from recorded_blocks import BLOCKS, rows_of
from tqdm import tqdm

from qprobe.probe.metrics import reward_grid
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.solvers import NothingToLearn, Rows, solve

SIZES = (8, 16, 32, 64, 128, 256)
RESAMPLES = 2000
TESTS = {"HumanEval": "humaneval.sample", "MBPP test": "mbpp-test.sample"}
HEADER = (
    "block",
    "tested on",
    "k",
    "training problems",
    "draws",
    "gain",
    "gain low",
    "gain high",
    "auc",
    "auc low",
    "auc high",
)


def measured(scores: np.ndarray, rows: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(P,) what the best of k earns over one completion, exactly over all choices of k, and (P,) AUC (NaN: nothing to order)."""
    rng = np.random.default_rng(0)
    best = reward_grid(scores, rows.rewards, rows.groups, [k], [0.0], draws=2, rng=rng).values[0, 0]
    one = np.bincount(rows.groups, rows.rewards) / np.bincount(rows.groups)
    return best - one, within_prompt_auc(scores, rows.rewards, rows.groups)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of (draws, problems) with the 95 % interval over both."""
    rng = np.random.default_rng(seed)
    draws, prompts = values.shape
    means = [
        values[rng.integers(draws, size=draws)].mean(axis=0)[rng.integers(prompts, size=prompts)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str | float, ...]] = []
    with (arguments.out / "learning_curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, blocks in BLOCKS.items():
            rows = rows_of(arguments.run, "mbpp-train.sample", blocks)
            tests = {test: rows_of(arguments.run, pool, blocks) for test, pool in TESTS.items()}
            prompts = int(rows.groups.max()) + 1
            for size in (*SIZES, prompts):
                draws = 1 if size == prompts else arguments.draws
                made: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
                for draw in tqdm(range(draws), f"{name}, {size}", leave=False):
                    own = np.random.default_rng([size, draw]).permutation(prompts)[:size]
                    try:
                        solution = solve(
                            rows.take(np.isin(rows.groups, own)),
                            "centred_mse",
                            weightings=[dict.fromkeys(blocks, 1.0)],
                            anchor="none",
                        )
                    except NothingToLearn:
                        solution = None
                    for test, others in tests.items():
                        scores = np.zeros(len(others)) if solution is None else solution.score(others.blocks)
                        for k in sorted({8, int(np.bincount(others.groups).min())}):
                            made.setdefault((test, k), []).append(measured(scores, others, k))
                for (test, k), values in made.items():
                    gains, aucs = (np.stack(part) for part in zip(*values, strict=True))
                    mixed = ~np.isnan(aucs[0])
                    row = (name, test, k, size, draws, *interval(gains), *interval(aucs[:, mixed]))
                    found.append(row)
                    writer.writerow(row)
                    file.flush()
                    print(
                        "{:<14}{:<11}k={:<4}{:>5} x {:<4}{:+.3f} [{:+.3f}, {:+.3f}]   AUC {:.3f} [{:.3f}, {:.3f}]".format(
                            *row
                        )
                    )
    draw_figure(found, arguments.out / "learning_curve.png")


def draw_figure(found: list[tuple[str | float, ...]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = list(dict.fromkeys((row[1], row[2]) for row in found))
    figure, axes = pyplot.subplots(1, len(places), figsize=(4.2 * len(places), 3.4), sharey=True, layout="constrained")
    for place, axis in zip(places, np.atleast_1d(axes), strict=True):
        for name in BLOCKS:
            own = [row for row in found if row[0] == name and (row[1], row[2]) == place]
            sizes, gain, low, high = (np.array([float(row[at]) for row in own]) for at in (3, 5, 6, 7))
            (line,) = axis.plot(sizes, gain, marker="o", markersize=3, label=name)
            axis.fill_between(sizes, low, high, alpha=0.15, color=line.get_color())
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(
            xscale="log", title=f"{place[0]}, k = {place[1]}", xlabel="training problems of MBPP, 8 completions each"
        )
    np.atleast_1d(axes)[0].set_ylabel("reward over one completion")
    np.atleast_1d(axes)[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
