"""Sampling with transformers: the reference, and the default without a GPU.

A prompt is prefilled once, all its completions read its keys and values, and rows leave as they finish. Every row draws
from a generator of its own, so a completion depends on its seed and not on its neighbours (up to the rounding of batched
products: none seen in float32, 1-2 % of a state in bfloat16). So a batch may be cut into passes that fit the memory.

Where it stops: one process, one model; beam search and repetition penalties are not part of the method.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.memory import UsesModel, scores_at_once
from qprobe.models.prefix import PrefixRun, check_prompts, law_of
from qprobe.sampling.base import Completion, SamplingSettings, check_seeds
from qprobe.sampling.law import LawCheck, compare, refuse
from qprobe.sampling.local import LocalSampler
from qprobe.sampling.stopping import Growing, StopTexts

# Nucleus sampling looks at this many likeliest tokens and sorts a row in full only when their mass is short of top_p.
# Sorting 49,152 scores of every row at every step costs more than a 135M-parameter model on a CPU.
CANDIDATES = 256
# What came of comparing this process's samplers with their models.
_checked: dict[ModelSpec, LawCheck] = {}


class HFSampler(UsesModel, LocalSampler):
    """Completions by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
        settings: the sampling law.
    """

    back_end = "hf"

    def identity(self) -> dict[str, Any]:
        return super().identity() | law_of(self.model)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        wanted: Callable[[int], bool] | None = None,
    ) -> list[list[Completion]]:
        """As `Sampler.sample`.

        Args:
            wanted: of a prompt's place, asked after every token: where nobody wants its completions any more, those that are not
                finished end there, with an empty finish_reason.
        """
        check_seeds(prompts, seeds, self.settings.n)
        if not prompts:
            return []
        check_prompts(prompts)
        run, settings = self.passes.run, self.settings
        self.check_length(prompts, run.language_model.context_length)
        n, greedy = settings.n, settings.temperature == 0
        owner = [p for p in range(len(prompts)) for _ in range(n)]
        stops, eos = StopTexts(models.load_tokenizer(self.model), settings), run.language_model.eos_token_ids
        made: dict[int, Growing] = {}

        def need(count: int, width: int, rows: Sequence[int]) -> int:
            return self.passes.footprint.sampling(count, width, len(rows), settings.max_new_tokens, greedy)

        def draw(rows: list[int], used: list[Sequence[int]], places: list[int]) -> None:
            growing = [Growing(prompts[owner[row]], seeds[owner[row]][row % n], eos, stops) for row in rows]
            going_on = None if wanted is None else [functools.partial(wanted, owner[row]) for row in rows]
            _draw(run, used, places, growing, settings, going_on)
            made.update(zip(rows, growing, strict=True))

        self.passes.each(range(len(owner)), owner, prompts, need, draw)
        return self.finished([made[row] for row in range(len(owner))])

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


def _draw(
    run: PrefixRun,
    prompts: Sequence[Sequence[int]],
    owner: Sequence[int],
    rows: Sequence[Growing],
    settings: SamplingSettings,
    wanted: Sequence[Callable[[], bool]] | None = None,
) -> None:
    """Let the rows of a pass grow to their ends, or while they are wanted: row r continues prompt `owner[r]`, prompts in
    rising order."""
    device, length = run.language_model.device, settings.max_new_tokens
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    uniforms = torch.stack([torch.rand(length, generator=own, dtype=torch.float64) for own in generators]).to(device)
    prefix = run.prefill(prompts, logits=True)
    places = torch.tensor(owner)
    assert prefix.logits is not None  # asked for
    logits = prefix.logits[places.to(device)]
    continuation = run.continuation(prefix, places)
    del prefix
    alive = list(range(len(rows)))
    for step in range(length):
        chosen, logprobs = draw_tokens(logits, uniforms[alive, step], settings)
        drawn = enumerate(zip(alive, chosen.tolist(), logprobs.tolist(), strict=True))
        going_on = [
            place
            for place, (row, token, logprob) in drawn
            if rows[row].take(token, logprob) and (wanted is None or wanted[row]())
        ]
        if not going_on:
            return
        if len(going_on) < len(alive):
            kept = torch.tensor(going_on, device=device)
            continuation.keep(kept)
            chosen = chosen[kept]
            alive = [alive[place] for place in going_on]
        output = continuation.extend(chosen[:, None], logits=True)
        assert output.logits is not None  # asked for
        logits = output.logits


def draw_tokens(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """`sample_tokens` for scores of any float type, some rows at a time, with the tokens' untempered log-probabilities.

    Returns: (R,) int64, (R,) float32.
    """
    size = max(1, scores_at_once(logits.device) // logits.shape[1])
    drawn = []
    for part, draws in zip(logits.split(size), uniforms.split(size), strict=True):
        scores = part.float()
        chosen = sample_tokens(scores, draws, settings)
        drawn.append((chosen, scores.log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]))
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
    if not settings.top_k:
        scaled = scaled.log_softmax(dim=1)  # half the time of logsumexp
    values, ids = scaled.topk(count, dim=1)
    if settings.top_k:
        probabilities = values.softmax(dim=1, dtype=torch.float64)
    else:
        probabilities = values.exp().double()
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
