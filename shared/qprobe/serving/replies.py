"""Answers as a client of OpenAI's protocol reads them, whole or as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from qprobe.serving.answer import Answer, usage_of
from qprobe.serving.protocol import Body, ChatBody

KEEP_ALIVE = b": candidates are drawn\n\n"
DONE = b"data: [DONE]\n\n"
# A text goes out in pieces of some words, as a model's own stream would.
_PIECE = re.compile(r"\s*(?:\S+\s*){1,4}|\s+")


def whole(answers: Sequence[Answer], body: Body) -> dict[str, Any]:
    """The answers to the prompts of a request as one object."""
    choices = [{"index": index, **choice} for index, choice in _choices(answers, body)]
    found = _head(answers[0], "chat.completion" if isinstance(body, ChatBody) else "text_completion")
    return found | {"choices": choices, "usage": usage_of(answers)} | _candidates(answers, body)


def streamed(answers: Sequence[Answer], body: Body) -> Iterator[bytes]:
    """The answers to the prompts of a request as server-sent events."""
    chat = isinstance(body, ChatBody)
    head = _head(answers[0], "chat.completion.chunk" if chat else "text_completion")
    more = {"usage": None} if body.usage_streamed else {}
    for index, choice in _choices(answers, body):
        for part in _deltas(choice) if chat else _texts(choice):
            yield event(head | {"choices": [{"index": index, **part}]} | more)
    if last := ({"usage": usage_of(answers)} if body.usage_streamed else {}) | _candidates(answers, body):
        yield event(head | {"choices": []} | last)
    yield DONE


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _choices(answers: Sequence[Answer], body: Body) -> Iterator[tuple[int, dict[str, Any]]]:
    """Choices with their indices, prompt by prompt: choice j of prompt i is i n + j, also where others lack candidates."""
    for number, answer in enumerate(answers):
        for rank, place in enumerate(answer.order):
            yield number * (body.n or 1) + rank, answer.draws.candidates[place].choice


def _candidates(answers: Sequence[Answer], body: Body) -> dict[str, Any]:
    """All candidates, where they were asked for; of several prompts a list of each."""
    if not body.qprobe.return_candidates:
        return {}
    found = [answer.candidates() for answer in answers]
    return {"qprobe": {"candidates": found[0] if len(found) == 1 else found}}


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    head = {"id": answer.id, "object": kind, "created": answer.created, "model": answer.draws.model}
    origin = answer.chosen().origin
    return head | {name: origin[name] for name in ("system_fingerprint", "service_tier") if name in origin}


def _deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message in parts: role, whatever is no text as it is, the text in pieces, and why it ended."""
    message = dict(choice["message"])
    content, calls, refusal = (message.pop(name, None) for name in ("content", "tool_calls", "refusal"))
    rest = {name: value for name, value in message.items() if value is not None}
    yield {"delta": {"role": "assistant", "content": "", **rest}, "logprobs": None, "finish_reason": None}
    if refusal:
        yield {"delta": {"refusal": refusal}, "logprobs": None, "finish_reason": None}
    if calls:
        numbered = [{"index": place, **call} for place, call in enumerate(calls)]
        yield {"delta": {"tool_calls": numbered}, "logprobs": None, "finish_reason": None}
    for piece, logprobs in _pieces(content, choice.get("logprobs")):
        yield {"delta": {"content": piece}, "logprobs": logprobs, "finish_reason": None}
    yield {"delta": {}, "logprobs": None, "finish_reason": choice.get("finish_reason")}


def _texts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for piece, logprobs in _pieces(choice["text"], choice.get("logprobs")):
        yield {"text": piece, "logprobs": logprobs, "finish_reason": None}
    yield {"text": "", "logprobs": None, "finish_reason": choice.get("finish_reason")}


def _pieces(content: Any, logprobs: Any) -> Iterator[tuple[Any, Any]]:
    """The text in pieces; whole where it has log-probabilities, which belong to all of it."""
    if not isinstance(content, str) or logprobs:
        if content:
            yield content, logprobs
        return
    for piece in _PIECE.findall(content):
        yield piece, None
