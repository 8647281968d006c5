"""The client of an OpenAI-compatible API that sampler and embedder share: calls, retries, limits, what was spent.

Calls run in threads, a bounded number at once. 429, 5xx, timeouts, dropped connections and cut answers are tried again with
exponential waits and jitter; `Retry-After` holds all calls back. Every fault that stays is one sentence. The key is read
from the environment, checked, sent, and kept out of everything else (`keys`): identities, messages, logs, answers.

A successful answer may be of no use (no JSON, an error inside, choices that say nothing): that is a passing fault too.

Where it stops: no streaming, no batch endpoint, no proxy settings but the environment's.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from qprobe.models import keys
from qprobe.models.api_faults import Fault, fault_of, words_of
from qprobe.models.keys import Key

Answer = TypeVar("Answer")
FIRST_WAIT = 1.0  # seconds before the first repetition; doubled each time


class ApiError(RuntimeError):
    """A call that failed for good; the message says what to do."""


class ApiUnusable(ApiError):
    """The server answered every time, and never with anything that can be used."""


class ApiRefused(ApiError):
    """The server understood a request and refused it.

    Args:
        said: the server's own words.
        parameter: the parameter that it names, where it names one.
    """

    def __init__(self, message: str, said: str, parameter: str | None) -> None:
        super().__init__(message)
        self.said = said
        self.parameter = parameter

    @property
    def too_long(self) -> bool:
        """Whether the text was longer than the model's context."""
        return bool(
            re.search(r"context[ _](length|size|window)|(maximum|max) (model|input) length|too long", self.said, re.I)
        )


