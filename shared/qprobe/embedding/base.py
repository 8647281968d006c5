"""What every embedder promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Embedder(Protocol):
    """A back end that embeds prompt + completion: phi(x, a) of the paper."""

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings except the layer (model, which token); cheap: nothing is loaded."""

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
