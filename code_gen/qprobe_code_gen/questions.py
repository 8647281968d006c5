"""Questions whose answer is a number: how they are put, what a completion earns, and which completions agree.

Two styles: `few_shot` (worked examples before the question, as text to be continued) and `chat` (the examples as turns).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qprobe.prompts import Prompt
from qprobe.run.stages import RewardBatch, RewardRow
from qprobe_code_gen.answers import MARK, final_number, number
from qprobe_code_gen.problems.gsm8k import Question

REQUEST = f"Solve this problem step by step. End with a line of {MARK} and the number alone."
ASKED = "Question:"
STYLES = ("few_shot", "chat")


@dataclass(frozen=True)
class QuestionStyle:
    """How questions are put to the model.

    Args:
        style: one of `STYLES`.
        request: what stands before every question of a chat.
        examples: worked questions, in order; whoever evaluates must leave them out.
    """

    style: str
    request: str = REQUEST
    examples: Sequence[Question] = field(default=())

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"Prompt style {self.style!r} does not suit questions: choose one of {', '.join(STYLES)}.")
        if self.style == "few_shot" and not self.examples:
            raise ValueError("Prompt style few_shot was given no examples: set dataset.examples, or take chat.")

    def stop(self, problems: Sequence[Question]) -> tuple[str, ...]:
        """Texts that end a completion: a model that continues text goes on with a question of its own."""
        return (f"\n{ASKED}",) if self.style == "few_shot" else ()

    def prompt(self, question: Question) -> Prompt:
        if self.style == "few_shot":
            shown = "".join(f"{ASKED} {q.text}\nAnswer: {q.worked}\n\n" for q in self.examples)
            return Prompt(question.task_id, text=f"{shown}{ASKED} {question.text}\nAnswer:")
        turns = [turn for q in self.examples for turn in (self._asked(q), {"role": "assistant", "content": q.worked})]
        return Prompt(question.task_id, messages=(*turns, self._asked(question)))

    def _asked(self, question: Question) -> dict[str, str]:
        return {"role": "user", "content": f"{self.request}\n\n{question.text}"}


class FinalNumberReward:
    """A reward stage: 1 where the final number of a completion is the question's, else 0.

    Args:
        questions: those that the completions belong to.
    """

    name = "final_number"

    def __init__(self, questions: Sequence[Question]) -> None:
        self.answers = {question.task_id: number(question.answer) for question in questions}

    def identity(self) -> dict[str, Any]:
        return {"reward": self.name}

    def check(self) -> None:
        """Nothing can fail that loading the questions has not said."""

    def row(self, task_id: str, completion: str) -> RewardRow:
        """What a completion earns; the detail is the number that was read."""
        found = final_number(completion)
        if found is None:
            return RewardRow(0.0, "no_number")
        right = found == self.answers[task_id]
        return RewardRow(float(right), "right" if right else "wrong", detail=str(found))

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, [self.row(task_id, completion) for task_id, _, completion in batch.rows]


class SameNumber:
    """Completions agree that end in the same number: what self-consistency counts. One without a number agrees with none."""

    def identity(self) -> dict[str, Any]:
        return {"agreement": "final_number"}

    def check(self) -> None:
        """Nothing can fail."""

    def keys(self, batches: Iterable[Sequence[tuple[str, str]]]) -> Iterator[list[Hashable | None]]:
        """What every (task_id, completion) says, batch by batch, in order; None where it says nothing."""
        for batch in batches:
            yield [final_number(completion) for _, completion in batch]
