"""The API client: passing faults are tried again and counted, lasting ones are sentences, limits hold, the key stays secret."""

from __future__ import annotations

import email.utils
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qprobe.models import openai_client
from qprobe.models.openai_client import ApiError, ApiRefused, ApiSettings, Client, client

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0.0}
Refusals = Callable[..., Exception]


def post(server: Any, **changes: Any) -> dict[str, Any]:
    return client(server.settings(**changes)).each([request(server.settings(**changes))])[0]


def request(settings: ApiSettings, body: dict[str, Any] = BODY) -> Callable[[threading.Event], dict[str, Any]]:
    return lambda halt: client(settings).post("/completions", body, "choices", halt)


def usage(server: Any, **changes: Any) -> dict[str, int]:
    return client(server.settings(**changes)).usage()


# ------------------------------------------------------------------------------------------------ faults that pass


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_passing_refusals_are_tried_again_and_counted(server: Any, refusal: Refusals, status: int) -> None:
    server.faults += [refusal(status, "busy"), refusal(status, "busy")]
    assert post(server)["choices"]
    assert len(server.requests) == 3
    spent = usage(server)
    assert (spent["calls"], spent["retries"]) == (3, 2)


@pytest.mark.parametrize("fault", ["drop", "cut", "[1]"])
def test_broken_answers_are_asked_for_again(server: Any, fault: str) -> None:
    server.faults.append(fault)
    answer = post(server)
    assert answer["choices"][0]["text"]
    assert usage(server)["retries"] == 1


def test_a_call_that_takes_too_long_is_tried_again(server: Any) -> None:
    server.faults.append(1.5)
    assert post(server, timeout=0.5)["choices"]
    assert usage(server, timeout=0.5)["retries"] == 1


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_honoured_by_all_calls(server: Any, refusal: Refusals, dated: bool) -> None:
    settings = server.settings(concurrency=2)
    seconds = 2.0 if dated else 0.6
    said = email.utils.formatdate(time.time() + seconds, usegmt=True) if dated else "0.6"
    server.faults.append((refusal(429, "slow down"), {"Retry-After": said}))
    began = time.monotonic()
    client(settings).each([request(settings)])
    client(settings).each([request(settings)] * 4)
    # A date has whole seconds: up to one is lost in writing it.
    assert seconds - (1.1 if dated else 0.01) < time.monotonic() - began < seconds + 10
    assert client(settings).usage()["retries"] == 1


def test_other_threads_wait_too_when_the_server_asks_for_it(server: Any, refusal: Refusals) -> None:
    settings = server.settings(concurrency=1)
    the_client = client(settings)
    server.faults.append((refusal(429, "slow down"), {"Retry-After": "0.7"}))
    first = threading.Thread(target=the_client.each, args=([request(settings)],))
    first.start()
    while not the_client.usage()["retries"]:
        time.sleep(0.005)
    began = time.monotonic()
    the_client.each([request(settings)])
    assert time.monotonic() - began > 0.5
    first.join()


def test_a_server_that_asks_for_more_patience_than_there_is_is_given_up(server: Any, refusal: Refusals) -> None:
    server.faults.append((refusal(429, "come tomorrow"), {"Retry-After": "3600"}))
    with pytest.raises(ApiError, match="longest_wait"):
        post(server)
    assert len(server.requests) == 1


