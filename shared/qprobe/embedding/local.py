"""What the embedders share that run a model themselves (transformers, vLLM): its tokenizer, its context, their identity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from qprobe.models.language_model import ModelSpec, OwnTokens
from qprobe.models.prefix import check_prompts


class LocalEmbedder(OwnTokens):
    """An embedder that takes token ids of the model's tokenizer.

    Args:
        model: which model.
        layers: hidden layers; negative counts from the last.
    """

    back_end: ClassVar[str]

    def __init__(self, model: ModelSpec, layers: Sequence[int]) -> None:
        if not layers:
            raise ValueError("The embedder was given no layers: name at least one, -1 is the last.")
        self.model = model
        self._layers = tuple(layers)

    def identity(self) -> dict[str, Any]:
        return {"embedder": self.back_end, "model": self.model.identity(), "token": "last"}

    def folder_name(self) -> str:
        name = re.sub(r"[^\w.-]+", "-", str(self.model.identity()["name"])).strip("-")
        return f"{self.back_end}-{name}"

    def check_rows(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> None:
        """Raise ValueError where prompts and completions do not belong together, or a prompt is empty."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but completions of {len(completions)}: give one list a prompt.")
        check_prompts(prompts)

    def check_length(self, longest: int, limit: int | None) -> None:
        """Raise ValueError where a prompt with its completion exceeds a context of `limit` tokens."""
        if limit is not None and longest > limit:
            raise ValueError(
                f"A prompt with its completion has {longest} tokens, more than the context of {limit} tokens of "
                f"{self.model.name}: embed with a model of longer context, or shorten the longer of the two."
            )
