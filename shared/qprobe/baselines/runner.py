"""The stage of the baselines: what must be learnt is learnt, rivals answer and are rewarded, rankers score the candidates.

run/baselines/<name>/                     what a baseline learnt, with a manifest and, when it is whole, learnt.json
run/{prompts,completions}/<split>.<name>  a rival's prompts and answers; their rewards lie in run/rewards/<split>.<name>/
run/rewards/<split>.sample/<name>/        a ranker's scores of the candidates
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qprobe import store
from qprobe.baselines.base import Baseline, Lessons, Ranker, Rival, check_whole
from qprobe.files import write_whole
from qprobe.run import stages
from qprobe.run.joined import join
from qprobe.run.stages import Pool, Reward, RewardBatch, RewardRow
from qprobe.store.table import Table

LEARNT = "learnt.json"  # says that what was learnt is whole


class Ranking:
    """A ranker as a reward stage of one pool.

    Args:
        ranker: gives the scores.
        tested: the pool.
        folder: what it learnt.
        learnt: identity of that; None where it learns nothing.
    """

    def __init__(self, ranker: Ranker, tested: Pool, folder: Path, learnt: str | None) -> None:
        self.name = ranker.name
        self.ranker = ranker
        self.tested = tested
        self.folder = folder
        self.learnt = learnt

    def identity(self) -> dict[str, Any]:
        return {"reward": self.name, "ranker": self.ranker.identity(), "learnt": self.learnt}

    def check(self) -> None:
        self.ranker.check()

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        return self.ranker.scores(self.tested, self.folder, batches)


class Baselines:
    """The baselines of a run.

    Args:
        members: rivals and rankers, rows of the table in this order.
        run: the run folder.
        lessons: what they may learn from; None where there is no training split.

    Raises:
        ValueError: a name twice, or nothing to learn from.
    """

    def __init__(self, members: Sequence[Baseline], run: Path, lessons: Lessons | None) -> None:
        self.members, self.run_folder, self.lessons = members, run, lessons
        names = [member.name for member in members]
        if len(set(names)) < len(names):
            raise ValueError(f"The baselines are {', '.join(names)}: name each of them once.")
        if lessons is None and (needy := [member.name for member in members if member.learns]):
            raise ValueError(
                f"The baselines {', '.join(needy)} learn from a training split and there is none, for one set of prompts is "
                "cross-validated: name a training split, or leave them out."
            )

    def check(self) -> None:
        """Say what can be known to fail before any work."""
        for member in self.members:
            member.check()
            if member.learns:
                self._learning(member).check_inputs()

    def run(self, pools: Sequence[tuple[Pool, Reward]], progress: bool = True) -> None:
        """Do what is left to do on test pools, each with its reward; finished work is found again."""
        for member in self.members:
            self._learn(member)
            for pool, reward in pools:
                if isinstance(member, Rival):
                    rival = member.pool(pool, self._folder(member))
                    stages.sample(rival, progress)
                    stages.give_back(rival.sampler)
                    stages.reward(rival, reward, progress)
                elif isinstance(member, Ranker):
                    check_whole(pool, pool.completions, "sample")
                    stages.reward(pool, self._ranking(member, pool), progress)

    def rivals(self, pool: Pool, reward: Reward) -> dict[str, np.ndarray | None]:
        """Row -> (P,) rewards of a rival's answers, prompts by task id; None where it was not run to its end."""
        members = [member for member in self.members if isinstance(member, Rival)]
        return {member.method: self._values(member, pool, reward) for member in members}

    def rankings(self, pool: Pool) -> dict[str, np.ndarray | None]:
        """Row -> (1, N) scores of the pool's candidates; None where not all were scored."""
        members = [member for member in self.members if isinstance(member, Ranker)]
        values = {member.method: self._values(member, pool) for member in members}
        return {method: None if found is None else found[None].astype(float) for method, found in values.items()}

    def notes(self, pool: Pool, k: int) -> list[str]:
        """What a reader must know of the rows of rankers that choose among k of a pool's candidates."""
        most = max(map(pool.samples, pool.task_ids))
        return [
            f"{member.method} chooses among k={k} candidates by what all samples of their prompt say, up to {most}: with "
            f"{k} alone it would know less."
            for member in self.members
            if isinstance(member, Ranker) and member.of_all and k < most
        ]

    def identity(self, pool: Pool, reward: Reward) -> dict[str, str | None]:
        """What the rows of the baselines are made from; None where one was not run to its end."""
        found = {member.name: self._found(member, pool, reward) for member in self.members}
        return {name: None if at is None else at[0].rewards(at[1]).state for name, at in found.items()}

    def _values(self, member: Baseline, pool: Pool, reward: Reward | None = None) -> np.ndarray | None:
        found = self._found(member, pool, reward)
        return None if found is None else join(*found).rewards

    def _found(self, member: Baseline, pool: Pool, reward: Reward | None) -> tuple[Pool, Reward] | None:
        """Where a baseline's values lie: a pool and what rewards it; None where they are not all there."""
        if member.learns and not (self._folder(member) / LEARNT).exists():
            return None
        at: tuple[Pool, Reward]
        if isinstance(member, Ranker):
            at = pool, self._ranking(member, pool)
        else:
            assert isinstance(member, Rival)
            assert reward is not None  # rivals are rewarded as all completions are
            at = member.pool(pool, self._folder(member)), reward
        table = at[0].rewards(at[1])
        table.check_inputs()
        return at if all(table.has(keys) for keys in at[0].batches) else None

    def _learn(self, member: Baseline) -> None:
        if not member.learns:
            return
        table = self._learning(member)
        table.begin()
        if not (table.folder / LEARNT).exists():
            assert self.lessons is not None  # looked at when the baselines were made
            member.learn(self.lessons, table.folder)
            write_whole(table.folder / LEARNT, b"{}\n")

    def _learning(self, member: Baseline) -> Table:
        """The folder of what a baseline learns, known by its manifest as a table is."""
        assert self.lessons is not None  # looked at when the baselines were made
        inputs = {"baseline": member.identity(), "lessons": self.lessons.identity()}
        return store.open_table(self.run_folder, "baselines", member.name, inputs=inputs)

    def _folder(self, member: Baseline) -> Path:
        return self.run_folder / "baselines" / member.name

    def _ranking(self, member: Ranker, pool: Pool) -> Ranking:
        learnt = self._learning(member).identity if member.learns else None
        return Ranking(member, pool, self._folder(member), learnt)
