"""The stage of the baselines: they are trained where they must be, rivals answer and are rewarded, rankers score the candidates.

run/baselines/<name>/                     what was trained, with a manifest and, when it is whole, learnt.json
run/{prompts,completions}/<split>.<name>  a rival's prompts and answers; their rewards lie in run/rewards/<split>.<name>/
run/rewards/<split>.sample/<name>/        a ranker's scores of the candidates
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qprobe import store
from qprobe.baselines.base import Baseline, Fitted, Ranker, Rival, TrainingData, check_whole
from qprobe.files import write_whole
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool, Reward, RewardBatch, RewardRow
from qprobe.store.table import Table

# The name, and the keys "learnt" and "lessons" of manifests, are those of older run folders, which are read too.
_FINISHED = "learnt.json"


class _Ranking:
    """A ranker as a reward stage of one pool.

    Args:
        ranker: gives the scores.
        tested: the pool.
        folder: what it was trained to.
        trained: identity of that; None where it is not trained.
    """

    def __init__(self, ranker: Ranker, tested: Pool, folder: Path, trained: str | None) -> None:
        self.name, self.ranker, self.tested, self.folder, self.trained = ranker.name, ranker, tested, folder, trained

    def identity(self) -> dict[str, Any]:
        return {"reward": self.name, "ranker": self.ranker.identity(), "learnt": self.trained}

    def check(self) -> None:
        self.ranker.check()

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        return self.ranker.scores(self.tested, self.folder, batches)


class Baselines:
    """The baselines of a run.

    Args:
        baselines: rows of the table in this order. Those that are fitted have no part in the stage.
        run: the run folder.
        data: what they may be trained on; None where there is no training split.

    Raises:
        ValueError: a name twice, or nothing to train on.
    """

    def __init__(self, baselines: Sequence[Baseline], run: Path, data: TrainingData | None) -> None:
        self.fitted = [member for member in baselines if isinstance(member, Fitted)]
        self.members = [member for member in baselines if not isinstance(member, Fitted)]
        self.run_folder, self.data = run, data
        names = [member.name for member in baselines]
        if len(set(names)) < len(names):
            raise ValueError(f"The baselines are {', '.join(names)}: name each of them once.")
        if data is None and (needy := [member.name for member in baselines if member.trains]):
            raise ValueError(
                f"The baselines {', '.join(needy)} need a training split, and one set of prompts is cross-validated: name a "
                "training split, or leave them out."
            )

    def check(self) -> None:
        """Say what can be known to fail before any work."""
        for member in self.members:
            member.check()
            if member.trains:
                self._training(member).check_inputs()

    def run(self, pools: Sequence[tuple[Pool, Reward]], progress: bool = True) -> None:
        """Do what is left to do on test pools, each with its reward; finished work is found again."""
        for member in self.members:
            self._train(member)
            for tested, reward in pools:
                pool, stage = self._at(member, tested, reward)
                if isinstance(member, Rival):
                    stages.sample(pool, progress)
                    stages.give_back(pool.sampler)
                else:
                    check_whole(pool, pool.completions, "sample")
                rewarding.reward(pool, stage, progress)

    def rivals(self, pool: Pool, reward: Reward) -> dict[str, np.ndarray | None]:
        """Row -> (P,) rewards of a rival's answers, prompts by task id; None where it was not run to its end."""
        return self._values([member for member in self.members if isinstance(member, Rival)], pool, reward)

    def rankings(self, pool: Pool) -> dict[str, np.ndarray | None]:
        """Row -> (1, N) scores of the pool's candidates; None where not all were scored."""
        values = self._values([member for member in self.members if isinstance(member, Ranker)], pool, None)
        return {method: None if found is None else found[None].astype(float) for method, found in values.items()}

    def notes(self, pool: Pool, k: int) -> list[str]:
        """What a reader must know of the rows of rankers that choose among k of a pool's candidates."""
        most = max(map(pool.samples, pool.task_ids))
        return [
            f"{member.method} chooses among k={k} candidates by what all samples of their prompt say, up to {most}: with "
            f"{k} alone it would know less."
            for member in [*self.members, *self.fitted]
            if isinstance(member, Ranker | Fitted) and member.of_all and k < most
        ]

    def identity(self, pool: Pool, reward: Reward) -> dict[str, str | None]:
        """What the rows of the baselines are made from; None where one was not run to its end."""
        found = {member.name: self._finished(member, pool, reward) for member in self.members}
        return {name: None if at is None else at[0].rewards(at[1]).state for name, at in found.items()}

    def _values(self, members: Sequence[Baseline], pool: Pool, reward: Reward | None) -> dict[str, np.ndarray | None]:
        found = {member.method: self._finished(member, pool, reward) for member in members}
        return {method: None if at is None else join(*at).rewards for method, at in found.items()}

    def _at(self, member: Baseline, tested: Pool, reward: Reward | None) -> tuple[Pool, Reward]:
        """Where a baseline's values lie: a pool and what rewards it."""
        if isinstance(member, Ranker):
            trained = self._training(member).identity if member.trains else None
            return tested, _Ranking(member, tested, self._folder(member), trained)
        assert isinstance(member, Rival)
        assert reward is not None  # rivals are rewarded as all completions are
        return member.pool(tested, self._folder(member)), reward

    def _finished(self, member: Baseline, tested: Pool, reward: Reward | None) -> tuple[Pool, Reward] | None:
        """The same; None where the values are not all there."""
        if member.trains and not (self._folder(member) / _FINISHED).exists():
            return None
        pool, stage = self._at(member, tested, reward)
        table = pool.rewards(stage)
        table.check_inputs()
        return (pool, stage) if all(table.has(keys) for keys in pool.batches) else None

    def _train(self, member: Baseline) -> None:
        if not member.trains:
            return
        table = self._training(member)
        table.begin()
        if not (table.folder / _FINISHED).exists():
            assert self.data is not None  # looked at when the baselines were made
            member.train(self.data, table.folder)
            write_whole(table.folder / _FINISHED, b"{}\n")

    def _training(self, member: Baseline) -> Table:
        """The folder of what a baseline was trained to, known by its manifest as a table is."""
        assert self.data is not None  # looked at when the baselines were made
        inputs = {"baseline": member.identity(), "lessons": self.data.identity()}
        return store.open_table(self.run_folder, "baselines", member.name, inputs=inputs)

    def _folder(self, member: Baseline) -> Path:
        return self.run_folder / "baselines" / member.name