def test_waits_double_with_jitter_up_to_the_longest(server: Any, refusal: Refusals, monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 1.0)
    settings = server.settings(longest_wait=8.0)
    waits: list[float] = []

    class Halt(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return False

    server.always = refusal(500, "broken")
    the_client = Client(ApiSettings(**vars(settings) | {"retries": 6}))
    with pytest.raises(ApiError, match="7 times"):
        the_client.post("/completions", BODY, "choices", Halt())
    the_client.close()
    for wait, whole in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert whole / 2 <= wait <= whole
    assert len({wait / whole for wait, whole in zip(waits, [1, 2, 4, 8, 8, 8], strict=True)}) > 1


# ------------------------------------------------------------------------------------------------ faults that stay


QUOTA = {"code": "insufficient_quota"}


@pytest.mark.parametrize(
    ("fault", "word", "calls"),
    [
        ((401, "no"), "OPENAI_API_KEY", 1),
        ((403, "no"), "refused the key", 1),
        ((404, "The model `tiny` does not exist"), "base_url", 1),
        ((402, "pay"), "quota", 1),
        ((429, "You exceeded your current quota", QUOTA), "quota", 1),
        ((418, "teapot"), "teapot", 1),
        ((500, "broken"), "4 times", 4),
        ("drop", "running", 4),
        ("not json", "JSON", 4),
        ("<html>hello</html>", "base_url", 1),
        ("{}", "no choices", 4),
    ],
)
def test_lasting_faults_are_sentences(server: Any, refusal: Refusals, fault: Any, word: str, calls: int) -> None:
    if isinstance(fault, tuple):
        status, said, *more = fault
        fault = refusal(status, said, **(more[0] if more else {}))
    server.always = fault
    with pytest.raises(ApiError, match=word):
        post(server)
    assert len(server.requests) == calls


def test_what_a_server_refuses_can_be_looked_at(server: Any, refusal: Refusals) -> None:
    server.always = refusal(400, "'n' is too large", param="n")
    with pytest.raises(ApiRefused) as caught:
        post(server)
    assert (caught.value.said, caught.value.parameter, caught.value.too_long) == ("'n' is too large", "n", False)


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens",
        "the request exceeds the available context size. try increasing the context size or enable context shift",
        "The decoder prompt (length 300) is longer than the maximum model length of 192.",
        "Prompt is too long",
    ],
)
def test_the_ways_of_saying_too_long(said: str) -> None:
    assert ApiRefused("", said, None).too_long


def test_the_first_failure_ends_the_rest_and_what_waits(server: Any, refusal: Refusals, monkeypatch: Any) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 60.0)
    settings = server.settings(concurrency=2)
    server.faults += [refusal(500, "wait a minute"), refusal(401, "no")]
    began = time.monotonic()
    with pytest.raises(ApiError, match="refused the key"):
        client(settings).each([request(settings)] * 40)
    assert time.monotonic() - began < 10
    assert len(server.requests) <= 4


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C as at a terminal: a shell starts what runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_does_not_wait_for_answers(server: Any, interrupts: None) -> None:
    server.pause = 8.0
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client(server.settings()).each([request(server.settings())] * 8)
    assert time.monotonic() - began < 6
    timer.join()


# ------------------------------------------------------------------------------------------- order, number, limits


def test_answers_keep_their_order_and_calls_their_bound(server: Any) -> None:
    server.pause = 0.03
    settings = server.settings(concurrency=3)
    bodies = [BODY | {"prompt": "a" * (1 + i)} for i in range(12)]
    answers = client(settings).each([request(settings, body) for body in bodies])
    assert server.busiest == 3
    counts = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert counts == sorted(counts)
    assert len(set(counts)) == 12


