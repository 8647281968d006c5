"""Embedding with vLLM's pooling runner: the states of the final layer, at the last token of prompt + completion.

They equal transformers' `hidden_states[-1]` (tests: 1e-4 in float32). vLLM gives no other layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding.local import LocalEmbedder
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.prefix import check_rows
from qprobe.models.vllm_engine import EngineSettings, UsesEngine


class VLLMEmbedder(UsesEngine, LocalEmbedder):
    """Hidden states of the final layer by vLLM.

    Args:
        model: which model; an engine is started at the first call, and ends the one that sampled.
        layers: the final layer, as -1 or by its number.
        engine: how vLLM is run.
    """

    back_end = "vllm"

    def __init__(
        self,
        model: ModelSpec,
        layers: Sequence[int] = (-1,),
        engine: EngineSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, layers)
        self.engine = EngineSettings.of(engine)

    @property
    def layers(self) -> tuple[int, ...]:
        """The final layer's number. The model's configuration is read for it, its weights are not.

        Raises:
            ValueError: another layer is asked for.
        """
        outline = models.outline(self.model)
        for layer in self._layers:
            if outline.check_layer(layer) != outline.layer_count:
                raise ValueError(
                    f"vLLM gives the states of the final layer of {self.model.name} only ({outline.layer_count}, or -1), "
                    f"not of layer {layer}: use the transformers embedder, embedder=hf."
                )
        return (outline.layer_count,)

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        check_rows(prompts, completions)
        (layer,) = self.layers
        rows = [[*prompt, *ids] for prompt, of_prompt in zip(prompts, completions, strict=True) for ids in of_prompt]
        self.check()
        self.check_length(max(map(len, rows), default=0), self.engine.context_length(self.model))
        if not rows:
            return {layer: torch.zeros(0, models.outline(self.model).width)}
        engine = vllm_engine.start(self.model, self.engine, pooling=True)
        from vllm import PoolingParams

        states: dict[int, Tensor] = {}

        def take(place: int, outputs: Any) -> bool:
            states[place] = outputs.data.float().cpu()
            return False

        engine.run(rows, [PoolingParams(task="embed", use_activation=False) for _ in rows], take)
        return {layer: torch.stack([states[place] for place in range(len(rows))])}