@dataclass(frozen=True)
class ApiSettings:
    """Which model of which server, and how it is called. Only `model` and `server` (or `base_url`) decide answers.

    Args:
        model: as the server calls it.
        base_url: of the server, with its version path.
        server: what run folders call the server; None is `base_url`. For servers whose address changes from job to job.
        api_key_variable: the environment variable that holds the key. A server other than OpenAI's may need none.
        concurrency: calls at once.
        timeout: seconds that one call may take.
        retries: how often a call is repeated after a passing fault.
        longest_wait: seconds; a server that asks for more is given up.
        max_calls: requests of one process (a command, a shard, a worker of Ray), repeated ones included; None is no limit.
        max_tokens: prompt and completion tokens of one process; None is no limit. Calls that are under way when it is reached
            still count, so it may be passed by `concurrency` calls.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    server: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    longest_wait: float = 120.0
    max_calls: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        # Whoever pastes a key into the wrong place must not read it again in a log: neither value is repeated.
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_variable):
            raise ValueError(
                "api_key_variable is the name of an environment variable in capital letters, such as OPENAI_API_KEY; a key "
                "itself is never written into a configuration."
            )
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username or address.query:
            raise ValueError(
                "base_url is http:// or https:// with a host and a path, such as http://localhost:8000/v1, without user, "
                "password or query: a key belongs into the environment."
            )
        if not self.model:
            raise ValueError("The API's model is empty: name it as the server does.")
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or not self.longest_wait >= 0:
            raise ValueError(
                f"api: concurrency={self.concurrency} must be at least 1, retries={self.retries} and "
                f"longest_wait={self.longest_wait} 0 or more, timeout={self.timeout} above 0."
            )
        for name in ("max_calls", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"api.{name} is {value}: at least 1, or null for no limit.")
        self.check_no_key({"api.model": self.model, "api.base_url": self.base_url, "api.server": self.server})

    def check_no_key(self, given: dict[str, Any]) -> None:
        """Raise ValueError where one of these settings (by name) holds the key: settings are written into manifests."""
        Key.of(self.api_key_variable).check_absent(given)

    def identity(self) -> dict[str, Any]:
        """What decides the answers. The key, and how often or fast is called, do not."""
        return {"name": self.model, "server": self.server or self.base_url.rstrip("/")}


@runtime_checkable
class Metered(Protocol):
    """A back end that says what it has spent so far in this process."""

    def usage(self) -> dict[str, int]:
        """calls, retries, prompt_tokens, completion_tokens, and the number of answers of every model that answered."""


class Client:
    """Calls to one server with one set of settings; all threads and back ends of a process share it (`client`)."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.where = f"The API at {settings.base_url}"
        self._lock = threading.Lock()
        self._spent: Counter[str] = Counter(calls=0, retries=0, prompt_tokens=0, completion_tokens=0)
        self._not_before = 0.0
        self._told: set[str] = set()
        self._openai: Any = None
        self._key = Key(settings.api_key_variable, "")

    def usage(self) -> dict[str, int]:
        with self._lock:
            return dict(self._spent)

    def check(self) -> None:
        """Raise where no call could be made: a missing package, a missing key, one that cannot be sent."""
        self._connect()

    def close(self) -> None:
        """Close the connections; what was spent stays counted, and the next call opens them again."""
        with self._lock:
            connected, self._openai = self._openai, None
        if connected is not None:
            connected.close()

    def each(self, calls: Sequence[Callable[[threading.Event], Answer]]) -> list[Answer]:
        """The answers of all calls, in order, at most `concurrency` at once. The first that fails for good ends the rest.

        Args:
            calls: each is given an event that is set when the others have failed.
        """
        answers: dict[int, Answer] = {}
        failures: list[BaseException] = []
        halt = threading.Event()
        places = iter(range(len(calls)))

        def work() -> None:
            while not halt.is_set():
                with self._lock:
                    place = next(places, None)
                if place is None:
                    return
                try:
                    answers[place] = calls[place](halt)
                except BaseException as error:
                    failures.append(error)
                    halt.set()

        self._connect()
        # Daemons and no pool: whoever presses Ctrl-C does not wait for answers that nobody will read.
        threads = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.settings.concurrency, len(calls)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            halt.set()
        if failures:
            raise failures[0]
        return [answers[place] for place in range(len(calls))]

    def post(
        self,
        path: str,
        body: dict[str, Any],
        holds: str,
        halt: threading.Event,
        wrong: Callable[[dict[str, Any]], str | None] = lambda _: None,
    ) -> dict[str, Any]:
        """The answer to one request, tried again as often as the settings say.

        Args:
            path: of the endpoint, behind the base URL.
            body: of the request.
            holds: the key of the answer whose list must not be empty.
            halt: ends waiting when it is set.
            wrong: why an answer is of no use, as the object of "answered with"; None where it is of use.

        Raises:
            ApiRefused: the server refuses what is asked.
            ApiUnusable: every answer was of no use.
            ApiError: everything else that does not pass, or a limit.
        """
        for attempt in itertools.count():
            self._begin(halt)
            try:
                return self._usable(self._asked(path, body), holds, wrong)
            except Fault as found:
                fault = found
            # Behind the except clause: what the client raised may hold the key, and is no context of ours.
            if not fault.again and fault.said is not None:
                raise ApiRefused(f"{fault.sentence}.", fault.said, fault.parameter)
            if not fault.again:
                raise ApiError(f"{fault.sentence}.")
            if attempt == self.settings.retries:
                raise (ApiUnusable if fault.unusable else ApiError)(
                    f"{fault.sentence}, {attempt + 1} times in a row. What was finished stays; the same command continues."
                )
            self._hold_back(fault, attempt, halt)
        raise AssertionError("counting does not end")

    def _asked(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers, the key hidden in it."""
        import openai

        try:
            found: Any = self._connect().post(path, body=body, cast_to=object)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise fault_of(error, self.where, self.settings, self._key) from None
        if isinstance(found, str):  # not even said to be JSON: a page
            raise Fault(f"{self.where} gave a page, no JSON: check that base_url is an API's, usually ending with /v1")
        answer = self._key.hidden_in(found)
        if answer != found:
            self._tell("echo", f"{self.where} sends the key back in its answers: *** is kept in its place.")
        return answer

    def _usable(self, answer: Any, holds: str, wrong: Callable[[dict[str, Any]], str | None]) -> dict[str, Any]:
        """An answer that can be used, its tokens counted; counted are those of a useless one too."""
        if isinstance(answer, dict) and isinstance(answer.get(holds), list) and answer[holds]:
            self._count(answer)
            useless = wrong(answer)
            if useless is None:
                return answer
        else:
            useless = words_of(answer) if isinstance(answer, dict) and answer.get("error") else f"no {holds}"
        raise Fault(f"{self.where} answered with {self._key.scrubbed(useless)}", again=True, unusable=True)

    def _count(self, answer: dict[str, Any]) -> None:
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        if self.settings.max_tokens is not None and not isinstance(usage.get("prompt_tokens"), int):
            raise Fault(
                f"{self.where} does not say how many tokens it used, so api.max_tokens cannot be kept: use api.max_calls"
            )
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                count = usage.get(name)  # half of a server may say anything
                self._spent[name] += count if isinstance(count, int) and 0 <= count < 2**53 else 0
            # Names such as gpt-4o move to another model in time: the answers say which one it was.
            model = answer.get("model")
            by = self._key.scrubbed(model) if isinstance(model, str) and model else self.settings.model
            self._spent[f"answers of {by}"] += 1

    def _begin(self, halt: threading.Event) -> None:
        """Wait until calls are welcome, count this one, or raise where a limit is reached."""
        while (wait := self._not_before - time.monotonic()) > 0 and not halt.is_set():
            halt.wait(wait)
        if halt.is_set():
            raise ApiError("Stopped because another call failed.")
        with self._lock:
            tokens = self._spent["prompt_tokens"] + self._spent["completion_tokens"]
            for name, used in (("max_calls", self._spent["calls"]), ("max_tokens", tokens)):
                if (limit := getattr(self.settings, name)) is not None and used >= limit:
                    raise ApiError(
                        f"api.{name}={limit} is reached ({used} used by this process). What was finished stays; the same "
                        "command continues with a limit of its own, or raise it (if no batch fits into it, lower batch_rows)."
                    )
            self._spent["calls"] += 1

    def _hold_back(self, fault: Fault, attempt: int, halt: threading.Event) -> None:
        longest, wait = self.settings.longest_wait, fault.wait
        if wait is None:
            wait = min(FIRST_WAIT * 2**attempt, longest) * random.uniform(0.5, 1.0)
        elif wait > longest:
            raise ApiError(
                f"{fault.sentence} and asks for {wait:.0f} s of patience, more than api.longest_wait={longest:g}. What was "
                "finished stays; start the same command again later."
            )
        with self._lock:
            self._spent["retries"] += 1
            if fault.wait is not None:
                self._not_before = max(self._not_before, time.monotonic() + wait)
        self._tell("again", f"{fault.sentence}; trying again. (Said once; usage.jsonl counts the retries.)")
        halt.wait(wait)

    def _tell(self, kind: str, sentence: str) -> None:
        """Print a sentence, once of its kind."""
        with self._lock:
            first = kind not in self._told
            self._told.add(kind)
        if first:
            tqdm.write(sentence, file=sys.stderr)

    def _connect(self) -> Any:
        with self._lock:
            if self._openai is None:
                try:
                    import openai
                except ModuleNotFoundError as error:
                    raise ModuleNotFoundError(
                        "The openai package is not installed: run `pip install 'qprobe[openai]'` (or `pip install openai`)."
                    ) from error
                settings = self.settings
                self._key = Key.of(settings.api_key_variable)
                if (fault := self._key.fault()) is not None:
                    raise ApiError(fault)
                if not self._key.value and settings.base_url.startswith("https://api.openai.com"):
                    raise ApiError(
                        f"{self.where} needs a key: set the environment variable {settings.api_key_variable}."
                    )
                self._openai = openai.OpenAI(
                    api_key=self._key.value or "none",
                    base_url=settings.base_url,
                    timeout=settings.timeout,
                    max_retries=0,  # ours are counted, and hold all threads back
                )
                keys.hide_from_logs(self._key)
            return self._openai


class ApiBackEnd:
    """What back ends that call an API share: its client, opened at the first call."""

    api: ApiSettings

    @property
    def client(self) -> Client:
        return client(self.api)

    def usage(self) -> dict[str, int]:
        """Spent so far in this process: calls, retries, prompt_tokens, completion_tokens, and answers of every model."""
        return self.client.usage()

    def check(self) -> None:
        """Raise, before any work, where the openai package or the key is missing."""
        self.client.check()

    def close(self) -> None:
        """Close the connections; the next call opens them again."""
        self.client.close()


_clients: dict[ApiSettings, Client] = {}


def client(settings: ApiSettings) -> Client:
    """The process's client for these settings: whoever shares it shares limits and counts."""
    return _clients.setdefault(settings, Client(settings))


def close_clients() -> None:
    """Close all connections and forget what was spent."""
    while _clients:
        _clients.popitem()[1].close()
