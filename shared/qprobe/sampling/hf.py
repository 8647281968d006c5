"""Sampling with transformers: the reference, and the default without a GPU.

A batch is prefilled once, all completions of a prompt read its keys and values, and rows leave as they finish. Every row
draws from a generator of its own, so a completion depends on its seed and not on its neighbours (up to the rounding of
batched products: none seen in float32, 1-2 % of a state in bfloat16).

Where it stops: one process, one model; beam search and repetition penalties are not part of the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qprobe import models
from qprobe.models import LanguageModel, ModelSpec
from qprobe.prefix import PrefixRun
from qprobe.prompts import Prompt
from qprobe.sampling.base import Completion, SamplingSettings
from qprobe.sampling.stopping import StopTexts

# Nucleus sampling looks at this many likeliest tokens and sorts a row in full only when their mass is short of top_p.
# Sorting 49,152 scores of every row at every step costs more than a 135M-parameter model on a CPU.
CANDIDATES = 256


class HFSampler:
    """Completions by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        settings: the sampling law.
    """

    def __init__(self, model: ModelSpec, settings: SamplingSettings) -> None:
        self.model = model
        self.settings = settings
        self._run: PrefixRun | None = None

    def identity(self) -> dict[str, Any]:
        return {"sampler": "hf", "model": self.model.identity(), **dataclasses.asdict(self.settings)}

    def prompt_identity(self) -> dict[str, Any]:
        identity = self.model.identity()
        del identity["dtype"]  # rounds the states, leaves the tokens
        return identity

    def tokenizer_fingerprint(self) -> str:
        return models.load_tokenizer(self.model).fingerprint()

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        return models.load_tokenizer(self.model).render_prompt(prompt)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        if len(prompts) != len(seeds) or any(len(s) != self.settings.n for s in seeds):
            raise ValueError(
                f"{len(prompts)} prompts need as many lists of {self.settings.n} seeds; {len(seeds)} were given."
            )
        if not prompts:
            return []
        if self._run is None:
            self._run = PrefixRun(models.load(self.model))
        language_model = self._run.language_model
        self._check_length(prompts, language_model)
        batch = _Batch(self._run, models.load_tokenizer(self.model), self.settings, prompts, seeds)
        completions = batch.run()
        n = self.settings.n
        return [completions[p * n : (p + 1) * n] for p in range(len(prompts))]

    def _check_length(self, prompts: Sequence[Sequence[int]], language_model: LanguageModel) -> None:
        longest, limit = max(map(len, prompts), default=0), language_model.context_length
        if limit is not None and longest + self.settings.max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {longest} tokens with max_new_tokens={self.settings.max_new_tokens} exceeds the context of "
                f"{limit} tokens of {self.model.name}: shorten the prompt or lower max_new_tokens."
            )


class _Batch:
    """The completions of one batch in the making."""

    def __init__(
        self,
        run: PrefixRun,
        tokenizer: models.Tokenizer,
        settings: SamplingSettings,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
    ) -> None:
        self.run_model = run
        self.settings = settings
        self.prompts = prompts
        self.seeds = [seed for of_prompt in seeds for seed in of_prompt]
        count = len(self.seeds)
        self.owner = [row // settings.n for row in range(count)]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.finished: list[Completion | None] = [None] * count
        self.eos = run.language_model.eos_token_ids
        self.stops = StopTexts(tokenizer, settings.stop)

    def run(self) -> list[Completion]:
        device = self.run_model.language_model.device
        uniforms = torch.stack(
            [
                torch.rand(
                    self.settings.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                )
                for seed in self.seeds
            ]
        ).to(device)
        prefix = self.run_model.prefill(self.prompts, logits=True)
        owner = torch.tensor(self.owner)
        assert prefix.logits is not None  # asked for
        logits = prefix.logits[owner.to(device)]
        continuation = self.run_model.continuation(prefix, owner)
        alive = list(range(len(self.seeds)))
        for step in range(self.settings.max_new_tokens):
            scores = logits.float()
            chosen = sample_tokens(scores, uniforms[alive, step], self.settings)
            logprobs = scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(dim=1)
            going_on = self._take(alive, chosen.tolist(), logprobs.tolist())
            if not going_on:
                break
            if len(going_on) < len(alive):
                rows = torch.tensor(going_on, device=device)
                continuation.keep(rows)
                chosen = chosen[rows]
                alive = [alive[i] for i in going_on]
            output = continuation.extend(chosen[:, None], logits=True)
            assert output.logits is not None  # asked for
            logits = output.logits
        completions = [completion for completion in self.finished if completion is not None]
        assert len(completions) == len(self.seeds)
        return completions

    def _take(self, alive: list[int], tokens: list[int], logprobs: list[float]) -> list[int]:
        """Add a token to every living row; returns the places (in `alive`) of the rows that go on."""
        going_on = []
        for place, (row, token, logprob) in enumerate(zip(alive, tokens, logprobs, strict=True)):
            if token in self.eos:
                self._finish(row, "stop")
                continue
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            if self.stops.reached(self.prompts[self.owner[row]], self.tokens[row]):
                self._finish(row, "stop")
            elif len(self.tokens[row]) == self.settings.max_new_tokens:
                self._finish(row, "length")
            else:
                going_on.append(place)
        return going_on

    def _finish(self, row: int, reason: str) -> None:
        text, kept = self.stops.cut(self.prompts[self.owner[row]], self.tokens[row])
        logprob = float(sum(self.logprobs[row][:kept]))
        self.finished[row] = Completion(text, self.tokens[row][:kept], reason, logprob, self.seeds[row])


def sample_tokens(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token a row from the tempered, truncated law, by inverting its distribution function.

    Args:
        logits: (R, V) float32.
        uniforms: (R,) float64 in [0, 1), one draw a row.
        settings: temperature, top_k, top_p. Among equal scores at the edge of the nucleus the order of `topk` decides.

    Returns: (R,) int64.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=1)
    scaled = logits / settings.temperature
    vocabulary = logits.shape[1]
    if settings.top_k == 0 and settings.top_p == 1:
        return _invert(scaled.softmax(dim=1, dtype=torch.float64), uniforms)
    count = min(settings.top_k or CANDIDATES, vocabulary)
    values, ids = scaled.topk(count, dim=1)
    if settings.top_k:
        probabilities = values.softmax(dim=1, dtype=torch.float64)
    else:
        probabilities = (values - scaled.logsumexp(dim=1, keepdim=True)).exp().double()
        short = (probabilities.sum(dim=1) < settings.top_p).nonzero()[:, 0]
        if len(short) and count < vocabulary:
            chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            full = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            full[short] = False
            chosen[full] = _nucleus(probabilities[full], ids[full], uniforms[full], settings.top_p)
            order = scaled[short].sort(dim=1, descending=True)
            chosen[short] = _nucleus(
                order.values.softmax(dim=1, dtype=torch.float64), order.indices, uniforms[short], settings.top_p
            )
            return chosen
    return _nucleus(probabilities, ids, uniforms, settings.top_p)


def _nucleus(probabilities: Tensor, ids: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """A draw from the smallest set of leading tokens whose mass reaches top_p. Probabilities fall along each row."""
    mass_before = probabilities.cumsum(dim=1) - probabilities
    kept = probabilities.masked_fill(mass_before >= top_p, 0.0)
    return ids.gather(1, _invert(kept, uniforms)[:, None])[:, 0]


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index where each row's distribution function passes its uniform; rows need not sum to 1."""
    cumulative = probabilities.cumsum(dim=1)
    index = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    # A uniform rounded up to the total would fall behind the last token that has any mass.
    last = probabilities.shape[1] - 1 - (probabilities.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(index, last)
