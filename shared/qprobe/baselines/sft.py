"""SFT on successes: a LoRA adapter is taught the training completions that earned their reward; its model answers greedily."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qprobe.baselines.base import Lessons, Rival
from qprobe.baselines.lora import LoRASettings, check_base, examples_of, fine_tune
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.run.stages import Pool
from qprobe.sampling import Sampler

ADAPTER = "adapter"


class SFT(Rival):
    """The sampler's model, fine-tuned on its own successes.

    Args:
        model: that is fine-tuned.
        settings: how.
        sampler: makes the sampler at temperature 0 of the model with an adapter.
        success: least reward of a success.
        seed: of the training.
    """

    name = "sft"
    method = "SFT on successes"
    learns = True

    def __init__(
        self,
        model: ModelSpec,
        settings: LoRASettings,
        sampler: Callable[[Path], Sampler],
        success: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.settings = settings
        self.sampler = sampler
        self.success = success
        self.seed = seed

    def identity(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        return {"model": self.model.identity(), "success": self.success, "seed": self.seed, **settings}

    def check(self) -> None:
        check_base(self.model)

    def learn(self, lessons: Lessons, folder: Path) -> None:
        examples = examples_of(lessons, Likelihood(self.model), self.success)
        trained = fine_tune(self.model, examples, self.settings, folder / ADAPTER, self.seed)
        tqdm.write(trained.sentence(self.method))

    def pool(self, tested: Pool, folder: Path) -> Pool:
        split = dataclasses.replace(tested.split, recorded=None)
        sampler = self.sampler(folder / ADAPTER)
        return Pool(tested.run, split, self.name, sampler, tested.seed, tested.batch_rows, tested.shard)
