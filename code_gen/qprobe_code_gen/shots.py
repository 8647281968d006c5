"""Successes of a finished run, to be shown before every prompt of another: few-shot under a Q-probe of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qprobe import store
from qprobe.baselines.base import TrainingRow
from qprobe.baselines.few_shot import FewShotSettings, Shot, successes
from qprobe.prompts import Prompt
from qprobe.run.pools import KEY_COLUMNS
from qprobe.store.table import found_table


def shots_of(
    run: Path, split: str, prompts: Sequence[Prompt], style: dict[str, Any], reward: str, settings: FewShotSettings
) -> list[Shot]:
    """The successes that a run's completions of a problem set hold.

    Args:
        run: its folder.
        split: name of the training set.
        prompts: of all its problems.
        style: fields of the prompt style, which must be those of that run.
        reward: name of the stage that rewarded them.
        settings: which successes.

    Raises:
        ValueError: a run of other prompts or of other problems, one that is not finished, or no success.
    """
    pool = f"{split}.sample"
    if not (run / "rewards" / pool / reward).is_dir():
        raise ValueError(
            f"dataset.shots: {run} holds no rewards of {pool}: run the stages sample and reward there first."
        )
    prompted = found_table(run / "prompts" / split, store.PROMPTS)
    own = json.loads(json.dumps(style))
    if prompted.inputs["split"].get("style") != own or prompted.inputs["split"].get("shots"):
        raise ValueError(f"dataset.shots: the prompts of {run} have another style: take the same dataset.prompt_style.")
    completions = found_table(run / "completions" / pool, store.COMPLETIONS).read().to_pylist()
    rewards = found_table(run / "rewards" / pool / reward, store.REWARDS).read().to_pylist()
    if len(rewards) < len(completions):
        raise ValueError(
            f"dataset.shots: the stage reward is missing {len(completions) - len(rewards)} of {len(completions)} rows of {pool} "
            f"in {run}: run it there first."
        )
    drawn, of = len({row["task_id"] for row in completions}), prompted.inputs["prompts"]
    if drawn < of:  # such as a shard's: a later call would show others
        raise ValueError(
            f"dataset.shots: the stage sample is missing {of - drawn} of {of} prompts of {pool} in {run}: run it there first."
        )
    earned = {tuple(row[name] for name in KEY_COLUMNS): float(row["reward"]) for row in rewards}
    known = {prompt.task_id: prompt for prompt in prompts}
    if foreign := sorted({row["task_id"] for row in completions} - set(known)):
        raise ValueError(f"dataset.shots: {run} has completions of {foreign[0]}, which is no problem of {split}.")
    rows = sorted(completions, key=lambda row: (row["task_id"], row["sample"]))
    rewarded = [
        TrainingRow(
            known[name := row["task_id"]], "", [], row["completion"], row["token_ids"], earned[name, row["sample"]]
        )
        for row in rows
    ]
    return successes(rewarded, settings)
