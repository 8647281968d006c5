"""What every embedder promises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

# The number of the likelihood columns among an embedder's layers, which count from 0.
LIKELIHOOD = -1


class ReadsTokens(Protocol):
    """What reads the token ids of its own tokenizer: an embedder, or a model that says how likely a completion is."""

    def tokenizer_fingerprint(self) -> str:
        """Equal for back ends whose token ids mean the same."""

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        """Token ids of a rendered prompt, for text that another tokenizer made."""

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion by itself."""


class Embedder(ReadsTokens, Protocol):
    """A back end that embeds prompt + completion: phi(x, a) of the paper."""

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings except the layer (model, which token); cheap: nothing is loaded."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers that it reads, counted from 0."""

    def folder_name(self) -> str:
        """A short name for the run folder."""

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


@runtime_checkable
class GivesLikelihoods(Protocol):
    """An embedder whose `embed` may also give likelihood columns, as the layer `LIKELIHOOD`: (N, C) float32."""

    likelihood: bool
    """Whether it does; whoever does not read them may turn them off."""

    def column_names(self) -> tuple[str, ...]:
        """The names of the C columns."""

    def likelihood_identity(self) -> dict[str, Any]:
        """What decides the columns besides the embedder's own identity."""


def columns_identity(embedder: Embedder, layers: Sequence[int]) -> dict[str, Any]:
    """What decides the likelihood columns among layers that are read; empty where they are not."""
    return embedder.likelihood_identity() if LIKELIHOOD in layers and isinstance(embedder, GivesLikelihoods) else {}


def tables_of(embedder: Embedder) -> list[int]:
    """The layers that an embedder gives, the likelihood columns among them."""
    columns = isinstance(embedder, GivesLikelihoods) and embedder.likelihood
    return [*embedder.layers, *([LIKELIHOOD] if columns else [])]


def path_name(back_end: str, model: str) -> str:
    """Back end and model as the name of a folder."""
    return back_end + "-" + re.sub(r"[^\w.-]+", "-", model).strip("-")


def tokens_to_read(
    reader: ReadsTokens,
    sampled_by: str | None,
    prompt: tuple[str, list[int]],
    completions: Sequence[tuple[str, list[int] | None]],
    *,
    templated: bool,
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt and of its completions that are embedded, or otherwise read.

    Args:
        sampled_by: the fingerprint of the sampler's tokenizer, or None. Where it is the reader's own, token ids are taken as
            they are. Otherwise, or where a completion has none, prompt and completions are tokenised once, each by itself.
        prompt: as rendered, and its token ids.
        completions: text and token ids of each, or None for the latter.
        templated: whether the prompt was rendered by a chat template, special tokens included. Never so where an API sampled
            (`sampled_by` is None): it renders by itself, and what is known of the prompt is plain text.
    """
    text, prompt_ids = prompt
    given = [ids for _, ids in completions if ids is not None]
    same = sampled_by is not None and sampled_by == reader.tokenizer_fingerprint()
    templated = templated and sampled_by is not None
    if same and len(given) == len(completions):
        return prompt_ids, given
    return reader.encode_prompt(text, templated), [reader.encode_completion(words) for words, _ in completions]
