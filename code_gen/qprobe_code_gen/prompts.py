"""From a problem to a prompt, and from a completion to a program.

Five styles: `chat_continued` (an instruct model is asked, and its answer is opened with a fence and the problem's whole code),
`chat_opened` (with a fence and the signature), `chat` (it answers freely), `zero_shot` (the problem as code to be continued, the
paper's) and `few_shot` (solved problems before it).

Cutting never empties a completion that begins with `def` or with a fence, as the published code does: a completion is read
as a fenced block, as a program of its own, or as the body of the function, by what it begins with.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from qprobe.prompts import Prompt
from qprobe_code_gen.problems.base import Problem

FENCE = "```"
REQUEST = "Write a Python function for this specification."
# What stands at the left margin behind a finished program, whatever the program is.
BEHIND_PROGRAMS = ("\n" + FENCE, '\n"""', "\nprint", "\nassert ", "\nif __name__")
# What else stands behind a finished function, where one function is asked for. It may also stand in the first lines of a
# whole program (a completion that begins with a fence or an import), so it counts only behind an empty line.
BEHIND_FUNCTIONS = tuple(
    f"\n\n{word}" for word in ("def ", "class ", "if ", "for ", "while ", "import ", "from ", "#", "@")
)
STYLES = ("chat_continued", "chat_opened", "chat", "zero_shot", "few_shot")


@dataclass(frozen=True)
class PromptStyle:
    """How problems are put to the model.

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

    def stop(self, problems: Sequence[Problem]) -> tuple[str, ...]:
        """Texts that end a completion of any of these problems.

        A free answer may explain itself before its fence, so it ends by itself only. A problem that gives no signature may
        be answered with several functions, and a continued answer ends with the fence that it was opened with.
        """
        if self.style == "chat":
            return ()
        one_function = self.style != "chat_continued" and all(problem.signature for problem in problems)
        return BEHIND_PROGRAMS + (BEHIND_FUNCTIONS if one_function else ())

    def prompt(self, problem: Problem) -> Prompt:
        if self.style.startswith("chat"):
            messages = ({"role": "user", "content": f"{self.request}\n\n{problem.description}"},)
            opening = "" if self.style == "chat" else f"{FENCE}python\n{self._given(problem)}"
            return Prompt(problem.task_id, messages=messages, opening=opening)
        solved = "".join(f"{example.solution.strip()}\n\n\n" for example in self.examples)
        return Prompt(problem.task_id, text=solved + problem.code_prompt)

    def program(self, problem: Problem, completion: str) -> str:
        """The program that is executed for a completion: never empty unless the completion is."""
        code = _fenced(completion, self.style)
        if _stands_alone(code):
            return problem.header + _longest_program(code)
        return self._given(problem) + _body(code)

    def _given(self, problem: Problem) -> str:
        """The code that a completion continues. A chat's opening says no docstring where there is no function to hold it."""
        if self.style == "chat_opened" or (self.style == "chat_continued" and not problem.signature):
            return problem.header + problem.signature.rstrip()
        return problem.code_prompt.rstrip() if self.style == "chat_continued" else problem.code_prompt


def _fenced(completion: str, style: str) -> str:
    """The code of a completion with fences: inside the first block, or before the fence that closes an opened answer."""
    before, fence, rest = completion.partition(FENCE)
    if not fence:
        return completion
    opened_here = not before.strip() or style == "chat"
    if not opened_here:
        return before
    first_line, newline, code = rest.partition("\n")
    # The language's name stands on the line of the fence; a block of one line has none.
    return (code if newline and len(first_line.split()) <= 1 else rest).partition(FENCE)[0]


def _stands_alone(code: str) -> bool:
    """Whether the code begins at the left margin, as a whole program does and the body of a function does not."""
    first = next((line for line in code.splitlines() if line.strip()), "")
    return bool(first) and not first[0].isspace()


def _longest_program(code: str) -> str:
    """The longest run of leading lines that parses: what follows a program is talk. All of it where none parses."""
    lines = code.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        text = "".join(lines[:end])
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        if tree.body:
            return text
    return code


def _body(code: str) -> str:
    """The body of a function: up to the first line at the left margin that is no comment and not empty."""
    kept = []
    for line in code.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "".join(kept)
