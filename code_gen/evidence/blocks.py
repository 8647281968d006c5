"""Which block carries the signal on recorded completions, and whether training beats the untrained scores.

    python code_gen/evidence/blocks.py --run runs/recorded_mbpp --columns columns            # MBPP, by cross-validation
    python code_gen/evidence/blocks.py --run runs/recorded_mbpp --columns columns --to humaneval.sample
    python code_gen/evidence/blocks.py --run runs/recorded_mbpp --columns columns --losses   # equal solvers, one loss each

`--run` is a finished run of `experiment=recorded_mbpp`, whose unit tests give the rewards; hidden states are the recording's;
`--columns` holds what `likelihood_columns.py` wrote, or a Parquet file with the same columns as POOL.parquet; problems without
likelihood columns are left out. Without it all problems are read, with what the recording itself says of likelihoods: sum and
mean of log-probabilities and the length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from likelihood_columns import RECORDING

from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED
from qprobe.probe.blocks import AUTO_LOSSES, Report, cross_validated, transferred
from qprobe.probe.solvers import Rows

ALL_LOSSES = ("reward_mse", "centred_mse", "reward_cross_entropy", "pairwise_logistic", "policy_gradient")
HIDDEN = "layer 18"
# What another program wrote before the columns had their names.
OLDER = {"logprob_of_fence": "logprob_of_ending_begun"}


def recorded(pool: str) -> pd.DataFrame:
    """task_id, sample, and the likelihood columns that follow from the recorded sum of log-probabilities."""
    every = pd.read_parquet(RECORDING / "completions.parquet")
    own = every[every.pool == pool]
    tokens = own.token_ids.map(len)
    sampler = json.loads((RECORDING / "recording.json").read_text())["completions"][pool]["inputs"]["sampler"]
    ended = (own.finish_reason == "stop") if "logprob" in sampler else 0  # older sums leave the token of the end out
    mean = own.logprob / np.maximum(tokens + ended, 1)
    values = {"logprob_sum": own.logprob, "logprob_mean": mean, "tokens": tokens}
    return own[["task_id", "sample"]].assign(**values)


def read(run: Path, columns: Path | None, pool: str, layer: int = 18) -> pd.DataFrame:
    """One row a completion: task_id, sample, reward, state, and the likelihood columns that are known."""
    if columns is None:
        known = recorded(pool)
    else:
        file = columns / f"{pool}.parquet"
        known = pd.read_parquet(file if file.exists() else columns / pool).rename(columns=OLDER)
    parts = sorted((run / "rewards" / pool / "unit_tests").glob("*.parquet"))
    rewards = pd.concat([pd.read_parquet(part) for part in parts])[["task_id", "sample", "reward"]]
    states = pd.read_parquet(RECORDING / "features" / f"{pool}.layer={layer:02d}.parquet")
    (name,) = set(states.columns) - {"task_id", "sample"}
    keys = ["task_id", "sample"]
    table = known.merge(rewards, on=keys).merge(states.rename(columns={name: "state"}), on=keys)
    return table.sort_values(keys).reset_index(drop=True)


def rows_of(table: pd.DataFrame, blocks: Sequence[str], columns: Sequence[str]) -> Rows:
    """Blocks and all untrained scores; what is centred within prompts ranks as before, and is scaled by what differs there."""
    groups = pd.factorize(table.task_id)[0]
    likelihood = table[list(columns)].astype(np.float64)
    made = {
        HIDDEN: np.stack(list(table.state)).astype(np.float32),
        "likelihood": (likelihood - likelihood.groupby(groups).transform("mean")).to_numpy(),
    }
    untrained = {name: sign * table[name].to_numpy(np.float64) for name, sign in UNTRAINED.items() if name in table}
    return Rows({name: made[name] for name in blocks}, table.reward.to_numpy(), groups, anchors=untrained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--columns", type=Path)
    parser.add_argument("--pool", default="mbpp-train.sample", help="what is trained on")
    parser.add_argument("--to", help="a pool to test on; none cross-validates")
    parser.add_argument("--losses", action="store_true", help="every loss by itself")
    parser.add_argument("--repeats", type=int, default=2, help="divisions into folds")
    parser.add_argument("--anchors", type=int, default=2, help="untrained scores that L2 may pull towards")
    parser.add_argument(
        "--choose", action="store_true", help="take the one chosen candidate, not the mean of those as good"
    )
    arguments = parser.parse_args()
    table = read(arguments.run, arguments.columns, arguments.pool)
    other = read(arguments.run, arguments.columns, arguments.to) if arguments.to else None
    columns = [c for c in COLUMNS if c in table and (other is None or c in other)]
    print(f"likelihood columns: {', '.join(columns)}")
    for blocks in ([HIDDEN, "likelihood"], [HIDDEN], ["likelihood"]) if arguments.columns else ([HIDDEN],):
        for losses in [(loss,) for loss in ALL_LOSSES] if arguments.losses else [AUTO_LOSSES]:
            started = time.process_time()
            rows = rows_of(table, blocks, columns)
            options = {"losses": losses, "anchors": arguments.anchors, "average": not arguments.choose}
            if other is None:
                report = cross_validated(rows, repeats=arguments.repeats, **options)
            else:
                report = transferred(rows, rows_of(other, blocks, columns), **options)
            spent = time.process_time() - started
            print(f"\n== {' + '.join(blocks)}, {' or '.join(losses)} ({spent:.0f} s of a core)")
            show(report, short=arguments.losses)


def show(report: Report, short: bool) -> None:
    """The report, and what every fold chose."""
    table = report.table().split("\n")
    print("\n".join(table[:4] if short else table))
    for solution in report.solutions[:1] if short else report.solutions:
        print(f"  {solution.loss}: {solution.sentence()}")
    print(report.verdict())


if __name__ == "__main__":
    main()
