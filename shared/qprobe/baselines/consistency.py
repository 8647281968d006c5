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


class Remembered:
    """An agreement that is asked once a completion, however many baselines of a process read it: it may execute programs."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self._known: dict[Answer, Hashable | None] = {}

    def identity(self) -> dict[str, Any]:
        return self.agreement.identity()

    def check(self) -> None:
        self.agreement.check()

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        given: list[tuple[Sequence[Answer], list[Answer]]] = []

        def unknown() -> Iterator[list[Answer]]:
            for batch in batches:
                given.append((batch, [answer for answer in dict.fromkeys(batch) if answer not in self._known]))
                yield given[-1][1]

        for number, found in enumerate(self.agreement.keys(unknown())):
            batch, asked = given[number]
            self._known.update(zip(asked, found, strict=True))
            yield [self._known[answer] for answer in batch]


def known(agreement: Agreement | None, name: str) -> Agreement:
    """The agreement that a baseline of some name counts.

    Raises:
        ValueError: there is none.
    """
    if agreement is None:
        raise ValueError(f"baselines.names has {name}, but when two completions agree is not known here: leave it out.")
    return agreement


def said_by(
    agreement: Agreement, batches: Iterable[RewardBatch]
) -> Iterator[tuple[RewardBatch, list[Hashable | None]]]:
    """Every batch with what each of its completions says."""
    given: list[RewardBatch] = []

    def answers() -> Iterator[list[Answer]]:
        for batch in batches:
            given.append(batch)
            yield [(task_id, completion) for task_id, _, completion in batch.rows]

    for number, keys in enumerate(agreement.keys(answers())):
        yield given[number], keys


class SelfConsistency(Ranker):
    """Rank candidates by how many of their prompt agree with them, themselves included; 0 where a candidate says nothing."""

    name = "self_consistency"
    method = "self-consistency"
    of_all = True

    def __init__(self, agreement: Agreement | None) -> None:
        self.agreement = known(agreement, self.name)

    def identity(self) -> dict[str, Any]:
        return {"agreement": self.agreement.identity()}

    def check(self) -> None:
        self.agreement.check()

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch, keys in said_by(self.agreement, batches):
            said = list(zip((task_id for task_id, _, _ in batch.rows), keys, strict=True))
            votes = Counter(said)
            yield batch, [RewardRow(0.0 if key is None else float(votes[task_id, key])) for task_id, key in said]
