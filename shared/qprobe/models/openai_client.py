"""The client of an OpenAI-compatible API that sampler and embedder share: calls, retries, limits, what was spent.

Calls run in threads, a bounded number at once. 429, 5xx, timeouts, dropped connections and cut answers are tried again with
exponential waits and jitter; `Retry-After` holds all calls back. Every fault that stays is one sentence. The key is read
from the environment, checked, sent, and kept out of everything else (`keys`): identities, messages, logs, answers.

A successful answer may be of no use (no JSON, an error inside, choices that say nothing): that is a passing fault too.

Where it stops: no streaming, no batch endpoint, no proxy settings but the environment's.
"""

from __future__ import annotations

import email.utils
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
from qprobe.models.keys import Key

Answer = TypeVar("Answer")
FIRST_WAIT = 1.0  # seconds before the first repetition; doubled each time
TRANSIENT = (408, 409, 425, 429)  # and all from 500
WRONG_KEY = (401, 403)
UNREADABLE = "gave an answer that is no JSON"


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


@dataclass(frozen=True)
class _Fault:
    """What a failed call means: a sentence without its end, and whether another try may help."""

    sentence: str
    again: bool
    wait: float | None = None
    said: str | None = None
    parameter: str | None = None
    unusable: bool = False


class Client:
    """Calls to one server with one set of settings; all threads and back ends of a process share it (`client`)."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._spent: Counter[str] = Counter(calls=0, retries=0, prompt_tokens=0, completion_tokens=0)
        self._not_before = 0.0
        self._random = random.Random()
        self._told: set[str] = set()
        self._openai: Any = None
        self._key = Key(settings.api_key_variable, "")

    @property
    def where(self) -> str:
        return f"The API at {self.settings.base_url}"

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
        # Daemons: whoever presses Ctrl-C does not wait for answers that nobody will read.
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
        attempt = 0
        while True:
            self._begin(halt)
            fault = self._try(path, body, holds, wrong)
            if not isinstance(fault, _Fault):
                return fault
            if fault.said is not None and not fault.again:
                raise ApiRefused(f"{fault.sentence}.", fault.said, fault.parameter)
            if not fault.again:
                raise ApiError(f"{fault.sentence}.")
            if attempt == self.settings.retries:
                raise (ApiUnusable if fault.unusable else ApiError)(
                    f"{fault.sentence}, {attempt + 1} times in a row. What was finished stays; the same command continues."
                )
            self._hold_back(fault, attempt, halt)
            attempt += 1

    def _try(
        self, path: str, body: dict[str, Any], holds: str, wrong: Callable[[dict[str, Any]], str | None]
    ) -> dict[str, Any] | _Fault:
        import openai

        try:
            found: Any = self._connect().post(path, body=body, cast_to=object)
        except openai.APIStatusError as error:
            return self._status_fault(error.status_code, error.response.headers, error.body, str(error))
        except openai.APITimeoutError:
            return _Fault(f"{self.where} gave no answer in {self.settings.timeout:g} s", again=True)
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ == "LocalProtocolError":  # its words repeat the header
                return _Fault(
                    f"{self.where} was not asked, for a header holds what none may: check the environment variables that begin "
                    "with OPENAI_",
                    again=False,
                )
            why = self._scrubbed(str(error.__cause__ or error))
            return _Fault(f"{self.where} could not be reached or broke off ({why}): is it running?", again=True)
        except openai.OpenAIError as error:
            return _Fault(f"{self.where}: {self._scrubbed(str(error))}", again=False)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, numbers or nesting beyond what Python reads
            return _Fault(f"{self.where} {UNREADABLE}", again=True, unusable=True)
        if isinstance(found, str):  # not even said to be JSON: a page
            return _Fault(
                f"{self.where} {UNREADABLE}: check that base_url is an API's, usually ending with /v1", again=False
            )
        answer = self._key.hidden_in(found)
        if answer != found:
            self._tell("echo", f"{self.where} sends the key back in its answers: *** is kept in its place.")
        if not isinstance(answer, dict) or not isinstance(answer.get(holds), list) or not answer[holds]:
            said = _said(answer) if isinstance(answer, dict) and answer.get("error") else f"no {holds}"
            return _Fault(f"{self.where} answered with {self._scrubbed(said)}", again=True, unusable=True)
        counted = self._counted(answer)
        if not isinstance(counted, _Fault) and (useless := wrong(answer)) is not None:
            return _Fault(f"{self.where} answered with {self._scrubbed(useless)}", again=True, unusable=True)
        return counted

    def _status_fault(self, status: int, headers: Any, content: Any, text: str) -> _Fault:
        settings, content = self.settings, self._key.hidden_in(content)
        said = self._scrubbed(_said(content) or text)
        code = str(content.get("code") or content.get("type")) if isinstance(content, dict) else ""
        if status in WRONG_KEY:
            have = "refused the key" if self._key.value else "wants a key"
            return _Fault(
                f"{self.where} {have} ({status}): set the environment variable {settings.api_key_variable} to one that may "
                f"use {settings.model!r}",
                again=False,
            )
        if status == 402 or "insufficient_quota" in code:
            return _Fault(f"{self.where} says that the account's quota is used up ({status}: {said})", again=False)
        if status == 404:
            return _Fault(
                f"{self.where} does not know the model {settings.model!r}, or not at this endpoint (404: {said}): check "
                "api.model, and api.base_url, which usually ends with /v1",
                again=False,
                said=said,
            )
        if status in TRANSIENT or status >= 500:
            return _Fault(f"{self.where} answered {status} ({said})", again=True, wait=_retry_after(headers))
        parameter = content.get("param") if isinstance(content, dict) else None
        return _Fault(f"{self.where} refused a request ({status}: {said})", again=False, said=said, parameter=parameter)

    def _begin(self, halt: threading.Event) -> None:
        """Wait until calls are welcome, count this one, or raise where a limit is reached."""
        settings = self.settings
        while (wait := self._not_before - time.monotonic()) > 0 and not halt.is_set():
            halt.wait(wait)
        if halt.is_set():
            raise ApiError("Stopped because another call failed.")
        with self._lock:
            tokens = self._spent["prompt_tokens"] + self._spent["completion_tokens"]
            for name, used, limit in (
                ("max_calls", self._spent["calls"], settings.max_calls),
                ("max_tokens", tokens, settings.max_tokens),
            ):
                if limit is not None and used >= limit:
                    raise ApiError(
                        f"api.{name}={limit} is reached ({used} used by this process). What was finished stays; the same "
                        "command continues with a limit of its own, or raise it (if no batch fits into it, lower batch_rows)."
                    )
            self._spent["calls"] += 1

    def _counted(self, answer: dict[str, Any]) -> dict[str, Any] | _Fault:
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        if self.settings.max_tokens is not None and not isinstance(usage.get("prompt_tokens"), int):
            return _Fault(
                f"{self.where} does not say how many tokens it used, so api.max_tokens cannot be kept: use api.max_calls",
                again=False,
            )
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                count = usage.get(name)  # half of a server may say anything
                self._spent[name] += count if isinstance(count, int) and 0 <= count < 2**53 else 0
            # Names such as gpt-4o move to another model in time: the answers say which one it was.
            model = answer.get("model")
            by = self._scrubbed(model) if isinstance(model, str) and model else self.settings.model
            self._spent[f"answers of {by}"] += 1
        return answer

    def _hold_back(self, fault: _Fault, attempt: int, halt: threading.Event) -> None:
        wait = fault.wait
        if wait is None:
            wait = min(FIRST_WAIT * 2**attempt, self.settings.longest_wait) * self._random.uniform(0.5, 1.0)
        elif wait > self.settings.longest_wait:
            raise ApiError(
                f"{fault.sentence} and asks for {wait:.0f} s of patience, more than api.longest_wait="
                f"{self.settings.longest_wait:g}. What was finished stays; start the same command again later."
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

    def _scrubbed(self, text: str) -> str:
        """A server's words without the key, on one line, of bearable length."""
        text = " ".join(self._key.hidden(text).split())
        return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")


_clients: dict[ApiSettings, Client] = {}


def client(settings: ApiSettings) -> Client:
    """The process's client for these settings: whoever shares it shares limits and counts."""
    return _clients.setdefault(settings, Client(settings))


def close_clients() -> None:
    """Close all connections and forget what was spent."""
    while _clients:
        _clients.popitem()[1].close()


def _said(content: Any) -> str:
    """The words of an error's body, as OpenAI, vLLM and others write it."""
    if isinstance(content, dict):
        for key in ("error", "message", "detail"):
            if content.get(key):
                return _said(content[key])
    return "" if content is None else str(content)


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, from a number or a date; None where it does not say."""
    text = str(headers.get("retry-after", "")).strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
