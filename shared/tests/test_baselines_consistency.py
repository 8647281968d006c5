"""Self-consistency: votes by hand."""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qprobe.baselines.consistency import Answer, SelfConsistency
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.probe.training import TrainingSettings
from qprobe.run.pools import Pool, RewardBatch


class LastWord:
    def identity(self) -> dict[str, Any]:
        return {"agreement": "last word"}

    def check(self) -> None:
        pass

    def keys(self, batches: Iterable[Sequence[Answer]]) -> Iterator[list[Hashable | None]]:
        for batch in batches:
            yield [text.split()[-1] if text.split() else None for _, text in batch]


def test_a_candidate_scores_the_candidates_of_its_own_prompt_that_say_the_same(
    fakes: ModuleType, tmp_path: Path
) -> None:
    pool = Pool(tmp_path, fakes.split("test", 3), "sample", fakes.Sampler(), 0)
    texts = {"t-000": ["so 7", "7", "is 8", ""], "t-001": ["7", "", "", "9"], "t-002": ["8", "8", "8", "8"]}
    batches = [
        RewardBatch(keys, [(key, n, text) for key in keys for n, text in enumerate(texts[key])])
        for keys in (("t-000", "t-001"), ("t-002",))
    ]
    scored = list(SelfConsistency(LastWord()).scores(pool, tmp_path, iter(batches)))
    assert [batch for batch, _ in scored] == batches
    assert [[row.reward for row in rows] for _, rows in scored] == [[2, 2, 1, 0, 1, 0, 0, 1], [4, 4, 4, 4]]


def test_votes_of_more_candidates_than_are_chosen_from_are_said(fakes: ModuleType, tmp_path: Path) -> None:
    settings = EvaluationSettings(losses=("reward_mse",), seeds=1, folds=2, draws=5, bootstrap=100)
    for k, said in ((2, 1), (4, 0)):  # of four
        pipeline = fakes.pipeline(
            tmp_path / "run",
            outputs=tmp_path / f"k{k}",
            baselines=[SelfConsistency(LastWord())],
            training=TrainingSettings(steps=5),
            settings=dataclasses.replace(settings, k=k),
        )
        pipeline.execute(["sample", "reward", "embed", "baselines", "train", "evaluate"])
        notes = pipeline.results(pipeline.tests[0]).notes
        assert sum("self-consistency" in note and "k=2" in note for note in notes) == said
