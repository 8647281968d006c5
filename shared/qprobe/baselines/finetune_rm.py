"""Finetune RM: a LoRA adapter with a linear head is trained on rewards of the training completions and ranks the candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from tqdm import tqdm

from qprobe.baselines.base import Ranker, TrainingData
from qprobe.baselines.lora import HEAD_FILE, Trained, Training, check_base
from qprobe.baselines.objectives import Example, Judgement, check_targets, examples_of
from qprobe.baselines.settings import LoRASettings
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.run.pools import Pool, RewardBatch, RewardRow, completions_of
from qprobe.run.stages import tokens_of

_ADAPTER = "adapter"


def train_reward_model(
    model: ModelSpec,
    examples: Sequence[Example],
    settings: LoRASettings,
    folder: Path,
    seed: int = 0,
    progress: bool = True,
) -> Trained:
    """Train an adapter and a linear head to tell the rewards of completions, empty ones too; see `lora.Training`.

    Raises:
        ValueError: rewards outside of [0, 1], or all the same; and as `Training.run`.
    """
    check_targets(examples)
    return Training(model, examples, settings, folder, seed, progress).run(Judgement())


class RewardModel:
    """A trained reward model: the embedding of its last layer at the last token, times its head.

    Args:
        model: the model that it was trained from.
        folder: of its adapter and head.
    """

    def __init__(self, model: ModelSpec, folder: Path) -> None:
        if not (folder / HEAD_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {HEAD_FILE}: it is no reward model, train one.")
        self.embedder = HFEmbedder(dataclasses.replace(model, adapter=str(folder)), layers=[-1])
        head = tensors_from_bytes((folder / HEAD_FILE).read_bytes())
        self.weight, self.bias = head["weight"][0], head["bias"]

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """The logit of every completion: the higher, the better; an empty one is judged by its prompt.

        Args:
            prompts: P lists of token ids, none empty.
            completions: the completions of each prompt, token ids.
        """
        (states,) = self.embedder.embed(prompts, completions).values()
        values = iter((states @ self.weight + self.bias).tolist())
        return [[next(values) for _ in of_prompt] for of_prompt in completions]


class FinetuneRM(Ranker):
    """A reward model trained from the run's own model.

    Args:
        model: that is trained.
        settings: how.
        seed: of the training.
    """

    name = "finetune_rm"
    method = "Finetune RM"
    trains = True

    def __init__(self, model: ModelSpec, settings: LoRASettings, seed: int = 0) -> None:
        self.model, self.settings, self.seed = model, settings, seed

    def identity(self) -> dict[str, Any]:
        return {"model": self.model.identity(), "seed": self.seed, **dataclasses.asdict(self.settings)}

    def check(self) -> None:
        check_base(self.model)

    def train(self, data: TrainingData, folder: Path) -> None:
        examples = examples_of(data, Likelihood(self.model))
        trained = train_reward_model(self.model, examples, self.settings, folder / _ADAPTER, self.seed)
        tqdm.write(trained.sentence(self.method))

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        model = RewardModel(self.model, folder / _ADAPTER)
        prompts = {row["task_id"]: row for row in tested.prompts.read([tested.task_ids]).to_pylist()}
        for batch in batches:
            rows = completions_of(tested, batch.keys)
            found = model.score(*tokens_of(tested, batch.keys, rows, prompts, model.embedder))
            yield batch, [RewardRow(score) for of_prompt in found for score in of_prompt]
