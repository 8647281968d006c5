"""Borda votes by self-certainty: by hand, at the ends of p, and read from a run's likelihood columns."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe.baselines.consistency import Answer, Remembered, SelfConsistency
from qprobe.baselines.self_certainty import SelfCertaintyBorda, borda
from qprobe.embedding import LIKELIHOOD
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.run import stages
from qprobe.run.pools import RewardBatch, completions_of
from qprobe.store.table import StoreError


class FirstDigit:
    """Answers agree that have the same tens; a single digit says nothing."""

    def __init__(self) -> None:
        self.asked: list[Answer] = []

    def identity(self) -> dict[str, Any]:
        return {"agreement": "tens"}

    def check(self) -> None:
        pass

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        for batch in batches:
            self.asked += batch
            tens = [text.removeprefix("answer ")[0] for _, text in batch]
            yield [None if digit == "0" else digit for digit in tens]


@pytest.mark.parametrize(
    ("p", "places"),
    [
        # Ranks 1 to 5 are a, b, b, c, b. Squares: a 25, b 16 + 9 + 1 = 26, c 4.
        (2, [1, 4, 3, 0, 2]),
        # Cubes: a 125, b 64 + 27 + 1 = 92.
        (3, [4, 3, 2, 0, 1]),
        # One vote each: b 3, then a and c with 1, the surer first.
        (0, [1, 4, 3, 0, 2]),
    ],
)
def test_votes_by_hand(p: float, places: list[int]) -> None:
    said, certainty = ["a", "b", "b", "c", "b"], np.array([9.0, 8.0, 7.0, 6.0, 5.0])
    assert borda(said, certainty, p).tolist() == places
    lot = [3, 0, 4, 2, 1]  # whichever comes first
    assert borda([said[at] for at in lot], certainty[lot], p).tolist() == [places[at] for at in lot]


def test_equally_sure_candidates_share_the_votes_of_their_ranks() -> None:
    # Ranks 1 and 2 are shared by x and y, (9 + 4) / 2 each; z has 1: x and y are equal in all.
    assert borda(["x", "y", "z"], np.array([1.0, 1.0, 0.0]), 2).tolist() == [1, 1, 0]
    # With z's vote y is ahead, and of its answer the surer candidate.
    assert borda(["x", "y", "y"], np.array([1.0, 1.0, 0.0]), 2).tolist() == [0, 2, 1]


def test_who_says_nothing_has_no_votes_and_is_sure_for_himself_alone() -> None:
    assert borda([None, None, "a"], np.array([9.0, 8.0, 1.0]), 1).tolist() == [1, 0, 2]
    assert borda([None, None], np.array([8.0, 9.0]), 1).tolist() == [0, 1]


def test_at_the_ends_of_p_it_is_self_consistency_and_the_surest_candidate() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = rng.integers(0, 4, 9).tolist()
        certainty = rng.permutation(9).astype(float)
        counts = np.bincount(said)
        assert counts[said[int(borda(said, certainty, 0).argmax())]] == counts.max()
        assert borda(said, certainty, 200).argmax() == certainty.argmax()


def test_it_reads_the_run_s_own_columns(fakes: ModuleType, tmp_path: Path) -> None:
    place = COLUMNS.index("self_certainty_mean")

    class Columns(fakes.EmbedderWithColumns):
        def embed(self, *rows: Any) -> dict[int, Any]:
            found: dict[int, Any] = super().embed(*rows)
            found[LIKELIHOOD][:, place] *= -1  # the other columns say the contrary
            return found

    embedder, agreement = Columns(), FirstDigit()
    pool = fakes.pool(tmp_path, sampler=fakes.Sampler(6), batch_rows=18)
    ranker = SelfCertaintyBorda(agreement, embedder, p=1.5)
    stages.sample(pool, progress=False)
    batches = [
        RewardBatch(keys, [(row["task_id"], row["sample"], row["completion"]) for row in completions_of(pool, keys)])
        for keys in pool.batches
    ]
    with pytest.raises(StoreError, match="embed"):
        list(ranker.scores(pool, tmp_path, iter(batches)))
    stages.embed(pool, embedder, progress=False)
    scored = list(ranker.scores(pool, tmp_path, iter(batches)))
    assert [batch for batch, _ in scored] == batches
    for batch, rows in scored:
        for key in batch.keys:
            own = [
                (row.reward, text) for row, (task_id, _, text) in zip(rows, batch.rows, strict=True) if task_id == key
            ]
            said = [None if text[7] == "0" else text[7] for _, text in own]
            certainty = np.array([-1000.25 - sum(text.encode()) - place for _, text in own])  # as the fakes make it
            assert [reward for reward, _ in own] == borda(said, certainty, 1.5).tolist()


def test_what_it_needs_is_asked_for_before_any_work(fakes: ModuleType) -> None:
    agreement, embedder = FirstDigit(), fakes.EmbedderWithColumns()
    with pytest.raises(ValueError, match="agree"):
        SelfCertaintyBorda(None, embedder)
    with pytest.raises(ValueError, match=r"embedder\.likelihood"):
        SelfCertaintyBorda(agreement, fakes.Embedder())
    embedder.likelihood = False
    with pytest.raises(ValueError, match=r"embedder\.likelihood"):
        SelfCertaintyBorda(agreement, embedder)
    with pytest.raises(ValueError, match=r"self_certainty_borda\.p"):
        SelfCertaintyBorda(agreement, fakes.EmbedderWithColumns(), p=-1)


def test_baselines_that_read_one_agreement_ask_once_for_every_answer(fakes: ModuleType, tmp_path: Path) -> None:
    agreement = FirstDigit()
    remembered = Remembered(agreement)
    pool = fakes.pool(tmp_path)
    texts = ["answer 12", "answer 12", "answer 30", "answer 05"]
    batches = [RewardBatch((key,), [(key, n, text) for n, text in enumerate(texts)]) for key in ("t-000", "t-001")]
    for _ in range(2):
        scored = list(SelfConsistency(remembered).scores(pool, tmp_path, iter(batches)))
        assert [[row.reward for row in rows] for _, rows in scored] == [[2, 2, 1, 0]] * 2
    assert agreement.asked == [
        (key, text) for key in ("t-000", "t-001") for text in ("answer 12", "answer 30", "answer 05")
    ]
    assert remembered.identity() == agreement.identity()
