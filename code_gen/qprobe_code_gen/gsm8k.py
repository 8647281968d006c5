"""GSM-8K in one place: data, prompts, the number that an answer ends in, the reward, and which answers agree.

School mathematics in words, 7,473 training and 1,319 test problems (Cobbe et al. 2021), from the hub or local files. A row is a
question and a worked answer that ends in `####` and a number. Its <<48/2=24>> are for a calculator that nobody runs here, and are
left out.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from qprobe.prompts import Prompt
from qprobe.run.pools import RewardBatch, RewardRow
from qprobe_code_gen import problem_sets
from qprobe_code_gen.problem_sets import ProblemSet

_HUB_ID = "openai/gsm8k"
SPLITS = {"gsm8k-train": "train", "gsm8k-test": "test"}
SIZES = {"gsm8k-train": 7473, "gsm8k-test": 1319}
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")

MARK = "####"
REQUEST = f"Solve this problem step by step. End with a line of {MARK} and the number alone."
ASKED = "Question:"
STYLES = ("few_shot", "chat")

_AMOUNT = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?>\.[0-9]+)?"
# A minus behind a digit, a letter or a bracket subtracts; digits inside a word (m2) are no number.
NUMBER = re.compile(
    rf"(?:(?<![\w)\]%])(?P<minus>-\$?|\$-))?(?<![A-Za-z_0-9])(?P<amount>{_AMOUNT}|(?<!\.)\.[0-9]+)"
    r"(?:\s?/\s?(?P<over>(?=[0-9.]*[1-9])[0-9]+(?:\.[0-9]+)?))?"
)
# A sentence may say what the answer is; behind a colon it may also begin to reason, so a number must follow at once.
_SENTENCE = r"((?:(?![.!?]\s)[^\n])*)"
_STATED = re.compile(
    rf"\banswer\b[^.\n0-9]{{0,40}}?\b(?:is|be)\b{_SENTENCE}|\banswer\W{{0,3}}[:=](?=[^\n\w]*[0-9]){_SENTENCE}", re.I
)
# "#### 2. Then": a heading of Markdown, not an answer.
_NUMBERED = re.compile(r"[.):]\s+\w")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9.]+)\}\s*\{([0-9.]+)\}")
# How LaTeX writes inside numbers, and a minus of its own.
WRITTEN = (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\u2212", "-"))


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
        found = problem_sets.from_hub(_HUB_ID, "main", SPLITS[split], of, key)
    else:
        found = problem_sets.from_file(file, {"question", "answer"}, of, key)
    questions = [_question(f"{split}/{i}", row, where) for i, (where, row) in enumerate(found)]
    if not questions:
        raise ValueError(f"{file or _HUB_ID} has no problem of GSM-8K: give another file, or null for the hub.")
    return ProblemSet(split, questions, {"data": "gsm8k"})


def load_split(split: str, train_file: str | None = None, test_file: str | None = None) -> ProblemSet[Question]:
    """As `load`, with the keys of the configuration."""
    return load(split, {"train": train_file, "test": test_file}[SPLITS[split]])


def _question(task_id: str, row: dict[str, Any], where: str) -> Question:
    text, answer = row["question"], row["answer"]
    if not isinstance(text, str) or not text.strip() or not isinstance(answer, str):
        raise ValueError(f"{where} is no problem of GSM-8K: question must be a text that is not empty, answer a text.")
    steps, mark, last = answer.rpartition(MARK)
    if not mark or number(last) is None:
        raise ValueError(
            f"{where} is no problem of GSM-8K: its answer must end in {MARK} and a number, and ends in {answer[-30:]!r}."
        )
    return Question(task_id, text.strip(), _CALCULATOR.sub("", steps).strip(), last.strip())


@dataclass(frozen=True)
class QuestionStyle:
    """How a question becomes a prompt.

    Args:
        style: `few_shot` (worked examples before the question, as text to be continued) or `chat` (the examples as turns).
        request: what comes before every question of a chat.
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

    def stop(self) -> tuple[str, ...]:
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


def number(text: str) -> Decimal | None:
    """A text that is one number and nothing else, but for white space, a dollar and a per cent sign; else None."""
    found = NUMBER.fullmatch(text.strip().lstrip("$").rstrip("%"))
    return None if found is None else _value(found)


def final_number(text: str) -> Decimal | None:
    """The number that an answer ends in; None where it has none.

    Read in this order: behind `####` (GSM-8K's own mark), behind "the answer is", inside \\boxed{...}, else the last of all.
    Where it stops: digits only (no "seventy-two"), English separators (1,000.5), no powers of ten; a per cent is its number.

    Returns: an exact decimal; a fraction that does not come out even is rounded to 28 digits.
    """
    for written, plain in WRITTEN:
        text = text.replace(written, plain)
    text = FRACTION.sub(r"\1/\2", text)
    for line in re.findall(rf"{MARK}\s*([^\n]*)", text):
        found = NUMBER.search(line)
        if found and not re.search(r"\w", line[: found.start()]) and not _NUMBERED.match(line[found.end() :]):
            # The first: what a model writes behind its answer belongs to a question of its own making.
            return _result(line)
    stated = [said or given for said, given in _STATED.findall(text)]
    for clause in (*reversed(stated), *reversed(_BOXED.findall(text))):
        value = _result(clause)
        if value is not None:
            return value
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _result(clause: str) -> Decimal | None:
    """The first number of a clause, or of what its last equals sign gives."""
    found = NUMBER.search(clause.rpartition("=")[2])
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["amount"].replace(",", ""))
    if found["over"]:
        value /= Decimal(found["over"])
    # Plain negation would round a long number.
    return value.copy_negate() if found["minus"] else value


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
        """The final number of every (task_id, completion), batch by batch, in order; None where there is none."""
        for batch in batches:
            yield [final_number(completion) for _, completion in batch]
