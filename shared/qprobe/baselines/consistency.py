"""Self-consistency: a candidate is as good as the number of candidates of its prompt that say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from qprobe.baselines.base import Ranker
from qprobe.run.pools import Pool, RewardBatch, RewardRow

Answer = tuple[str, str]  # task id and completion


class Agreement(Protocol):
    """When two completions of a prompt say the same: what a task knows and the core does not."""

    def identity(self) -> dict[str, Any]:
        """What decides it; cheap."""

    def check(self) -> None:
        """Raise, in a sentence, what can be known to fail before any work."""

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        """What every completion says, batch by batch, in order: equal keys agree, None agrees with nobody."""


class SelfConsistency(Ranker):
    """Rank candidates by how many of their prompt agree with them, themselves included; 0 where a candidate says nothing."""

    name = "self_consistency"
    method = "self-consistency"
    of_all = True

    def __init__(self, agreement: Agreement | None) -> None:
        if agreement is None:
            raise ValueError(
                "baselines.names has self_consistency, but when two completions agree is not known here: leave it out."
            )
        self.agreement = agreement

    def identity(self) -> dict[str, Any]:
        return {"agreement": self.agreement.identity()}

    def check(self) -> None:
        self.agreement.check()

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch, keys in said(self.agreement, batches):
            votes = Counter(zip((task_id for task_id, _, _ in batch.rows), keys, strict=True))
            own = ((key, votes[row[0], key]) for row, key in zip(batch.rows, keys, strict=True))
            yield batch, [RewardRow(0.0 if key is None else float(count)) for key, count in own]


def said(agreement: Agreement, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[Hashable | None]]]:
    """Every batch, in order, with what its candidates say."""
    given: list[RewardBatch] = []

    def answers() -> Iterator[list[Answer]]:
        for batch in batches:
            given.append(batch)
            yield [(task_id, completion) for task_id, _, completion in batch.rows]

    for number, keys in enumerate(agreement.keys(answers())):
        yield given[number], keys
