"""Likelihood columns of recorded completions, by one more pass over them with the model that drew them.

    python code_gen/evidence/likelihood_columns.py --model qwen2.5-coder-1.5b-instruct.gguf --pool humaneval.sample --out columns

Every prompt is a Parquet file of its own in the folder OUT/POOL (`task_id`, `sample`, a column each of `COLUMNS`), written
whole; a run that was stopped goes on where it was. `--check FILE` compares with columns that another program computed, and
says the largest and the mean distance of each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
from recorded_blocks import RECORDING
from tqdm import tqdm

from qprobe import models
from qprobe.files import write_whole
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS, LikelihoodColumns

ENDING = "\n```"  # what closes the answer of the recorded prompts, which opened a fence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the weights that drew the completions")
    parser.add_argument(
        "--recording", type=Path, default=RECORDING, help="folder with completions.parquet and prompts.parquet"
    )
    parser.add_argument("--pool", default="humaneval.sample")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=Path, help="a text file with one task_id a line: these alone, in this order")
    parser.add_argument("--check", type=Path, help="Parquet with columns of the same names, to compare with")
    arguments = parser.parse_args()
    every = pd.read_parquet(arguments.recording / "completions.parquet")
    completions = every[every.pool == arguments.pool]
    prompts = pd.read_parquet(arguments.recording / "prompts.parquet")
    prompts = prompts[prompts.split == arguments.pool.split(".")[0]].set_index("task_id").prompt_token_ids
    tasks = list(dict.fromkeys(completions.task_id))
    if arguments.only:
        tasks = [task for task in arguments.only.read_text().split() if task in set(tasks)]
    folder = arguments.out / arguments.pool
    model = ModelSpec(arguments.model)
    reader = LikelihoodColumns(model, ending=models.load_tokenizer(model).encode_completion(ENDING))
    waiting = [task for task in tasks if not _path(folder, task).exists()]
    rows, started = 0, time.monotonic()
    for task in tqdm(waiting, unit="prompt", mininterval=30):
        own = completions[completions.task_id == task].sort_values("sample")
        found = reader.read([list(prompts[task])], [[list(ids) for ids in own.token_ids]]).columns
        table = pd.DataFrame(found, columns=list(COLUMNS))
        table.insert(0, "task_id", task)
        table.insert(1, "sample", own["sample"].to_numpy())
        write_whole(_path(folder, task), table.to_parquet(index=False))
        rows += len(own)
    if rows:
        print(f"{rows} rows, {(time.monotonic() - started) / rows:.2f} s a row")
    if arguments.check:
        compare(pd.concat([pd.read_parquet(_path(folder, task)) for task in tasks]), pd.read_parquet(arguments.check))


def compare(ours: pd.DataFrame, others: pd.DataFrame) -> None:
    """Print how far two tables of columns are apart, and the deviation of each column within prompts beside it."""
    others = others.rename(columns={"logprob_of_fence": "logprob_of_ending_begun"})
    both = ours.merge(others, on=["task_id", "sample"], suffixes=("", "_other"))
    print(f"{len(both)} rows in both")
    for name in COLUMNS:
        if name + "_other" in both:
            apart = (both[name] - both[name + "_other"]).abs()
            spread = (both[name] - both.groupby("task_id")[name].transform("mean")).std()
            print(f"{name:28s} mean {apart.mean():9.5f}  largest {apart.max():9.5f}  within prompts {spread:9.5f}")


def _path(folder: Path, task: str) -> Path:
    return folder / f"{task.replace('/', '-')}.parquet"


if __name__ == "__main__":
    main()
