"""A user's own files: prompts, and candidates with their rewards, as JSON lines. What is wrong is said with its line.

{"prompt": "...", "word": "sea"}                                     a prompt, with a field for the reward function
{"messages": [{"role": "user", "content": "..."}], "task_id": "a"}   a conversation, with a name of its own
{"prompt": "...", "completion": "...", "reward": 0.5}                a candidate of a prompt
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.files import read_text
from qprobe.prompts import Prompt, wrong_messages

_OWN_FIELDS = {"prompt", "messages", "task_id"}


@dataclass(frozen=True)
class PromptRow:
    """A prompt as its line gives it.

    Args:
        task_id: its own, or made of the split's name and the number of its line.
        line: number of the line, from 1.
        prompt: text, or a conversation as [{"role": ..., "content": ...}, ...].
        fields: everything else of the line.
    """

    task_id: str
    line: int
    prompt: str | list[dict[str, str]]
    fields: dict[str, Any]

    def as_prompt(self, style: str) -> Prompt:
        """The prompt for a model: plain text becomes a user's message (`chat`) or is continued as it stands (`text`)."""
        if isinstance(self.prompt, list):
            return Prompt(self.task_id, messages=tuple(self.prompt))
        return plain_prompt(self.task_id, self.prompt, style)


def plain_prompt(task_id: str, text: str, style: str) -> Prompt:
    """Plain text as a prompt.

    Args:
        style: `chat` makes it a user's message, `text` has it continued as it stands.
    """
    if style == "chat":
        return Prompt(task_id, messages=({"role": "user", "content": text},))
    if style == "text":
        return Prompt(task_id, text=text)
    raise ValueError(
        f"The style of the prompts is {style!r}: choose chat (a user's message) or text (to be continued)."
    )


@dataclass(frozen=True)
class Candidates:
    """Completions that are there already, with their rewards, by task id in the order of the file.

    Args:
        prompts: those with two candidates at least.
        notes: what a user should know of the file, as sentences.
        lines: numbers of their lines, from 1.
        places: of every line of the file that is not empty, by its number: which candidate it is, from 0.
    """

    prompts: list[PromptRow]
    completions: dict[str, list[str]]
    rewards: dict[str, list[float]]
    notes: list[str]
    lines: dict[str, list[int]]
    places: dict[int, int]


def read_prompts(path: Path, split: str) -> list[PromptRow]:
    """Prompts out of a file.

    Args:
        split: a short name, from which task ids are made where a line gives none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no prompt, or is there twice; the message names it.
    """
    rows: list[PromptRow] = []
    by_id: dict[str, PromptRow] = {}
    by_prompt: dict[str, PromptRow] = {}
    for line in _lines(path):
        row = line.prompt_row(split)
        if (other := by_id.setdefault(row.task_id, row)) is not row:
            raise line.wrong(f"the task_id {row.task_id!r} was given to line {other.line} too; give each its own")
        if (other := by_prompt.setdefault(json.dumps(row.prompt), row)) is not row:
            # Twice the same prompt would be trained on and tested on at once.
            raise line.wrong(f"the prompt is that of line {other.line} again; keep one of them")
        if clash := sorted({"completion", "prompts", "completions"} & set(row.fields)):
            raise line.wrong(f"the field {clash[0]!r} has the name of what the reward function is given; rename it")
        rows.append(row)
    if not rows:
        raise ValueError(f'{_named(path)} has no prompts: give one JSON object a line, such as {{"prompt": "..."}}.')
    return rows


