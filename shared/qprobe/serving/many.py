"""Answers to a file of prompts: drawn in batches, one JSON line each, going on where it was stopped.

{"task_id": "prompts-00001", "line": 1, "answer": "...", "score": 1.7, "probability": 0.41, "seed": 3, "made_from": "..."}

A line that is there is not answered again; one that was half written when the process was killed is. `made_from` is the
fingerprint of the prompt, of the probe and of all that draws and embeds: answers of other ones are not gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qprobe.files import fingerprint
from qprobe.models.openai_client import ApiRefused
from qprobe.run.runners.local import Work, run_stage
from qprobe.serving.policy import Choice, Policy
from qprobe.store.jsonl import PromptRow

Lines = list[dict[str, Any]]
# Prompts that a server refuses before it answers one: then it refuses all, such as a model that it does not know.
_REFUSED = 8


@dataclass(frozen=True)
class Answers:
    """What came of a file of prompts.

    Args:
        answered: prompts that have an answer, of this process or of an earlier one.
        empty: answers of this process without any text.
        unsure: prompts of this process whose answer is null, for being less likely to be right than was asked for.
        wrong: a sentence on every prompt that has none.
    """

    answered: int
    empty: int
    unsure: int
    wrong: list[str]


class Answering:
    """A policy that answers the prompts of a file.

    Args:
        policy: chooses the answers.
        seed: of candidates and choice, for every prompt; so the answers are those of `policy.choose(prompt, seed)`. None takes a
            new one, which the lines name.
        at_once: prompts that are drawn together, at least 1.
        candidates: whether a line holds all candidates.
        at_least: probability of being right below which the answer is null; None takes every one.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int | None = None,
        at_once: int = 8,
        candidates: bool = False,
        at_least: float | None = None,
    ) -> None:
        self.policy = policy
        self.seed = secrets.randbits(60) if seed is None else seed
        self.at_once = max(1, at_once)
        self.candidates = candidates
        self.at_least = at_least
        self._made_from: list[Any] = [_identity(policy), seed]
        if at_least is not None:
            calibration = policy.probe.calibration_
            self._made_from += [at_least, None if calibration is None else calibration.packed().tolist()]
        self._wrong: list[str] = []
        self._answered = self._empty = self._unsure = 0

    def answer(self, rows: Sequence[PromptRow], output: Path | None = None, progress: bool = True) -> Answers:
        """Answer the prompts that have no answer yet, in order.

        Args:
            rows: the prompts, each with a task id of its own.
            output: the file that the lines are added to; None is the standard output, where nothing is gone on with.
            progress: whether rate and time left are shown on stderr.

        Raises:
            ValueError: `output` holds answers to other prompts, or of another probe or other settings.
        """
        done = set() if output is None else self._done(output, rows)
        left = [row for row in rows if row.task_id not in done]
        batches = [left[start : start + self.at_once] for start in range(0, len(left), self.at_once)]
        before: Work[list[PromptRow]] = Work([], len(done), True)
        works = [before, *(Work(batch, len(batch), False) for batch in batches)]
        with contextlib.ExitStack() as stack:
            file = sys.stdout if output is None else stack.enter_context(output.open("a", encoding="utf-8"))

            def write(batch: Sequence[PromptRow], lines: Lines) -> None:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                if output is not None:
                    os.fsync(file.fileno())

            run_stage("answer", works, self._batches, write, unit="prompts", progress=progress)
        return Answers(len(done) + self._answered, self._empty, self._unsure, self._wrong)

    def _batches(self, batches: Iterable[list[PromptRow]]) -> Iterator[tuple[list[PromptRow], Lines]]:
        for batch in batches:
            chosen = self._choose(batch)
            yield batch, [self._line(row, choice) for row, choice in zip(batch, chosen, strict=True) if choice]

    def _choose(self, batch: Sequence[PromptRow]) -> Sequence[Choice | None]:
        """The choices of a batch; a prompt that cannot be answered costs the others nothing but another try."""
        try:
            found = self.policy.choose([row.prompt for row in batch], self.seed)
        except (ValueError, TemplateError, ApiRefused) as error:
            if len(batch) > 1:
                return [choice for row in batch for choice in self._choose([row])]
            self._wrong.append(f"Line {batch[0].line} ({batch[0].task_id}): {error}")
            if isinstance(error, ApiRefused) and not self._answered and len(self._wrong) >= _REFUSED:
                raise
            return [None]
        self._answered += len(batch)
        return found

    def _line(self, row: PromptRow, choice: Choice) -> dict[str, Any]:
        chosen = choice.candidates[choice.chosen]
        unsure = self.at_least is not None and choice.right is not None and choice.right < self.at_least
        self._unsure += unsure
        self._empty += not unsure and not chosen.text.strip()
        line = {"task_id": row.task_id, "line": row.line, "answer": None if unsure else chosen.text}
        line |= {"score": chosen.score, "probability": chosen.probability}
        if choice.right is not None:
            line["right"] = choice.right
        if self.candidates:
            line["candidates"] = [vars(candidate) for candidate in choice.candidates]
        return line | {"seed": self.seed, "made_from": self._of(row)}

    def _of(self, row: PromptRow) -> str:
        return fingerprint([row.prompt, *self._made_from])

    def _done(self, output: Path, rows: Sequence[PromptRow]) -> set[str]:
        """Task ids of the prompts that are answered; a line that was half written is cut off."""
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            return set()
        content = output.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(output, len(whole))
        wanted, found = {row.task_id: self._of(row) for row in rows}, set()
        for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
                task_id, made_from = line["task_id"], line["made_from"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{output}, line {number}: this is no answer of `qprobe answer`: remove the line, or give another --output."
                ) from error
            if wanted.get(task_id, made_from) != made_from:
                raise ValueError(
                    f"{output}, line {number}: {task_id} was answered to another prompt, or by another probe, other settings or "
                    "another seed: give another --output, or remove the file."
                )
            found.add(task_id)
        return found & set(wanted)


def _identity(policy: Policy) -> list[Any]:
    """What decides the answers, but for prompts and seed."""
    weights = hashlib.sha256()
    for tensor in policy.probe.network_.state_dict().values():
        weights.update(tensor.detach().cpu().numpy().tobytes())
    identities = [policy.sampler.identity(), policy.embedder.identity()]
    return [*identities, weights.hexdigest(), list(policy.blocks) or policy.layer, policy.beta, policy.style]
