"""What a judge behind an API is asked, and what its reply says: fenced sections, the verdict's letter, its probability."""

from __future__ import annotations

import functools
import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qprobe.files import fingerprint
from qprobe_preference.judges.base import Comparison, Conversation

_PLACES = ("fence", "conversation", "answer_a", "answer_b")


@dataclass(frozen=True)
class Form:
    """The form of a request and of its reply.

    Args:
        user: the user's message, a template with {fence}, {conversation}, {answer_a} and {answer_b}.
        verdict: regular expression that the last line of a reply must match in full; its first group is A or B.
        system: the system message, a template with {fence}; None sends none.

    Raises:
        ValueError: a place that is missing, or what is no such regular expression.
    """

    user: str
    verdict: str
    system: str | None = None

    def __post_init__(self) -> None:
        if missing := [place for place in _PLACES if f"{{{place}}}" not in self.user]:
            raise ValueError(f"judge.user lacks {{{missing[0]}}}: the judge would not see it, or not where it ends.")
        if self._pattern.groups < 1:
            raise ValueError("judge.verdict has no group: put the letter into parentheses, as ([AB]).")

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return compiled(self.verdict, "judge.verdict")

    def identity(self) -> str:
        """Decides, with the model's parameters, what a judge says."""
        return fingerprint([self.system, self.user, self.verdict])

    def messages(self, comparison: Comparison, swapped: bool) -> list[dict[str, str]]:
        """The request's messages, with a new fence."""
        a, b = comparison.shown[:: -1 if swapped else 1]
        values = {"conversation": written(comparison.prompt), "answer_a": a, "answer_b": b}
        fence = secrets.token_hex(6)
        while any(fence in text for text in values.values()):
            fence = secrets.token_hex(6)
        values["fence"] = fence
        # In one pass: what an answer holds is never taken for a place of the template.
        places = re.compile("|".join(rf"\{{{name}\}}" for name in _PLACES))
        return [
            {"role": role, "content": places.sub(lambda found: values[found[0][1:-1]], template)}
            for role, template in (("system", self.system), ("user", self.user))
            if template
        ]

    def letter_at(self, reply: str) -> int | None:
        """Where the verdict's letter is: in the last line, or nowhere."""
        body = reply.rstrip()
        found = self._pattern.fullmatch(body, body.rfind("\n") + 1)
        return None if found is None or found[1] not in ("A", "B") else found.start(1)


def share_of_a(tokens: Sequence[dict[str, Any]], reply: str, at: int) -> float | None:
    """P(A) / (P(A) + P(B)) of the token that holds the verdict's letter; None where it cannot be found.

    Args:
        tokens: of the reply, as servers give them: token, bytes, logprob, top_logprobs.
        reply: the text.
        at: where the letter is in it.
    """
    spelled = [bytes(token.get("bytes") or str(token.get("token")).encode(errors="replace")) for token in tokens]
    begins = b"".join(spelled).rfind(reply.encode(errors="replace"))
    place, end = begins + len(reply[:at].encode(errors="replace")), 0
    for token, spelling in zip(tokens, spelled, strict=True):
        end += len(spelling)
        if begins >= 0 and end > place:
            return _share([token, *(token.get("top_logprobs") or [])])
    return None


def written(conversation: Conversation) -> str:
    """A conversation as a judge reads it."""
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in conversation)


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression of the configuration; ValueError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} is no regular expression ({error}): {pattern!r}.") from None


def _share(alternatives: Sequence[Any]) -> float | None:
    """From the alternatives of one token, the chosen one first; " A" and "A" are two spellings of one verdict."""
    weights = {"A": 0.0, "B": 0.0}
    seen: set[str] = set()
    for alternative in alternatives:
        token, value = str(alternative.get("token")), alternative.get("logprob")
        letter = re.sub(r"\W", "", token)
        if letter in weights and token not in seen and isinstance(value, int | float):
            seen.add(token)
            weights[letter] += math.exp(value)
    total = sum(weights.values())
    return weights["A"] / total if total > 0 else None
