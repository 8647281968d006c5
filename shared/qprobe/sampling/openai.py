"""Sampling from an OpenAI-compatible API: conversations by chat completions, plain text by completions.

An API takes text, so a prompt's "token ids" are here the UTF-8 bytes of its request; completions have no token ids.

Seeds are sent (one a call: that of its first choice, folded to 31 bits) and are best effort, as the servers say themselves;
`choices_per_call=1` sends every sample's own. What a server refuses is left away where the law does not change: `n` (single
calls then), `seed`, `stop` and `logprobs`; `max_tokens` is renamed. top_k is only sent where it is set, never left away.

Texts are cut as the local samplers cut. A server that stops inside the white space that begins a completion, where stop
texts do not count, is asked again without them. Few servers say whether an empty answer ended by itself, so elsewhere
that is asked again too, once. What is no answer (`choices`) is asked for again, and never kept as an empty completion.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from qprobe.models import choices
from qprobe.models.choices import Said
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiBackEnd, ApiRefused, ApiSettings
from qprobe.models.tokenizer import Tokenizer
from qprobe.prompts import Prompt
from qprobe.sampling.base import LOGPROB, Completion, SamplingSettings, check_seeds
from qprobe.sampling.law import Drawn
from qprobe.settings import build

_OPENINGS = ("continue_final_message", "prefix")
_LEFT_AWAY = {
    "n": "completions are asked for one by one",
    "seed": "completions cannot be repeated",
    "stop": "completions are cut here, and cost tokens up to max_new_tokens",
    "logprobs": "log-probabilities are unknown",
    "max_tokens": "max_completion_tokens is sent in its place",
}


@dataclass(frozen=True)
class _Job:
    """Some samples of one prompt that one call asks for, with the server's stop words or without."""

    prompt: int
    samples: tuple[int, ...]
    stop: bool = True


