"""Self-certainty with Borda voting: candidates vote for what they say, the surest with the most votes.

Kang, Zhao and Song (2025), "Scalable Best-of-N Selection for Large Language Models via Self-Certainty", NeurIPS, arXiv
2502.18581: N candidates are ranked by their mean self-certainty, the one of rank r has (N - r + 1)^p votes for its answer, and
the answer with the most is taken. p = 0 is self-consistency, p without bound the surest candidate. The authors tune p, larger
for larger N; 1.2 is reported of their comparison at N = 64, and 0.5 is the default of their code.

Self-certainty is the likelihood column of that name. The paper takes final answers of mathematics; here an application says which
completions say the same. Of the best answer the surest candidate is taken, and candidates that say nothing have no answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qprobe.baselines.base import Floats, Ranker, check_whole
from qprobe.baselines.consistency import Agreement, known, said_by
from qprobe.embedding import LIKELIHOOD, Embedder, GivesLikelihoods
from qprobe.run.pools import Pool, RewardBatch, RewardRow

COLUMN = "self_certainty_mean"


class SelfCertaintyBorda(Ranker):
    """Rank candidates by the Borda votes of what they say, then by their own self-certainty.

    Args:
        agreement: when two completions say the same.
        embedder: of the run; it must give likelihood columns.
        p: power of a rank's votes, 0 or more.

    Raises:
        ValueError: agreement is not known, there are no such columns, or p is negative.
    """

    name = "self_certainty_borda"
    method = "self-certainty, Borda votes"
    of_all = True
    reads_likelihoods = True

    def __init__(self, agreement: Agreement | None, embedder: Embedder, p: float = 1.2) -> None:
        self.agreement = known(agreement, self.name)
        if not (isinstance(embedder, GivesLikelihoods) and embedder.likelihood and COLUMN in embedder.column_names()):
            raise ValueError(
                f"baselines.names has {self.name}, which reads likelihood columns, and this run's embedder gives none: take "
                "embedder=hf or a recording with them, and embedder.likelihood=true; or leave it out."
            )
        if not p >= 0:
            raise ValueError(f"baselines.{self.name}.p is {p}: 0 or more.")
        self.embedder, self.p = embedder, p
        self.column = embedder.column_names().index(COLUMN)

    def identity(self) -> dict[str, Any]:
        columns = {"embedder": self.embedder.identity(), "columns": self.embedder.likelihood_identity()}
        return {"agreement": self.agreement.identity(), "p": self.p, **columns}

    def check(self) -> None:
        self.agreement.check()

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        table = tested.features(self.embedder, LIKELIHOOD)
        check_whole(tested, table, "embed")
        for batch, keys in said_by(self.agreement, batches):
            found, columns = table.read_embeddings([batch.keys])
            certainty = dict(zip(found, columns[:, self.column].astype(np.float64), strict=True))
            rows = [
                (key, certainty[task_id, sample]) for (task_id, sample, _), key in zip(batch.rows, keys, strict=True)
            ]
            places: list[float] = []
            for _, own in itertools.groupby(zip(batch.rows, rows, strict=True), lambda pair: pair[0][0]):
                said, sure = zip(*(row for _, row in own), strict=True)
                places += borda(said, np.array(sure), self.p).tolist()
            yield batch, [RewardRow(place) for place in places]


def borda(said: Sequence[Hashable | None], certainty: Floats, p: float) -> Floats:
    """(n,) places of a prompt's candidates, 0 the last: by the votes of what they say, then by certainty; equals share one.

    Args:
        said: what each of n candidates says; None has no votes.
        certainty: (n,) float; equally sure candidates have the mean of their ranks' votes.
        p: power of the votes.
    """
    votes = np.empty(len(certainty))
    votes[np.argsort(-certainty)] = np.arange(len(certainty), 0, -1.0) ** p
    _, level = np.unique(certainty, return_inverse=True)
    votes = (np.bincount(level, votes) / np.bincount(level))[level]
    of_answer: dict[Hashable | None, float] = {}
    for key, vote in zip(said, votes, strict=True):
        of_answer[key] = of_answer.get(key, 0.0) + float(vote)
    of_answer[None] = 0.0
    # Sums that are equal but for the order of their terms are equal.
    totals = np.round([of_answer[key] for key in said], 9)
    _, places = np.unique(np.stack([totals, certainty], axis=1), axis=0, return_inverse=True)
    return places.ravel().astype(np.float64)
