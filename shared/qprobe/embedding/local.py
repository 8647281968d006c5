"""What the embedders share that run a model themselves (transformers, vLLM): its tokenizer, its context, their identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from qprobe.embedding.base import path_name
from qprobe.models.language_model import ModelSpec
from qprobe.models.loading import OwnTokens


class LocalEmbedder(OwnTokens):
    """An embedder that takes token ids of the model's tokenizer.

    Args:
        model: which model.
        layers: hidden layers; negative counts from the last.
    """

    back_end: ClassVar[str]

    def __init__(self, model: ModelSpec, layers: Sequence[int] = (-1,)) -> None:
        if not layers:
            raise ValueError("The embedder was given no layers: name at least one, -1 is the last.")
        self.model = model
        self._layers = tuple(layers)

    def identity(self) -> dict[str, Any]:
        return {"embedder": self.back_end, "model": self.model.identity(), "token": "last"}

    def folder_name(self) -> str:
        return path_name(self.back_end, str(self.model.identity()["name"]))

    def check_length(self, longest: int, limit: int | None) -> None:
        """Raise ValueError where a prompt with its completion exceeds a context of `limit` tokens."""
        if limit is not None and longest > limit:
            raise ValueError(
                f"A prompt with its completion has {longest} tokens, more than the context of {limit} tokens of "
                f"{self.model.name}: embed with a model of longer context, or shorten the longer of the two."
            )
