"""GSM-8K: school mathematics in words, 7,473 training and 1,319 test problems (Cobbe et al. 2021), from the hub or local files.

A row is a question and a worked answer that ends in `####` and a number. Its <<48/2=24>> are for a calculator that nobody runs
here, and are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qprobe_code_gen.answers import MARK, number
from qprobe_code_gen.problems import rows
from qprobe_code_gen.problems.base import ProblemSet

HUB_ID = "openai/gsm8k"
SPLITS = {"gsm8k-train": "train", "gsm8k-test": "test"}
SIZES = {"gsm8k-train": 7473, "gsm8k-test": 1319}
CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class Question:
    """One problem in words whose answer is a number.

    Args:
        task_id: unique in its data set.
        text: what is asked.
        solution: the data set's own steps, without the mark and the number.
        answer: the number as the data set writes it.
    """

    task_id: str
    text: str
    solution: str
    answer: str

    @property
    def worked(self) -> str:
        """The whole answer as it should look: steps, mark, number."""
        return f"{self.solution}\n{MARK} {self.answer}"

    def content(self) -> list[str]:
        """What decides prompt and reward."""
        return [self.task_id, self.text, self.answer]


def load(split: str, file: str | None = None) -> ProblemSet[Question]:
    """One split, in the data set's order.

    Args:
        split: a name of `SPLITS`.
        file: a JSON-lines file of that split, plain or gzipped; None asks the hub.

    Raises:
        OSError: no such file, or the hub cannot be reached.
        ValueError: a row that is no problem of GSM-8K; the message says which.
    """
    of, key = "GSM-8K", f"{SPLITS[split]}_file"
    if file is None:
        found = rows.from_hub(HUB_ID, "main", SPLITS[split], of, key)
    else:
        found = rows.from_file(file, {"question", "answer"}, of, key)
    questions = [question_from_row(f"{split}/{i}", row, where) for i, (where, row) in enumerate(found)]
    if not questions:
        raise ValueError(f"{file or HUB_ID} has no problem of GSM-8K: give another file, or null for the hub.")
    return ProblemSet(split, questions, {"data": "gsm8k"})


def question_from_row(task_id: str, row: dict[str, Any], where: str) -> Question:
    """A question from one row.

    Args:
        where: the row stands, for messages.

    Raises:
        ValueError: no question, or no number behind the mark.
    """
    text, answer = row["question"], row["answer"]
    if not isinstance(text, str) or not text.strip() or not isinstance(answer, str):
        raise ValueError(
            f"{where} is no problem of GSM-8K: question and answer must be texts, and the question not empty."
        )
    steps, mark, last = answer.rpartition(MARK)
    if not mark or number(last) is None:
        raise ValueError(
            f"{where} is no problem of GSM-8K: its answer must end in {MARK} and a number, and ends in {answer[-30:]!r}."
        )
    return Question(task_id, text.strip(), CALCULATOR.sub("", steps).strip(), last.strip())
