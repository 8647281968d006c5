"""How long linear probes take to solve, all left-out scores included, beside scikit-learn on the same rows and folds.

    python shared/benchmarks/solvers.py                  # 464 prompts x 8 rows x 3 blocks of 1,536 columns, 13 strengths
    python shared/benchmarks/solvers.py --paper          # the paper's size as well: 92,800 x 4,096, float16
    python shared/benchmarks/solvers.py --prompts 60 --columns 64 --peer-columns 64   # a small machine

Features are random with a planted direction in the second block; the time does not depend on them. Our solver leaves out every
prompt in closed form. RidgeCV leaves out folds of prompts (GroupKFold of 5): it has no closed form for groups. The cross-entropy
is compared with LogisticRegressionCV at the same folds and strengths, on `--peer-columns` columns of the block that carries the
signal. Prints JSON, then one sentence for the goals; exits 1 where one is missed. On a busy machine trust processor
seconds and the ratios, which are of these.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GroupKFold

from qprobe.probe.solvers import STRENGTHS, Rows, solve
from qprobe.probe.solvers.work import SolvedLoss

ONE_WEIGHTING, NINE_WEIGHTINGS, PAPER = 10.0, 60.0, 90.0
PAPER_GIB = 8.0
AGREEMENT = 1e-3
Result = TypeVar("Result")


def table(prompts: int, samples: int, columns: int, blocks: int, dtype: str = "float32") -> Rows:
    """Random blocks, rewards of 0 and 1 from a direction of the second block, the prompt's own level and noise."""
    rng = np.random.default_rng(0)
    count = prompts * samples
    made = {}
    for block in range(blocks):
        values = np.empty((count, columns), dtype=dtype)
        for first in range(0, count, 4096):
            values[first : first + 4096] = rng.standard_normal(
                (len(values[first : first + 4096]), columns), dtype="float32"
            )
        made[f"block {block}"] = values
    signal = made[f"block {min(1, blocks - 1)}"][:, :8].astype(np.float64).sum(axis=1) / 8**0.5
    level = np.repeat(rng.normal(size=prompts), samples)
    rewards = (signal + level + rng.normal(size=count) > 0).astype(np.float64)
    return Rows(made, rewards, np.repeat(np.arange(prompts), samples))


def timed(work: Callable[[], Result]) -> tuple[dict[str, float], Result]:
    """(seconds and processor seconds, what it gave)."""
    started, used = time.perf_counter(), time.process_time()
    made = work()
    return {"seconds": time.perf_counter() - started, "processor seconds": time.process_time() - used}, made


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, over the deviation of the other."""
    return float(np.abs(one - other).max() / other.std())


def peers(rows: Rows, columns: int) -> dict[str, Any]:
    """Seconds of scikit-learn and of ours on one block, at the same folds and strengths."""
    features = rows.blocks[list(rows.blocks)[1]][:, :columns].astype(np.float64)
    own = Rows(features, rows.rewards, rows.groups)
    folds = list(GroupKFold(5).split(features, rows.rewards, rows.groups))
    finite = [s for s in STRENGTHS if np.isfinite(s)]
    centred = (features - features.mean(0)) / features.std(0) / columns**0.5
    largest = float(np.linalg.eigvalsh(centred.T @ centred)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ridge_cv, _ = timed(lambda: RidgeCV([s * largest for s in finite], cv=folds).fit(centred, rows.rewards))
        # Their C is 1 / (2 N l) of ours, and it multiplies the sum over rows.
        strengths = [1 / (2 * s * largest) for s in finite]
        logistic = LogisticRegressionCV(Cs=strengths, cv=folds, max_iter=1000, scoring="roc_auc", l1_ratios=(0,))
        logistic_cv, _ = timed(lambda: logistic.fit(centred, rows.rewards.astype(int)))
    ours, _ = timed(lambda: solve(own, "reward_mse"))
    entropy, _ = timed(lambda: solve(own, "reward_cross_entropy"))
    return {
        "columns": columns,
        "RidgeCV, 5 folds": ridge_cv,
        "reward_mse, every prompt left out": ours,
        "RidgeCV over ours": ridge_cv["processor seconds"] / ours["processor seconds"],
        "LogisticRegressionCV, 5 folds": logistic_cv,
        "reward_cross_entropy, 5 folds": entropy,
        "LogisticRegressionCV over ours": logistic_cv["processor seconds"] / entropy["processor seconds"],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=464)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--columns", type=int, default=1536, help="of each of the three blocks")
    parser.add_argument("--peer-columns", type=int, default=512, help="of the block that scikit-learn gets")
    parser.add_argument("--paper", action="store_true", help="92,800 x 4,096 as well")
    arguments = parser.parse_args()
    rows = table(arguments.prompts, arguments.samples, arguments.columns, 3)
    alike = dict.fromkeys(rows.blocks, 1.0)
    nine = [
        {name: float(w) for name, w in zip(rows.blocks, (1, b, c), strict=True)} for b in (0, 1, 3) for c in (0, 1, 3)
    ]
    figures: dict[str, Any] = {"rows": len(rows), "columns": 3 * arguments.columns, "strengths": len(STRENGTHS)}
    losses: tuple[SolvedLoss, ...] = ("reward_mse", "centred_mse")
    for loss in losses:
        one, narrow = timed(lambda loss=loss: solve(rows, loss, weightings=[alike]))  # type: ignore[misc]
        many, _ = timed(lambda loss=loss: solve(rows, loss, weightings=nine))  # type: ignore[misc]
        _, wide = timed(lambda loss=loss: solve(rows, loss, weightings=[alike], dtype=np.float64))  # type: ignore[misc]
        figures[loss] = {
            "one weighting": one,
            "nine weightings": many,
            "left-out scores against float64, over their deviation": relative(narrow.left_out, wide.left_out),
        }
    figures["scikit-learn"] = peers(rows, arguments.peer_columns)
    missed = [loss for loss in losses if figures[loss]["one weighting"]["seconds"] > ONE_WEIGHTING]
    missed += [
        f"{loss}, nine weightings" for loss in losses if figures[loss]["nine weightings"]["seconds"] > NINE_WEIGHTINGS
    ]
    if arguments.paper:
        large = table(464, 200, 4096, 1, "float16")
        seconds, _ = timed(lambda: solve(large, "reward_mse"))
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures["paper's size"] = {**seconds, "peak RSS GiB": gib}
        missed += ["the paper's size"] if seconds["seconds"] > PAPER or gib > PAPER_GIB else []
    figures["load average of the last minute"] = os.getloadavg()[0]
    print(json.dumps(figures, indent=2))
    print(
        f"Goals: {ONE_WEIGHTING:g} s for one weighting, {NINE_WEIGHTINGS:g} s for nine"
        f"{f', {PAPER:g} s and {PAPER_GIB:g} GiB at the size of the paper' if arguments.paper else ''}: "
        f"{'missed by ' + ', '.join(missed) if missed else 'all met'}."
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
