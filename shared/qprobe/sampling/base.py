"""What every sampler promises."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qprobe.prompts import Prompt

if TYPE_CHECKING:  # samplers of an API need no torch
    from torch import Tensor

# What a log-probability is the sum over, in the words of whoever compares two versions. Version 1 gave an empty completion the
# probability 1.
LOGPROB = "2: the end included"


class StopRule(Protocol):
    """Where completions end that no stop text can say: given by whoever knows what they are. It is pickled with its sampler."""

    def identity(self) -> dict[str, Any]:
        """What decides where completions end."""

    def may_end(self, recent: str) -> bool:
        """Whether `end` is to be asked, by the text of the last tokens; cheap, for it is asked after every token."""

    def end(self, prompt: str, text: str, last: bool) -> int | None:
        """Where a completion ends, None while it may go on: the text of the prompt, the text so far, whether nothing follows it.

        What it says of a text does not change with what follows that text."""


@dataclass(frozen=True)
class SamplingSettings:
    """The sampling law p0 and how many completions are drawn from it.

    Args:
        n: completions a prompt, at least 1.
        temperature: 0 is greedy decoding (then n must be 1).
        top_p: nucleus mass in (0, 1]; applied after top_k, to the renormalised law, as transformers and vLLM do.
        top_k: number of likeliest tokens kept; 0 keeps all.
        max_new_tokens: the longest completion, in tokens.
        stop: texts that end a completion; the completion is cut before the first of them. A stop text behind white space
            alone does not count: it would empty a completion that begins with it.
        rule: decides in the place of the stop texts where a completion ends. These are then what a server is told, whose
            answers are cut by the rule.
    """

    n: int = 8
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 300
    stop: tuple[str, ...] = ()
    rule: StopRule | None = None

    def __post_init__(self) -> None:
        given: Any = self.stop  # a configuration may hold anything
        if isinstance(given, str):
            raise ValueError(f"sampling: stop is the single text {given!r}: give a list of texts, [{given!r}].")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"sampling: n={self.n} and max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"sampling: temperature={self.temperature} must be finite and 0 or more, top_p={self.top_p} in (0, 1], "
                f"top_k={self.top_k} 0 or more."
            )
        if self.temperature == 0 and self.n != 1:
            raise ValueError(
                f"sampling: temperature 0 gives the same completion every time, so n must be 1, not {self.n}."
            )
        if "" in self.stop:
            raise ValueError("sampling: an empty stop text would end every completion at once; remove it.")

    def identity(self) -> dict[str, Any]:
        """What decides the law, JSON-able."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rule"}
        return values if self.rule is None else values | self.rule.identity()

    def end(self, prompt: str, text: str, last: bool) -> int | None:
        """Where a completion ends, None while it may go on; as `StopRule.end`."""
        if self.rule is not None:
            return self.rule.end(prompt, text, last)
        at = stop_position(text, self.stop)
        return at if at < len(text) else None


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    Args:
        text: what the completion adds to the prompt, cut before the stop text.
        token_ids: its tokens, without end-of-sequence and stop tokens; a token that straddles the cut is kept. None where
            the back end gives no tokens.
        finish_reason: "stop" (end of sequence or a stop text), "length", or an API's own word, such as "content_filter".
        logprob: untempered log-probability given the prompt, in nats, summed over the tokens that were drawn: `token_ids` and
            those that ended the completion (end of sequence, stop text). NaN where unknown. An API that does not tell the
            probability of the end is summed over what it tells.
        seed: of this sample.
        logprobs: of every one of `token_ids`, untempered, in nats; None where unknown. In no table.
        states: what an embedder would read of it, layer -> (D,) float32, where the sampler was asked to keep it; in no table.
    """

    text: str
    token_ids: list[int] | None
    finish_reason: str
    logprob: float
    seed: int
    logprobs: Sequence[float] | None = field(default=None, repr=False, compare=False)
    states: Mapping[int, Tensor] | None = field(default=None, repr=False, compare=False)


def stop_position(text: str, stop: Sequence[str]) -> int:
    """Where the first stop text that counts begins; the length of the text where there is none."""
    begins = len(text) - len(text.lstrip())
    found = [text.find(word, begins + 1) for word in stop]
    return min((at for at in found if at >= 0), default=len(text))


def check_seeds(prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], n: int) -> None:
    """Raise ValueError where there is not a list of n seeds for every prompt."""
    if len(prompts) != len(seeds) or any(len(s) != n for s in seeds):
        raise ValueError(f"{len(prompts)} prompts need as many lists of {n} seeds; {len(seeds)} were given.")


class Sampler(Protocol):
    """A back end that draws completions. Equal seeds and equal batches give equal completions."""

    settings: SamplingSettings

    def identity(self) -> dict[str, Any]:
        """What decides the completions (model, settings); cheap: nothing is loaded."""

    def prompt_identity(self) -> dict[str, Any]:
        """What decides how a prompt is rendered and tokenised; cheap."""

    def tokenizer_fingerprint(self) -> str | None:
        """Equal for back ends whose token ids mean the same; None where an API keeps tokens and chat template to itself."""

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        """A prompt as the model reads it: text and token ids."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        """`settings.n` completions of every prompt, in order; `seeds[p][i]` belongs to completion i of prompt p."""


# Prompts as token ids, and the seeds of each one's completions: as `Sampler.sample` takes them.
Batch = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]


@runtime_checkable
class Refills(Protocol):
    """A sampler that has rows of several batches in work, so that it is never half idle."""

    def sample_batches(self, batches: Iterable[Batch]) -> Iterator[tuple[int, list[list[Completion]]]]:
        """(number of the batch, from 0 on, what `Sampler.sample` returns of it), in any order; a batch is asked for when rows of
        it can begin.
        """


def sample_seeds(run_seed: int, task_id: str, n: int) -> list[int]:
    """Seeds of a prompt's samples: hash(run seed, task_id) + sample, below 2**62."""
    digest = hashlib.sha256(f"{run_seed}\x00{task_id}".encode()).digest()
    first = int.from_bytes(digest[:8], "big") >> 3
    return [first + sample for sample in range(n)]
