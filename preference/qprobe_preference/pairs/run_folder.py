"""Pairs out of a run folder with rewards: a passed and a failed completion of one prompt."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.files import fingerprint
from qprobe.prompts import Prompt
from qprobe.store.table import COMPLETIONS, PROMPTS, REWARDS, found_table
from qprobe_preference.pairs.base import Found


def pairs(
    run: Path,
    pool: str,
    render: Callable[[Prompt], str],
    *,
    reward: str | None = None,
    passed: float = 0.5,
    per_prompt: int = 4,
    seed: int = 0,
) -> Iterator[Found | str]:
    """Pairs of a pool, or why a prompt has none. The run's prompts stay as they are, openings included.

    Args:
        run: the run folder.
        pool: such as humaneval.sample.
        render: the text that a prompt is to the run's model; by it the opening of an answer is known again.
        reward: the reward's folder; None: the only one.
        passed: the reward from which a completion has passed.
        per_prompt: most pairs of one prompt, drawn at random.
        seed: of the draw.

    Raises:
        ValueError: no such pool or reward, or prompts that were rendered by another model.
        StoreError: a table that cannot be read.
    """
    if per_prompt < 1:
        raise ValueError(f"dataset.options.per_prompt is {per_prompt}: at least one pair of a prompt.")
    for task in judged(run, pool, render, reward):
        texts: dict[bool, list[str]] = {True: [], False: []}
        for completion, earned in zip(task.completions, task.rewards, strict=True):
            texts[earned >= passed].append(completion)
        good, bad = ([*dict.fromkeys(texts[side])] for side in (True, False))
        # A text that both passes and fails, as by a random reward, says nothing.
        good, bad = [text for text in good if text not in bad], [text for text in bad if text not in good]
        if not good or not bad:
            yield "none_failed" if good else "none_passed"
            continue
        task_id, prompt = task.prompt.task_id, task.prompt
        every = [(a, b) for a in good for b in bad]
        drawn = random.Random(fingerprint([seed, task_id])).sample(every, min(per_prompt, len(every)))
        for a, b in sorted(drawn):
            yield Found(prompt.messages or prompt.text, a, b, cluster=f"task {task_id}", opening=prompt.opening)


@dataclass(frozen=True)
class Judged:
    """A prompt of a run folder with its completions and what each earned."""

    prompt: Prompt
    completions: list[str]
    rewards: list[float]


def judged(run: Path, pool: str, render: Callable[[Prompt], str], reward: str | None = None) -> Iterator[Judged]:
    """The prompts of a pool by task id, as the run's model read them, with completions and rewards.

    Args and Raises: as of `pairs`.
    """
    prompts = found_table(_folder(run / "prompts", pool.rpartition(".")[0]), PROMPTS).read().to_pylist()
    columns = ["task_id", "sample"]
    completions = found_table(_folder(run / "completions", pool), COMPLETIONS).read(None, [*columns, "completion"])
    rewards = found_table(_folder(_folder(run / "rewards", pool), reward), REWARDS).read(None, [*columns, "reward"])
    rows: dict[str, list[dict[str, Any]]] = {}
    order = [(column, "ascending") for column in columns]
    for row in completions.join(rewards, columns).sort_by(order).to_pylist():
        if row["reward"] is None:
            where = f"{run}: completion {row['sample']} of {row['task_id']}"
            raise ValueError(f"{where} has no reward: run the stage reward there first.")
        rows.setdefault(row["task_id"], []).append(row)
    for row in sorted(prompts, key=lambda row: str(row["task_id"])):
        if own := rows.get(row["task_id"]):
            yield Judged(_prompt(run, row, render), [r["completion"] for r in own], [r["reward"] for r in own])


def _prompt(run: Path, row: Mapping[str, Any], render: Callable[[Prompt], str]) -> Prompt:
    """A prompt of the run, with the opening of its answers, which follows the rendered conversation."""
    if row["messages"] is None:
        return Prompt(row["task_id"], text=row["prompt"])
    plain = Prompt(row["task_id"], messages=tuple(json.loads(row["messages"])))
    rendered = render(plain)
    if not row["prompt"].startswith(rendered):
        raise ValueError(
            f"The prompts of {run} were rendered by another model's chat template: give the run's model by model.name."
        )
    return dataclasses.replace(plain, opening=row["prompt"][len(rendered) :])


def _folder(parent: Path, name: str | None) -> Path:
    """A folder by its name, or the only one."""
    known = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    if name is None and len(known) == 1:
        return parent / known[0]
    if name not in known:
        raise ValueError(
            f"{parent} has no folder {name or 'that is the only one'}: it has {', '.join(known) or 'none'}."
        )
    return parent / name
