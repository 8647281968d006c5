"""A programming problem, whatever data set it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One programming problem.

    Args:
        task_id: unique in its data set.
        description: what is asked for, as text for a chat message.
        header: code before the function: imports and given helper functions; ends with a newline unless empty.
        signature: the `def` line(s) of the function, ends with a newline; empty where the problem gives none.
        docstring: the lines after the signature, ends with a newline; empty where the problem gives none.
        entry_point: the function's name; empty where the problem gives none.
        tests: code that runs after the program and raises unless it is right.
        solution: the data set's own whole program.
    """

    task_id: str
    description: str
    header: str
    signature: str
    docstring: str
    entry_point: str
    tests: str
    solution: str

    def __post_init__(self) -> None:
        if not self.tests.strip():
            raise ValueError(f"Problem {self.task_id} has no tests: every program would pass; remove the problem.")

    @property
    def code_prompt(self) -> str:
        """The problem as code to be continued: header, signature, docstring."""
        return self.header + self.signature + self.docstring

    def content(self) -> list[str]:
        """What decides prompt and reward."""
        return [self.task_id, self.description, self.code_prompt, self.tests]
