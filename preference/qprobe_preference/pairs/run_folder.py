"""Pairs out of a run folder with rewards: a passed and a failed completion of one prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
        per_prompt: most pairs of one prompt, drawn by lot.
        seed: of the lot.

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
        # One text may pass and fail where a reward is by chance; it says nothing then.
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
    """The prompts of a pool by task id, as they were put to the run's model, with completions and rewards.

    Args and Raises: as of `pairs`.
    """
    prompts = found_table(_folder(run / "prompts", pool.rpartition(".")[0]), PROMPTS).read().to_pylist()
    completions = found_table(_folder(run / "completions", pool), COMPLETIONS).read(
        None, ["task_id", "sample", "completion"]
    )
    rewards = found_table(_folder(_folder(run / "rewards", pool), reward), REWARDS).read(
        None, ["task_id", "sample", "reward"]
    )
    earned = {(row["task_id"], row["sample"]): row["reward"] for row in rewards.to_pylist()}
    texts: dict[str, list[tuple[str, float]]] = {}
    for row in sorted(completions.to_pylist(), key=lambda row: (row["task_id"], row["sample"])):
        key = (row["task_id"], row["sample"])
        if key not in earned:
            raise ValueError(f"{run}: completion {key[1]} of {key[0]} has no reward: run the stage reward there first.")
        texts.setdefault(row["task_id"], []).append((row["completion"], earned[key]))
    for row in sorted(prompts, key=lambda row: str(row["task_id"])):
        task_id = row["task_id"]
        if task_id in texts:
            talk, opening = _prompt(run, row["messages"], row["prompt"], render)
            asked = (
                Prompt(task_id, text=talk) if isinstance(talk, str) else Prompt(task_id, messages=talk, opening=opening)
            )
            yield Judged(asked, [text for text, _ in texts[task_id]], [reward for _, reward in texts[task_id]])


def _prompt(
    run: Path, messages: str | None, rendered: str, render: Callable[[Prompt], str]
) -> tuple[str | tuple[dict[str, str], ...], str]:
    """A prompt of the run and the opening of its answers, which is what stands behind the rendered conversation."""
    if messages is None:
        return rendered, ""
    talk = tuple(json.loads(messages))
    plain = render(Prompt("run", messages=talk))
    if not rendered.startswith(plain):
        raise ValueError(
            f"The prompts of {run} were rendered by another model's chat template: give the run's model by model.name."
        )
    return talk, rendered[len(plain) :]


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
