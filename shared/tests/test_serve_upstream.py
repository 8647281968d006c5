"""A server before another one of OpenAI's protocol: what goes through, and what a client sees of every fault of it."""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, policy_of, post, save_probe, serving

from qprobe.models import keys
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, sample_seeds
from qprobe.serving import learning
from qprobe.serving.policy import Policy, choice_seed
from qprobe.serving.running import application
from qprobe.serving.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "the number"}]
BODY = {"model": "tiny", "messages": MESSAGES, "qprobe": {"seed": 11, "return_candidates": True}}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def probe(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_probe(tmp_path_factory.mktemp("probe"), tiny_model)


@pytest.fixture(scope="module")
def policy(probe: Path) -> Policy:
    return policy_of(probe)


@pytest.fixture
def server(
    make_server: Callable[[ModelSpec], Any], tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """With a copy of the model: requests that were given up still run there, and a model runs in one thread at a time."""
    copied = shutil.copytree(tiny_model.name, tmp_path_factory.mktemp("upstream") / "model")
    return make_server(dataclasses.replace(tiny_model, name=str(copied)))


@pytest.fixture
def served(policy: Policy, server: Any) -> Iterator[Served]:
    settings = ServeSettings(candidate_seconds=3, request_seconds=10)
    with serving(application(policy, settings, server.settings(retries=2))) as made:
        yield made


def ask(served: Served, **more: Any) -> tuple[int, dict[str, str], Json]:
    status, headers, said = post(f"{served.url}/chat/completions", BODY | more)
    return status, {name.lower(): value for name, value in headers.items()}, said


def changed(**message: Any) -> Callable[[Json], Json]:
    """An answer whose first choice has another message."""

    def change(answer: Json) -> Json:
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        first = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
        return answer | {"choices": [first, *answer["choices"][1:]]}

    return change


def test_candidates_are_read_as_the_probe_was_trained(served: Served, policy: Policy, server: Any) -> None:
    server.always = lambda answer: answer | {"id": "chatcmpl-theirs", "created": 5, "system_fingerprint": "fp"}
    status, headers, said = ask(served, user="u-1", logprobs=True)
    assert status == 200
    (_, _, sent) = server.requests[0]
    assert (sent["n"], sent["seed"], sent["user"], sent["max_tokens"]) == (4, 11, "u-1", 12)
    assert "qprobe" not in sent
    prompt = Prompt("p", messages=tuple(MESSAGES))
    texts = [candidate["text"] for candidate in said["qprobe"]["candidates"]]
    completions = [Completion(text, None, "stop", math.nan, 0) for text in texts]
    (read,) = policy.read([prompt], [policy.sampler.render(prompt)], [completions])
    scores = [candidate["score"] for candidate in said["qprobe"]["candidates"]]
    assert scores == pytest.approx(read.scores.tolist(), abs=1e-4)
    choice = policy.choice(completions, read, choice_seed(sample_seeds(11, policy.sampler.render(prompt)[0], 4)))
    assert said["choices"][0]["message"]["content"] == choice.answer
    assert said["choices"][0]["logprobs"]["content"]  # of the chosen one
    assert (said["id"], said["created"], said["system_fingerprint"]) == ("chatcmpl-theirs", 5, "fp")
    assert said["model"] == "tiny-2026-11"
    usage = server.requests and said["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert headers["x-qprobe-valid"] == "4"


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_single_calls_at_once_where_n_is_not_followed(how: str, served: Served, server: Any) -> None:
    server.pause = 0.2
    if how == "refused":
        server.max_n = 1
    else:
        server.always = lambda answer: answer | {"choices": answer["choices"][:1]}
    status, headers, said = ask(served)
    assert (status, headers["x-qprobe-valid"]) == (200, "4")
    singles = server.requests[1:]
    assert len(singles) == (4 if how == "refused" else 3)
    assert sorted(sent["seed"] for _, _, sent in singles) == ([11, 12, 13, 14] if how == "refused" else [12, 13, 14])
    assert len({candidate["text"] for candidate in said["qprobe"]["candidates"]}) > 1
    assert server.busiest >= 3
    server.requests.clear()
    ask(served)
    assert [sent.get("n") for _, _, sent in server.requests] == [None] * 4  # remembered


def test_passing_faults_are_tried_again(served: Served, server: Any, refusal: Callable[..., Exception]) -> None:
    kinds: list[Any] = ["drop", "cut", refusal(500, "broken"), (refusal(429, "busy"), {"Retry-After": "0"}), 0.2]
    for fault in kinds:
        server.requests.clear()
        server.faults.append(fault)
        status, headers, _ = ask(served)
        assert (status, headers["x-qprobe-valid"]) == (200, "4"), fault
        assert len(server.requests) == (1 if fault == 0.2 else 2), fault


def test_what_stays_is_said(served: Served, server: Any, refusal: Callable[..., Exception]) -> None:
    limited = (refusal(429, "busy"), {"Retry-After": "100"})
    expected: list[tuple[Any, int, str]] = [
        ("drop", 502, "broke off"),
        ("cut", 502, "server"),
        (refusal(500, "broken"), 502, "500"),
        (limited, 429, "busy"),
        ("<html>no</html>", 502, "page"),
        ("{}", 502, "no choices"),
        (4.0, 504, ""),
        (refusal(400, "logit_bias is wrong", param="logit_bias"), 400, "logit_bias"),
        (refusal(401, "wrong key"), 502, "refused the key"),
        (refusal(404, "no such model"), 404, "no such model"),
        (lambda answer: answer | {"choices": [{"message": {"content": None}}] * 4}, 502, "null"),
        (lambda answer: {"error": {"message": "out of order"}}, 502, "out of order"),
    ]
    for fault, status, word in expected:
        server.always = fault
        began = time.monotonic()
        found, headers, said = ask(served)
        assert (found, word in said["error"]["message"]) == (status, True), (fault, said)
        assert time.monotonic() - began < 15
        assert "127.0.0.1" not in said["error"]["message"]
        if fault is limited:
            assert headers["retry-after"] == "100"


def test_a_choice_that_is_no_text_is_left_and_said(served: Served, server: Any) -> None:
    server.always = changed(content=None)
    status, headers, said = ask(served)
    assert (status, headers["x-qprobe-k"], headers["x-qprobe-valid"]) == (200, "4", "3")
    assert said["usage"]["qprobe"]["faults"] == ["no text (null)"]
    assert len(said["qprobe"]["candidates"]) == 3


def test_some_of_the_single_calls_may_fail(policy: Policy, server: Any, refusal: Callable[..., Exception]) -> None:
    with serving(application(policy, ServeSettings(candidate_seconds=2), server.settings(retries=0))) as served:
        server.faults.extend([refusal(400, "'n' must be 1", param="n"), refusal(500, "broken"), 3.0])
        status, headers, said = ask(served)
    assert (status, headers["x-qprobe-valid"]) == (200, "2")
    assert any("broken" in fault for fault in said["usage"]["qprobe"]["faults"])
    assert any("too late" in fault for fault in said["usage"]["qprobe"]["faults"])


def test_calls_of_tools_and_reasoning_come_back_whole(served: Served, server: Any) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    server.always = changed(content=None, tool_calls=calls)
    best_first = {"n": 4, "tools": tools, "qprobe": {"seed": 1, "k": 4, "return_candidates": True}}
    status, _, said = ask(served, **best_first)
    assert status == 200, said
    assert server.requests[-1][2]["tools"] == tools
    called = next(choice for choice in said["choices"] if choice["message"].get("tool_calls"))
    assert (called["message"]["tool_calls"], called["finish_reason"]) == (calls, "tool_calls")
    assert any('"weather"' in candidate["text"] for candidate in said["qprobe"]["candidates"])
    chunks = list(
        served.client().chat.completions.create(model="tiny", messages=MESSAGES, n=4, tools=tools, stream=True)
    )
    streamed = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert [(call.index, call.function.name) for call in streamed[0]] == [(0, "weather")]
    server.always = changed(content="It rains.", reasoning_content="Clouds.")
    _, _, said = ask(served, **best_first)
    assert "Clouds." in [choice["message"].get("reasoning_content") for choice in said["choices"]]


def test_keys_go_through_or_come_from_the_environment_and_into_no_log(
    policy: Policy, server: Any, key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(application(policy, ServeSettings(), server.settings())) as served:
        ask(served)
        assert server.requests[-1][1]["authorization"] == f"Bearer {key}"
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(application(policy, ServeSettings(), server.settings(retries=0))) as served:
        assert served.client(key).chat.completions.create(model="tiny", messages=MESSAGES).choices
        wrong = "sk-another-key-12345"
        status, _, said = post(f"{served.url}/chat/completions", BODY, {"authorization": f"Bearer {wrong}"})
        assert (status, "of the request" in said["error"]["message"]) == (401, True)
        assert wrong not in str(said)
        assert ask(served)[0] == 401
    assert "chat/completions" in caplog.text
    assert key not in caplog.text
    assert wrong not in caplog.text


def test_a_probe_of_an_api_is_served_by_its_own_server(tiny_model: ModelSpec, server: Any, tmp_path: Path) -> None:
    """Sampler and embedder are an API's, as the card says."""
    import numpy as np

    from qprobe.cli import composition
    from qprobe.embedding.openai import OpenAIEmbedder
    from qprobe.probe.card import EmbeddingSource
    from qprobe.probe.estimator import QProbe

    api = [f"api.model=tiny api.base_url={server.url}".split()][0]
    words = ["sampler=openai", "embedder=openai", "sampler.max_new_tokens=8", "sampler.n=3"]
    words += [f"{part}.{word}" for part in ("sampler", "embedder") for word in api]
    config = composition.composed("run", words)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 32)).astype("float32")
    trained = QProbe(loss="reward_mse", steps=5).fit(
        features, (features[:, 0] > 0).astype("float32"), np.arange(60) // 3
    )
    embedder = OpenAIEmbedder(None, dataclasses.replace(server.settings(), timeout=120.0, concurrency=8, retries=6))
    trained.source = EmbeddingSource.of(embedder.identity(), 0, embedder.tokenizer_fingerprint())
    trained.use = {"prompts": "chat"} | {name: config[name] for name in ("model", "sampler", "embedder")}
    trained.save_pretrained(tmp_path / "probe")
    with serving(application(policy_of(tmp_path / "probe"), ServeSettings())) as served:
        status, headers, _ = ask(served)
    assert (status, headers["x-qprobe-valid"]) == (200, "3")
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions", "/v1/embeddings"]


def test_two_servers_that_share_a_folder_of_feedback_mix_no_replies(
    policy: Policy, server: Any, tmp_path: Path
) -> None:
    """Some servers draw the ids of their answers out of a thousand."""
    server.always = lambda answer: answer | {"id": "chatcmpl-7"}
    with contextlib.ExitStack() as stack:
        made = [application(policy, ServeSettings(), server.settings(), feedback=tmp_path) for _ in range(2)]
        for served in [stack.enter_context(serving(one)) for one in made]:
            _, _, said = ask(served)
            assert post(f"{served.url}/feedback", {"id": said["id"], "preferred": 0})[0] == 200
    requests = learning.read(tmp_path)[0]
    assert [len(request.probabilities) for request in requests] == [4, 4]


def test_what_cannot_be_sent_is_the_clients_fault_and_not_tried_again(served: Served, server: Any) -> None:
    for sent in (b'"user": "\\ud800"', b'"frequency_penalty": NaN'):
        content = json.dumps(BODY).encode()[:-1] + b", " + sent + b"}"
        status, _, said = post(f"{served.url}/chat/completions", content)
        assert (status, "The body" in said["error"]["message"]) == (400, True), said
    assert not server.requests


def test_keys_of_clients_are_not_kept(policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPROBE_TEST_KEY", raising=False)
    settings = dataclasses.replace(server.settings(), api_key_variable="QPROBE_TEST_KEY")
    with serving(application(policy, ServeSettings(), settings)) as served:
        for number in range(3):
            post(f"{served.url}/chat/completions", BODY, {"authorization": f"Bearer sk-client-number-{number}"})
    assert len(server.requests) == 3
    kept = [value for value in gc.get_objects() if type(value) is keys.Key]
    assert not [key for key in kept if key.value.startswith("sk-client-number")]


def test_several_prompts_are_a_call_each(served: Served, server: Any) -> None:
    sent = {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 4, "qprobe": {"k": 3, "seed": 5}}
    status, _, said = post(f"{served.url}/completions", sent)
    assert status == 200, said
    assert sorted((asked["prompt"], asked["n"]) for _, _, asked in server.requests) == [("one", 3), ("two", 3)]
    assert [choice["index"] for choice in said["choices"]] == [0, 1]
    assert [one["candidates"] for one in said["usage"]["qprobe"]] == [3, 3]
