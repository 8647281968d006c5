"""What a server's answers earned: every reply with the probability of its choice, and what users said of it, append-only.

FOLDER/replies/    task_id (the request's id), sample, at, prompt (a fingerprint), probe, beta, score, probability, chosen;
                   completion and request, null unless texts are kept
FOLDER/features/   task_id, sample, embedding: what a new probe learns from without any text
FOLDER/feedback/   task_id, sample, reward, kind (reward, rewards, preferred), at
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from qprobe.files import fingerprint
from qprobe.probe.card import EmbeddingSource
from qprobe.serving.policy import Choice, Read
from qprobe.serving.protocol import Refused
from qprobe.store.table import StoreError, Table, feature_rows, open_table

_KEY = [pa.field("task_id", pa.string(), nullable=False), pa.field("sample", pa.int32(), nullable=False)]
REPLIES = pa.schema(
    [
        *_KEY,
        pa.field("at", pa.float64(), nullable=False),  # seconds since 1970
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("probe", pa.string(), nullable=False),
        pa.field("beta", pa.float64(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("probability", pa.float64(), nullable=False),  # with which it could be chosen, exploring included
        pa.field("chosen", pa.bool_(), nullable=False),
        pa.field("completion", pa.string()),
        pa.field("request", pa.string()),
    ]
)
FEEDBACK = pa.schema(
    [
        *_KEY,
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("at", pa.float64(), nullable=False),
    ]
)
# Notes on the table of replies.
PROBE = "probe"
FLUSH = 2.0  # seconds between writes
_MOST_KNOWN = 200_000  # requests that feedback is taken for, the latest


class FeedbackBody(BaseModel):
    """Of /v1/feedback: one of reward (of the answer), rewards (of candidates by place), preferred (the place of the best)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str = Field(min_length=1, max_length=200)
    reward: float | None = None
    rewards: dict[int, float] | None = Field(default=None, min_length=1)
    preferred: int | None = Field(default=None, ge=0)


@dataclass
class _Known:
    """A request that feedback may come for."""

    candidates: int
    chosen: int
    said: bool = False


@dataclass(frozen=True)
class Tables:
    """The three tables of a folder.

    Args:
        source: what the embeddings are of; a folder takes those of one source alone.
        widths: columns of every block.
    """

    folder: Path
    source: dict[str, Any]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path, source: EmbeddingSource | None, widths: Sequence[int]) -> Tables:
        return cls(folder, {} if source is None else dataclasses.asdict(source), tuple(widths))

    def _table(self, name: str, schema: pa.Schema | None) -> Table:
        return open_table(self.folder, name, inputs={"source": self.source, "widths": list(self.widths)}, schema=schema)

    @property
    def replies(self) -> Table:
        return self._table("replies", REPLIES)

    @property
    def features(self) -> Table:
        return self._table("features", None)

    @property
    def feedback(self) -> Table:
        return self._table("feedback", FEEDBACK)


