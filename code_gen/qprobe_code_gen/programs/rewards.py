"""The reward of a program: 1 if its unit tests pass, else 0, by a judge apart from it in the sandbox."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from qprobe.run.pools import RewardBatch, RewardRow
from qprobe_code_gen.programs import reading
from qprobe_code_gen.programs.mbpp import SLOW
from qprobe_code_gen.programs.problem import Problem
from qprobe_code_gen.sandbox import JUDGE, Executor, Limits, Program, Reference, Verdict

_SLOW_FACTOR = 4.0  # times its reference's CPU time that a program of a slow problem may take


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
        limits: of one program; those of a problem whose own solution is slow are wider.
        workers: programs that run at once; None is the number of processors.
        strict: refuse to run when a layer of isolation is missing.
        one_process: run programs together with tests that need more of them than their functions' results; such programs
            can forge their reward. False refuses problems with such tests.
    """

    name = "unit_tests"

    def __init__(
        self,
        problems: Sequence[Problem],
        style: Reader,
        limits: Limits | None = None,
        workers: int | None = None,
        strict: bool = False,
        one_process: bool = True,
    ) -> None:
        self.problems = {problem.task_id: problem for problem in problems}
        self.style = style
        self.limits = limits or Limits()
        self.workers = os.cpu_count() or 1 if workers is None else workers
        self.strict = strict
        self.one_process = one_process

    def identity(self) -> dict[str, Any]:
        limits = dataclasses.asdict(self.limits)
        return {
            "reward": self.name,
            "style": self.style.style,
            "reader": {"version": reading.VERSION},
            "judge": {"version": JUDGE},
            "limits": limits,
        }

    def executor(self, workers: int | None = None) -> Executor:
        """The sandbox in which programs are executed.

        Args:
            workers: programs at once; None takes the stage's own.
        """
        return Executor(workers or self.workers, self.limits, self.strict, one_process=self.one_process)

    def check(self) -> None:
        """Start the sandbox and execute a right and a wrong program, so that what it lacks is said before hours of sampling.

        Raises:
            ExecutorError: it does not start, `strict` and a layer is missing, or its verdicts are wrong.
            ValueError: problems whose tests need one process with their program, where `one_process` is False.
        """
        with self.executor(1) as executor:
            executor.check()
            for problem in self.problems.values():
                try:
                    executor.plan(_executed("", problem))
                except ValueError as error:
                    raise ValueError(f"The problem {problem.task_id}: {error}") from None

    def program(self, task_id: str, completion: str) -> Program:
        """What is executed for a completion."""
        problem = self.problems[task_id]
        program = _executed(self.style.program(problem, completion), problem)
        if task_id not in SLOW:
            return program
        # Else a slow machine would decide whether a right program passes.
        own = self.limits.relative_to(SLOW[task_id], factor=_SLOW_FACTOR, least=self.limits.cpu_seconds)
        return dataclasses.replace(program, limits=own)

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

        with self.executor() as executor:
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


def _executed(code: str, problem: Problem) -> Program:
    return Program(code, problem.tests, reference=Reference(problem.header, problem.solution))
