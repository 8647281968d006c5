"""Few-shot on successes: training prompts with a completion that earned its reward stand before every test prompt.

The same model answers, greedily. Which successes: the prompts whose best completion earned most, as many as asked for; among
equal prompts, and among equal completions of a prompt, a lot decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qprobe.baselines.base import Lesson, Lessons, Rival, answer
from qprobe.files import write_whole
from qprobe.prompts import Prompt
from qprobe.run.stages import Pool, Split
from qprobe.sampling import Sampler

SHOTS = "shots.json"


@dataclass(frozen=True)
class Shot:
    """A solved prompt: what was asked, and what was answered."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class FewShotSettings:
    """How successes are chosen.

    Args:
        shots: solved prompts in front of every prompt, 1 or more.
        success: least reward of a success.
        seed: of the lot among equals.
    """

    shots: int = 5
    success: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ValueError(f"few-shot shots is {self.shots}: at least 1.")


def successes(lessons: Sequence[Lesson], settings: FewShotSettings) -> list[Shot]:
    """The solved prompts that are shown, at most `settings.shots`.

    Raises:
        ValueError: no completion is a success.
    """
    lot = np.random.default_rng(settings.seed)
    best: dict[str, tuple[float, float, Lesson]] = {}
    for lesson in lessons:
        found = lesson.reward, lot.random(), lesson
        key = lesson.prompt.task_id
        if lesson.reward >= settings.success and (key not in best or found[:2] > best[key][:2]):
            best[key] = found
    if not best:
        raise ValueError(
            f"There is no success to show: none of {len(lessons)} training completions earned {settings.success:g}. Sample "
            "more of them, or lower the least reward of a success (success)."
        )
    order = sorted(best.values(), key=lambda found: (-found[0], lot.random()))
    if len(order) < settings.shots:
        tqdm.write(f"few-shot: only {len(order)} training prompts have a success, so {len(order)} are shown.")
    return [Shot(lesson.prompt, lesson.completion) for _, _, lesson in order[: settings.shots]]


def with_shots(prompt: Prompt, shots: Sequence[Shot]) -> Prompt:
    """A prompt with solved ones before it: turns of a conversation, or blocks of text with an empty line between them."""
    if prompt.text is None:
        turns: list[dict[str, str]] = []
        for shot in shots:
            said = {"role": "assistant", "content": answer(shot.prompt, shot.completion)}
            turns += [*_asked(shot.prompt, first=not turns), said]
        return dataclasses.replace(prompt, messages=(*turns, *_asked(prompt, first=not turns)))
    blocks = [f"{shot.prompt.text or ''}{shot.completion}".strip() for shot in shots]
    return dataclasses.replace(prompt, text="\n\n".join([*blocks, prompt.text]))


def _asked(prompt: Prompt, first: bool) -> list[dict[str, str]]:
    """The messages of a prompt; a system message belongs to the beginning of a conversation alone."""
    return [message for message in prompt.messages if first or message["role"] != "system"]


class FewShot(Rival):
    """The same model with successes of the training split before every test prompt.

    Args:
        sampler: of the completions, at temperature 0.
        settings: which successes.
        room: how many tokens a prompt may have; None where that is not known. What is longer is given fewer shots.
    """

    name = "few_shot"
    learns = True

    def __init__(self, sampler: Sampler, settings: FewShotSettings, room: Callable[[], int | None]) -> None:
        self.sampler = sampler
        self.settings = settings
        self.room = room
        self.method = f"few-shot ({settings.shots} success{'' if settings.shots == 1 else 'es'})"
        self._fitted: dict[tuple[str, str], Split] = {}

    def identity(self) -> dict[str, Any]:
        return {"few_shot": dataclasses.asdict(self.settings)}

    def check(self) -> None:
        """Nothing can be known beforehand: whether there are successes is seen once they are rewarded."""

    def learn(self, lessons: Lessons, folder: Path) -> None:
        shots = successes(lessons.read(), self.settings)
        text = json.dumps([dataclasses.asdict(shot) for shot in shots], indent=1)
        write_whole(folder / SHOTS, text.encode())

    def pool(self, tested: Pool, folder: Path) -> Pool:
        split, written = tested.split, (folder / SHOTS).read_text()
        if (split.name, written) not in self._fitted:
            self._fitted[split.name, written] = self._split(split, _read(written))
        fitted = self._fitted[split.name, written]
        return Pool(tested.run, fitted, self.name, self.sampler, tested.seed, tested.batch_rows, tested.shard)

    def _split(self, split: Split, shots: list[Shot]) -> Split:
        room = self.room()
        shown = [self._fit(prompt, shots, room) for prompt in split.prompts]
        if cut := sum(count < len(shots) for _, count in shown):
            fewest = min(count for _, count in shown)
            tqdm.write(f"few-shot: {cut} prompts of {split.name} have room for fewer shots, {fewest} at the least.")
        source = {**split.source, "shots": [dataclasses.asdict(shot) for shot in shots], "room": room}
        return Split(split.name, [prompt for prompt, _ in shown], source, clusters=split.clusters)

    def _fit(self, prompt: Prompt, shots: list[Shot], room: int | None) -> tuple[Prompt, int]:
        """The prompt with as many shots as there is room for, never itself among them; the last are those that stay."""
        shots = [shot for shot in shots if shot.prompt.task_id != prompt.task_id]
        for count in range(len(shots), 0, -1):
            longer = with_shots(prompt, shots[len(shots) - count :])
            if room is None or len(self.sampler.render(longer)[1]) <= room:
                return longer, count
        return prompt, 0


def _read(written: str) -> list[Shot]:
    def prompt(values: Mapping[str, Any]) -> Prompt:
        return Prompt(**{**values, "messages": tuple(values["messages"])})

    return [Shot(prompt(shot["prompt"]), shot["completion"]) for shot in json.loads(written)]
