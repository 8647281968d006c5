"""Sampling with vLLM: the choice for a GPU.

Every completion is a request of its own with its own seed; the prompt's keys and values are shared by vLLM's prefix cache.
Prompts go in as token ids and tokens come out: stop texts are watched here, by the rules of the transformers sampler, because
vLLM's own would end a completion that begins with one.

Equal seeds give equal completions as long as rounding does: batch shape moves bits, so in bfloat16 a resumed run may draw
others for what it had not yet written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qprobe import models
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.prefix import check_prompts
from qprobe.models.vllm_engine import EngineSettings, UsesEngine
from qprobe.sampling.base import Completion, SamplingSettings, check_seeds
from qprobe.sampling.local import LocalSampler
from qprobe.sampling.stopping import Growing, StopTexts

# vLLM raises a temperature below this to it.
_LOWEST_TEMPERATURE = 0.01


class VLLMSampler(UsesEngine, LocalSampler):
    """Completions by vLLM.

    Args:
        model: which model; an engine is started at the first call and shared with samplers of the same model.
        settings: the sampling law.
        engine: how vLLM is run.

    Raises:
        ValueError: a temperature that vLLM would change.
    """

    back_end = "vllm"

    def __init__(
        self, model: ModelSpec, settings: SamplingSettings, engine: EngineSettings | Mapping[str, Any] | None = None
    ) -> None:
        if 0 < settings.temperature < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"sampling: vLLM draws at temperature {_LOWEST_TEMPERATURE} at least, not {settings.temperature}: use 0 for "
                "greedy decoding."
            )
        super().__init__(model, settings)
        self.engine = EngineSettings.of(engine)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        check_seeds(prompts, seeds, self.settings.n)
        if not prompts:
            return []
        self.check()
        check_prompts(prompts)
        self.check_length(prompts, self.engine.context_length(self.model))
        engine = vllm_engine.start(self.model, self.engine, pooling=False)
        stops = StopTexts(models.load_tokenizer(self.model), self.settings)
        eos = models.outline(self.model).eos_token_ids
        rows = [
            Growing(prompt, seed, eos, stops)
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
            for seed in of_prompt
        ]
        params = [self._params(row.seed, eos) for row in rows]
        engine.run([row.prompt for row in rows], params, lambda place, outputs: _take(rows[place], outputs[0]))
        for row in rows:
            if not row.reason:
                raise RuntimeError(
                    f"vLLM ended the completion of seed {row.seed} after {len(row.tokens)} tokens, unasked."
                )
        return self.finished(rows, self.settings.n)

    def _params(self, seed: int, eos: frozenset[int]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = self.settings.temperature == 0
        return SamplingParams(
            temperature=self.settings.temperature,
            top_p=1.0 if greedy else self.settings.top_p,
            top_k=0 if greedy else self.settings.top_k,
            seed=None if greedy else seed,
            max_tokens=self.settings.max_new_tokens,
            # Every end of sequence that the model and its tokenizer name, not only the one that vLLM would pick.
            stop_token_ids=sorted(eos),
            ignore_eos=True,
            logprobs=0,  # of the token that was drawn, and no others
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _take(row: Growing, output: Any) -> bool:
    """Add what vLLM drew, token by token; returns whether the completion goes on."""
    return all(
        row.take(token, of_token[token].logprob)
        for token, of_token in zip(output.token_ids, output.logprobs, strict=True)
    )
