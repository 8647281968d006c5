"""What the samplers share that run a model themselves (transformers, vLLM): its tokenizer, its context, their identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling.base import LOGPROB, Completion, SamplingSettings
from qprobe.sampling.law import Drawn
from qprobe.sampling.stopping import Growing


class LocalSampler:
    """A sampler whose prompts are token ids of the model's tokenizer.

    Args:
        model: which model.
        settings: the sampling law.
    """

    back_end: ClassVar[str]

    def __init__(self, model: ModelSpec, settings: SamplingSettings) -> None:
        self.model = model
        self.settings = settings
        self._drawn: list[list[Drawn]] = []

    def draws_from(self, spec: ModelSpec) -> bool:
        """Whether this is the sampler's model, on whatever device."""
        return spec.identity() == self.model.identity()

    def drawn(self, tokenizer: models.Tokenizer | None = None) -> list[list[Drawn]]:
        """The completions of the first batch, by prompt, as they were drawn."""
        return self._drawn

    def finished(self, rows: Sequence[Growing], n: int) -> list[list[Completion]]:
        """Completions of every prompt, n rows each; those of the first batch are remembered as they were drawn."""
        own = [rows[start : start + n] for start in range(0, len(rows), n)]
        self._drawn = self._drawn or [[row.drawn() for row in of_prompt] for of_prompt in own]
        return [[row.completion() for row in of_prompt] for of_prompt in own]

    def identity(self) -> dict[str, Any]:
        identity = {"sampler": self.back_end, "model": self.model.identity(), **self.settings.identity()}
        return identity | {"logprob": LOGPROB}

    def prompt_identity(self) -> dict[str, Any]:
        identity = self.model.identity()
        del identity["dtype"]  # rounds the states, leaves the tokens; so does the way of attention
        identity.pop("attention", None)
        return identity

    def tokenizer_fingerprint(self) -> str:
        return models.load_tokenizer(self.model).fingerprint()

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        return models.load_tokenizer(self.model).render_prompt(prompt)

    def check_length(self, prompts: Sequence[Sequence[int]], limit: int | None) -> None:
        """Raise ValueError where a prompt and its longest completion exceed a context of `limit` tokens."""
        longest = max(map(len, prompts), default=0)
        if limit is not None and longest + self.settings.max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {longest} tokens with max_new_tokens={self.settings.max_new_tokens} exceeds the context of "
                f"{limit} tokens of {self.model.name}: shorten the prompt or lower max_new_tokens."
            )
