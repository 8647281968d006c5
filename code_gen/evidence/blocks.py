"""Which block carries the signal on recorded completions, and whether training beats the untrained scores: `make ablation`.

    python code_gen/evidence/blocks.py --run runs/recorded_mbpp                    # MBPP's training problems, by cross-validation
    python code_gen/evidence/blocks.py --run runs/recorded_mbpp --to humaneval.sample        # trained there, tested here
    python code_gen/evidence/blocks.py --run runs/recorded_mbpp --losses           # equal solvers, one loss each

`--run` is a finished run of `experiment=recorded_mbpp`, whose unit tests give the rewards; features are the recording's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from recorded_blocks import BLOCKS, rows_of

from qprobe.probe.blocks import AUTO_LOSSES, Report, cross_validated, transferred

ALL_LOSSES = ("reward_mse", "centred_mse", "reward_cross_entropy", "pairwise_logistic", "policy_gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--pool", default="mbpp-train.sample", help="what is trained on")
    parser.add_argument("--to", nargs="*", default=[], help="pools to test on; none cross-validates")
    parser.add_argument("--losses", action="store_true", help="every loss by itself")
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--repeats", type=int, default=1, help="divisions into folds")
    parser.add_argument("--anchors", type=int, default=2, help="untrained scores that L2 may pull towards")
    parser.add_argument(
        "--choose", action="store_true", help="take the one chosen candidate, not the mean of those as good"
    )
    arguments = parser.parse_args()
    for name in arguments.blocks:
        blocks = BLOCKS[name]
        rows = rows_of(arguments.run, arguments.pool, blocks)
        for losses in [(loss,) for loss in ALL_LOSSES] if arguments.losses else [AUTO_LOSSES]:
            options = {"losses": losses, "anchors": arguments.anchors, "average": not arguments.choose}
            for to in arguments.to or [None]:
                started = time.process_time()
                report = (
                    cross_validated(rows, repeats=arguments.repeats, **options)
                    if to is None
                    else transferred(rows, rows_of(arguments.run, to, blocks), **options)
                )
                where = "cross-validated" if to is None else f"tested on {to}"
                spent = time.process_time() - started
                print(f"\n== {' + '.join(blocks)}, {' or '.join(losses)}, {where} ({spent:.0f} s of a core)")
                show(report, short=arguments.losses)


def show(report: Report, short: bool) -> None:
    """The report, and what every fold chose."""
    table = report.table().split("\n")
    print("\n".join(table[:4] if short else table))
    for solution in report.solutions[:1] if short else report.solutions:
        print(f"  {solution.loss}: {solution.sentence()}")
    print(report.verdict(), flush=True)


if __name__ == "__main__":
    main()
