"""What all judges share: a comparison, its judgement, and the reward stage that compares candidates with references.

A judge says which of two answers to a conversation is preferred. A candidate's reward is the probability that it is
preferred to its prompt's reference answer. What a judge cannot decide (an unreadable verdict, a refusal, a text beyond its
context) counts half and keeps a verdict of its own, so that it can be counted; a failure is raised, never a zero. A verdict that
could not be read counts half until the next command, which asks again.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from qprobe.files import fingerprint
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import RewardBatch, RewardRow

Conversation = str | tuple[dict[str, str], ...]
_DECIDED = ("win", "loss", "tie")


@dataclass(frozen=True)
class Comparison:
    """Two answers to one conversation.

    Args:
        task_id: of the prompt, for messages.
        prompt: plain text, or messages {"role": ..., "content": text}.
        first: the answer that a win is counted for.
        second: the other one.
        opening: the beginning of both answers, given to the model; neither repeats it.
    """

    task_id: str
    prompt: Conversation
    first: str
    second: str
    opening: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(
                f"The prompt {self.task_id} is empty: there is nothing that its answers could be judged by."
            )
        messages = () if isinstance(self.prompt, str) else self.prompt
        texts = [message.get(key) for message in messages for key in ("role", "content")]
        if not all(isinstance(text, str) for text in (*texts, self.first, self.second)):
            raise ValueError(
                f"The prompt {self.task_id} has a role, content or answer that is no text: judges read text only."
            )

    @property
    def shown(self) -> tuple[str, str]:
        """Both answers as a reader sees them: whole, and without white space around them, which would tell who wrote."""
        return (self.opening + self.first).strip(), (self.opening + self.second).strip()


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one comparison.

    Args:
        win: probability that the first answer is preferred, in [0, 1]; 0.5 is a tie.
        verdict: "win", "loss" or "tie" of the first answer; or why there is none: "unparsed", "refused", "too_long".
        detail: short JSON, such as the raw scores.
    """

    win: float
    verdict: str
    detail: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.win <= 1:  # NaN is not
            raise ValueError(f"A judgement's win is {self.win}: a probability lies in [0, 1].")


class Judge(Protocol):
    """Compares pairs of answers."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What decides the judgements."""

    def check(self) -> None:
        """Raise, in a sentence, what can be known to fail before any work."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, in order. A failure is raised."""


@dataclass(frozen=True)
class ScoreRule:
    """From the scores of two answers to a judgement.

    Args:
        soft: whether win is sigmoid(beta * difference), else 1, 0.5 or 0.
        beta: of the sigmoid, above 0; 1 for scores of Bradley-Terry models.
        tie: the largest difference of scores that counts as none, 0 or more.
    """

    soft: bool = False
    beta: float = 1.0
    tie: float = 1e-6

    def __post_init__(self) -> None:
        if not (0 < self.beta < math.inf and 0 <= self.tie < math.inf):
            raise ValueError(f"judge.beta={self.beta} must be above 0 and judge.tie={self.tie} 0 or more.")

    def judgement(self, comparison: Comparison, first: float, second: float) -> Judgement:
        """The judgement of one comparison.

        Raises:
            RuntimeError: a score that is no finite number.
        """
        difference = first - second
        if not math.isfinite(difference):
            raise RuntimeError(
                f"The scores of two answers to {comparison.task_id} are {first} and {second}: try judge.*dtype=float32."
            )
        sign = 0 if abs(difference) <= self.tie else 1 if difference > 0 else -1
        # The sigmoid, without overflow.
        win = 0.5 * (1 + (math.tanh(0.5 * self.beta * difference) if self.soft else sign))
        verdict = ("tie", "win", "loss")[sign]
        return Judgement(win, verdict, json.dumps({"first": first, "second": second}))


def folder_name(name: str | None, *parts: str) -> str:
    """What the run folder calls a judge: its own name, or one made of `parts`, such as its model."""
    joined = name or "-".join(["judge", *(Path(part).name if Path(part).is_dir() else part for part in parts if part)])
    return re.sub(r"[^\w.-]+", "-", joined).strip("-.")


def undecided(verdict: str, **detail: Any) -> Judgement:
    """A comparison that counts half because there is no verdict on it."""
    return Judgement(0.5, verdict, json.dumps(detail) if detail else "")


def tally(judgements: Iterable[Judgement | RewardRow]) -> Counter[str]:
    """How many judgements have each verdict, and how many hold an answer that was flagged ("flagged")."""
    counts: Counter[str] = Counter()
    for judgement in judgements:
        counts[judgement.verdict] += 1
        counts["flagged"] += bool(judgement.detail and json.loads(judgement.detail).get("flagged"))
    return +counts


class AgainstReference:
    """A reward stage: the probability that a judge prefers a candidate to its prompt's reference answer.

    `unread` and `replies` make it a `rewarding.Asks`: what could not be read is asked again.

    Args:
        judge: compares.
        prompts: those that the candidates belong to, as the judge reads them: best as conversations, also where a policy
            reads transcripts.
        references: the reference answer of every prompt, by task id, without the prompt's opening.
    """

    unread = frozenset({"unparsed"})

    def __init__(self, judge: Judge, prompts: Sequence[Prompt], references: Mapping[str, str]) -> None:
        if lacking := [prompt.task_id for prompt in prompts if prompt.task_id not in references]:
            raise ValueError(
                f"{len(lacking)} of {len(prompts)} prompts have no reference answer (the first: {lacking[0]}): give one each."
            )
        self.judge = judge
        self.name = judge.name
        self.prompts: dict[str, Conversation] = {p.task_id: p.messages or str(p.text) for p in prompts}
        self.openings = {p.task_id: p.opening for p in prompts}
        self.references = {task_id: references[task_id] for task_id in self.prompts}

    def identity(self) -> dict[str, Any]:
        pairs = [[key, self.prompts[key], self.openings[key], self.references[key]] for key in sorted(self.prompts)]
        return {"reward": "judge", "judge": self.judge.identity(), "references": fingerprint(pairs)}

    def check(self) -> None:
        """Raise what the judge knows to fail before any work."""
        self.judge.check()

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        counts: Counter[str] = Counter()
        try:
            for batch in batches:
                start = time.monotonic()
                judgements = self.judge.compare([self._comparison(key, text) for key, _, text in batch.rows])
                seconds = (time.monotonic() - start) / max(1, len(batch.rows))
                counts += tally(judgements)
                yield batch, [RewardRow(j.win, j.verdict, seconds, j.detail) for j in judgements]
        finally:
            stages.give_back(self.judge)  # the memory is the next stage's
        if unusual := [f"{count} {name}" for name, count in counts.items() if name not in _DECIDED]:
            judged = sum(count for name, count in counts.items() if name != "flagged")
            tqdm.write(f"Of {judged} judgements by {self.name}: {', '.join(unusual)}.", file=sys.stderr)

    def replies(self, verdict: str, detail: str) -> tuple[int, int]:
        """How many replies a judgement rests on, and how many of them could not be read."""
        letters = json.loads(detail).get("letters", []) if detail else []
        return len(letters), letters.count(None) if verdict in self.unread else 0

    def _comparison(self, task_id: str, candidate: str) -> Comparison:
        return Comparison(task_id, self.prompts[task_id], candidate, self.references[task_id], self.openings[task_id])
