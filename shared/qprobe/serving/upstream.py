"""Candidates from a server of OpenAI's protocol: one call with `n`, and single calls at once where it does not follow `n`.

A client's body goes there as it is, but for what this server answers itself; a choice comes back as it is. Passing faults are
tried again while there is time. Fewer choices than were asked for are said, never made up.

Where it stops: no load balancing over several servers; put a proxy before them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from qprobe.models import choices, keys, openai_client
from qprobe.models.api_faults import Fault, fault_of, words_of
from qprobe.models.keys import Key
from qprobe.models.openai_client import ApiRefused, ApiSettings
from qprobe.sampling import Completion
from qprobe.sampling.openai import refuses, sent_stop_texts
from qprobe.serving.batching import TooLate
from qprobe.serving.draws import Asked, Candidate, Draws
from qprobe.serving.protocol import OWN_KEYS, Refused, spoken_calls

_WHERE = "The model's server"
_ORIGIN = ("id", "created", "system_fingerprint", "service_tier")


class Upstream:
    """Candidates by an OpenAI-compatible server.

    Args:
        api: which model of which server; its `timeout`, `retries` and `longest_wait` are kept too.
        extra_body: further keys of every request.
        calls: at once, over all requests.
        stop_limit: stop texts that the server takes.
    """

    def __init__(
        self, api: ApiSettings, extra_body: Mapping[str, Any] | None = None, calls: int = 64, stop_limit: int = 4
    ) -> None:
        import openai

        self.api = api
        self.name = api.model
        self._extra_body = dict(extra_body or {})
        self._stop_limit = stop_limit
        self._follows_n = True
        self._length = "max_tokens"
        self._room = asyncio.Semaphore(calls)
        self._client = openai.AsyncOpenAI(api_key="none", base_url=api.base_url, max_retries=0)

    async def close(self) -> None:
        await self._client.close()

    async def draw(self, asked: Asked) -> Draws:
        k = asked.law.n
        answers: list[dict[str, Any]] = []
        faults: list[Refused | TooLate] = []
        if k > 1 and self._follows_n:
            try:
                answers.append(await self._timely(asked, self._call(asked, k, 0)))
            except ApiRefused as refused:
                if not refuses(refused, "n"):
                    raise Refused(400, str(refused), refused.parameter) from None
                self._follows_n = False
            else:
                # Servers that take `n` and do not look at it give one.
                self._follows_n = self._follows_n and len(answers[0]["choices"]) > 1
        if missing := k - sum(len(answer["choices"]) for answer in answers):
            more, faults = await self._singles(asked, range(k - missing, k))
            answers += more
        candidates, unusable = _candidates(answers, asked)
        if not candidates:
            raise faults[0] if faults else Refused(502, f"{_WHERE} answered with {unusable[0]}.")
        said = [fault.message if isinstance(fault, Refused) else "a candidate came too late" for fault in faults]
        usage: dict[str, Any] = {}
        for answer in answers:
            usage = _added(usage, answer.get("usage"))
        named = answers[0].get("model")
        return Draws(candidates, usage, named if isinstance(named, str) else self.name, [*said, *unusable])

    async def _singles(
        self, asked: Asked, places: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[Refused | TooLate]]:
        """What single calls at once gave in time, and what came in the place of others."""
        results = await asyncio.gather(
            *(self._timely(asked, self._call(asked, 1, place)) for place in places), return_exceptions=True
        )
        answers, faults = [], list[Refused | TooLate]()
        for result in results:
            if isinstance(result, ApiRefused):
                faults.append(Refused(400, str(result), result.parameter))
            elif isinstance(result, Refused | TooLate):
                faults.append(result)
            elif isinstance(result, BaseException):
                raise result
            else:
                answers.append(result)
        return answers, faults

    async def _timely(self, asked: Asked, call: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(max(0.0, asked.left())):
                found: dict[str, Any] = await call
                return found
        except TimeoutError:
            raise TooLate from None
        finally:
            call.close()  # where there was no time to begin

    async def _call(self, asked: Asked, n: int, place: int) -> dict[str, Any]:
        """The answer to one call, one of its choices usable at least; `place` of its first candidate sets the seed.

        Raises:
            ApiRefused: the server refuses what is asked.
            Refused: every other fault.
        """
        api = self.api
        for attempt in itertools.count():
            path, body = self._body(asked, n, place)
            try:
                async with self._room:
                    return self._usable(await self._asked(path, body, asked), asked, n)
            except _Failed as failed:
                fault, status = failed.fault, failed.status
            if fault.said is not None and not fault.again:
                refused = ApiRefused(f"{fault.sentence}.", fault.said, fault.parameter)
                if self._length in body and self._length == "max_tokens" and refuses(refused, "max_tokens"):
                    self._length = "max_completion_tokens"
                    continue
                if status == 404:
                    raise Refused(404, str(refused), code="model_not_found")
                raise refused
            wait = fault.wait
            if wait is None:
                wait = min(openai_client.FIRST_WAIT * 2**attempt, api.longest_wait) * random.uniform(0.5, 1.0)
            if not fault.again or attempt == api.retries or wait >= asked.left():
                raise Refused(_status(status), f"{fault.sentence}.", wait=fault.wait if status == 429 else None)
            await asyncio.sleep(wait)
        raise AssertionError("counting does not end")

    async def _asked(self, path: str, body: dict[str, Any], asked: Asked) -> Any:
        import openai

        if (why := asked.key.fault()) is not None:
            raise Refused(401, why if asked.key.variable else "The key of the request's header is none.")
        options: Any = {"timeout": max(0.1, min(self.api.timeout, asked.left()))}
        if asked.key.value:
            options["headers"] = {"Authorization": f"Bearer {asked.key.value}"}
        try:
            with keys.hidden_from_logs(asked.key):
                found: Any = await self._client.post(path, body=body, cast_to=object, options=options)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise _failed(error, self.api, asked.key) from None
        if isinstance(found, str):
            raise _Failed(Fault(f"{_WHERE} gave a page, no JSON"), 502)
        return asked.key.hidden_in(found)

    def _usable(self, answer: Any, asked: Asked, n: int) -> dict[str, Any]:
        given = answer.get("choices") if isinstance(answer, dict) else None
        if isinstance(given, list) and given:
            usable: dict[str, Any] = {**answer, "choices": given[:n]}
            read = [_candidate(usable, place, asked) for place in range(len(usable["choices"]))]
            if any(isinstance(found, Candidate) for found in read):
                return usable
            useless = str(read[0])
        else:
            useless = words_of(answer) if isinstance(answer, dict) and answer.get("error") else "no choices"
        raise _Failed(Fault(f"{_WHERE} answered with {asked.key.scrubbed(useless)}", again=True), 502)

    def _body(self, asked: Asked, n: int, place: int) -> tuple[str, dict[str, Any]]:
        """The client's body, with the law's values where it says nothing."""
        law, given = asked.law, {key: value for key, value in asked.given.items() if value is not None}
        body = {key: value for key, value in given.items() if key not in OWN_KEYS}
        own: dict[str, Any] = {"temperature": law.temperature, self._length: law.max_new_tokens}
        if law.top_p < 1:
            own["top_p"] = law.top_p
        if law.top_k:
            own["top_k"] = law.top_k
        if law.stop and (told := sent_stop_texts(law.stop, self._stop_limit)):
            own["stop"] = list(told)
        if "max_tokens" in given or "max_completion_tokens" in given:
            del own[self._length]
        body = own | self._extra_body | body | {"model": self.api.model}
        if n > 1:
            body["n"] = n
        if asked.seeded:
            body["seed"] = (asked.seed + place) % 2**31  # a larger one is refused or rounded by some
        if asked.chat:
            return "/chat/completions", body | {"messages": asked.given["messages"]}
        return "/completions", body | {"prompt": asked.prompt.text}


class _Failed(Exception):
    """A call that failed: the fault, and the status that a client is told."""

    def __init__(self, fault: Fault, status: int) -> None:
        super().__init__(fault.sentence)
        self.fault, self.status = fault, status


def _failed(error: Exception, api: ApiSettings, key: Key) -> _Failed:
    import openai

    fault = fault_of(error, _WHERE, api, key)
    if not isinstance(error, openai.APIStatusError):
        return _Failed(fault, 504 if isinstance(error, openai.APITimeoutError) else 502)
    if error.status_code not in (401, 403):
        return _Failed(fault, error.status_code)
    if key.variable:  # the operator's to mend, and not the client's
        return _Failed(fault, 502)
    said = "refused the key of the request" if key.value else "wants a key: send one as a bearer token"
    return _Failed(Fault(f"{_WHERE} {said} ({error.status_code})"), error.status_code)


def _status(status: int) -> int:
    """What a client is told of the server's status: its own key's faults and limits as they are, else a bad gateway."""
    return status if status in (401, 403, 429, 504) else 502


def _candidates(answers: Sequence[dict[str, Any]], asked: Asked) -> tuple[list[Candidate], list[str]]:
    """Those of all answers that can be used, and why others cannot."""
    read = [_candidate(answer, place, asked) for answer in answers for place in range(len(answer["choices"]))]
    return [one for one in read if isinstance(one, Candidate)], [one for one in read if isinstance(one, str)]


def _candidate(answer: Mapping[str, Any], place: int, asked: Asked) -> Candidate | str:
    """A choice as a candidate, or why it is none. What is embedded of a call of a tool is its name and arguments."""
    said = choices.read(answer, place, chat=asked.chat)
    if said.fault is not None and not said.called:
        return said.fault
    choice = dict(answer["choices"][place])
    choice.pop("index", None)
    text, reason = said.text, said.reason
    message = choice.get("message") if asked.chat else None
    if isinstance(message, Mapping):
        text += spoken_calls(message)
        if said.refused and not text:
            text = str(message.get("refusal") or "")
    if asked.given.get("stop") is None and text == said.text:
        cut = asked.law.end(asked.rendered[0], text, last=True)
        if cut is not None:
            text = text[:cut]
            choice["finish_reason"] = reason = "stop"
            choice |= {"message": {**choice["message"], "content": text}} if asked.chat else {"text": text}
    origin = {name: answer[name] for name in _ORIGIN if answer.get(name) is not None}
    return Candidate(Completion(text, None, reason, math.nan, asked.seed), choice, origin)


def _added(total: Mapping[str, Any], more: Any) -> dict[str, Any]:
    """Counts of tokens added up, those of inner objects too; what is no number is left."""
    found = dict(total)
    for name, value in more.items() if isinstance(more, Mapping) else ():
        if isinstance(value, Mapping):
            found[name] = _added(found.get(name) or {}, value)
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
            found[name] = (found.get(name) or 0) + value
    return found
