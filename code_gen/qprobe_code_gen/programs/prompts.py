"""From a problem to a prompt.

Five styles: `chat_continued` (an instruct model is asked, and its answer is opened with a fence and the problem's whole code),
`chat_opened` (with a fence and the signature), `chat` (it answers freely), `zero_shot` (the problem as code to be continued, the
paper's) and `few_shot` (solved problems before it). `reading` says how completions of all of them become programs, `ending` where
they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qprobe.prompts import Prompt
from qprobe_code_gen.programs.ending import CLOSING_FENCE, ProgramEnd
from qprobe_code_gen.programs.problem import Problem
from qprobe_code_gen.programs.reading import Given, read

REQUEST = "Write a Python function for this specification."
STYLES = ("chat_continued", "chat_opened", "chat", "zero_shot", "few_shot")


@dataclass(frozen=True)
class PromptStyle:
    """How a problem becomes a prompt.

    Args:
        style: one of `STYLES`.
        request: first sentence of a chat message.
        examples: solved problems for few_shot, in order; whoever evaluates must leave them out.
    """

    style: str
    request: str = REQUEST
    examples: Sequence[Problem] = field(default=())

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"Prompt style {self.style!r} is unknown: choose one of {', '.join(STYLES)}.")
        if (self.style == "few_shot") != bool(self.examples):
            raise ValueError(
                f"Prompt style {self.style} was given {len(self.examples)} examples: few_shot alone takes them."
            )

    def stop(self) -> tuple[str, ...]:
        """Texts that a server may end a completion at. A free answer may explain itself first, so it ends by itself only."""
        return () if self.style == "chat" else (CLOSING_FENCE,)

    def rule(self, problems: Sequence[Problem]) -> ProgramEnd | None:
        """Where a completion of any of these problems ends; None where it does so by itself."""
        if self.style == "chat":
            return None
        chats = self.style.startswith("chat")
        asked = [(problem.description if chats else problem.code_prompt, self.given(problem)) for problem in problems]
        return ProgramEnd(asked, behind=not chats)

    def prompt(self, problem: Problem) -> Prompt:
        if self.style.startswith("chat"):
            messages = ({"role": "user", "content": f"{self.request}\n\n{problem.description}"},)
            opening = "" if self.style == "chat" else f"```python\n{self.given(problem).code.rstrip()}"
            return Prompt(problem.task_id, messages=messages, opening=opening)
        solved = "".join(f"{example.solution.strip()}\n\n\n" for example in self.examples)
        return Prompt(problem.task_id, text=solved + problem.code_prompt)

    def given(self, problem: Problem) -> Given:
        """What a completion is asked to go on with."""
        return given(problem, self.style)

    def program(self, problem: Problem, completion: str) -> str:
        """The program that is executed for a completion."""
        return read(completion, self.given(problem)).program


def given(problem: Problem, style: str) -> Given:
    """What a completion in this style is asked to go on with, for whoever reads it.

    A chat's opening says no docstring where there is no function to hold it.
    """
    shown = not (style == "chat_opened" or (style == "chat_continued" and not problem.signature))
    docstring = problem.docstring if shown else ""
    return Given(problem.header, problem.signature, docstring, problem.entry_point)
