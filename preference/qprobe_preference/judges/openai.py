"""A judge behind an OpenAI-compatible API: both orders of every pair, disagreement is a tie.

The template of the configuration writes conversation and answers between lines that hold a sign drawn for every request, so
that no answer can end its own section, and the verdict is read from the last line of the reply only. This keeps answers
from forging the form of a request; whether a model obeys what it was told to judge is up to the model, so answers that speak
to a judge are flagged and counted. Every reply is kept by content (`cache`), and `usage.jsonl` in the same
folder counts what was spent.

A reply that is an error, empty, cut or without a verdict is a fault: it is asked for again, and never kept. Where that does not
help, its comparison counts half for now ("unparsed"), and the next command asks again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qprobe.models import choices
from qprobe.models.openai_client import ApiError, ApiRefused, ApiSettings, ApiUnusable, Client, client
from qprobe_preference.judges.base import Comparison, Judgement, folder_name, undecided
from qprobe_preference.judges.cache import Reply, ReplyCache
from qprobe_preference.judges.form import Form, compiled, share_of_a

_CUT = ("length", "max_tokens")  # why a reply ended, where it might have gone on
# Replies in a row that fail for good before the server counts as broken.
_FAILED_IN_A_ROW = 10
_ORDERS = (False, True)  # whether the answers are swapped, so that the first one is B


class OpenAIJudge:
    """Asks a model which of two answers is better.

    Args:
        api: which model of which server, and how it is called.
        folder: where replies and usage.jsonl are kept; may serve several judges.
        user, verdict, system: see `Form`.
        name: what the run folder calls the judge; None is made of its model.
        soft, ...: conf/judge/openai.yaml describes the others.
    """

    def __init__(
        self,
        api: ApiSettings,
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
        if retries < 0 or max_tokens < 1 or top_logprobs < 1:
            raise ValueError(
                f"judge: retries={retries} must be 0 or more, max_tokens={max_tokens} and top_logprobs={top_logprobs} 1 or more."
            )
        self.api = api
        self.name = folder_name(name, self.api.model, "soft" if soft else "")
        self.form = Form(user, verdict, system)
        self.suspicious = [compiled(pattern, "judge.suspicious") for pattern in suspicious]
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
            "template": self.form.identity(),
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
            for swapped in _ORDERS if first != second else ():
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
        flagged = [name for name, answer in shown.items() if any(p.search(answer) for p in self.suspicious)]
        detail: dict[str, Any] = {"flagged": flagged} if flagged else {}
        if shown["first"] == shown["second"]:
            return Judgement(0.5, "tie", json.dumps({"equal": True, **detail}))
        plain, swapped = (self.cache.get(self._key(comparison, order)) for order in _ORDERS)
        assert plain is not None
        assert swapped is not None
        detail |= {"letters": [plain.letter, swapped.letter], "asked": [plain.asked, swapped.asked]}
        for why in ("too_long", "refused", "failed", "unparsed"):
            if why in (plain.why, swapped.why):
                return undecided("unparsed" if why == "failed" else why, **detail)
        votes = (plain.letter == "A") + (swapped.letter == "B")
        win = votes / 2
        if self.soft:
            assert plain.share is not None
            assert swapped.share is not None
            win = (plain.share + 1 - swapped.share) / 2
            detail["shares"] = [plain.share, swapped.share]
        return Judgement(win, ("loss", "tie", "win")[votes], json.dumps(detail))

    def _key(self, comparison: Comparison, swapped: bool) -> str:
        content = [self._asked, comparison.prompt, *comparison.shown[:: -1 if swapped else 1]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _known(self, key: str) -> Reply | None:
        """A kept reply, where it says as much as a new one would."""
        reply = self.cache.get(key)
        if reply is None or reply.why == "refused":
            return reply
        return reply if reply.letter is not None and (reply.share is not None or not self.soft) else None

    def _reply(self, key: str, comparison: Comparison, swapped: bool, halt: threading.Event) -> None:
        reply = Reply(None, why="unparsed", asked=0)
        while reply.why == "unparsed" and reply.asked <= self.retries:
            reply = self._ask(comparison, swapped, reply.asked + 1, halt)
        with self._lock:
            self._failed = self._failed + 1 if reply.why == "failed" else 0
            if self._failed >= _FAILED_IN_A_ROW:
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
        at = self.form.letter_at(text)
        # The last line of what was cut may be the beginning of another; a reply of one line is what was asked for.
        if at is None or (said.reason in _CUT and "\n" in text.strip()):
            return Reply(None, asked=asked, text=text, why="unparsed")
        share = share_of_a(self._tokens(choice), text, at) if self.soft else None
        if self.soft and share is None:
            return Reply(None, asked=asked, text=text, why="unparsed")
        return Reply(text[at], share, asked, text)

    def _post(self, comparison: Comparison, swapped: bool, halt: threading.Event) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.api.model, "messages": self.form.messages(comparison, swapped)}
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

    def _tokens(self, choice: Mapping[str, Any]) -> list[dict[str, Any]]:
        given = choice.get("logprobs")
        tokens = given.get("content") if isinstance(given, dict) else None
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, dict) for token in tokens):
            raise ApiError(f"{self.client.where} gives no log-probabilities of its tokens: set judge.soft=false.")
        return tokens

    def _note(self, spent: Mapping[str, int]) -> None:
        """Add what was spent to usage.jsonl."""
        if not spent:
            return
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with (self.cache.folder / "usage.jsonl").open("a") as file:
            file.write(json.dumps({"at": time.time(), "judge": self.name, **spent}) + "\n")
