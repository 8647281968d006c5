"""The reward of a program: 1 if its unit tests pass, else 0, by running them in the sandbox."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from qprobe.stages import RewardBatch, RewardRow
from qprobe_code_gen import reading
from qprobe_code_gen.problems import Problem
from qprobe_code_gen.sandbox import Executor, Limits, Program, Verdict


class Reader(Protocol):
    """How completions become programs."""

    @property
    def style(self) -> str: ...

    def program(self, problem: Problem, completion: str, /) -> str: ...


class UnitTestReward:
    """A reward stage that runs every completion's program with its problem's tests.

    Args:
        problems: those that the completions belong to.
        style: how completions become programs.
        limits: of one program.
        workers: programs that run at once; None is the number of processors.
        strict: refuse to run when a layer of isolation is missing.
    """

    name = "unit_tests"

    def __init__(
        self,
        problems: Sequence[Problem],
        style: Reader,
        limits: Limits | None = None,
        workers: int | None = None,
        strict: bool = False,
    ) -> None:
        self.problems = {problem.task_id: problem for problem in problems}
        self.style = style
        self.limits = limits or Limits()
        self.workers = os.cpu_count() or 1 if workers is None else workers
        self.strict = strict

    def identity(self) -> dict[str, Any]:
        limits = dataclasses.asdict(self.limits)
        return {
            "reward": self.name,
            "style": self.style.style,
            "reader": {"version": reading.VERSION},
            "limits": limits,
        }

    def check(self) -> None:
        """Start the sandbox once, so that what it lacks is said before hours of sampling.

        Raises:
            ExecutorError: it does not start, or `strict` and a layer is missing.
        """
        Executor(1, self.limits, self.strict).close()

    def program(self, task_id: str, completion: str) -> Program:
        """What is executed for a completion."""
        problem = self.problems[task_id]
        return Program(code=self.style.program(problem, completion), tests=problem.tests)

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        """Batches as they are finished: the executor's pool is fed across their borders, so it never waits for one."""
        waiting: dict[int, tuple[RewardBatch, list[RewardRow | None], int]] = {}  # program number -> its place

        def programs() -> Iterator[Program]:
            number = 0
            for batch in batches:
                rows: list[RewardRow | None] = [None] * len(batch.rows)
                for row, (task_id, _, completion) in enumerate(batch.rows):
                    waiting[number] = (batch, rows, row)
                    number += 1
                    yield self.program(task_id, completion)

        with Executor(self.workers, self.limits, self.strict) as executor:
            for number, execution in executor.run(programs()):
                batch, rows, row = waiting.pop(number)
                rows[row] = RewardRow(
                    reward=float(execution.verdict == Verdict.PASSED),
                    verdict=str(execution.verdict),
                    seconds=execution.seconds,
                    detail=execution.detail,
                )
                finished = [r for r in rows if r is not None]
                if len(finished) == len(rows):
                    yield batch, finished