def sound_prompts(path: Path, split: str) -> tuple[list[PromptRow], list[str]]:
    """The prompts of a file, and a sentence on every line that is none; the same prompt may be there twice.

    Args:
        split: as of `read_prompts`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    by_id: dict[str, PromptRow] = {}
    wrong: list[str] = []
    for number, text in _texts(path):
        try:
            line = _line(path, number, text)
            row = line.prompt_row(split)
            if (other := by_id.setdefault(row.task_id, row)) is not row:
                raise line.wrong(f"the task_id {row.task_id!r} was given to line {other.line} too; give each its own")
        except ValueError as error:
            wrong.append(str(error))
    return list(by_id.values()), wrong


def check_apart(training: list[PromptRow], tests: list[PromptRow]) -> None:
    """Raise ValueError where a test prompt or its task id is among the training prompts."""
    ids = {row.task_id: row for row in training}
    prompts = {json.dumps(row.prompt): row for row in training}
    for row in tests:
        if other := ids.get(row.task_id):
            raise ValueError(
                f"Line {row.line} of the test prompts has the task_id {row.task_id!r} of line {other.line} of the training "
                "prompts: give each its own."
            )
        if other := prompts.get(json.dumps(row.prompt)):
            raise ValueError(
                f"Line {row.line} of the test prompts is line {other.line} of the training prompts: a test on it would say "
                "nothing; remove one of them."
            )


def read_candidates(path: Path, split: str) -> Candidates:
    """Candidates and rewards out of a file, grouped by task id where the lines give one, else by prompt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no candidate or contradicts another one; the message names it.
    """
    groups: dict[str, PromptRow] = {}
    by_prompt: dict[str, PromptRow] = {}
    completions: dict[str, list[str]] = {}
    rewards: dict[str, list[float]] = {}
    lines: dict[str, list[int]] = {}
    repeated: list[int] = []
    extra: set[str] = set()
    places: dict[int, int] = {}
    for line in _lines(path):
        places[line.number] = len(places)
        row = line.prompt_row(split)
        own = json.dumps(row.prompt)
        known = by_prompt.get(own)
        if known is not None and "task_id" not in line.values:
            row = known
        if known is not None and known.task_id != row.task_id:
            raise line.wrong(
                f"its prompt has the task_id {known.task_id!r} at line {known.line} and {row.task_id!r} here; a prompt has one"
            )
        first = groups.setdefault(row.task_id, row)
        if json.dumps(first.prompt) != own:
            raise line.wrong(
                f"the task_id {row.task_id!r} is that of another prompt at line {first.line}; give each its own"
            )
        by_prompt.setdefault(own, first)
        completion, reward = line.candidate()
        of_prompt = completions.setdefault(row.task_id, [])
        if completion in of_prompt:
            repeated.append(line.number)
        of_prompt.append(completion)
        rewards.setdefault(row.task_id, []).append(reward)
        lines.setdefault(row.task_id, []).append(line.number)
        extra |= set(line.values) - _OWN_FIELDS - {"completion", "reward"}
    if not groups:
        raise ValueError(
            f'{_named(path)} has no candidates: give one JSON object a line, such as {{"prompt": "...", "completion": "...", '
            '"reward": 0.5}.'
        )
    alone = [task_id for task_id, texts in completions.items() if len(texts) == 1]
    if len(alone) == len(groups):
        raise ValueError(
            f"{_named(path)} has a single candidate of every prompt: there is nothing to choose from; give two at least of each."
        )
    notes = []
    if extra:
        notes.append(f"Fields that are not read: {', '.join(sorted(extra))}.")
    if repeated:
        notes.append(
            f"{len(repeated)} of {sum(map(len, completions.values()))} lines repeat a completion of their prompt (the first: "
            f"line {repeated[0]}): they count as further draws of it. Remove them if they are there by mistake."
        )
    if alone:
        notes.append(
            f"{len(alone)} of {len(groups)} prompts have a single candidate (the first: line {groups[alone[0]].line}): there is "
            "nothing to choose, and they are left out."
        )
    for task_id in alone:
        del groups[task_id], completions[task_id], rewards[task_id], lines[task_id]
    return Candidates(list(groups.values()), completions, rewards, notes, lines, places)


@dataclass(frozen=True)
class _Line:
    """The object of a line of a file; `number` from 1."""

    path: Path
    number: int
    values: dict[str, Any]

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{_named(self.path)}, line {self.number}: {what}.")

    def prompt_row(self, split: str) -> PromptRow:
        task_id = self.values.get("task_id", f"{split}-{self.number:05d}")
        if isinstance(task_id, int) and not isinstance(task_id, bool):
            task_id = str(task_id)
        if not isinstance(task_id, str) or not task_id:
            raise self.wrong(f"task_id is {task_id!r}; give a text or a whole number")
        if ("prompt" in self.values) == ("messages" in self.values):
            given = "both prompt and messages" if "prompt" in self.values else "neither prompt nor messages"
            raise self.wrong(f"it has {given}; give one of them")
        fields = {name: value for name, value in self.values.items() if name not in _OWN_FIELDS}
        prompt = self._messages() if "messages" in self.values else self._text("prompt", self.values["prompt"])
        if isinstance(prompt, str) and not prompt.strip():
            raise self.wrong("the prompt is empty")
        return PromptRow(self._text("task_id", task_id), self.number, prompt, fields)

    def candidate(self) -> tuple[str, float]:
        """Completion and reward."""
        if missing := [name for name in ("completion", "reward") if name not in self.values]:
            raise self.wrong(f"it has no {' and no '.join(missing)}; every candidate has both")
        reward = self.values["reward"]
        if not isinstance(reward, int | float) or not abs(reward) < 1e38:
            raise self.wrong(f"the reward is {reward!r:.60}; give a finite number")
        return self._text("completion", self.values["completion"]), float(reward)

    def _messages(self) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = self.values["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise self.wrong('messages is no conversation; give [{"role": "user", "content": "..."}, ...]')
        if why := wrong_messages(messages):
            raise self.wrong(why)
        return messages

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(f"{name} is {value!r:.60}; give a text")
        if not _is_unicode(value):
            raise self.wrong(f"{name} holds half of a character (a lone surrogate); correct the text")
        return value


def _lines(path: Path) -> Iterator[_Line]:
    """Every line that is not empty."""
    for number, text in _texts(path):
        yield _line(path, number, text)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not empty."""
    # Only line feeds end a line: JSON may hold the other separators that str.splitlines knows.
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield number, text


def _line(path: Path, number: int, text: str) -> _Line:
    try:
        line = _Line(path, number, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _Line(path, number, {}).wrong(f"this is no JSON ({error}); write one JSON object a line") from error
    if not isinstance(line.values, dict):
        raise line.wrong("this is no JSON object; write {...} with its fields")
    return line


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and {"role", "content"} <= set(message)
        and all(isinstance(value, str) and _is_unicode(value) for value in message.values())
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _named(path: Path) -> str:
    return "The standard input" if str(path) == "-" else str(path)
