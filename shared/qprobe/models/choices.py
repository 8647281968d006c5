"""What one choice of a server's answer says: a text, or why it is none.

Servers report faults inside successful answers: `finish_reason: "error"`, null content, a tool's call in the place of words. Such
a choice is no completion, and is never read as an empty one. A text may be empty; a refusal may have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FAILED = re.compile(
    r"error|abort|cancel|fail|timed?[ _-]?out|overload|unavailable|insufficient|interrupt|exception", re.IGNORECASE
)
_FILTERED = re.compile(r"filter|refus|safety|sensitive|blocked|prohibited|recitation", re.IGNORECASE)
# Where servers put what a model thought before it answered.
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "output_text", None)


@dataclass(frozen=True)
class Said:
    """A choice as it is read.

    Args:
        text: what the model said; empty where there is a fault.
        reason: the server's word on why it ended; "unknown" where it gives none, "refusal" where the model refused.
        refused: whether model or server refused to answer.
        fault: why this is no answer, as the object of "answered with"; None where it is one.
        called: whether the fault is that it calls a tool and says nothing.
    """

    text: str
    reason: str = "unknown"
    refused: bool = False
    fault: str | None = None
    called: bool = False


def read(answer: Mapping[str, Any], place: int, *, chat: bool) -> Said:
    """The choice at a place of an answer.

    Args:
        chat: whether the answer is one to messages, else to a text.
    """
    choice = answer["choices"][place]
    if not isinstance(choice, Mapping):
        return _fault("a choice that is no object")
    given = choice.get("finish_reason")
    reason = given if isinstance(given, str) and given else "unknown"
    message: Any = choice.get("message") if chat else {"content": choice.get("text")}
    refusal = message.get("refusal") if isinstance(message, Mapping) else None
    refused = (isinstance(refusal, str) and bool(refusal)) or _FILTERED.search(reason) is not None
    if choice.get("error") or (_FAILED.search(reason) and not refused):
        return _fault(f"a completion that failed (finish_reason {reason})")
    if not isinstance(message, Mapping):
        return _fault("a choice without a message")
    content = message.get("content")
    text = _text(content)
    if not text and refused:
        return Said("", "refusal" if refusal else reason, refused=True)
    if not text and any(message.get(name) for name in _CALLS):
        return Said("", reason, fault="a call of a tool and no text", called=True)
    if not text and (any(message.get(name) for name in _REASONING) or (chat and _reasoned(answer))):
        return _fault(
            f"reasoning and no text (finish_reason {reason}): allow more tokens, or switch reasoning off by extra_body"
        )
    if text is None:
        return _fault("no text (null)" if content is None else "content that is no text")
    if not text and reason == "unknown":
        return _fault("an empty text and no finish_reason")
    return Said(text, reason, refused)


def fault_of(answer: Mapping[str, Any], *, chat: bool) -> str | None:
    """Why no choice of an answer can be used; None where one can."""
    faults = [read(answer, place, chat=chat).fault for place in range(len(answer["choices"]))]
    return faults[0] if all(faults) else None


def _fault(why: str) -> Said:
    return Said("", fault=why)


def _text(content: Any) -> str | None:
    """Text out of a string or a list of parts, None where there is none; what no file can hold is replaced."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else part
            for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if texts else None
    if not isinstance(content, str):
        return None
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _reasoned(answer: Mapping[str, Any]) -> bool:
    """Whether tokens were spent on reasoning that the server does not show."""
    usage = answer.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
    spent = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    return isinstance(spent, int) and spent > 0
