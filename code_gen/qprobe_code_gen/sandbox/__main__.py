"""`qprobe-sandbox`: what this machine isolates, and one program or a file of them from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from . import Execution, Executor, ExecutorError, Layer, Limits, Program, Reference

KEYS = ("program", "tests", "header", "reference")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; None takes those of the process.

    Returns:
        0 whatever the verdict; 2 for input that cannot be used, 1 when the harness fails.
    """
    options = _parser().parse_args(arguments)
    try:
        return _info(options) if options.command == "info" else _execute(options)
    except (ValueError, OSError) as fault:
        print(f"qprobe-sandbox: {fault}", file=sys.stderr)
        return 2
    except ExecutorError as fault:
        print(f"qprobe-sandbox: {fault}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qprobe-sandbox", description="Execute untrusted Python programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print which layers of isolation are active here and what each stops")
    info.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    execute = commands.add_parser("execute", help="execute a program, or a file of them, and print a line of JSON each")
    execute.add_argument(
        "program",
        type=Path,
        help='Python file; or FILE.jsonl with {"program": ..., "tests": ...} a line, and "header" and "reference" where '
        "they are known: code that the problem gives, and a right program, which says whose the names in the tests are",
    )
    execute.add_argument("--tests", type=Path, help="Python file that runs after the program in the same namespace")
    execute.add_argument("--expression", default="", help="evaluated last; its repr is printed as value")
    execute.add_argument("--timeout", type=float, default=Limits.cpu_seconds, help="CPU seconds (default %(default)s)")
    execute.add_argument("--memory", type=int, default=Limits.memory_mib, help="MiB (default %(default)s)")
    execute.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="programs at once (default %(default)s)"
    )
    execute.add_argument(
        "--apart", action="store_true", help="refuse tests that need to run in one process with their program"
    )
    execute.add_argument("--strict", action="store_true", help="refuse to run when a layer of isolation is missing")
    return parser


def _info(options: argparse.Namespace) -> int:
    with Executor(workers=1) as executor:
        layers = executor.info()
    print(json.dumps([asdict(layer) for layer in layers]) if options.json else table(layers))
    return 0


def _execute(options: argparse.Namespace) -> int:
    limits = Limits(cpu_seconds=options.timeout, memory_mib=options.memory)
    many = options.program.suffix == ".jsonl"
    if many and (options.tests or options.expression):
        raise ValueError(f"{options.program} brings its own tests: leave --tests and --expression out")
    if many:
        programs = list(_programs(options.program))
        if not programs:
            raise ValueError(f"{options.program} has no line: give programs")
    else:
        tests = _text(options.tests) if options.tests else ""
        programs = [Program(_text(options.program), tests, options.expression)]
    with Executor(
        workers=options.workers if many else 1, limits=limits, strict=options.strict, one_process=not options.apart
    ) as executor:
        for number, program in enumerate(programs, 1):
            try:
                executor.plan(program)
            except ValueError as fault:
                raise ValueError(f"{options.program}, line {number}: {fault}" if many else str(fault)) from None
        if many:
            _print_in_order(executor, programs)
        else:
            print(json.dumps(asdict(executor.execute(programs[0]))))
    return 0


def _print_in_order(executor: Executor, programs: list[Program]) -> None:
    waiting: dict[int, Execution] = {}
    number = 0
    # On stderr, so that the lines on standard output can go into a file.
    for index, execution in tqdm(executor.run(programs), total=len(programs), unit="program", file=sys.stderr):
        waiting[index] = execution
        while number in waiting:
            done = waiting.pop(number)
            line = {"verdict": done.verdict, "detail": done.detail, "seconds": done.seconds}
            print(json.dumps(line), flush=True)
            number += 1


def _programs(path: Path) -> Iterator[Program]:
    """The programs of a file of JSON lines.

    Raises:
        ValueError: a line that is none, by its number; before anything is executed.
    """
    for number, line in enumerate(_text(path, "JSON lines").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as fault:
            raise ValueError(f"{where} is not JSON ({fault})") from fault
        if not isinstance(row, dict) or not {"program", "tests"} <= row.keys():
            raise ValueError(f'{where} is no program: give {{"program": ..., "tests": ...}}')
        if wrong := [key for key in KEYS if not isinstance(row.get(key, ""), str)]:
            raise ValueError(f"{where}: {wrong[0]} is no text: give Python source")
        known = Reference(row.get("header", ""), row.get("reference", ""))
        yield Program(row["program"], row["tests"], reference=known if known != Reference() else None)


def _text(path: Path, what: str = "a Python source file") -> str:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give {what}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path} is not UTF-8 text (byte {fault.start}): give {what}") from fault


def table(layers: list[Layer]) -> str:
    """The layers as text: name, state, what each stops, and what is lost where one is absent."""
    width = max(len(layer.name) for layer in layers)
    lines = []
    for layer in layers:
        lines.append(f"{layer.name:<{width}}  {'active' if layer.active else 'ABSENT'}  stops {layer.stops}")
        if layer.note:
            lines.append(f"{'':<{width}}          {layer.note}")
    missing = [layer.name for layer in layers if not layer.active]
    if missing:
        lines.append(
            f"{len(missing)} of {len(layers)} layers are absent here. Programs run with what there is; --strict refuses."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