class OpenAISampler(ApiBackEnd):
    """Completions by an OpenAI-compatible API.

    Args:
        model: not used, an API names its own model; here so that all samplers are made alike.
        settings: the sampling law.
        api: which model of which server, and how it is called.
        choices_per_call: completions that one call asks for; None asks for all of a prompt.
        stop_limit: stop texts that the server accepts; OpenAI's takes 4. All others are cut here.
        opening: how the server is told to go on with an opened answer: "continue_final_message" (vLLM, SGLang) or "prefix"
            (Mistral, DeepSeek); None where it cannot.
        logprobs: whether log-probabilities are asked for.
        extra_body: further keys of every request, such as a server's own; they decide the completions.
    """

    def __init__(
        self,
        model: ModelSpec | None,
        settings: SamplingSettings,
        api: ApiSettings | Mapping[str, Any],
        choices_per_call: int | None = None,
        stop_limit: int = 4,
        opening: str | None = None,
        logprobs: bool = True,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if choices_per_call is not None and choices_per_call < 1:
            raise ValueError(f"choices_per_call is {choices_per_call}: at least 1, or null for all of a prompt.")
        if stop_limit < 0:
            raise ValueError(f"stop_limit is {stop_limit}: 0 or more.")
        if opening is not None and opening not in _OPENINGS:
            raise ValueError(f"opening is {opening!r}: choose {' or '.join(_OPENINGS)}, or null.")
        self.settings = settings
        self.api = api if isinstance(api, ApiSettings) else build(ApiSettings, api, "sampler.api")
        self.opening = opening
        self.logprobs = logprobs
        self.extra_body = dict(extra_body or {})
        self.api.check_no_key({"sampler.extra_body": self.extra_body})
        self.choices_per_call = choices_per_call or settings.n
        self.stop_limit = stop_limit
        self._stop = sent_stop_texts(settings.stop, stop_limit)
        self._left_away: set[str] = set()
        # Of the first batch, by prompt: request, text, and the log-probability of the text alone.
        self._first: list[list[tuple[dict[str, Any], str, float]]] = []

    def identity(self) -> dict[str, Any]:
        return {
            "sampler": "openai",
            "model": self.api.identity(),
            **self.settings.identity(),
            "opening": self.opening,
            "logprobs": self.logprobs,
            "extra_body": self.extra_body,
            "logprob": LOGPROB,
        }

    def draws_from(self, spec: ModelSpec) -> bool:
        """Whether the server's model is this one, by its name."""
        return spec.name == self.api.model and spec.adapter is None

    def drawn(self, tokenizer: Tokenizer) -> list[list[Drawn]]:
        """The texts of the first batch in the tokens of `tokenizer`, without what ended them, which few servers tell."""
        found = []
        for of_prompt in self._first:
            rows = [row for row in of_prompt if row[1] and math.isfinite(row[2])]
            found.append(
                [Drawn(_tokens(tokenizer, request), tokenizer.encode_completion(text), p) for request, text, p in rows]
            )
        return found

    def prompt_identity(self) -> dict[str, Any]:
        return {"rendered_by": "the server"}

    def tokenizer_fingerprint(self) -> None:
        """None: the tokens are the server's own."""

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        """A prompt's text, for whoever embeds it, and its request as bytes.

        Raises:
            ValueError: an opened answer, and `opening` does not say how.
        """
        if prompt.opening and self.opening is None:
            raise ValueError(
                f"Prompt {prompt.task_id} opens the answer (its last words are the assistant's), which a plain chat API "
                "cannot be told: end with a user's words, use a prompt style that does "
                "not (chat, zero_shot, few_shot), or set sampler.opening=continue_final_message (vLLM, SGLang) or prefix "
                "(Mistral, DeepSeek) if the server knows one of them."
            )
        request: dict[str, Any]
        if prompt.text is not None:
            text, request = prompt.text, {"text": prompt.text}
        else:
            request = {"messages": list(prompt.messages), "opening": prompt.opening}
            text = _said(request)
        return text, list(json.dumps(request).encode())

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        check_seeds(prompts, seeds, self.settings.n)
        requests = [_request(ids) for ids in prompts]
        found: dict[tuple[int, int], Completion] = {}
        alone: dict[tuple[int, int], float] = {}
        left = [_Job(p, (i,)) for p in range(len(prompts)) for i in range(self.settings.n)]
        while left:
            jobs, left = self._together(left), []
            calls = [functools.partial(self._call, job, requests[job.prompt], seeds[job.prompt]) for job in jobs]
            for job, found_here in zip(jobs, self.client.each(calls), strict=True):
                if len(found_here) == 1 < len(job.samples):
                    self.choices_per_call = 1  # such servers take `n` and do not look at it
                left += [_Job(job.prompt, (sample,), job.stop) for sample in job.samples[len(found_here) :]]
                for sample, (choice, said) in zip(job.samples, found_here, strict=False):
                    if said.fault is not None:  # others of the call were usable, so this comes to an end
                        left.append(_Job(job.prompt, (sample,), job.stop))
                        continue
                    request, seed = requests[job.prompt], seeds[job.prompt][sample]
                    completion, of_text = self._completion(choice, said, request, seed)
                    if job.stop and self._stopped_early(choice, completion, _said(requests[job.prompt])):
                        left.append(_Job(job.prompt, (sample,), stop=False))
                    else:
                        found[job.prompt, sample] = completion
                        alone[job.prompt, sample] = of_text
        if not self._first:
            self._first = [
                [(requests[p], found[p, i].text, alone[p, i]) for i in range(self.settings.n)]
                for p in range(len(prompts))
            ]
        return [[found[p, i] for i in range(self.settings.n)] for p in range(len(prompts))]

    def _together(self, single: Sequence[_Job]) -> list[_Job]:
        """Neighbours that one call may ask for, joined: servers that count seeds on give each its own."""
        jobs: list[_Job] = []
        for job in single:
            last = jobs[-1] if jobs else None
            if (
                last
                and (last.prompt, last.samples[-1] + 1, last.stop) == (job.prompt, job.samples[0], job.stop)
                and len(last.samples) < self.choices_per_call
            ):
                jobs[-1] = dataclasses.replace(last, samples=last.samples + job.samples)
            else:
                jobs.append(job)
        return jobs

    def _call(
        self, job: _Job, request: dict[str, Any], seeds: Sequence[int], halt: threading.Event
    ) -> list[tuple[Any, Said]]:
        """The choices of one call, as they came and as they are read: at most as many as the job has samples, and one usable."""
        chat = "text" not in request

        def wrong(answer: dict[str, Any]) -> str | None:
            of_job = {"choices": answer["choices"][: len(job.samples)], "usage": answer.get("usage")}
            return choices.fault_of(of_job, chat=chat)

        while True:
            path, body = self._body(job, request, seeds)
            try:
                answer = self.client.post(path, body, "choices", halt, wrong)
                given = answer["choices"][: len(job.samples)]
                return [(choice, choices.read(answer, place, chat=chat)) for place, choice in enumerate(given)]
            except ApiRefused as error:
                if error.too_long:
                    raise ValueError(
                        f"A prompt with max_new_tokens={self.settings.max_new_tokens} exceeds the context of "
                        f"{self.api.model} ({error.said}): shorten the prompt or lower max_new_tokens."
                    ) from None
                name = next((name for name in _LEFT_AWAY if name in body and refuses(error, name)), None)
                if name is None:
                    raise
                self._leave_away(name)

    def _leave_away(self, name: str) -> None:
        if name not in self._left_away:
            self._left_away.add(name)
            tqdm.write(f"{self.client.where} refuses {name}: {_LEFT_AWAY[name]}.", file=sys.stderr)
        if name == "n":
            self.choices_per_call = 1

    def _body(self, job: _Job, request: dict[str, Any], seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
        settings, length = self.settings, "max_tokens"
        if length in self._left_away:
            length = "max_completion_tokens"
        body: dict[str, Any] = {"model": self.api.model, "temperature": settings.temperature}
        optional: dict[str, Any] = {"seed": seeds[job.samples[0]] % 2**31}  # a larger one is refused or rounded by some
        if "text" in request:
            path, body["prompt"] = "/completions", request["text"]
            optional["logprobs"] = 1 if self.logprobs else None
        else:
            path, body["messages"] = "/chat/completions", list(request["messages"])
            optional["logprobs"] = True if self.logprobs else None
            if request["opening"]:
                opened = {"role": "assistant", "content": request["opening"]}
                body["messages"].append(opened | ({"prefix": True} if self.opening == "prefix" else {}))
                if self.opening == "continue_final_message":
                    body |= {"add_generation_prompt": False, "continue_final_message": True}
        body[length] = settings.max_new_tokens
        optional["n"] = len(job.samples) if len(job.samples) > 1 else None  # some servers do not even take n=1
        optional["stop"] = list(self._stop) if job.stop and self._stop else None
        if settings.top_p < 1:
            body["top_p"] = settings.top_p
        if settings.top_k:
            body["top_k"] = settings.top_k
        body |= {key: value for key, value in optional.items() if value is not None and key not in self._left_away}
        return path, body | self.extra_body

    def _stopped_early(self, choice: dict[str, Any], completion: Completion, prompt: str) -> bool:
        """Whether the server may have ended the completion at a stop text that does not count."""
        ended_by_itself = "stop_reason" in choice and choice["stop_reason"] is None  # vLLM says so, others say nothing
        if not self._stop or "stop" in self._left_away or completion.finish_reason != "stop" or ended_by_itself:
            return False
        if self.settings.rule is None:
            return not completion.text.strip()
        # It is an end if it were one behind any of the texts that the server may have stopped at.
        at = len(completion.text)
        ends = (self.settings.end(prompt, completion.text + told, last=True) for told in self._stop)
        return not any(end is not None and end <= at for end in ends)

    def _completion(
        self, choice: dict[str, Any], said: Said, request: dict[str, Any], seed: int
    ) -> tuple[Completion, float]:
        """The completion, and the log-probability of its text without what ended it."""
        text, reason = said.text, said.reason
        opening = request.get("opening", "")
        if opening and self.opening == "prefix":
            text = text.removeprefix(opening)  # Mistral repeats it, DeepSeek does not
        cut = self.settings.end(_said(request), text, last=True)
        if cut is not None:
            text, reason = text[:cut], "stop"
        given, stop = choice.get("logprobs"), self.settings.stop
        return Completion(text, None, reason, _logprob(given, text, stop), seed), _logprob(given, text, None)


def sent_stop_texts(stop: Sequence[str], limit: int) -> tuple[str, ...]:
    """The stop texts that a server is told, the first ones that leave the cut where all of them together would make it.

    A server that stops at "def" swallows the end of an untold "\n\ndef", and nobody could cut before that any more: a text
    is told together with those that may begin before it, or not at all. (Where one stop text lies in the middle of another,
    the cut depends on the tokens of whoever samples.)

    Args:
        stop: all stop texts.
        limit: how many the server takes.
    """
    told: list[str] = []
    for text in dict.fromkeys(stop):
        group, open_ends = {text}, [text]
        while open_ends:
            known = open_ends.pop()
            new = {other for other in stop if other not in group and _may_begin_before(other, known)}
            group |= new
            open_ends += new
        if len(group.union(told)) <= limit:
            told += [word for word in dict.fromkeys(stop) if word in group and word not in told]
    return tuple(told)


def _may_begin_before(other: str, told: str) -> bool:
    """Whether `other` may begin before `told` and be complete no earlier, so that a stop at `told` hides it."""
    return any(told.startswith(other[at:]) or other[at:].startswith(told) for at in range(1, len(other)))


def _request(ids: Sequence[int]) -> dict[str, Any]:
    if not ids:
        raise ValueError("A prompt has no tokens: an empty prompt cannot be continued; give it at least one token.")
    try:
        request: dict[str, Any] = json.loads(bytes(ids))
        if "text" in request or "messages" in request:
            return request
    except (ValueError, TypeError):
        pass
    raise ValueError(
        "A prompt is no request of this sampler: an API takes text, so give sample() what its render() gave, not token ids."
    )


def _said(request: dict[str, Any]) -> str:
    """A prompt's text."""
    if "text" in request:
        return str(request["text"])
    several = len(request["messages"]) > 1
    said = [f"{m['role']}: {m['content']}" if several else m["content"] for m in request["messages"]]
    return "".join(f"{one}\n\n" for one in said) + str(request["opening"])


def refuses(error: ApiRefused, name: str) -> bool:
    """Whether a server refuses this parameter."""
    if error.parameter is not None:
        return error.parameter == name
    return re.search(rf"(?:^|[\s'\"`(\[]){name}(?:$|[\s'\"`)\]:=<>,.])", error.said) is not None


def _tokens(tokenizer: Tokenizer, request: dict[str, Any]) -> list[int]:
    """A request as a local tokenizer reads it."""
    if "text" in request:
        return tokenizer.render_prompt(Prompt("request", text=request["text"]))[1]
    prompt = Prompt("request", messages=tuple(request["messages"]), opening=request["opening"])
    return tokenizer.render_prompt(prompt)[1]


def _logprob(given: Any, text: str, stop: Sequence[str] | None) -> float:
    """The log-probability of a text, summed over its tokens and those that ended it; NaN where that is unknown.

    Args:
        given: what the server says of its tokens. Many do not tell the token that ended the completion: then it is left out,
            and an empty text is unknown.
        text: as kept, cut before a stop text.
        stop: the stop texts; what a server drew behind one does not count. None leaves out what ended the text.
    """
    if not isinstance(given, dict) or "\ufffd" in text:  # that sign stands for any number of tokens
        return math.nan
    tokens: list[tuple[bytes, Any]] = []
    if isinstance(given.get("content"), list):
        for part in given["content"]:
            spelled = part.get("bytes")
            tokens.append((bytes(spelled) if spelled else str(part.get("token")).encode(), part.get("logprob")))
    elif isinstance(given.get("tokens"), list) and isinstance(given.get("token_logprobs"), list):
        tokens = [(str(t).encode(), v) for t, v in zip(given["tokens"], given["token_logprobs"], strict=False)]
    wanted, every = text.encode(), b"".join(token for token, _ in tokens)
    if not tokens or not every.startswith(wanted):
        return math.nan
    behind = every[len(wanted) :]
    ends = [0] if stop is None else [len(word.encode()) for word in stop if behind.startswith(word.encode())]
    length, read, total = len(wanted) + min(ends, default=len(behind)), 0, 0.0
    for token, value in tokens:
        if ends and read >= length:
            break
        if not isinstance(value, int | float):
            return math.nan
        read += len(token)
        total += value
    return total
