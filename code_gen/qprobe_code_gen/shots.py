"""Successes out of a finished run, to be shown before every prompt of another: few-shot under a Q-probe of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from qprobe import store
from qprobe.baselines.base import Lesson
from qprobe.baselines.few_shot import FewShotSettings, Shot, successes
from qprobe.stages import KEY_COLUMNS
from qprobe.store import found_table
from qprobe_code_gen.problems import ProblemSet
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.rewards import UnitTestReward


def shots_of(run: Path, problems: ProblemSet, style: PromptStyle, settings: FewShotSettings) -> list[Shot]:
    """The successes that a run's completions of a problem set hold.

    Args:
        run: its folder.
        problems: the whole training set.
        style: of the prompts, theirs and ours.
        settings: which successes.

    Raises:
        ValueError: a run of other prompts or of other problems, one that is not finished, or no success.
    """
    pool = f"{problems.name}.sample"
    if not (run / "rewards" / pool / UnitTestReward.name).is_dir():
        raise ValueError(
            f"dataset.shots: {run} holds no rewards of {pool}: run the stages sample and reward there first."
        )
    put = found_table(run / "prompts" / problems.name, store.PROMPTS)
    own = json.loads(json.dumps(dataclasses.asdict(style)))
    if put.inputs["split"].get("style") != own or put.inputs["split"].get("shots"):
        raise ValueError(
            f"dataset.shots: the prompts of {run} are put in another way: take the same dataset.prompt_style."
        )
    completions = found_table(run / "completions" / pool, store.COMPLETIONS).read().to_pylist()
    rewards = found_table(run / "rewards" / pool / UnitTestReward.name, store.REWARDS).read().to_pylist()
    if len(rewards) < len(completions):
        raise ValueError(
            f"dataset.shots: the stage reward is missing {len(completions) - len(rewards)} of {len(completions)} rows of {pool} "
            f"in {run}: run it there first."
        )
    earned = {tuple(row[name] for name in KEY_COLUMNS): float(row["reward"]) for row in rewards}
    known = {problem.task_id: style.prompt(problem) for problem in problems.problems}
    if foreign := sorted({row["task_id"] for row in completions} - set(known)):
        raise ValueError(
            f"dataset.shots: {run} has completions of {foreign[0]}, which is no problem of {problems.name}."
        )
    lessons = [
        Lesson(
            known[row["task_id"]], "", [], row["completion"], row["token_ids"], earned[row["task_id"], row["sample"]]
        )
        for row in sorted(completions, key=lambda row: (row["task_id"], row["sample"]))
    ]
    return successes(lessons, settings)
