"""Where a completion ends: the rules that every sampler with token ids shares."""

from __future__ import annotations

from collections.abc import Sequence

from qprobe.models import Tokenizer
from qprobe.sampling.base import stop_position


class StopTexts:
    """Finds the first stop text that counts in tokens as they come, and cuts them there.

    Args:
        tokenizer: of the model that samples.
        stop: texts that end a completion.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        # Enough tokens to hold the longest stop text, whatever its cut: a token has a byte at least.
        self._tail = max((len(s.encode()) for s in stop), default=0) + 1

    def reached(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the tokens so far hold a stop text that counts; to be asked after every token."""
        if not self.stop:
            return False
        before = tokens[: -self._tail] or prompt
        recent = self.tokenizer.decode_completion(before, tokens[-self._tail :])
        if not any(stop in recent for stop in self.stop):
            return False
        text = self.tokenizer.decode_completion(prompt, tokens)
        return stop_position(text, self.stop) < len(text)

    def cut(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[str, int]:
        """The text before the stop text, and how many tokens are kept: one that straddles the cut is."""
        text = self.tokenizer.decode_completion(prompt, tokens)
        cut, kept = stop_position(text, self.stop), len(tokens)
        if cut < len(text):
            # Only the last tokens can lie beyond the cut: sampling stopped as soon as a stop text was complete.
            # Lengths would not do: a character that lacks its last bytes is as long as the whole one.
            while kept and self.tokenizer.decode_completion(prompt, tokens[: kept - 1]).startswith(text[:cut]):
                kept -= 1
        return text[:cut], kept
