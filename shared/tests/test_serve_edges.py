"""A server and what clients seldom do: several prompts in one request, candidates of a stream, leaving while they send."""

import asyncio
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, counted, policy_of, post, save_probe, serving

from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.serving import app as routes
from qprobe.serving.policy import Policy
from qprobe.serving.running import application
from qprobe.serving.service import Service
from qprobe.serving.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "the number"}]
PROMPTS = ["def add(", "the word", "def add("]


@pytest.fixture(scope="module")
def probe(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_probe(tmp_path_factory.mktemp("probe"), tiny_model)


@pytest.fixture(scope="module")
def policy(probe: Path) -> Policy:
    return policy_of(probe)


@pytest.fixture(scope="module")
def served(probe: Path) -> Iterator[Served]:
    with serving(application(policy_of(probe), ServeSettings(most_in_work=4))) as made:
        yield made


def name_of(served: Served) -> str:
    return str(served.client().models.list().data[0].id)


def body(served: Served, **more: Any) -> dict[str, Any]:
    return {"model": name_of(served), "messages": MESSAGES} | more


def test_several_prompts_are_answered_as_by_a_request_each(served: Served, policy: Policy) -> None:
    asked = {"model": name_of(served), "prompt": PROMPTS, "seed": 3, "n": 2}
    found = served.client().completions.create(**asked, extra_body={"qprobe": {"return_candidates": True}})
    assert [choice.index for choice in found.choices] == list(range(6))
    alone = [served.client().completions.create(**(asked | {"prompt": prompt})) for prompt in PROMPTS]
    assert [choice.text for choice in found.choices] == [choice.text for one in alone for choice in one.choices]
    assert found.choices[2].text == policy.answer(Prompt("p", text=PROMPTS[1]), 3)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(found.usage, name) == sum(getattr(one.usage, name) for one in alone)
    own = found.usage.qprobe
    assert [one["index"] for one in own] == [one.usage.qprobe["index"] for one in alone]
    assert len({one["id"] for one in own}) == 3
    assert own[0]["id"] == found.id
    assert [candidates[own[n]["index"]]["text"] for n, candidates in enumerate(found.qprobe["candidates"])] == [
        choice.text for choice in found.choices[::2]
    ]
    texts = [""] * 6
    for chunk in served.client().completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_a_list_that_cannot_be_answered_is_refused_as_a_whole(served: Served) -> None:
    asked = {"model": name_of(served), "max_tokens": 2}
    wrong: list[tuple[Any, int, str]] = [
        ([], 400, "prompt"),
        (["x"] * 5, 400, "4 are the most"),
        (["x", ""], 400, "empty"),
        ([[1, 2], [3]], 400, "prompt"),
    ]
    for prompt, status, word in wrong:
        found, _, said = post(f"{served.url}/completions", asked | {"prompt": prompt})
        assert (found, word in said["error"]["message"]) == (status, True), said
    assert counted(served, "qprobe_requests_in_work") == 0
    assert post(f"{served.url}/completions", asked | {"prompt": ["x"] * 4})[0] == 200


def test_embeddings_that_overflow_are_the_servers_fault(
    probe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qprobe.serving.policy import Policy

    scored = Policy._scored
    for failures, status in (("error", 500), ("first", 200)):
        with (
            serving(application(policy_of(probe), ServeSettings(when_scoring_fails=failures))) as served,
            monkeypatch.context() as spoiled,
        ):
            asked = body(served, max_tokens=2)
            spoiled.setattr(
                Policy, "_scored", lambda policy, features, sizes: scored(policy, features * math.nan, sizes)
            )
            found, headers, said = post(f"{served.url}/chat/completions", asked)
        assert caplog.text.count("could not be scored: NotFinite") == 1
        caplog.clear()
        assert found == status
        if status == 500:
            assert (said["error"]["code"], "NaN" in said["error"]["message"]) == ("scoring_failed", True)
        else:
            assert headers["x-qprobe-score"] == "none"


def test_a_client_that_goes_while_it_sends_is_no_fault(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    gone = counted(served, "qprobe_clients_gone_total")
    host, port = served.root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        )
        connection.sendall(head + b"\r\n{")
        time.sleep(0.2)
    waited = time.monotonic() + 10
    while counted(served, "qprobe_clients_gone_total") == gone:
        assert time.monotonic() < waited
        time.sleep(0.02)
    assert "Traceback" not in capfd.readouterr().err


def test_a_stream_holds_the_candidates_that_were_asked_for(served: Served) -> None:
    asked = {"return_candidates": True, "seed": 1}
    whole = served.client().chat.completions.create(**body(served, max_tokens=3), extra_body={"qprobe": asked})
    for options in ({}, {"stream_options": {"include_usage": True}}):
        stream = served.client().chat.completions.create(
            **body(served, max_tokens=3), stream=True, **options, extra_body={"qprobe": asked}
        )
        chunks = list(stream)
        assert chunks[-1].qprobe["candidates"] == whole.qprobe["candidates"]
        assert (chunks[-1].usage is None) == (not options)


def test_our_object_may_be_null_and_scores_are_of_the_model_that_is_asked_for(served: Served) -> None:
    assert post(f"{served.url}/chat/completions", body(served, max_tokens=2, qprobe=None))[0] == 200
    asked = {"prompt": "x", "candidates": ["a"]}
    assert post(f"{served.url}/score", asked | {"model": "gpt-none"})[0] == 404
    assert post(f"{served.url}/score", asked | {"model": name_of(served)})[0] == 200


def test_a_fault_in_a_stream_is_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import openai

    async def broken(*_: Any) -> None:
        await asyncio.sleep(0.1)
        raise RuntimeError("broken inside")

    monkeypatch.setattr(routes, "KEEP_ALIVE", 0.01)
    asked = body(served, stream=True)
    monkeypatch.setattr(Service, "_chosen", broken)
    with pytest.raises(openai.APIError, match="fault of the server"):
        list(served.client().chat.completions.create(**asked))
    assert "broken inside" in caplog.text
