"""Sampling with vLLM: the choice for a GPU.

Every completion is a request of its own with its own seed; the prompt's keys and values are shared by vLLM's prefix cache.
Prompts go in as token ids and tokens come out: stop texts are watched here, by the rules of the transformers sampler, because
vLLM's own would end a completion that begins with one.

Equal seeds give equal completions as long as rounding does: batch shape moves bits, so in bfloat16 a resumed run may draw
others for what it had not yet written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qprobe import models, vllm_engine
from qprobe.models import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling.base import Completion, SamplingSettings
from qprobe.sampling.stopping import StopTexts
from qprobe.settings import build
from qprobe.vllm_engine import EngineSettings

# vLLM raises a temperature below this to it.
LOWEST_TEMPERATURE = 0.01


class VLLMSampler:
    """Completions by vLLM.

    Args:
        model: which model; an engine is started at the first call and shared with samplers of the same model.
        settings: the sampling law.
        engine: how vLLM is run.

    Raises:
        ValueError: a temperature that vLLM would change.
    """

    def __init__(
        self, model: ModelSpec, settings: SamplingSettings, engine: EngineSettings | Mapping[str, Any] | None = None
    ) -> None:
        if 0 < settings.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"sampling: vLLM draws at temperature {LOWEST_TEMPERATURE} at least, not {settings.temperature}: use 0 for "
                "greedy decoding."
            )
        self.model = model
        self.settings = settings
        self.engine = engine if isinstance(engine, EngineSettings) else build(EngineSettings, engine or {}, "engine")

    def identity(self) -> dict[str, Any]:
        return {"sampler": "vllm", "model": self.model.identity(), **dataclasses.asdict(self.settings)}

    def prompt_identity(self) -> dict[str, Any]:
        identity = self.model.identity()
        del identity["dtype"]  # rounds the states, leaves the tokens
        return identity

    def tokenizer_fingerprint(self) -> str:
        return models.load_tokenizer(self.model).fingerprint()

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        return models.load_tokenizer(self.model).render_prompt(prompt)

    def check(self) -> None:
        """Raise ModuleNotFoundError where vLLM is missing, before any work."""
        vllm_engine.check_installed()

    def close(self) -> None:
        """Give back the engine's memory; the next call starts it again."""
        vllm_engine.shut_down()

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        n = self.settings.n
        if len(prompts) != len(seeds) or any(len(s) != n for s in seeds):
            raise ValueError(f"{len(prompts)} prompts need as many lists of {n} seeds; {len(seeds)} were given.")
        if not prompts:
            return []
        vllm_engine.check_installed()
        self._check_length(prompts)
        engine = vllm_engine.start(self.model, self.engine, pooling=False)
        stops = StopTexts(models.load_tokenizer(self.model), self.settings.stop)
        eos = models.outline(self.model).eos_token_ids
        rows = [
            _Row(prompt, seed, self.settings.max_new_tokens, eos, stops)
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
            for seed in of_prompt
        ]
        params = [self._params(row.seed, eos) for row in rows]
        engine.run([row.prompt for row in rows], params, lambda place, outputs: rows[place].take(outputs[0]))
        completions = [row.completion() for row in rows]
        return [completions[p * n : (p + 1) * n] for p in range(len(prompts))]

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

    def _check_length(self, prompts: Sequence[Sequence[int]]) -> None:
        longest, limit = max(map(len, prompts), default=0), self.engine.context_length(self.model)
        if limit is not None and longest + self.settings.max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {longest} tokens with max_new_tokens={self.settings.max_new_tokens} exceeds the context of "
                f"{limit} tokens of {self.model.name}: shorten the prompt or lower max_new_tokens."
            )


class _Row:
    """A completion in the making."""

    def __init__(
        self, prompt: Sequence[int], seed: int, max_new_tokens: int, eos: frozenset[int], stops: StopTexts
    ) -> None:
        self.prompt = prompt
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.stops = stops
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""

    def take(self, output: Any) -> bool:
        """Add what vLLM drew, token by token; returns whether the completion goes on."""
        for token, of_token in zip(output.token_ids, output.logprobs, strict=True):
            if token in self.eos:
                self.reason = "stop"
                return False
            self.tokens.append(token)
            self.logprobs.append(of_token[token].logprob)
            if self.stops.reached(self.prompt, self.tokens):
                self.reason = "stop"
                return False
            if len(self.tokens) == self.max_new_tokens:
                self.reason = "length"
                return False
        return True

    def completion(self) -> Completion:
        if not self.reason:
            raise RuntimeError(
                f"vLLM ended the completion of seed {self.seed} after {len(self.tokens)} tokens, unasked."
            )
        text, kept = self.stops.cut(self.prompt, self.tokens)
        return Completion(text, self.tokens[:kept], self.reason, float(sum(self.logprobs[:kept])), self.seed)
