"""Sampling with transformers: the reference, and the default without a GPU.

A prompt is prefilled once, all its completions read its keys and values, and rows that finish are replaced by others
(`sampling/refilled.py`). Every row draws from a generator of its own, so a completion depends on its seed and not on its
neighbours (up to the rounding of batched products: none seen in float32, 1-2 % of a state in bfloat16). So any rows may be in
work together, as many as fit the memory and are fast.

Where it stops: one process, one model; beam search and repetition penalties are not part of the method.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qprobe import models
from qprobe.models.keeping import NOTHING, Keep
from qprobe.models.language_model import ModelSpec
from qprobe.models.memory import UsesModel, scores_at_once
from qprobe.models.pace import UNMEASURED, best_rows
from qprobe.models.prefix import check_prompts, law_of
from qprobe.sampling.base import Batch, Completion, Sampler, SamplingSettings, check_seeds
from qprobe.sampling.law import LawCheck, compare, refuse
from qprobe.sampling.local import LocalSampler
from qprobe.sampling.refilled import RefilledBatch
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
        rows_at_once: completions that are decoded together, at least 1, where the model's prompts are shared; None measures once
            what the machine likes best (`qprobe.models.pace`). It changes no completion beyond the rounding of batched products.
        keep: what comes with the completions (`Completion.states`), so that no embedder has to read them again.
        greedy_too: behind the completions of every prompt comes that of temperature 0, with the seed of the first.
    """

    back_end = "hf"

    def __init__(
        self,
        model: ModelSpec,
        settings: SamplingSettings,
        rows_at_once: int | None = None,
        keep: Keep = NOTHING,
        greedy_too: bool = False,
    ) -> None:
        super().__init__(model, settings)
        self.keep = keep
        self.greedy_too = greedy_too
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"sampler rows_at_once is {rows_at_once}: give 1 or more, or null to have it measured.")
        self.rows_at_once = rows_at_once

    def identity(self) -> dict[str, Any]:
        return super().identity() | law_of(self.model)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        """As `Sampler.sample`."""
        check_seeds(prompts, seeds, self.settings.n)
        if not prompts:
            return []
        ((_, completions),) = self.sample_batches([(prompts, seeds)])
        return completions

    def sample_batches(
        self, batches: Iterable[Batch | None], wanted: Callable[[int, int], bool] | None = None
    ) -> Iterator[tuple[int, list[list[Completion]]]]:
        """As `Refills.sample_batches`.

        Args:
            batches: None where there is no more at the moment; it ends when then no row is left in work.
            wanted: of a batch's number and a prompt's place in it, asked after every token: where nobody wants its completions
                any more, those that are not finished end there, with an empty finish_reason.
        """
        language_model = self.passes.run.language_model
        stops, eos = StopTexts(models.load_tokenizer(self.model), self.settings), language_model.eos_token_ids

        def checked() -> Iterator[Batch | None]:
            for batch in batches:
                if batch is None:
                    yield None
                    continue
                prompts, seeds = batch
                check_seeds(prompts, seeds, self.settings.n)
                check_prompts(prompts)
                self.check_length(prompts, language_model.context_length)
                yield prompts, seeds

        def start(prompt: Sequence[int], seed: int) -> Growing:
            return Growing(prompt, seed, eos, stops, keep=self.keep)

        batch = RefilledBatch(
            self.passes, self.settings, start, draw_tokens, self._at_once, wanted, self.keep, self.greedy_too
        )
        for number, rows in batch.complete(checked()):
            yield number, self.finished(rows, self.settings.n + self.greedy_too)

    def beside(self, greedy: Sampler) -> HFSampler | None:
        """A copy that draws the completions of a greedy sampler beside its own (`greedy_too`): prompts are run once for both, and
        the one row that a prompt has of them costs no step of its own. None where these are not its model's at temperature 0.
        """
        law = {name: getattr(self.settings, name) for name in ("n", "temperature", "top_p", "top_k")}
        same = isinstance(greedy, HFSampler) and greedy.model == self.model and greedy.settings.temperature == 0
        if not same or dataclasses.replace(greedy.settings, **law) != self.settings:
            return None
        made = copy.copy(self)
        made.greedy_too = True
        return made

    def warm(self) -> None:
        """Load the model, and measure how many rows it likes, where nobody has said it."""
        if self.rows_at_once is None and self.passes.run.shared:
            _ = self._best

    def _at_once(self, there: int) -> int:
        """How many rows are decoded at once, of so many that are there."""
        if self.rows_at_once is not None:
            return self.rows_at_once
        return UNMEASURED if there <= UNMEASURED else self._best

    @functools.cached_property
    def _best(self) -> int:
        return best_rows(self.passes)

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
