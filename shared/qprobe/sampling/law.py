"""Is what a sampler drew the model's? A few completions of its first batch are read once more by the model itself.

One row at a time, unpadded, with the attention that transformers gives the model: nothing that makes the sampler fast takes part.
Compared is the log-probability with which a completion was drawn, in nats a token. Rounding moves it by a few thousandths in
bfloat16; a sampler whose attention is another moves it by more than a tenth.

Where it stops: it sees the scores that were drawn from, not the draws (those are tested against the law itself), and a fault that
shows in fewer than one in some ten completions may escape the eight that are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from qprobe.models import LanguageModel, ModelSpec, Tokenizer
from qprobe.prefix import plain_attention

# Nats a token beyond which the laws differ, on top of three standard errors.
LIMIT, ERRORS = 0.05, 3.0
# Completions that are read, of so many prompts; and how many at most where the first ones leave it open.
COMPLETIONS, PROMPTS, MOST = 8, 4, 64


@dataclass(frozen=True)
class Drawn:
    """A completion as it was drawn.

    Args:
        prompt: token ids.
        tokens: all that were drawn, the end of sequence and stop texts included.
        logprob: untempered, summed over `tokens`, in nats.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprob: float


@runtime_checkable
class TellsDrawn(Protocol):
    """A sampler that remembers the completions of its first batch."""

    def draws_from(self, spec: ModelSpec) -> bool:
        """Whether `spec` is the model that they are from."""

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
        unread: completions whose plain pass is not finite in this type.
    """

    model: str
    dtype: str
    completions: int
    prompts: int
    tokens: int
    distance: float
    error: float
    unread: int = 0

    @property
    def holds(self) -> bool:
        """False where the two laws are plainly not one."""
        return math.isfinite(self.distance) and self.distance <= LIMIT + ERRORS * self.error

    @property
    def open(self) -> bool:
        """Whether more completions would decide: beyond the limit, within its error."""
        return self.holds and self.distance > LIMIT

    def sentence(self) -> str:
        """For the user."""
        read = f"{self.completions} completions of {self.prompts} prompts ({self.tokens:,} tokens)"
        if not self.completions:
            return f"Law of {self.model} in {self.dtype}: not compared, the model's plain pass is not finite in it."
        error = f" ± {self.error:.4f}" if math.isfinite(self.error) else ""
        told = f"Law of {self.model} in {self.dtype}: {read}, read again by its plain attention, differ by {self.distance:.4f}"
        more = f"; {self.unread} more could not be read, their plain pass is not finite" if self.unread else ""
        return f"{told}{error} nats a token from what they were drawn with{more}."


def compare(language_model: LanguageModel, drawn: Sequence[Sequence[Drawn]]) -> LawCheck:
    """Read some completions of a batch by the model's plain attention.

    Args:
        language_model: the model they are said to be from.
        drawn: the completions of each prompt.

    Returns: over 8 completions of 4 prompts where there are as many, and more, up to 64, where these leave it open.
    """
    waiting = _spread(drawn)
    found: list[tuple[Drawn, float]] = []
    with plain_attention(language_model.model):
        check = _summed(language_model, found)
        while waiting and (not found or check.open):
            chosen, waiting = waiting[:COMPLETIONS], waiting[COMPLETIONS:]
            found += [(row, _plain_logprob(language_model, row)) for row in chosen]
            if len(found) >= MOST:
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
        f"{check.sentence()} That is more than {LIMIT} and {ERRORS:.0f} standard errors: what was drawn is not the model's, and "
        f"nothing of this batch is kept. Use {' or '.join(ways) or 'another back end'}, and please report it."
    )


def noted(check: LawCheck) -> dict[str, Any]:
    """For a manifest."""
    plain = {key: value for key, value in dataclasses.asdict(check).items() if value != math.inf}
    return {"sentence": check.sentence(), **plain}


def _spread(drawn: Sequence[Sequence[Drawn]]) -> list[Drawn]:
    """Completions in the order in which they are read: two each of four prompts far apart, then of the next ones."""
    own = [list(rows) for rows in drawn if rows]
    each = max(1, COMPLETIONS // PROMPTS)
    step = max(1, len(own) // PROMPTS)
    order = [p for first in range(step) for p in range(first, len(own), step)]
    rounds = -(-max(map(len, own), default=0) // each)
    return [row for number in range(rounds) for p in order for row in own[p][number * each : (number + 1) * each]]


@torch.inference_mode()
def _plain_logprob(language_model: LanguageModel, row: Drawn) -> float:
    ids = torch.tensor([[*row.prompt, *row.tokens]], device=language_model.device)
    kept = len(row.tokens) + 1
    logits = language_model.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, :-1]
    following = ids[0, -len(row.tokens) :].to(logits.device)
    return float(logits.float().log_softmax(-1).gather(1, following[:, None]).double().sum())


def _summed(language_model: LanguageModel, found: Sequence[tuple[Drawn, float]]) -> LawCheck:
    read = [(row, plain) for row, plain in found if math.isfinite(plain)]
    apart = [row.logprob - plain if math.isfinite(row.logprob) else math.inf for row, plain in read]
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
    return LawCheck(name, dtype, len(read), prompts, tokens, distance, error, len(found) - len(read))
