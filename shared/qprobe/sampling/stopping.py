"""Where a completion ends: the rules that every sampler with token ids shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qprobe.models.keeping import NOTHING, Keep
from qprobe.models.likelihood_columns import TokenLaw, columns_of
from qprobe.models.tokenizer import Tokenizer
from qprobe.sampling.base import Completion, SamplingSettings
from qprobe.sampling.law import Drawn

# Tokens whose text a rule is shown after every token: enough for a line's end and what begins the next line.
_RECENT = 24


class StopTexts:
    """Finds where a completion ends in tokens as they come, by stop text or rule, and cuts them there.

    Args:
        tokenizer: of the model that samples.
        settings: of which the stop texts or the rule are used.
    """

    def __init__(self, tokenizer: Tokenizer, settings: SamplingSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        # Enough tokens to hold the longest stop text, whatever its cut: a token has a byte at least.
        self._tail = _RECENT if settings.rule else max((len(s.encode()) for s in settings.stop), default=0) + 1
        self._prompts: dict[tuple[int, ...], str] = {}

    def reached(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the tokens so far hold an end that counts; to be asked after every token."""
        settings = self.settings
        if not settings.stop and settings.rule is None:
            return False
        before = tokens[: -self._tail] or prompt
        recent = self.tokenizer.decode_completion(before, tokens[-self._tail :])
        if not (settings.rule.may_end(recent) if settings.rule else any(stop in recent for stop in settings.stop)):
            return False
        text = self.tokenizer.decode_completion(prompt, tokens)
        return settings.end(self._text(prompt), text, last=False) is not None

    def cut(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[str, int]:
        """The text before the end, and how many tokens are kept: one that straddles the cut is."""
        text = self.tokenizer.decode_completion(prompt, tokens)
        cut, kept = self.settings.end(self._text(prompt), text, last=True), len(tokens)
        if cut is None:
            return text, kept
        # Only the last tokens can lie beyond the cut: sampling stopped as soon as an end was reached.
        # Lengths would not do: a character that lacks its last bytes is as long as the whole one.
        while kept and self.tokenizer.decode_completion(prompt, tokens[: kept - 1]).startswith(text[:cut]):
            kept -= 1
        return text[:cut], kept

    def _text(self, prompt: Sequence[int]) -> str:
        """The text of a prompt, which a rule alone looks at."""
        if self.settings.rule is None:
            return ""
        key = tuple(prompt)
        if key not in self._prompts:
            self._prompts[key] = self.tokenizer.decode_completion([], prompt)
        return self._prompts[key]


@dataclass
class Growing:
    """A completion while its tokens are drawn.

    Args:
        prompt: token ids.
        seed: of the sample.
        eos: tokens that end a completion.
        stops: of the sampler's settings.
        tokens: drawn so far, without the end of sequence.
        reason: why it ended; empty while it goes on.
        keep: what is kept of it.
        ran: its tokens that the model has run; counted where something is kept.
        state: of the kept layers behind its last kept token, (D,) each; None until it has ended, or where nobody held it so long.
        laws: of every token that was drawn: the fields of `TokenLaw`, and the log-probability of the ending there.
    """

    prompt: Sequence[int]
    seed: int
    eos: frozenset[int]
    stops: StopTexts
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    keep: Keep = NOTHING
    ran: int = 0
    state: dict[int, Tensor] | None = None
    laws: list[NDArray[np.float64]] = field(default_factory=list)
    _end: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float) -> bool:
        """Add a token that was drawn; returns whether the completion goes on."""
        self._logprobs.append(logprob)
        if token in self.eos:
            self._end, self.reason = [token], "stop"
            return False
        self.tokens.append(token)
        if self.stops.reached(self.prompt, self.tokens):
            self.reason = "stop"
        elif len(self.tokens) == self.stops.settings.max_new_tokens:
            self.reason = "length"
        return not self.reason

    def lacks_a_step(self) -> bool:
        """Whether it has ended by a token that is part of it, and what is behind that is kept."""
        return bool(self.keep) and self.ran < self.cut[1]

    @functools.cached_property
    def cut(self) -> tuple[str, int]:
        """Its text and how many of its tokens are kept, once it has ended."""
        return self.stops.cut(self.prompt, self.tokens)

    def completion(self) -> Completion:
        text, kept = self.cut
        tokens, summed = self.tokens[:kept], float(sum(self._logprobs))
        completion = Completion(text, tokens, self.reason, summed, self.seed, self._logprobs[:kept])
        # Where nobody wanted it any more, there may be less.
        if not self.keep or (self.keep.layers and self.state is None):
            return completion
        states = dict(self.state or {})
        if self.keep.ending is not None:
            if len(self.laws) <= kept:
                return completion
            values = np.stack(self.laws[: kept + 1])
            values[-1, 0] = ending = values[-1, -1]
            states[self.keep.as_layer] = torch.from_numpy(columns_of(TokenLaw(*values.T[:-1]), ending)).float()
        return replace(completion, states=states)

    def drawn(self) -> Drawn:
        """With all its tokens."""
        return Drawn(self.prompt, [*self.tokens, *self._end], float(sum(self._logprobs)), self._logprobs)
