"""Sampling with transformers: the reference, and the default without a GPU.

A prompt is prefilled once, all its completions read its keys and values, and rows leave as they finish. Every row draws
from a generator of its own, so a completion depends on its seed and not on its neighbours (up to the rounding of batched
products: none seen in float32, 1-2 % of a state in bfloat16). So a batch may be cut into passes that fit the memory.

Where it stops: one process, one model; beam search and repetition penalties are not part of the method.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.memory import SCORES_AT_ONCE, Footprint, Passes
from qprobe.models.prefix import PrefixRun, check_prompts, law_of
from qprobe.sampling.base import Completion, SamplingSettings, check_seeds
from qprobe.sampling.law import Drawn, LawCheck, compare, refuse
from qprobe.sampling.local import LocalSampler
from qprobe.sampling.stopping import StopTexts

# Nucleus sampling looks at this many likeliest tokens and sorts a row in full only when their mass is short of top_p.
# Sorting 49,152 scores of every row at every step costs more than a 135M-parameter model on a CPU.
CANDIDATES = 256
# What came of comparing this process's samplers with their models.
_checked: dict[ModelSpec, LawCheck] = {}


class HFSampler(LocalSampler):
    """Completions by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        settings: the sampling law.
    """

    back_end = "hf"

    def identity(self) -> dict[str, Any]:
        return super().identity() | law_of(self.model)

    def __init__(self, model: ModelSpec, settings: SamplingSettings) -> None:
        super().__init__(model, settings)
        self._run: PrefixRun | None = None
        self._passes: Passes | None = None

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        check_seeds(prompts, seeds, self.settings.n)
        if not prompts:
            return []
        check_prompts(prompts)
        if self._run is None or self._passes is None:
            self._run = PrefixRun(models.load(self.model))
            self._passes = Passes(self._run.language_model)
        run, tokenizer, n = self._run, models.load_tokenizer(self.model), self.settings.n
        self.check_length(prompts, run.language_model.context_length)
        footprint = Footprint(run.language_model, run.shared, run.tokens_per_pass)
        owner = [p for p in range(len(prompts)) for _ in range(n)]
        lengths = [len(prompt) for prompt in prompts]
        completions: dict[int, Completion] = {}
        drawn: dict[int, Drawn] = {}

        def need(rows: Sequence[int]) -> int:
            used = {owner[row] for row in rows}
            width = max(lengths[p] for p in used)
            settings = self.settings
            return footprint.sampling(
                len(used), width, len(rows), settings.max_new_tokens, greedy=settings.temperature == 0
            )

        def draw(rows: list[int]) -> None:
            used = list(dict.fromkeys(owner[row] for row in rows))
            places = {p: place for place, p in enumerate(used)}
            batch = _Batch(
                run,
                tokenizer,
                self.settings,
                [prompts[p] for p in used],
                [places[owner[row]] for row in rows],
                [seeds[owner[row]][row % n] for row in rows],
            )
            completions.update(zip(rows, batch.run(), strict=True))
            drawn.update(zip(rows, batch.drawn(), strict=True))

        self._passes.run(range(len(owner)), owner, lengths, need, draw)
        if not self._drawn:
            self._drawn = [[drawn[p * n + sample] for sample in range(n)] for p in range(len(prompts))]
        return [[completions[p * n + sample] for sample in range(n)] for p in range(len(prompts))]

    def verify(self) -> LawCheck:
        """The first batch compared with the model; samplers of one model in one process share the answer.

        Raises:
            RuntimeError: what was drawn is not the model's.
        """
        if self.model not in _checked:
            check = compare(models.load(self.model), self._drawn)
            refuse(check, self.model)
            tqdm.write(check.sentence(), file=sys.stderr)
            _checked[self.model] = check
        return _checked[self.model]


class _Batch:
    """The completions of one pass in the making: row r continues prompt `owner[r]`, prompts in rising order."""

    def __init__(
        self,
        run: PrefixRun,
        tokenizer: models.Tokenizer,
        settings: SamplingSettings,
        prompts: Sequence[Sequence[int]],
        owner: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        self.run_model = run
        self.settings = settings
        self.prompts = prompts
        self.owner = owner
        self.seeds = seeds
        count = len(seeds)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.ends: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.finished: list[Completion | None] = [None] * count
        self.eos = run.language_model.eos_token_ids
        self.stops = StopTexts(tokenizer, settings)

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
        del prefix
        alive = list(range(len(self.seeds)))
        for step in range(self.settings.max_new_tokens):
            chosen, logprobs = draw_tokens(logits, uniforms[alive, step], self.settings)
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

    def drawn(self) -> list[Drawn]:
        """The rows with all their tokens."""
        return [
            Drawn(self.prompts[p], [*tokens, *end], float(sum(logprobs)), logprobs)
            for p, tokens, end, logprobs in zip(self.owner, self.tokens, self.ends, self.logprobs, strict=True)
        ]

    def _take(self, alive: list[int], tokens: list[int], logprobs: list[float]) -> list[int]:
        """Add a token to every living row; returns the places (in `alive`) of the rows that go on."""
        going_on = []
        for place, (row, token, logprob) in enumerate(zip(alive, tokens, logprobs, strict=True)):
            self.logprobs[row].append(logprob)
            if token in self.eos:
                self.ends[row] = [token]
                self._finish(row, "stop")
                continue
            self.tokens[row].append(token)
            if self.stops.reached(self.prompts[self.owner[row]], self.tokens[row]):
                self._finish(row, "stop")
            elif len(self.tokens[row]) == self.settings.max_new_tokens:
                self._finish(row, "length")
            else:
                going_on.append(place)
        return going_on

    def _finish(self, row: int, reason: str) -> None:
        text, kept = self.stops.cut(self.prompts[self.owner[row]], self.tokens[row])
        logprob = float(sum(self.logprobs[row]))
        self.finished[row] = Completion(text, self.tokens[row][:kept], reason, logprob, self.seeds[row])


def draw_tokens(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """`sample_tokens` for scores of any float type, some rows at a time, with the tokens' untempered log-probabilities.

    Returns: (R,) int64, (R,) float32.
    """
    size = max(1, SCORES_AT_ONCE // logits.shape[1])
    drawn = []
    for part, draws in zip(logits.split(size), uniforms.split(size), strict=True):
        scores = part.float()
        chosen = sample_tokens(scores, draws, settings)
        drawn.append((chosen, scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(dim=1)))
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])


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
