"""On a machine with a GPU, in some minutes: is the law the model's there, how fast is it, and a recording of HumanEval.

    make gpu-check MODEL=Qwen/Qwen2.5-Coder-1.5B-Instruct MINUTES=12

Three steps, each a command of its own with a share of the time; what a step prints is in OUT/NAME.log:

1. law: `shared/benchmarks/law.py` on the device, every family, type and path against float64.
2. generation: `shared/benchmarks/generation.py` with the model, sampler and embedder against plain transformers.
3. record: HumanEval, 48 completions a problem, drawn and embedded into the run folder OUT/run. Its parts are whole or not there:
   a later call goes on, here or wherever the folder was copied to.

The first two may take a quarter of the time each, and are stopped there. Exit status 1: a step failed or missed a goal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
import torch

ROOT = Path(__file__).resolve().parents[2]
# Seconds that a run has to end by itself, once it was told to.
GRACE = 15.0


def step(name: str, command: Sequence[str], out: Path, seconds: float) -> dict[str, object]:
    """Run a command for so long at most: how it ended, and the last line that it said."""
    started = time.monotonic()
    log = out / f"{name}.log"
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = "done" if process.wait(max(1.0, seconds)) == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            ended = "out of time"
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    row: dict[str, object] = {"step": name, "ended": ended, "seconds": round(time.monotonic() - started, 1)}
    print(f"{name:<12}{ended:<14}{row['seconds']:>8} s   {lines[-1][:120] if lines else ''}", flush=True)
    return row


def recorded(run: Path) -> dict[str, int]:
    """Rows of every table of the run folder that has parts."""
    counts: dict[str, int] = {}
    for part in sorted(run.glob("*/**/*.parquet")):
        table = str(part.parent.relative_to(run))
        counts[table] = counts.get(table, 0) + pyarrow.parquet.read_metadata(part).num_rows
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a hub id, a folder, a .gguf file, or the embedded one")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--batch-rows", type=int, default=1536, help="completions of one part of the recording")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--steps", nargs="+", default=["law", "generation", "record"])
    parser.add_argument("overrides", nargs="*", help="more settings of the recording, such as limit=4")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = torch.cuda.get_device_name() if device == "cuda" else f"no GPU, {os.cpu_count()} processors"
    print(f"{named}, torch {torch.__version__}, {arguments.model}, {arguments.minutes:g} minutes", flush=True)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = ["model=embedded"] if arguments.model == "embedded" else ["model=hub", f"model.name={arguments.model}"]
    commands = {
        "law": ["shared/benchmarks/law.py", "--seeds", "2", "--device", device, "--json", str(out / "law.json")],
        "generation": [
            "shared/benchmarks/generation.py",
            "--model",
            arguments.model,
            "--prompts",
            "16",
            "--tokens",
            "128",
        ],
        "record": [
            *("-m", "qprobe_code_gen", "experiment=humaneval", "stages=[sample,embed]", *model),
            *("dataset.prompt_style=chat_continued", f"sampler.n={arguments.samples}", "sampler.temperature=0.8"),
            *("sampler.top_p=0.95", "sampler.max_new_tokens=256", f"sampler.batch_rows={arguments.batch_rows}"),
            *(f"paths.run={out / 'run'}", *arguments.overrides),
        ],
    }
    rows = []
    for name in arguments.steps:
        left = end - time.monotonic() - GRACE
        rows.append(step(name, commands[name], out, left if name == "record" else min(left, 15 * arguments.minutes)))
    counts = recorded(out / "run")
    for table, count in counts.items():
        print(f"  {table:<48}{count:>8} rows")
    (out / "gpu_check.json").write_text(json.dumps({"device": named, "steps": rows, "rows": counts}, indent=1))
    sys.exit(any(str(row["ended"]).startswith("failed") for row in rows))


if __name__ == "__main__":
    main()
