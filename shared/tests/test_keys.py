"""Keys: what cannot be sent is refused by name, and no form of a key leaves the process by any back end that asks a server."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import traceback
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.models import openai_client
from qprobe.models.keys import Key
from qprobe.models.openai_client import ApiError, ApiSettings, client
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split
from qprobe.sampling import SamplingSettings
from qprobe.sampling.openai import OpenAISampler

SECRET = "sk-test-THE-KEY-ITSELF"  # that of the server of the tests
ODD = "sk/aB+9=x&y%z\"q'<w>\\v$0123"  # every sign that some spelling escapes

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "repr": lambda key: repr(f"Bearer {key}"),
    "repr of bytes": lambda key: repr(f"Bearer {key}".encode()),
    "json": json.dumps,
    "json in json": lambda key: json.dumps(json.dumps({"key": key})),
    "json escapes": lambda key: "".join(f"\\u{ord(sign):04x}" for sign in key),
    "escapes of bytes": lambda key: "".join(f"\\x{ord(sign):02x}" for sign in key),
    "url": lambda key: urllib.parse.quote(key, safe=""),
    "url, every sign": lambda key: "".join(f"%{ord(sign):02X}" for sign in key),
    "url of url": lambda key: urllib.parse.quote("".join(f"%{ord(sign):02x}" for sign in key)),
    "html": lambda key: "".join(f"&#{ord(sign)};" for sign in key),
    "html, hexadecimal": lambda key: "".join(f"&#x{ord(sign):x};" for sign in key),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of a header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of user and key": lambda key: base64.b64encode(f"user:{key}!".encode()).decode(),
    "base64 for urls": lambda key: base64.urlsafe_b64encode(f"a{key}".encode()).decode().rstrip("="),
    "base64 in lines": lambda key: base64.encodebytes(f"Bearer {key * 2}".encode()).decode(),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal with colons": lambda key: key.encode().hex(":").upper(),
    "upper header": lambda key: f"AUTHORIZATION: BEARER {key}".upper(),
    "lower header": lambda key: f"authorization: bearer {key}".lower(),
    "two lines": lambda key: f"{key[:11]}\n{key[11:]}",
    "two texts": lambda key: f"'{key[:11]}' + '{key[11:]}'",
    "letter by letter": " ".join,
    "half": lambda key: f"{key[:12]}...",
    "other half": lambda key: f"...{key[-12:]}",
}


def pieces(key: str, text: str, length: int = 8) -> list[str]:
    """What of a key a text shows, by decodings of the standard library: the second reader beside `Key.hidden`."""
    seen = [text, urllib.parse.unquote(urllib.parse.unquote(text)), "".join(text.split()), html.unescape(text)]
    seen.append(re.sub(r"\\+(?:x|u00)([0-9a-f]{2})", lambda sign: chr(int(sign[1], 16)), text))
    for run in re.findall(r"[A-Za-z0-9+/_-]{8,}", text.replace("\n", "")):
        standard = run.translate(str.maketrans("-_", "+/"))
        for cut in range(4):
            whole = standard[cut : cut + (len(standard) - cut) // 4 * 4]
            seen.append(base64.b64decode(whole).decode("latin-1"))
    found = {key[at : at + length].lower() for at in range(len(key) - length + 1)}
    return [piece for piece in found for one in seen if piece in one.lower()]


@pytest.mark.parametrize("key", [SECRET, ODD, "0123456789abcdef0123456789abcdef"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_key_is_hidden(form: str, key: str) -> None:
    if key == ODD and "half" in form:
        pytest.skip("half of it is eight letters and digits among signs: too few to know it by")
    said = Key("V", key).hidden(f"Refused: {FORMS[form](key)} is wrong.")
    assert "***" in said
    assert said.startswith("Refused: ")
    assert said.endswith("is wrong.")
    assert not pieces(key, said)
    letters = [sign for sign in said.lower() if sign.isalnum()]
    assert len(letters) < 60


@pytest.mark.parametrize(
    "text",
    ["def key(x):\n    return x % 2 == 0  # the key itself", "100%25 &amp; \\n \\u00e9", "sk-test is a test", "", "%"],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert Key("V", SECRET).hidden(text) == text
    assert Key("V", "").hidden(text) == text
    assert Key("V", "e").hidden(text) == text


def test_a_placeholder_for_a_key_changes_no_completion() -> None:
    """Local servers take any word for a key, and completions may hold that word."""
    for word in ("anything", "EMPTY", "none", "password"):
        assert Key("V", word).hidden_in({"text": f"{word} goes"}) == {"text": f"{word} goes"}


BROKEN = {
    "a line end": "sk-test\nTHE-KEY-ITSELF",
    "a carriage return": "sk-test\rTHE-KEY-ITSELF",
    "a space": "sk-test THE-KEY-ITSELF",
    "a tab": "sk-test\tTHE-KEY-ITSELF",
    "an accent": "sk-test-THE-KEY-ITSÉLF",
    "a curly quotation mark": "“sk-test-THE-KEY-ITSELF”",
    "a control sign": "sk-test\x1bTHE-KEY-ITSELF",
    "no space": "sk-test\u200bTHE-KEY-ITSELF",
    "bytes that are no text": "sk-test\udcffTHE-KEY-ITSELF",
    "another line": "sk-test-THE-KEY-ITSELF\nOTHER=1",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_key_that_cannot_be_sent_is_refused_by_name_before_any_request(
    broken: str, server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(openai_client.keys.os, "environ", {"OPENAI_API_KEY": BROKEN[broken]})
    sampler = OpenAISampler(None, SamplingSettings(n=1), server.settings())
    pool = Pool(tmp_path, Split("a", [Prompt("p", text="x")], {}), "sample", sampler, 0)
    for ask in (sampler.check, OpenAIEmbedder(None, server.settings()).check, lambda: stages.sample(pool, False)):
        with pytest.raises(ApiError, match="OPENAI_API_KEY") as caught:
            ask()
        assert not pieces(SECRET, "".join(traceback.format_exception(caught.value)), 5)
    assert not server.requests
    assert not pool.completions.parts()


def test_white_space_around_a_key_is_not_part_of_it(server: Any, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {key}\n")
    client(server.settings()).each([lambda halt: client(server.settings()).post("/completions", BODY, "choices", halt)])
    assert [headers["authorization"] for _, headers, _ in server.requests] == [f"Bearer {key}"]


BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0.0}


def everything(folder: Path) -> str:
    """All that a run folder holds, Parquet as its values."""
    import pyarrow.parquet as pq

    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(
        str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_text() for path in files
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_echoes_the_key_gets_it_into_no_table(
    form: str, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As model, text and reason of every answer; and as text of a refusal."""
    echo = FORMS[form](SECRET)

    def everywhere(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            choice |= {"text": f"It is {echo}", "finish_reason": echo}
        return answer | {"model": echo, echo: echo, "usage": {"prompt_tokens": echo, "completion_tokens": 3}}

    server.always = everywhere
    sampler = OpenAISampler(None, SamplingSettings(n=2, max_new_tokens=4), server.settings())
    pool = Pool(tmp_path, Split("a", [Prompt("p", text="x")], {}), "sample", sampler, 0)
    stages.sample(pool, progress=False)
    written = everything(tmp_path)
    assert "It is " in written
    assert not pieces(SECRET, written)
    assert pool.completions.usage()["completion_tokens"] == 3
    said = capsys.readouterr()
    assert not pieces(SECRET, said.err + said.out)
    assert "sends the key back" in said.err


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
@pytest.mark.parametrize("form", ["plain", "url, every sign", "base64 of a header", "upper header", "two lines"])
def test_no_error_shows_the_key(
    form: str, status: int, server: Any, refusal: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = FORMS[form](SECRET)
    server.always = refusal(status, f"{echo} {'x' * 250} {echo}", param=echo, code=echo)
    settings = server.settings(retries=1)
    asks: list[Callable[[], object]] = [
        lambda: OpenAISampler(None, SamplingSettings(n=1), settings).sample([list(b'{"text": "x"}')], [[1]]),
        lambda: OpenAIEmbedder(None, settings).embed([[65]], [[[66]]]),
    ]
    for ask in asks:
        with pytest.raises((ApiError, ValueError)) as caught:
            ask()
        assert not pieces(SECRET, "".join(traceback.format_exception(caught.value)))
        assert not pieces(SECRET, repr(caught.value.args) + repr(vars(caught.value)))
    assert not pieces(SECRET, capsys.readouterr().err)
    assert SECRET not in repr(Key.of("OPENAI_API_KEY"))


def test_logs_of_the_client_hold_no_key(server: Any, caplog: pytest.LogCaptureFixture, key: str) -> None:
    settings = server.settings()
    client(settings).check()  # its packages make their loggers when they are loaded
    for name in ["", *(name for name in logging.root.manager.loggerDict if name.startswith(("openai", "http")))]:
        caplog.set_level(logging.DEBUG, logger=name)
    server.faults += [(lambda answer: answer | {"model": key}, {"X-Echo": f"Bearer {key}"})]
    client(settings).each([lambda halt: client(settings).post("/completions", BODY, "choices", halt)])
    assert "X-Echo" in caplog.text or "x-echo" in caplog.text.lower()
    assert key not in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda api, key: ApiSettings(f"gpt {key}"),
        lambda api, key: ApiSettings("m", base_url=f"https://host/{key}/v1"),
        lambda api, key: ApiSettings("m", server=key),
        lambda api, key: OpenAISampler(None, SamplingSettings(), api, extra_body={"api_key": key}),
        lambda api, key: OpenAIEmbedder(None, api, extra_body={"headers": {"Authorization": f"Bearer {key}"}}),
    ],
)
def test_a_setting_that_holds_the_key_is_refused(make: Any, server: Any, key: str) -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        make(server.settings(), key)
    assert key not in str(caught.value)