class FeedbackLog:
    """Takes replies and feedback, and writes them in parts every `FLUSH` seconds.

    Args:
        folder: where the tables lie.
        texts: whether prompts and answers are stored.
    """

    def __init__(self, folder: Path, texts: bool = False) -> None:
        self.folder = folder
        self.texts = texts
        self._tables: Tables | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._replies: list[tuple[list[dict[str, Any]], np.ndarray]] = []
        self._feedback: list[dict[str, Any]] = []
        self._writing = asyncio.Lock()

    def open(self, source: EmbeddingSource | None, widths: Sequence[int], probe: Path | None) -> None:
        """Begin the tables, or go on with those that are there.

        Raises:
            StoreError: they are of another source.
        """
        self._tables = Tables.of(self.folder, source, widths)
        for table in (self._tables.replies, self._tables.features, self._tables.feedback):
            table.begin()
        if probe is not None:
            self._tables.replies.note(PROBE, str(probe.resolve()))
        if self._tables.replies.parts():
            rows = self._tables.replies.read(columns=["task_id", "sample", "at", "chosen"])
            for part in rows.sort_by("at").to_batches():  # parts lie in no order of time
                for row in part.to_pylist():
                    known = self._known.setdefault(row["task_id"], _Known(0, 0))
                    known.candidates += 1
                    known.chosen = row["sample"] if row["chosen"] else known.chosen
                    self._forget()
        if self._tables.feedback.parts():
            for task_id in self._tables.feedback.read(columns=["task_id"])["task_id"].to_pylist():
                if task_id in self._known:
                    self._known[task_id].said = True

    def record(self, id: str, prompt: str, probe: str, beta: float, choice: Choice, read: Read) -> None:
        """Remember a reply; `choice` holds the probabilities that it was chosen with."""
        at, own = time.time(), fingerprint(prompt)
        rows = [
            {
                "task_id": id,
                "sample": place,
                "at": at,
                "prompt": own,
                "probe": probe,
                "beta": beta,
                "score": candidate.score,
                "probability": candidate.probability,
                "chosen": place == choice.chosen,
                "completion": candidate.text if self.texts else None,
                "request": prompt if self.texts else None,
            }
            for place, candidate in enumerate(choice.candidates)
        ]
        self._replies.append((rows, read.features.numpy()))
        self._known[id] = _Known(len(rows), choice.chosen)
        self._forget()

    def _forget(self) -> None:
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)

    def knows(self, id: str) -> bool:
        return id in self._known

    def take(self, body: FeedbackBody) -> int:
        """Remember feedback; returns how many rewards it holds.

        Raises:
            Refused: an unknown request, one that had its feedback, or places that there are not.
        """
        known = self._known.get(body.id)
        if known is None:
            raise Refused(404, f"There is no request {body.id!r} here (or it is long past).", "id", "unknown_request")
        given = {
            name: value for name in ("reward", "rewards", "preferred") if (value := getattr(body, name)) is not None
        }
        if len(given) != 1:
            raise Refused(400, "Give one of reward, rewards and preferred.", "reward")
        ((kind, value),) = given.items()
        rewards: dict[int, float] = value if kind == "rewards" else {known.chosen: value}
        if kind == "preferred":
            rewards = {place: float(place == value) for place in range(known.candidates)}
        named = [value] if kind == "preferred" else list(rewards)
        if wrong := [place for place in named if not 0 <= place < known.candidates]:
            raise Refused(400, f"{kind} names candidate {wrong[0]}, and there are 0 to {known.candidates - 1}.", kind)
        if known.said:
            raise Refused(409, f"The request {body.id!r} has had its feedback.", "id", "feedback_given")
        known.said = True
        at = time.time()
        self._feedback += [
            {"task_id": body.id, "sample": place, "reward": float(reward), "kind": kind, "at": at}
            for place, reward in sorted(rewards.items())
        ]
        return len(rewards)

    async def flush(self) -> None:
        """Write what has come in."""
        async with self._writing:
            replies, self._replies = self._replies, []
            feedback, self._feedback = self._feedback, []
            try:
                if replies:
                    await asyncio.to_thread(self._write_replies, replies)
                    replies = []  # written once, though the feedback may have to wait
                if feedback:
                    await asyncio.to_thread(self._write_feedback, feedback)
            except (OSError, StoreError) as error:
                self._replies, self._feedback = [*replies, *self._replies], [*feedback, *self._feedback]
                tqdm.write(f"Replies and feedback wait to be written: {error}", file=sys.stderr)

    def _write_replies(self, replies: list[tuple[list[dict[str, Any]], np.ndarray]]) -> None:
        assert self._tables is not None  # opened before anything is recorded
        rows = [row for of_reply, _ in replies for row in of_reply]
        keys = list(dict.fromkeys(row["task_id"] for row in rows))
        names, samples = [row["task_id"] for row in rows], [row["sample"] for row in rows]
        values = np.concatenate([features for _, features in replies])
        # A reply is there only with its features: these go first.
        self._tables.features.write(keys, feature_rows(names, samples, values, exact=True)[0])
        self._tables.replies.write(keys, pa.Table.from_pylist(rows, schema=REPLIES))

    def _write_feedback(self, feedback: list[dict[str, Any]]) -> None:
        assert self._tables is not None  # as above
        keys = [f"{row['task_id']} {row['sample']}" for row in feedback]
        self._tables.feedback.write(keys, pa.Table.from_pylist(feedback, schema=FEEDBACK))

    async def keep_flushing(self) -> None:
        """Until cancelled; what is left then is written."""
        try:
            while True:
                await asyncio.sleep(FLUSH)
                await asyncio.shield(self.flush())  # comes to its end, and the last call waits for it
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await self.flush()


async def watch(path: Path, seconds: float, changed: Callable[[], Any], seen: tuple[int, int] | None) -> None:
    """Call and await `changed` whenever a file is written anew.

    Args:
        seen: its `state` when it was read first.
    """
    while True:
        await asyncio.sleep(seconds)
        now = state(path)
        if now is not None and now != seen:
            await changed()
        seen = seen if now is None else now


def state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
