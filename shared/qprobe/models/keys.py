"""Keys of servers: checked before they are sent, and kept out of everything that a process says or writes.

Whatever comes from a server or its client passes through `Key.hidden`. It finds a key in any case, escaped (as Python, JSON, HTML
or a URL writes it, also several times over), in base64 or hexadecimal, cut up by white space and punctuation, and pieces of it.

Where it stops: a transformation that only its maker knows, such as a cipher, is not recognised.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_HIDDEN = "***"
_SHORTEST = 4  # characters: a shorter key would be found in any text
# Loggers of the client, by the beginning of their names; at DEBUG they write the headers of answers.
_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")
# A character, written plainly or escaped; %25 is an escaped %, so that escapes of escapes are read too.
_SIGN = re.compile(
    r"%(?:25)*(?P<url>[0-9a-fA-F]{2})|\\+u\{?(?:00)*(?P<u>[0-9a-fA-F]{2})\}?|\\+x(?P<x>[0-9a-fA-F]{2})"
    r"|&(?:amp;)*#(?P<d>\d{1,3});|&(?:amp;)*#[xX](?P<h>[0-9a-fA-F]{2});|&(?:amp;)*(?P<name>[a-z]{2,4});|\\+[nrt]|.",
    re.S,
)
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Key:
    """A key as it is sent.

    Args:
        variable: the environment variable that holds it.
        value: empty where there is none.
    """

    variable: str
    value: str = field(repr=False)

    @classmethod
    def of(cls, variable: str) -> Key:
        """The key of an environment variable, without white space around it."""
        return cls(variable, os.environ.get(variable, "").strip())

    def fault(self) -> str | None:
        """Why it cannot be sent, without the value; None where it can."""
        for what, found in (
            ("a line end", re.search(r"[\r\n]", self.value)),
            ("a space", re.search(r"\s", self.value)),
            ("a character that is not printable ASCII", re.search(r"[^!-~]", self.value)),
        ):
            if found:
                return (
                    f"The environment variable {self.variable} holds {what} inside, which no key does: set it anew, to the key "
                    "alone, without quotation marks and other lines."
                )
        return None

    @property
    def secret(self) -> bool:
        """Whether it can only be a key: local servers take any word, and completions may hold words such as `anything`."""
        mixed = re.search(r"\d", self.value) and re.search(r"[A-Za-z]", self.value)
        return len(self.value) >= (8 if mixed else 12)

    def hidden(self, text: str) -> str:
        """A text with *** in the place of the key and of pieces of it."""
        if len(self.value) < _SHORTEST:
            return text
        text = re.sub(re.escape(self.value), _HIDDEN, text, flags=re.IGNORECASE)
        grams = self._grams
        if not grams or not any(any(True for _ in _hits(_plain(text), length, of)) for length, of in grams.items()):
            return text
        signs, spans = _placed(text)
        held = sorted(
            (spans[at][0], spans[at + length - 1][1]) for length, of in grams.items() for at in _hits(signs, length, of)
        )
        parts, end = [], 0
        for begins, ends in held:
            if begins >= end:
                parts += [text[end:begins], _HIDDEN]
            end = max(end, ends)
        return re.sub(r"(?:\*\*\*){2,}", _HIDDEN, "".join([*parts, text[end:]]))

    def scrubbed(self, text: str) -> str:
        """A server's words with the key hidden, on one line, of bearable length."""
        text = " ".join(self.hidden(text).split())
        return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")

    def hidden_in(self, value: Any) -> Any:
        """JSON with the key hidden in its texts and names; the same object where nothing was found."""
        if not self.secret:
            return value
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, list):
            # Long lists are embeddings: numbers hold no key.
            return [item if isinstance(item, float) else self.hidden_in(item) for item in value]
        if isinstance(value, dict):
            return {self.hidden_in(name): self.hidden_in(item) for name, item in value.items()}
        return value

    def check_absent(self, given: dict[str, Any]) -> None:
        """Raise ValueError where a setting holds the key: it would be written into manifests and tables.

        Args:
            given: JSON-able, by the setting's name.
        """
        for name, value in given.items():
            if self.secret and self.hidden(text := json.dumps(value)) != text:
                raise ValueError(
                    f"{name} holds the key of the environment variable {self.variable}: a key is sent from the environment, and "
                    "is part of no setting."
                )

    @functools.cached_property
    def _grams(self) -> dict[int, frozenset[str]]:
        """Pieces of the key and of its encodings by their length: a text that has one of them holds the key, or part of it."""
        found: dict[int, set[str]] = {}
        for form in self._forms():
            # Long enough that no other text has it, short enough that half a key is found.
            length = min(len(form), max(8, min(12, len(form) // 3)))
            if length >= 8:
                found.setdefault(length, set()).update(form[at : at + length] for at in range(len(form) - length + 1))
        return {length: frozenset(of) for length, of in found.items()}

    def _forms(self) -> Iterator[str]:
        raw = self.value.encode(errors="surrogatepass")
        yield _plain(self.value)
        yield raw.hex()
        for before in range(3):  # base64 spells three bytes at once: what stands before the key shifts it
            coded = base64.b64encode(bytes(before) + raw)
            own = coded[(0, 2, 3)[before] : len(coded) - (0, 3, 2)[(before + len(raw)) % 3]].decode()
            yield _plain(own)
            yield _plain(own.translate(str.maketrans("+/", "-_")))


class Hiding(logging.Filter):
    """Keeps keys out of the records of a logger, their tracebacks included."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[Key] = set()
        self.passing: Counter[Key] = Counter()  # calls in work by the key that they bear

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        for key in {*self.keys, *self.passing}:
            said = key.hidden(said)
            record.exc_text = key.hidden(record.exc_text) if record.exc_text else record.exc_text
        record.msg, record.args = said, ()
        record.exc_info = None  # its text is in exc_text
        return True


_hiding = Hiding()


def hide_from_logs(*own: Key) -> None:
    """Keep keys out of what the client's packages log, whoever listens."""
    _hiding.keys.update(own)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in _LOGGERS:
            logging.getLogger(name).addFilter(_hiding)  # twice is once


@contextlib.contextmanager
def hidden_from_logs(key: Key) -> Iterator[None]:
    """As `hide_from_logs`, of a client's key, as long as the call that bears it lasts: clients bring any number of them."""
    hide_from_logs()
    _hiding.passing[key] += 1
    try:
        yield
    finally:
        _hiding.passing[key] -= 1
        if not _hiding.passing[key]:
            del _hiding.passing[key]


def _plain(text: str) -> str:
    """A text without escapes, white space, punctuation and case."""
    return _OTHER.sub("", _SIGN.sub(_read, text) if re.search(r"[%\\&]", text) else text).lower()


def _read(sign: re.Match[str]) -> str:
    """The character that a sign stands for; nothing for white space."""
    code = next((int(sign[name], 16) for name in ("url", "u", "x", "h") if sign[name]), None)
    if sign["d"]:
        code = int(sign["d"])
    if code is not None:
        return chr(code)
    if sign["name"]:
        return html.unescape(f"&{sign['name']};")
    return sign[0] if len(sign[0]) == 1 else ""


def _placed(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`_plain` of a text, and where each of its characters stood."""
    signs, spans = [], []
    for sign in _SIGN.finditer(text):
        for character in _OTHER.sub("", _read(sign)).lower():
            signs.append(character)
            spans.append(sign.span())
    return "".join(signs), spans


def _hits(signs: str, length: int, grams: frozenset[str]) -> Iterator[int]:
    return (at for at in range(len(signs) - length + 1) if signs[at : at + length] in grams)
