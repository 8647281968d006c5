"""SFT on successes: a LoRA adapter trained on the training completions that earned their reward; its model answers greedily."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qprobe.baselines.base import Rival, TrainingData
from qprobe.baselines.lora import Trained, Training, check_base
from qprobe.baselines.objectives import Example, Imitation, examples_of
from qprobe.baselines.settings import LoRASettings
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.run.pools import Pool
from qprobe.sampling import Sampler

_ADAPTER = "adapter"


@dataclass(frozen=True)
class SFTSettings(LoRASettings):
    """How an adapter is trained, and `success`: the least reward of a success."""

    success: float = 1.0


def fine_tune(
    model: ModelSpec,
    examples: Sequence[Example],
    settings: LoRASettings,
    folder: Path,
    seed: int = 0,
    progress: bool = True,
) -> Trained:
    """Train an adapter to imitate completions, such as those of the model's own that earned a reward; see `lora.Training`.

    Raises:
        ValueError: no example has tokens; and as `Training.run`.
    """
    imitated = [example for example in examples if example.completion_ids]
    if not imitated:
        raise ValueError(
            "No successes to train on: no completion of the training prompts was rewarded. Draw more completions, take more "
            "prompts or a stronger model."
        )
    empty = len(examples) - len(imitated)
    return Training(model, imitated, settings, folder, seed, progress, empty).run(Imitation())


class SFT(Rival):
    """The sampler's model, fine-tuned on its own successes.

    Args:
        model: that is fine-tuned.
        settings: how, and on what.
        adapted: makes the sampler at temperature 0 of the model with an adapter.
        seed: of the training.
    """

    name = "sft"
    method = "SFT on successes"
    trains = True
    cannot_use = ("openai", "recorded")

    def __init__(
        self, model: ModelSpec, settings: SFTSettings, adapted: Callable[[Path], Sampler], seed: int = 0
    ) -> None:
        self.model, self.settings, self.adapted, self.seed = model, settings, adapted, seed

    def identity(self) -> dict[str, Any]:
        return {"model": self.model.identity(), "seed": self.seed, **dataclasses.asdict(self.settings)}

    def check(self) -> None:
        check_base(self.model)

    def train(self, data: TrainingData, folder: Path) -> None:
        examples = examples_of(data, Likelihood(self.model), self.settings.success)
        trained = fine_tune(self.model, examples, self.settings, folder / _ADAPTER, self.seed)
        tqdm.write(trained.sentence(self.method))

    def pool(self, tested: Pool, folder: Path) -> Pool:
        split = dataclasses.replace(tested.split, recorded=None)
        sampler = self.adapted(folder / _ADAPTER)
        return Pool(tested.run, split, self.name, sampler, tested.seed, tested.batch_rows, tested.shard)
