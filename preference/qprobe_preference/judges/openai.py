"""A judge behind an OpenAI-compatible API: both orders of every pair, disagreement is a tie.

The template of the configuration puts conversation and answers between lines that hold a sign drawn for every request, so
that no answer can end its own section, and the verdict is read from the last line of the reply only. This keeps answers
from forging the form of a request; whether a model obeys what it was told to judge is a matter of the model, so answers
that speak to a judge are flagged and counted. Every reply is kept by content (`cache`), and `usage.jsonl` beside it counts
what was spent.

A reply that is an error, empty, cut or without a verdict is a fault: it is asked for again, and never kept. Where that does not
help, its comparison counts half for now ("unparsed"), and the next command asks again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qprobe.files import fingerprint
from qprobe.models import choices
from qprobe.models.openai_client import ApiError, ApiRefused, ApiSettings, ApiUnusable, Client, client
from qprobe.settings import build
from qprobe_preference.judges.base import Comparison, Conversation, Judgement, folder_name, undecided
from qprobe_preference.judges.cache import Reply, ReplyCache

PLACES = ("fence", "conversation", "answer_a", "answer_b")
CUT = ("length", "max_tokens")  # why a reply ended, where it might have gone on
# Replies in a row that fail for good before the server counts as broken.
FAILED_IN_A_ROW = 10
ORDERS = (False, True)  # whether the answers are swapped, so that the first one is B


class OpenAIJudge:
    """Asks a model which of two answers is better.

    Args:
        api: which model of which server, and how it is called.
        folder: where replies and usage.jsonl are kept; may serve several judges.
        user: the user's message, a template with {fence}, {conversation}, {answer_a} and {answer_b}.
        system: the system message, a template with {fence}; None sends none.
        verdict: regular expression that the last line of a reply must match in full; its first group is A or B.
        suspicious: regular expressions of answers that speak to a judge.
        soft: whether win is the mean of P(A) / (P(A) + P(B)) over both orders; the server must give log-probabilities.
        top_logprobs: alternatives of a token that are asked for, 1 or more.
        retries: how often a reply without a verdict is asked for again.
        temperature: 0 is greedy; None sends none.
        max_tokens: longest reply.
        extra_body: further keys of every request; they decide the replies.
        name: what the run folder calls the judge; None is made of its model.
    """

    def __init__(
        self,
        api: ApiSettings | Mapping[str, Any],
        folder: Path,
        user: str,
        verdict: str,
        system: str | None = None,
        suspicious: Sequence[str] = (),
        soft: bool = False,
        top_logprobs: int = 20,
        retries: int = 2,
        temperature: float | None = 0.0,
        max_tokens: int = 256,
        extra_body: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if missing := [place for place in PLACES if f"{{{place}}}" not in user]:
            raise ValueError(f"judge.user lacks {{{missing[0]}}}: the judge would not see it, or not where it ends.")
        if retries < 0 or max_tokens < 1 or top_logprobs < 1:
            raise ValueError(
                f"judge: retries={retries} must be 0 or more, max_tokens={max_tokens} and top_logprobs={top_logprobs} 1 or more."
            )
        self.api = api if isinstance(api, ApiSettings) else build(ApiSettings, api, "judge.api")
        self.name = folder_name(name, self.api.model, "soft" if soft else "")
        self.system, self.user = system, user
        self.verdict = _compiled(verdict, "judge.verdict")
        if self.verdict.groups < 1:
            raise ValueError("judge.verdict has no group: put the letter into parentheses, as ([AB]).")
        self.suspicious = [_compiled(pattern, "judge.suspicious") for pattern in suspicious]
        self.soft, self.top_logprobs, self.retries = soft, top_logprobs, retries
        self.temperature, self.max_tokens, self.extra_body = temperature, max_tokens, dict(extra_body or {})
        self.api.check_no_key({"judge.extra_body": self.extra_body, "judge.user": user, "judge.system": system})
        self.cache = ReplyCache(folder)
        self._lock = threading.Lock()
        self._failed = 0  # replies in a row
        self._length = "max_tokens"  # or what a server wants in its place

    @property
    def client(self) -> Client:
        return client(self.api)

    def identity(self) -> dict[str, Any]:
        """Concurrency, limits and what is flagged decide no judgement."""
        return {"judge": "openai", **self._asked, "soft": self.soft, "retries": self.retries}

    def check(self) -> None:
        """Raise, before any work, where the openai package or the key is missing."""
        self.client.check()

    def close(self) -> None:
        """Close the connections; the next call opens them again."""
        self.client.close()

    @functools.cached_property
    def _asked(self) -> dict[str, Any]:
        """What decides a reply besides conversation and answers; it enters the key of the cache."""
        return {
            "model": self.api.identity(),
            "template": fingerprint([self.system, self.user, self.verdict.pattern]),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "extra_body": self.extra_body,
        }

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison. Equal answers are a tie without being asked for.

        Raises:
            ApiError: the server cannot be used, or a limit is reached; replies until then are kept.
        """
        jobs: dict[str, tuple[Comparison, bool]] = {}
        for comparison in comparisons:
            first, second = comparison.shown
            for swapped in ORDERS if first != second else ():
                key = self._key(comparison, swapped)
                if self._known(key) is None:
                    jobs[key] = (comparison, swapped)
        if jobs:
            spent = Counter(self.client.usage())
            try:
                self.client.each([functools.partial(self._reply, key, *job) for key, job in jobs.items()])
            finally:
                self._note(Counter(self.client.usage()) - spent)
        return [self._judgement(comparison) for comparison in comparisons]

    def _judgement(self, comparison: Comparison) -> Judgement:
        shown = dict(zip(("first", "second"), comparison.shown, strict=True))
        flagged = [name for name, answer in shown.items() if self._speaks_to_judges(answer)]
        detail: dict[str, Any] = {"flagged": flagged} if flagged else {}
        if shown["first"] == shown["second"]:
            return Judgement(0.5, "tie", json.dumps({"equal": True, **detail}))
        plain, swapped = (self.cache.get(self._key(comparison, order)) for order in ORDERS)
        assert plain is not None
        assert swapped is not None
        detail |= {"letters": [plain.letter, swapped.letter], "asked": [plain.asked, swapped.asked]}
        for why, verdict in (
            ("too_long", "too_long"),
            ("refused", "refused"),
            ("failed", "unparsed"),
            ("unparsed", "unparsed"),
        ):
            if why in (plain.why, swapped.why):
                return undecided(verdict, **detail)
        votes = (plain.letter == "A") + (swapped.letter == "B")
        win = votes / 2
        if self.soft:
            assert plain.share is not None
            assert swapped.share is not None
            win = (plain.share + 1 - swapped.share) / 2
            detail["shares"] = [plain.share, swapped.share]
        return Judgement(win, ("loss", "tie", "win")[votes], json.dumps(detail))

    def _speaks_to_judges(self, answer: str) -> bool:
        return any(pattern.search(answer) for pattern in self.suspicious)

    def _key(self, comparison: Comparison, swapped: bool) -> str:
        content = [self._asked, comparison.prompt, *comparison.shown[:: -1 if swapped else 1]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _known(self, key: str) -> Reply | None:
        """A kept reply, where it says as much as a new one would."""
        reply = self.cache.get(key)
        if reply is None:
            return None
        if reply.letter is None:
            return reply if reply.why == "refused" else None
        return reply if reply.share is not None or not self.soft else None

    def _reply(self, key: str, comparison: Comparison, swapped: bool, halt: threading.Event) -> None:
        reply = Reply(None, why="unparsed", asked=0)
        while reply.why == "unparsed" and reply.asked <= self.retries:
            reply = self._ask(comparison, swapped, reply.asked + 1, halt)
        with self._lock:
            self._failed = self._failed + 1 if reply.why == "failed" else 0
            if self._failed >= FAILED_IN_A_ROW:
                raise ApiError(f"{self._failed} replies in a row failed for good; the last: {reply.text}")
        # What failed is asked again; a server may get a longer context, and nothing was paid for such a call.
        self.cache.add(key, reply, keep=reply.letter is not None or reply.why == "refused")

    def _ask(self, comparison: Comparison, swapped: bool, asked: int, halt: threading.Event) -> Reply:
        try:
            answer = self._post(comparison, swapped, halt)
        except ApiRefused as error:
            if error.too_long:
                return Reply(None, asked=asked, text=error.said, why="too_long")
            if re.search(r"content[ _](filter|management|policy)", error.said, re.I):
                return Reply(None, asked=asked, text=error.said, why="refused")
            raise
        except ApiUnusable as error:
            return Reply(None, asked=asked, text=str(error), why="failed")
        said, choice = choices.read(answer, 0, chat=True), answer["choices"][0]
        text = said.text
        if said.refused:
            return Reply(None, asked=asked, text=str(choice["message"].get("refusal") or text), why="refused")
        at = self._letter_at(text)
        # The last line of what was cut may be the beginning of another; a reply of one line is what was asked for.
        if at is None or (said.reason in CUT and "\n" in text.strip()):
            return Reply(None, asked=asked, text=text, why="unparsed")
        share = self._share(choice.get("logprobs"), text, at) if self.soft else None
        if self.soft and share is None:
            return Reply(None, asked=asked, text=text, why="unparsed")
        return Reply(text[at], share, asked, text)

    def _letter_at(self, text: str) -> int | None:
        """Where the verdict's letter stands: in the last line, or nowhere."""
        body = text.rstrip()
        start = body.rfind("\n") + 1
        found = self.verdict.fullmatch(body, start)
        return None if found is None or found[1] not in ("A", "B") else found.start(1)

    def _post(self, comparison: Comparison, swapped: bool, halt: threading.Event) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.api.model, "messages": self.messages(comparison, swapped)}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.soft:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        while True:
            length = self._length
            try:
                return self.client.post(
                    "/chat/completions",
                    {**body, length: self.max_tokens, **self.extra_body},
                    "choices",
                    halt,
                    lambda answer: choices.read(answer, 0, chat=True).fault,
                )
            except ApiRefused as error:
                if self.soft and "logprobs" in f"{error.parameter} {error.said}":
                    raise ApiError(
                        f"{str(error).rstrip('.')}: set judge.soft=false, or lower judge.top_logprobs."
                    ) from None
                if length != "max_tokens" or "max_completion_tokens" not in error.said:
                    raise
                self._length = "max_completion_tokens"

    def messages(self, comparison: Comparison, swapped: bool) -> list[dict[str, str]]:
        """The request's messages, with a new fence."""
        answers = comparison.shown
        values = {
            "conversation": written(comparison.prompt),
            "answer_a": answers[swapped],
            "answer_b": answers[not swapped],
        }
        values["fence"] = secrets.token_hex(6)
        while any(values["fence"] in text for name, text in values.items() if name != "fence"):
            values["fence"] = secrets.token_hex(6)
        messages = [("system", self.system), ("user", self.user)]
        # In one pass: what an answer holds is never taken for a place of the template.
        places = re.compile("|".join(rf"\{{{name}\}}" for name in PLACES))
        return [
            {"role": role, "content": places.sub(lambda found: values[found[0][1:-1]], template)}
            for role, template in messages
            if template
        ]

    def _share(self, given: Any, text: str, at: int) -> float | None:
        """P(A) / (P(A) + P(B)) of the token that holds the verdict's letter; None where it cannot be found.

        Raises:
            ApiError: the server gave no log-probabilities.
        """
        parts = given.get("content") if isinstance(given, dict) else None
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise ApiError(f"{self.client.where} gives no log-probabilities of its tokens: set judge.soft=false.")
        spelled = [_spelled(part) for part in parts]
        begins = b"".join(spelled).rfind(text.encode(errors="replace"))
        place, end = begins + len(text[:at].encode(errors="replace")), 0
        for part, token in zip(parts, spelled, strict=True):
            end += len(token)
            if begins >= 0 and end > place:
                return _share_of_a([part, *(part.get("top_logprobs") or [])])
        return None

    def _note(self, spent: Mapping[str, int]) -> None:
        """Add what was spent to usage.jsonl."""
        if not spent:
            return
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with (self.cache.folder / "usage.jsonl").open("a") as file:
            file.write(json.dumps({"at": time.time(), "judge": self.name, **spent}) + "\n")


def written(conversation: Conversation) -> str:
    """A conversation as a judge reads it."""
    if isinstance(conversation, str):
        return conversation
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in conversation)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} is no regular expression ({error}): {pattern!r}.") from None


def _spelled(part: Mapping[str, Any]) -> bytes:
    spelled = part.get("bytes")
    return bytes(spelled) if spelled else str(part.get("token")).encode(errors="replace")


def _share_of_a(alternatives: Sequence[Any]) -> float | None:
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
