"""Embedding with transformers: the reference, and the default without a GPU.

A prompt is run once for all its completions, only the layers up to the highest asked for are run, and several layers come
from one pass. The states equal `output_hidden_states` of the joined sequence (tests: 1e-4 in float32).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding.base import LIKELIHOOD
from qprobe.embedding.local import LocalEmbedder
from qprobe.models.keeping import Keep
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS, COLUMNS_VERSION, LikelihoodColumns
from qprobe.models.memory import UsesModel
from qprobe.models.prefix import check_rows, law_of, parts_of
from qprobe.models.question import QUESTION_COLUMNS, Question


class HFEmbedder(UsesModel, LocalEmbedder):
    """Hidden states by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        layers: hidden layers; negative counts from the last. The paper reads layer 26 of 32.
        likelihood: whether the same pass reads the likelihood columns too; it then runs all layers and the output head.
        ending: text that ends a completion where it is right to end it, for the columns that say how likely its end is, such as
            a closing fence; None is the tokenizer's end of text.
        question: what the model is asked of its completion behind it, for two more columns (`qprobe.models.question`); None asks
            nothing, and saves the question's tokens at every completion.
    """

    back_end = "hf"

    def __init__(
        self,
        model: ModelSpec,
        layers: Sequence[int] = (-1,),
        likelihood: bool = False,
        ending: str | None = None,
        question: str | None = None,
    ) -> None:
        super().__init__(model, layers)
        self.likelihood = likelihood
        self.ending = ending
        self.question = question

    def likelihood_identity(self) -> dict[str, Any]:
        asked = {} if self.question is None else {"question": self.question}
        return {"columns": COLUMNS_VERSION, "ending": self.ending} | asked

    def column_names(self) -> tuple[str, ...]:
        return COLUMNS if self.question is None else (*COLUMNS, *QUESTION_COLUMNS)

    def identity(self) -> dict[str, Any]:
        return super().identity() | law_of(self.model)

    @property
    def layers(self) -> tuple[int, ...]:
        """Counted from 0. A negative layer needs the model's number of layers, which its configuration tells."""
        if all(layer >= 0 for layer in self._layers):
            return tuple(dict.fromkeys(self._layers))
        outline = models.outline(self.model)
        return tuple(dict.fromkeys(outline.check_layer(layer) for layer in self._layers))

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        check_rows(prompts, completions)
        run, footprint = self.passes.run, self.passes.footprint
        layers = sorted({run.language_model.check_layer(layer) for layer in self.layers})
        owner = [p for p, of_prompt in enumerate(completions) for _ in of_prompt]
        rows = [list(ids) for of_prompt in completions for ids in of_prompt]
        longest_row = max((len(prompts[p]) + len(row) for p, row in zip(owner, rows, strict=True)), default=0)
        behind = len(self._columns.behind) if self.likelihood else 0
        self.check_length(longest_row + behind, run.language_model.context_length)
        if self.likelihood:
            found = self._columns.read(prompts, completions, layers)
            return {**found.states, LIKELIHOOD: torch.from_numpy(found.columns).float()}
        states = {layer: torch.empty(len(rows), footprint.width) for layer in layers}

        def need(count: int, width: int, chosen: Sequence[int]) -> int:
            return footprint.reading(count, width, [len(rows[row]) for row in chosen], layers)

        def read(chosen: list[int], used: list[Sequence[int]], own: list[int]) -> None:
            prefix = run.prefill(used, layers)
            for layer in layers:  # rows that stay empty keep the state of their prompt's last token
                states[layer][chosen] = prefix.states[layer][own].float().cpu()
            for part in parts_of([len(rows[row]) for row in chosen], run.tokens_per_pass):
                read = [rows[chosen[r]] for r in part]
                last = torch.tensor([len(row) for row in read]).cumsum(0) - 1
                for layer, values in run.read(prefix, read, [own[r] for r in part], layers).states.items():
                    states[layer][[chosen[r] for r in part]] = values[last.to(values.device)].float().cpu()

        self.passes.each(range(len(rows)), owner, prompts, need, read)
        return states

    def is_drawn(self, layers: Sequence[int]) -> bool:
        """Whether a sampler of the same model has these of the embedder's layers in its hands while it draws.

        What is read behind a completion, an ending of several tokens or a question, is not drawn. Nothing is loaded, but a
        tokenizer for an ending.
        """
        return LIKELIHOOD not in layers or not self._columns.behind

    def kept(self, layers: Sequence[int]) -> Keep:
        """What the sampler is to keep where these layers are drawn, so that they need not be read.

        Raises:
            ValueError: the model has no such layer.
        """
        outline = models.outline(self.model)
        hidden = tuple(outline.check_layer(layer) for layer in layers if layer != LIKELIHOOD)
        return Keep(hidden, self._columns.ending[0], LIKELIHOOD) if LIKELIHOOD in layers else Keep(hidden)

    @functools.cached_property
    def _columns(self) -> LikelihoodColumns:
        ending = None if self.ending is None else self.encode_completion(self.ending)
        if self.question is None:
            return LikelihoodColumns(self.model, ending)
        return LikelihoodColumns(
            self.model, ending, Question.of(self.question, models.load_tokenizer(self.model), self.ending)
        )
