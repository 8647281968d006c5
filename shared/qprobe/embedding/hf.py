"""Embedding with transformers: the reference, and the default without a GPU.

A prompt is run once for all its completions, only the layers up to the highest asked for are run, and several layers come
from one pass. The states equal `output_hidden_states` of the joined sequence (tests: 1e-4 in float32).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qprobe import models
from qprobe.models import ModelSpec
from qprobe.prefix import Prefix, PrefixRun


class HFEmbedder:
    """Hidden states by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        layers: hidden layers; negative counts from the last. The paper reads layer 26 of 32.
        tokens_per_pass: completion tokens, padding included, that one forward pass may hold. 8192 need about 0.2 GB at
            135M parameters, 2 GB at 7B.
    """

    def __init__(self, model: ModelSpec, layers: Sequence[int] = (-1,), tokens_per_pass: int = 8192) -> None:
        if not layers:
            raise ValueError("The embedder was given no layers: name at least one, -1 is the last.")
        if tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass is {tokens_per_pass}: at least 1 is needed.")
        self.model = model
        self._layers = tuple(layers)
        self.tokens_per_pass = tokens_per_pass
        self._run: PrefixRun | None = None

    def identity(self) -> dict[str, Any]:
        return {"embedder": "hf", "model": self.model.identity(), "token": "last"}

    @property
    def layers(self) -> tuple[int, ...]:
        """Counted from 0. A negative layer needs the model's number of layers, so the model is loaded for it."""
        if all(layer >= 0 for layer in self._layers):
            return tuple(dict.fromkeys(self._layers))
        language_model = models.load(self.model)
        return tuple(dict.fromkeys(language_model.check_layer(layer) for layer in self._layers))

    def folder_name(self) -> str:
        name = re.sub(r"[^\w.-]+", "-", str(self.model.identity()["name"])).strip("-")
        return f"hf-{name}"

    def tokenizer_fingerprint(self) -> str:
        return models.load_tokenizer(self.model).fingerprint()

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return models.load_tokenizer(self.model).encode_prompt(text, templated)

    def encode_completion(self, text: str) -> list[int]:
        return models.load_tokenizer(self.model).encode_completion(text)

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but completions of {len(completions)}: give one list a prompt.")
        if self._run is None:
            self._run = PrefixRun(models.load(self.model))
        layers = sorted({self._run.language_model.check_layer(layer) for layer in self.layers})
        owner = [p for p, of_prompt in enumerate(completions) for _ in of_prompt]
        rows = [list(ids) for of_prompt in completions for ids in of_prompt]
        self._check_length(prompts, rows, owner)
        prefix = self._run.prefill(prompts, layers)
        # Rows that stay empty keep the state of their prompt's last token.
        states = {layer: prefix.states[layer][owner].float().cpu() for layer in layers}
        for chosen in self._passes(rows):
            for layer, values in self._extend(
                prefix, [rows[r] for r in chosen], [owner[r] for r in chosen], layers
            ).items():
                states[layer][chosen] = values
        return states

    def _passes(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows of similar length together, each pass within `tokens_per_pass`; empty rows need none."""
        batch: list[int] = []
        for row in sorted((r for r in range(len(rows)) if rows[r]), key=lambda r: len(rows[r])):
            if batch and (len(batch) + 1) * len(rows[row]) > self.tokens_per_pass:
                yield sorted(batch)
                batch = []
            batch.append(row)
        if batch:
            yield sorted(batch)

    def _extend(
        self, prefix: Prefix, rows: Sequence[Sequence[int]], owner: Sequence[int], layers: Sequence[int]
    ) -> dict[int, Tensor]:
        assert self._run is not None  # embed() made it
        device = self._run.language_model.device
        lengths = torch.tensor([len(r) for r in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        continuation = self._run.continuation(prefix, torch.tensor(owner))
        states = continuation.extend(ids.to(device), layers).states
        places = torch.arange(len(rows), device=device)
        last = (lengths - 1).to(device)
        return {
            layer: values[places.to(values.device), last.to(values.device)].float().cpu()
            for layer, values in states.items()
        }

    def _check_length(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], owner: Sequence[int]
    ) -> None:
        assert self._run is not None  # embed() made it
        limit = self._run.language_model.context_length
        longest = max((len(prompts[p]) + len(row) for p, row in zip(owner, rows, strict=True)), default=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"A prompt with its completion has {longest} tokens, more than the context of {limit} tokens of "
                f"{self.model.name}: embed with a model of longer context or shorten the prompt."
            )
