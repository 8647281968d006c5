"""The command `qprobe`.

qprobe inspect RUN      what is in a run folder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qprobe", description="Q-probes: adapt a frozen language model to a reward.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser(
        "inspect", help="what is in a run folder: rows a stage, pass rate, what is missing"
    )
    inspecting.add_argument("run", type=Path, help="the run folder, such as runs/demo")
    chosen = parser.parse_args(arguments)

    from qprobe import inspection
    from qprobe.store import StoreError

    try:
        print(inspection.to_text(inspection.inspect(chosen.run)))
    except StoreError as error:
        print(f"qprobe: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
