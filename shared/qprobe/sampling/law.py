"""Is what a sampler drew the model's? A few completions of its first batch are read once more by the model itself.

One row at a time, unpadded, with the attention that transformers gives the model: nothing that makes the sampler fast takes
part. Compared are the log-probabilities with which tokens were drawn: their mean, in nats a token, and the token furthest off. A
fault may be rare and large: with attention scores in bfloat16 Qwen2.5-Coder drew, in three of twenty completions, a token that
the model itself finds 14 nats less likely, and all others were right to .3 nats, which rounding costs anyway. A mean hides that.

Where it stops: it sees the scores that were drawn from, not the draws (those are tested against the law itself), and a fault that
shows in fewer than one in ten completions escapes the 24 that are read more often than once in ten runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.prefix import plain_attention
from qprobe.models.tokenizer import Tokenizer

# Nats a token beyond which the laws differ, on top of three standard errors; and nats by which no single token may be off.
LIMIT, _ERRORS, _LARGEST = 0.05, 3.0, 2.0
# Completions that are read, of as many prompts as there are; and how many at most where the first ones leave it open.
_COMPLETIONS, _MOST = 24, 72


@dataclass(frozen=True)
class Drawn:
    """A completion as it was drawn.

    Args:
        prompt: token ids.
        tokens: all that were drawn, the end of sequence and stop texts included.
        logprob: untempered, summed over `tokens`, in nats.
        each: that of every token; empty where only the sum is known.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprob: float
    each: Sequence[float] = ()


@runtime_checkable
class TellsDrawn(Protocol):
    """A sampler that remembers the completions of its first batch."""

    def draws_from(self, spec: ModelSpec) -> bool:
        """Whether they are from this model."""

    def drawn(self, tokenizer: Tokenizer) -> list[list[Drawn]]:
        """By prompt. `tokenizer` is for those that are known as text only."""


@runtime_checkable
class Verifies(Protocol):
    """A sampler that runs the model itself and can compare itself with it."""

    def verify(self) -> LawCheck:
        """Compare the first batch with the model.

        Raises:
            RuntimeError: it is not the model's.
        """


@dataclass(frozen=True)
class LawCheck:
    """What came of a comparison.

    Args:
        model, dtype: which model, in which type.
        completions, prompts, tokens: how much was read.
        distance: |mean of (log-probability as drawn - as read)|, in nats a token: the sum over completions by the sum of their
            tokens. Rounding has both signs and averages out; what is drawn from another law is likelier under that one.
        error: its standard error over completions; infinite with one completion, which decides nothing.
        largest: the same of the token furthest off, in nats; 0 where only sums are known.
        unread: completions whose plain pass is not finite in this type.
    """

    model: str
    dtype: str
    completions: int
    prompts: int
    tokens: int
    distance: float
    error: float
    largest: float = 0.0
    unread: int = 0

    @property
    def holds(self) -> bool:
        """False where the two laws are plainly not one."""
        mean = math.isfinite(self.distance) and self.distance <= LIMIT + _ERRORS * self.error
        return mean and self.largest <= _LARGEST

    @property
    def open(self) -> bool:
        """Whether more completions would decide: beyond the limit, within its error."""
        return self.holds and self.distance > LIMIT

    def sentence(self) -> str:
        """For the user."""
        begins = f"Law of {self.model} in {self.dtype}:"
        if not self.completions:
            return f"{begins} not compared, the model's plain pass is not finite in it."
        error = f" ± {self.error:.4f}" if math.isfinite(self.error) else ""
        furthest = f", one token by {self.largest:.2f}" if self.largest else ""
        more = f"; {self.unread} more could not be read, their plain pass is not finite" if self.unread else ""
        return (
            f"{begins} {self.completions} completions of {self.prompts} prompts ({self.tokens:,} tokens), read again by its "
            f"plain attention, differ by {self.distance:.4f}{error} nats a token from what they were drawn with{furthest}{more}."
        )


