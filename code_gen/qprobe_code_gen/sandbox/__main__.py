"""`qprobe-sandbox`: what this machine isolates, and one program from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from . import Executor, ExecutorError, Layer, Limits, Program


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
    execute = commands.add_parser("execute", help="execute a program and print one line of JSON")
    execute.add_argument("program", type=Path, help="Python file")
    execute.add_argument("--tests", type=Path, help="Python file that runs after the program in the same namespace")
    execute.add_argument("--expression", default="", help="evaluated last; its repr is printed as value")
    execute.add_argument("--timeout", type=float, default=Limits.cpu_seconds, help="CPU seconds (default %(default)s)")
    execute.add_argument("--memory", type=int, default=Limits.memory_mib, help="MiB (default %(default)s)")
    execute.add_argument("--strict", action="store_true", help="refuse to run when a layer of isolation is missing")
    return parser


def _info(options: argparse.Namespace) -> int:
    with Executor(workers=1) as executor:
        layers = executor.info()
    print(json.dumps([asdict(layer) for layer in layers]) if options.json else table(layers))
    return 0


def _execute(options: argparse.Namespace) -> int:
    limits = Limits(cpu_seconds=options.timeout, memory_mib=options.memory)
    tests = _source(options.tests) if options.tests else ""
    program = Program(_source(options.program), tests, options.expression)
    with Executor(workers=1, limits=limits, strict=options.strict) as executor:
        execution = executor.execute(program)
    print(json.dumps(asdict(execution)))
    return 0


def _source(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a Python source file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path} is not UTF-8 text (byte {fault.start}): give a Python source file") from fault


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
