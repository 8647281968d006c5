"""What every embedder promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Embedder(Protocol):
    """A back end that embeds prompt + completion: phi(x, a) of the paper."""

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings except the layer (model, which token); cheap: nothing is loaded."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers that it reads, counted from 0."""

    def folder_name(self) -> str:
        """A short name for the run folder."""

    def tokenizer_fingerprint(self) -> str:
        """Equal for back ends whose token ids mean the same."""

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        """Token ids of a rendered prompt, for text that another tokenizer made."""

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion by itself."""

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        """The hidden states at the last token of every completion.

        Args:
            prompts: P lists of token ids.
            completions: for every prompt, the token ids of its completions; an empty completion reads the last prompt token.

        Returns:
            layer -> (N, D) float32 on the CPU, completions of the first prompt first. Layers count from 0, the token
            embeddings, to the model's number of layers, whose states are normed (transformers' `hidden_states`).
        """