def test_usage_counts_tokens_and_who_answered(server: Any) -> None:
    answers = [post(server), post(server)]
    spent = usage(server)
    assert spent["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in answers) > 0
    assert spent["completion_tokens"] == sum(a["usage"]["completion_tokens"] for a in answers) > 0
    assert spent["answers of tiny-2026-11"] == spent["calls"] == 2


def test_the_limit_of_calls_holds_exactly_retries_included(server: Any, refusal: Refusals) -> None:
    settings = server.settings(max_calls=5, concurrency=3)
    server.faults.append(refusal(500, "once"))
    with pytest.raises(ApiError, match="max_calls"):
        client(settings).each([request(settings)] * 9)
    assert len(server.requests) == 5


def test_the_limit_of_tokens_stops_the_next_call(server: Any) -> None:
    settings = server.settings(max_tokens=10, concurrency=1)
    with pytest.raises(ApiError, match="max_tokens"):
        client(settings).each([request(settings)] * 9)
    spent = client(settings).usage()
    last = server.answer("/v1/completions", BODY)["usage"]
    each = last["prompt_tokens"] + last["completion_tokens"]
    assert len(server.requests) == -(-10 // each)
    assert spent["prompt_tokens"] + spent["completion_tokens"] == each * len(server.requests)


def test_a_limit_of_tokens_that_cannot_be_kept_is_a_sentence(server: Any) -> None:
    server.always = lambda answer: answer | {"usage": None}
    assert post(server)["choices"]
    with pytest.raises(ApiError, match="max_tokens"):
        post(server, max_tokens=10)


# --------------------------------------------------------------------------------------------------------- the key


def test_the_key_is_sent_and_stands_nowhere_else(
    server: Any, refusal: Refusals, key: str, caplog: Any, capsys: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults += [refusal(500, f"broken for {key}"), refusal(400, f"{key} may not do this")]
    with pytest.raises(ApiRefused) as caught:
        post(server)
    post(server)
    assert server.requests[0][1]["authorization"] == f"Bearer {key}"
    everything = [str(caught.value), caught.value.said, repr(caught.value), caplog.text, *capsys.readouterr()]
    everything += [str(server.settings().identity()), str(server.settings())]
    error: BaseException | None = caught.value
    while error is not None:
        assert error is caught.value or error.__suppress_context__ or key not in repr(error)
        everything.append(str(error))
        error = error.__cause__
    assert "may not do this" in caught.value.said
    assert not [text for text in everything if key in text]


def test_a_missing_key_is_said_before_any_call_where_one_is_needed(monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = ApiSettings("gpt")
    with pytest.raises(ApiError, match="OPENAI_API_KEY"):
        client(settings).check()
    openai_client.close_clients()


def test_a_closed_client_opens_again_and_keeps_its_count(server: Any) -> None:
    post(server)
    client(server.settings()).close()
    post(server)
    assert usage(server)["calls"] == 2


def test_a_server_that_wants_a_key_and_gets_none_says_so(server: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ApiError, match="wants a key"):
        post(server)


@pytest.mark.parametrize(
    "changes",
    [
        {"api_key_variable": "gsk_abc123"},
        {"api_key_variable": "sk-abc123"},
        {"base_url": "http://user:abc123@host/v1"},
        {"base_url": "http://host/v1?key=abc123"},
        {"base_url": "localhost:8000"},
        {"model": ""},
        {"concurrency": 0},
        {"timeout": 0.0},
        {"retries": -1},
        {"max_calls": 0},
        {"max_tokens": -3},
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_keys_not_repeated(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        ApiSettings(**{"model": "m"} | changes)
    assert "abc123" not in str(caught.value)


def test_identity_is_the_model_and_its_server() -> None:
    base = ApiSettings("m")
    assert base.identity() == {"name": "m", "server": "https://api.openai.com/v1"}
    assert ApiSettings("m", server="cluster", base_url="http://a:1/v1").identity()["server"] == "cluster"
    fast = ApiSettings("m", concurrency=99, retries=1, timeout=3.0, max_calls=4, max_tokens=5, api_key_variable="X")
    assert fast.identity() == base.identity()
    assert len({str(ApiSettings(m, base_url=u).identity()) for m in "ab" for u in ("http://a/v1", "http://b/v1")}) == 4


# ------------------------------------------------------------------------------------------------- without openai


def test_a_missing_package_is_a_sentence_with_the_command(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        post(server)


def test_openai_is_imported_at_the_first_call_only() -> None:
    code = (
        "import sys, qprobe, qprobe.sampling.openai, qprobe.embedding.openai, qprobe.run.stages; "
        "assert 'openai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
