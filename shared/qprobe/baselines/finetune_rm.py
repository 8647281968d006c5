"""The reward model of the paper's tables: the best of k by a LoRA adapter with a linear head (Finetune RM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load as tensors_from_bytes

from qprobe.baselines.lora import HEAD_FILE
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import ModelSpec


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
