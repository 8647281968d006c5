"""What a client of OpenAI's protocol sends: bodies of requests, and what is wrong with one as OpenAI words it.

Keys that this server does not know go to the model's server as they are. The object `qprobe` of a body is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qprobe.prompts import Prompt

# Keys of a body that are answered here and never sent on.
OWN_KEYS = ("qprobe", "stream", "stream_options", "n", "seed", "model", "messages", "prompt")
# Keys that change the law, with the values that leave it as it is; a model in this process cannot follow others.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
}
_KIND_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "server_error",
    504: "timeout_error",
}


class Refused(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: a sentence.
        param: the key that is wrong, where one is.
        code: a short name of the fault.
        wait: seconds after which it may be tried again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    def body(self) -> dict[str, Any]:
        kind = _KIND_OF_STATUS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.wait is None else {"retry-after": str(max(1, math.ceil(self.wait)))}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Own(_Strict):
    """The object `qprobe` of a body: what this server adds to the protocol.

    Args:
        k: candidates to choose from; null is the server's own.
        beta: temperature of the choice, 0 takes the best; null is the server's own.
        seed: of candidates and choice, for the same answer again; null is the body's `seed`, or a new one.
        return_candidates: whether the answer holds all candidates with scores and probabilities.
    """

    k: int | None = Field(default=None, ge=1)
    beta: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    return_candidates: bool = False


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Body(BaseModel):
    """What both kinds of requests share. Everything may be null, as clients send it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    qprobe: Own = Own()

    @field_validator("qprobe", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def usage_streamed(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def length(self) -> int | None:
        """The longest completion, under whichever name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...] | None:
        return None if self.stop is None else ((self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    def alone(self) -> Sequence[Body]:
        """The bodies of its prompts, one each."""
        return [self]

    def spoken(self) -> Prompt:
        """The prompt, for whoever reads or embeds it."""
        raise NotImplementedError


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)

    def spoken(self) -> Prompt:
        return _conversation(self.messages)


class TextBody(Body):
    """Of /v1/completions: a text, or several."""

    prompt: str | Annotated[list[str], Field(min_length=1)]

    def alone(self) -> Sequence[Body]:
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [self.model_copy(update={"prompt": text}) for text in texts]

    def spoken(self) -> Prompt:
        assert isinstance(self.prompt, str)  # alone
        return Prompt("request", text=self.prompt)


class ScoreBody(_Strict):
    """Of /v1/score: a prompt or messages, and candidates that are there already."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    candidates: list[str] = Field(min_length=1, max_length=1024)
    beta: float | None = Field(default=None, ge=0)

    def spoken(self) -> Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise Refused(400, "Give either prompt (a text to be continued) or messages (a conversation).", "prompt")
        return _conversation(self.messages) if self.messages is not None else Prompt("request", text=self.prompt)


Parsed = TypeVar("Parsed", bound=BaseModel)


def parsed(kind: type[Parsed], content: bytes) -> tuple[Parsed, dict[str, Any]]:
    """A body, and its plain object.

    Raises:
        Refused: it is no JSON object, or a key is wrong.
    """
    try:
        given = json.loads(content, parse_constant=_no_number)
        if b"\\ud" in content.lower():
            json.dumps(given, ensure_ascii=False).encode()  # raises at half of a pair, which is no text
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is no JSON ({error}): send one JSON object.") from None
    if not isinstance(given, dict):
        raise Refused(400, "The body is JSON, but no object: send one JSON object.")
    try:
        return kind.model_validate(given), given
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # A union names each of its kinds behind the key.
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]"))
        said = f"{where or 'The body'} cannot be used: {first['msg'][:1].lower()}{first['msg'][1:]}."
        raise Refused(400, said, where or None) from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def prompt_of(body: Body | ScoreBody) -> Prompt:
    """The prompt of a request, for whoever reads or embeds it.

    Raises:
        Refused: it is none.
    """
    try:
        return body.spoken()
    except ValueError as error:
        raise Refused(400, str(error).replace("Prompt request", "The prompt")) from None


def _conversation(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    return Prompt("request", messages=tuple(plain(message, place) for place, message in enumerate(messages)))


def refuse_law(given: Mapping[str, Any]) -> None:
    """Raise Refused where a body asks for a law that a model in this process does not follow."""
    for name, neutral in NEUTRAL.items():
        if (value := given.get(name)) is not None and value not in neutral:
            raise Refused(
                400,
                f"{name} is not followed by the model in this server's process: leave it out, or serve with an upstream that "
                "does.",
                name,
                "unsupported_parameter",
            )


def plain(message: Mapping[str, Any], place: int) -> dict[str, str]:
    """A message with its content as one text: parts joined, calls of tools as JSON behind it.

    Raises:
        Refused: it has no role, or a part that is no text.
    """
    role, content = message.get("role"), message.get("content")
    where = f"messages[{place}]"
    if not isinstance(role, str):
        raise Refused(400, f'{where} has no role: give {{"role": ..., "content": ...}}.', where)
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise Refused(
                400, f"{where} has a part that is no text, which the probe cannot read: send text alone.", where
            )
        content = "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise Refused(400, f"The content of {where} is no text.", where)
    return {"role": role, "content": (content or "") + spoken_calls(message)}


def spoken_calls(message: Mapping[str, Any]) -> str:
    """Calls of tools in a message as the text that is embedded: a line of JSON each, name and arguments."""
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    functions += [message["function_call"]] if message.get("function_call") else []
    return "\n".join(
        json.dumps({"name": function.get("name"), "arguments": function.get("arguments")})
        for function in functions
        if isinstance(function, Mapping)
    )
