"""Few-shot on successes: training prompts with a completion that earned its reward are put before every test prompt.

The same model answers, greedily. Which successes: the prompts whose best completion earned most, as many as asked for; among
equal prompts, and among equal completions of a prompt, a random number decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qprobe.baselines.base import Rival, TrainingData, TrainingRow, answer
from qprobe.files import write_whole
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool, Split
from qprobe.sampling import Sampler
from qprobe.settings import build

_SHOTS = "shots.json"


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
        seed: of the random choice among equals.
    """

    shots: int = 5
    success: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ValueError(f"few-shot shots is {self.shots}: at least 1.")


def successes(rows: Sequence[TrainingRow], settings: FewShotSettings) -> list[Shot]:
    """The solved prompts that are shown, at most `settings.shots`.

    Raises:
        ValueError: no completion is a success.
    """
    random = np.random.default_rng(settings.seed)
    best: dict[str, tuple[float, float, TrainingRow]] = {}
    for row in rows:
        found, key = (row.reward, random.random(), row), row.prompt.task_id
        if row.reward >= settings.success and (key not in best or found[:2] > best[key][:2]):
            best[key] = found
    if not best:
        raise ValueError(
            f"few-shot has no success to show: none of {len(rows)} training completions earned {settings.success:g}. Sample "
            "more, or lower success."
        )
    order = sorted(best.values(), key=lambda found: (-found[0], random.random()))
    if len(order) < settings.shots:
        tqdm.write(f"few-shot: only {len(order)} training prompts have a success, so {len(order)} are shown.")
    return [Shot(row.prompt, row.completion) for _, _, row in order[: settings.shots]]


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
        longest: tokens that a prompt may have; None where that is not known. Prompts that would be longer get fewer shots.
    """

    name = "few_shot"
    trains = True
    cannot_use = ("recorded",)

    def __init__(self, sampler: Sampler, settings: FewShotSettings, longest: Callable[[], int | None]) -> None:
        self.sampler, self.settings, self.longest = sampler, settings, longest
        self.method = f"few-shot ({settings.shots} success{'' if settings.shots == 1 else 'es'})"
        self._fitted: dict[tuple[str, str], Split] = {}

    def identity(self) -> dict[str, Any]:
        return {"few_shot": dataclasses.asdict(self.settings)}

    def train(self, data: TrainingData, folder: Path) -> None:
        shots = successes(data.read(), self.settings)
        text = json.dumps([dataclasses.asdict(shot) for shot in shots], indent=1)
        write_whole(folder / _SHOTS, text.encode())

    def pool(self, tested: Pool, folder: Path) -> Pool:
        split, written = tested.split, (folder / _SHOTS).read_text()
        if (split.name, written) not in self._fitted:
            shots = [build(Shot, shot, _SHOTS) for shot in json.loads(written)]
            self._fitted[split.name, written] = self._split(split, shots)
        fitted = self._fitted[split.name, written]
        return Pool(tested.run, fitted, self.name, self.sampler, tested.seed, tested.batch_rows, tested.shard)

    def _split(self, split: Split, shots: list[Shot]) -> Split:
        longest = self.longest()
        shown = [self._fit(prompt, shots, longest) for prompt in split.prompts]
        if cut := sum(count < len(shots) for _, count in shown):
            fewest = min(count for _, count in shown)
            tqdm.write(
                f"few-shot: {cut} prompts of {split.name} would be too long and get fewer shots, {fewest} at the least."
            )
        source = {**split.source, "shots": [dataclasses.asdict(shot) for shot in shots], "room": longest}
        return Split(split.name, [prompt for prompt, _ in shown], source, clusters=split.clusters)

    def _fit(self, prompt: Prompt, shots: list[Shot], longest: int | None) -> tuple[Prompt, int]:
        """The prompt with as many shots as it may have, never itself among them, and their number; the last are kept."""
        shots = [shot for shot in shots if shot.prompt.task_id != prompt.task_id]
        for count in range(len(shots), 0, -1):
            longer = with_shots(prompt, shots[len(shots) - count :])
            if longest is None or len(self.sampler.render(longer)[1]) <= longest:
                return longer, count
        return prompt, 0
