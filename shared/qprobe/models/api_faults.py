"""What a failed call of an API means: a sentence, and whether another try may help."""

from __future__ import annotations

import email.utils
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qprobe.models.keys import Key

if TYPE_CHECKING:
    from qprobe.models.openai_client import ApiSettings

_TRANSIENT = (408, 409, 425, 429)  # and all from 500


@dataclass(eq=False)
class Fault(Exception):
    """A call that failed.

    Args:
        sentence: without its end.
        again: whether another try may help.
        wait: seconds that the server asks for.
        said: the server's words, where it understood the request and refused it.
        parameter: that it names in them.
        unusable: whether it answered with something that cannot be used.
    """

    sentence: str
    again: bool = False
    wait: float | None = None
    said: str | None = None
    parameter: str | None = None
    unusable: bool = False


def fault_of(error: Exception, where: str, settings: ApiSettings, key: Key) -> Fault:
    """What an error of the client openai means, or one of reading what came.

    Args:
        where: the server, as the subject of a sentence.
        key: the one that was sent; kept out of the sentence.
    """
    import openai

    if isinstance(error, openai.APIStatusError):
        return _of_status(error, where, settings, key)
    if isinstance(error, openai.APITimeoutError):
        return Fault(f"{where} gave no answer in {settings.timeout:g} s", again=True)
    if isinstance(error, openai.APIConnectionError):
        if type(error.__cause__).__name__ == "LocalProtocolError":  # its words repeat the header
            return Fault(
                f"{where} was not asked, for a header holds what none may: check the environment variables that begin with "
                "OPENAI_"
            )
        why = key.scrubbed(str(error.__cause__ or error))
        return Fault(f"{where} could not be reached or broke off ({why}): is it running?", again=True)
    if isinstance(error, openai.OpenAIError):
        return Fault(f"{where}: {key.scrubbed(str(error))}")
    # No JSON, no UTF-8, numbers or nesting beyond what Python reads.
    return Fault(f"{where} gave an answer that is no JSON", again=True, unusable=True)


def words_of(content: Any) -> str:
    """The words of an error's body, as OpenAI, vLLM and others write it."""
    if isinstance(content, dict):
        for name in ("error", "message", "detail"):
            if content.get(name):
                return words_of(content[name])
    return "" if content is None else str(content)


def _of_status(error: Any, where: str, settings: ApiSettings, key: Key) -> Fault:
    status, content = error.status_code, key.hidden_in(error.body)
    said = key.scrubbed(words_of(content) or str(error))
    content = content if isinstance(content, dict) else {}
    if status in (401, 403):
        have = "refused the key" if key.value else "wants a key"
        return Fault(
            f"{where} {have} ({status}): set the environment variable {settings.api_key_variable} to one that may use "
            f"{settings.model!r}"
        )
    if status == 402 or "insufficient_quota" in str(content.get("code") or content.get("type")):
        return Fault(f"{where} says that the account's quota is used up ({status}: {said})")
    if status == 404:
        return Fault(
            f"{where} does not know the model {settings.model!r}, or not at this endpoint (404: {said}): check api.model, and "
            "api.base_url, which usually ends with /v1",
            said=said,
        )
    if status in _TRANSIENT or status >= 500:
        return Fault(f"{where} answered {status} ({said})", again=True, wait=_retry_after(error.response.headers))
    return Fault(f"{where} refused a request ({status}: {said})", said=said, parameter=content.get("param"))


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