def compare(language_model: LanguageModel, drawn: Sequence[Sequence[Drawn]]) -> LawCheck:
    """Read some completions of a batch by the model's plain attention.

    Args:
        language_model: the model they are said to be from.
        drawn: the completions of each prompt.

    Returns: over 24 completions where there are as many, of different prompts where there are, and more, up to 72, where these
        leave it open.
    """
    waiting = _spread(drawn)
    found: list[tuple[Drawn, torch.Tensor]] = []
    with language_model.alone, plain_attention(language_model.model):
        check = _summed(language_model, found)
        while waiting and (not found or check.open):
            chosen, waiting = waiting[:_COMPLETIONS], waiting[_COMPLETIONS:]
            found += [(row, _plain_logprobs(language_model, row)) for row in chosen]
            if len(found) >= _MOST:
                waiting = []
            check = _summed(language_model, found)
    return check


def refuse(check: LawCheck, spec: ModelSpec) -> None:
    """Raise RuntimeError, with what to do, where a sampler that runs the model itself does not draw from it."""
    if not check.completions and check.unread:
        raise RuntimeError(
            f"Model {spec.name!r}: its scores are not finite in {check.dtype}, so nothing drawn from them is the model's: use "
            "model.dtype=bfloat16 or float32."
        )
    if check.holds:
        return
    ways = [] if check.dtype == "float32" else ["model.dtype=float32"]
    ways += [] if spec.attention == "copied" else ["model.attention=copied"]
    raise RuntimeError(
        f"{check.sentence()} More than {LIMIT} and {_ERRORS:.0f} standard errors, or {_LARGEST} for one token, is no rounding: "
        "what was drawn is not the model's, and nothing of this batch is kept. "
        f"Use {' or '.join(ways) or 'another back end'}, and please report it."
    )


def noted(check: LawCheck) -> dict[str, Any]:
    """For a manifest."""
    plain = {key: value for key, value in dataclasses.asdict(check).items() if value != math.inf}
    return {"sentence": check.sentence(), **plain}


def _spread(drawn: Sequence[Sequence[Drawn]]) -> list[Drawn]:
    """Completions as they are read: one of every prompt, prompts far apart first, then the next one of each."""
    own = [list(rows) for rows in drawn if rows]
    step = max(1, len(own) // _COMPLETIONS)
    order = [p for first in range(step) for p in range(first, len(own), step)]
    return [own[p][number] for number in range(max(map(len, own), default=0)) for p in order if number < len(own[p])]


@torch.inference_mode()
def _plain_logprobs(language_model: LanguageModel, row: Drawn) -> torch.Tensor:
    """(T,) float64 log-probabilities of the row's tokens, on the CPU."""
    ids = torch.tensor([[*row.prompt, *row.tokens]], device=language_model.device)
    kept = len(row.tokens) + 1
    logits = language_model.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    following = ids[0, -len(row.tokens) :].to(logits.device)
    found: torch.Tensor = logits.float().log_softmax(-1).gather(1, following[:, None])[:, 0]
    return found.double().cpu()


def _summed(language_model: LanguageModel, found: Sequence[tuple[Drawn, torch.Tensor]]) -> LawCheck:
    read = [(row, plain) for row, plain in found if bool(plain.isfinite().all())]
    apart = [row.logprob - float(plain.sum()) if math.isfinite(row.logprob) else math.inf for row, plain in read]
    tokenwise = [torch.tensor(row.each, dtype=torch.float64) - plain for row, plain in read if len(row.each)]
    largest = max((float(difference.abs().max()) for difference in tokenwise), default=0.0)
    lengths = [len(row.tokens) for row, _ in read]
    tokens = sum(lengths)
    mean = sum(apart) / tokens if tokens else 0.0
    distance, error = abs(mean), math.inf
    if len(read) > 1 and math.isfinite(distance):
        # Of a ratio of sums, by its linear part.
        residuals = sum((a - mean * n) ** 2 for a, n in zip(apart, lengths, strict=True))
        error = math.sqrt(residuals * len(read) / (len(read) - 1)) / tokens
    dtype = str(next(language_model.model.parameters()).dtype).removeprefix("torch.")
    prompts = len({tuple(row.prompt) for row, _ in read})
    name = language_model.spec.name
    return LawCheck(name, dtype, len(read), prompts, tokens, distance, error, largest, len(found) - len(read))
