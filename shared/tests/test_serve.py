"""A server with the model in its process: the library's own answers under OpenAI's protocol, by the official client and curl."""

import http.client
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Served, counted, policy_of, post, save_probe, serving

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.prefix import plain_attention
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, sample_seeds
from qprobe.sampling.hf import HFSampler
from qprobe.serving import app as routes
from qprobe.serving.policy import Policy
from qprobe.serving.running import application
from qprobe.serving.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "the number"}]


@pytest.fixture(scope="module")
def probe(tiny_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_probe(tmp_path_factory.mktemp("probe"), tiny_model)


@pytest.fixture(scope="module")
def policy(probe: Path) -> Policy:
    return policy_of(probe)


@pytest.fixture(scope="module")
def served(probe: Path) -> Iterator[Served]:
    with serving(application(policy_of(probe), ServeSettings())) as made:
        yield made


def name_of(served: Served) -> str:
    return str(served.client().models.list().data[0].id)


def body(served: Served, **more: Any) -> dict[str, Any]:
    return {"model": name_of(served), "messages": MESSAGES} | more


def test_many_clients_at_once_get_the_librarys_own_answers(served: Served, policy: Policy) -> None:
    batches = counted(served, "qprobe_batches_total")
    prompts = [[{"role": "user", "content": f"word {number % 5}"}] for number in range(16)]

    def ask(number: int) -> Any:
        with served.client() as client:
            return client.chat.completions.create(
                model=name, messages=prompts[number], extra_body={"qprobe": {"seed": number, "return_candidates": True}}
            )

    name = name_of(served)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for number, answer in enumerate(answers):
        choice = policy.choose(prompts[number], number)
        assert [c["text"] for c in answer.qprobe["candidates"]] == [c.text for c in choice.candidates]
        shown = [(c["score"], c["probability"]) for c in answer.qprobe["candidates"]]
        assert shown == [pytest.approx((c.score, c.probability), abs=1e-4) for c in choice.candidates]
        assert answer.choices[0].message.content == choice.answer
        assert answer.usage.qprobe["index"] == choice.chosen
    assert counted(served, "qprobe_batches_total") - batches < 2 * 16  # they shared


def test_n_choices_come_best_first_and_usage_sums_all_candidates(served: Served, policy: Policy) -> None:
    sampler = policy.sampler
    answer = served.client().chat.completions.with_raw_response.create(
        **body(served, n=3), extra_body={"qprobe": {"k": 6, "beta": 0, "seed": 5, "return_candidates": True}}
    )
    found = answer.parse()
    candidates = found.qprobe["candidates"]
    ranked = sorted(candidates, key=lambda c: -c["score"])
    assert [choice.message.content for choice in found.choices] == [c["text"] for c in ranked[:3]]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [c["probability"] for c in ranked] == [1, 0, 0, 0, 0, 0]
    prompt = sampler.render(routes.prompt_of(routes.ChatBody(model="m", messages=MESSAGES)))[1]
    assert found.usage.prompt_tokens == len(prompt)
    assert 6 <= found.usage.completion_tokens <= 6 * 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    headers = answer.headers
    assert (headers["x-qprobe-k"], headers["x-qprobe-valid"]) == ("6", "6")
    assert int(headers["x-qprobe-index"]) == ranked[0]["index"]
    assert float(headers["x-qprobe-score"]) == pytest.approx(ranked[0]["score"], rel=1e-5)
    assert len(headers["x-qprobe-probe"]) == 12
    assert found.choices[0].finish_reason in ("stop", "length")
    # At temperature 0 all candidates are one.
    greedy = served.client().chat.completions.create(**body(served, temperature=0))
    assert greedy.usage.qprobe["candidates"] == 1


def test_a_stream_gives_the_same_answer_with_keep_alives_before_it(
    served: Served, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = policy.answer(MESSAGES, 7)
    stream = served.client().chat.completions.create(
        **body(served), stream=True, stream_options={"include_usage": True}, extra_body={"qprobe": {"seed": 7}}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert (chunks[-1].choices, chunks[-1].usage.qprobe["candidates"]) == ([], 4)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    monkeypatch.setattr(routes, "KEEP_ALIVE", 0.001)
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    sent = json.dumps(body(served, stream=True, qprobe={"seed": 7}))
    command = [curl, "-sN", f"{served.url}/chat/completions", "-H", "content-type: application/json", "-d", sent]
    events = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert events[0].startswith(":")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [
        json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-2] if event[0] == "d"
    ]
    assert "".join(texts) == expected


def test_texts_are_continued(served: Served, policy: Policy) -> None:
    expected = policy.answer(Prompt("p", text="def add("), 3)
    asked = {"model": name_of(served), "prompt": "def add(", "seed": 3}
    assert served.client().completions.create(**asked).choices[0].text == expected
    chunks = served.client().completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert served.client().completions.create(**(asked | {"prompt": ["def add("]})).choices[0].text == expected


def test_the_bodys_law_is_followed(served: Served, policy: Policy) -> None:
    short = served.client().chat.completions.create(**body(served, max_tokens=2), extra_body={"qprobe": {"seed": 1}})
    assert short.usage.completion_tokens <= 2 * 4
    long = policy.choose(MESSAGES, 1)
    stop = long.answer[3:5]
    cut = served.client().chat.completions.create(**body(served, stop=stop), extra_body={"qprobe": {"seed": 1, "k": 4}})
    assert stop not in cut.choices[0].message.content.lstrip()


def test_given_candidates_are_scored(served: Served, policy: Policy) -> None:
    choice = policy.choose(MESSAGES, 2)
    texts = [candidate.text for candidate in choice.candidates]
    status, _, found = post(f"{served.url}/score", {"messages": MESSAGES, "candidates": texts})
    assert status == 200
    rows = found["data"]
    prompt = Prompt("p", messages=tuple(MESSAGES))
    completions = [Completion(text, None, "stop", math.nan, 0) for text in texts]
    (read,) = policy.read([prompt], [policy.sampler.render(prompt)], [completions])
    assert [row["score"] for row in rows] == pytest.approx(read.scores.tolist(), abs=1e-4)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["probability"] for row in rows) == pytest.approx(1)
    assert rows[found["best"]]["score"] == max(row["score"] for row in rows)
    assert post(f"{served.url}/score", {"prompt": "x", "messages": MESSAGES, "candidates": ["a"]})[0] == 400


def test_logprobs_of_the_answer_are_the_models_own(served: Served, policy: Policy) -> None:
    with served.client() as client:
        answer = client.chat.completions.create(
            model=name_of(served), messages=MESSAGES, logprobs=True, extra_body={"qprobe": {"seed": 5}}
        )
    sampler = policy.sampler
    assert isinstance(sampler, HFSampler)
    text, prompt = sampler.render(Prompt("t", messages=tuple(MESSAGES)))
    (drawn,) = sampler.sample([prompt], [sample_seeds(5, text, sampler.settings.n)])
    tokens = drawn[policy.choose(MESSAGES, 5).chosen].token_ids or []
    model = models.load(sampler.model).model
    with torch.inference_mode(), plain_attention(model):
        law = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    wanted = law.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [token.logprob for token in found.content] == pytest.approx(wanted, abs=1e-4)
    assert len(found.content) == len(tokens) > 0


WRONG: list[tuple[Any, int, str]] = [
    (b"{", 400, "JSON"),
    (b"[]", 400, "object"),
    ({"messages": MESSAGES}, 400, "model"),
    ({"model": "gpt-none", "messages": MESSAGES}, 404, "gpt-none"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "role"),
    ({"messages": [{"content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "context"),
    ({"temperature": -1}, 400, "temperature"),
    ({"n": 0}, 400, "n "),
    ({"n": 65}, 400, "65"),
    ({"n": 3, "qprobe": {"k": 2}}, 400, "qprobe.k"),
    ({"qprobe": {"kk": 2}}, 400, "qprobe.kk"),
    ({"qprobe": {"beta": -1}}, 400, "qprobe.beta"),
    ({"max_tokens": 1000}, 400, "max_new_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ({"logprobs": True, "top_logprobs": 3}, 400, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
]


@pytest.mark.parametrize(("sent", "status", "word"), WRONG, ids=[str(row[0])[:40] for row in WRONG])
def test_what_cannot_be_answered_is_a_sentence_in_openais_form(
    sent: Any, status: int, word: str, served: Served
) -> None:
    if isinstance(sent, dict) and "model" not in sent and word != "model":
        sent = body(served) | sent
    found, _, said = post(f"{served.url}/chat/completions", sent)
    assert (found, set(said["error"])) == (status, {"message", "type", "param", "code"})
    assert word in said["error"]["message"]
    assert said["error"]["message"].endswith(".")


def test_other_errors_have_the_same_form(served: Served) -> None:
    import openai

    assert post(f"{served.url}/nothing", {})[0] == 404
    status, _, said = post(f"{served.url}/chat/completions", b"x=1", {"content-type": "text/plain"})
    assert (status, said["error"]["type"]) == (415, "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        served.client().chat.completions.create(model="other", messages=MESSAGES)
    assert served.client().models.retrieve(name_of(served)).id == name_of(served)
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other")


def test_one_clients_fault_in_a_shared_batch_is_his_own(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a probe whose embedder refuses one prompt, and whose candidates it has to read."""
    from qprobe.embedding.hf import HFEmbedder
    from qprobe.serving.policy import Policy

    embed = HFEmbedder.embed

    def refusing(self: Any, prompts: Any, completions: Any) -> Any:
        if any(len(prompt) > 60 for prompt in prompts):
            raise ValueError("The prompt is refused.")
        return embed(self, prompts, completions)

    monkeypatch.setattr(HFEmbedder, "embed", refusing)
    monkeypatch.setattr(Policy, "known", lambda *_: None)
    contents = ["short one", "y" * 70, "another"] * 3

    def ask(content: str) -> int:
        return post(f"{served.url}/chat/completions", body(served, messages=[{"role": "user", "content": content}]))[0]

    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, contents)) == [200, 400, 200] * 3


@pytest.mark.parametrize(("policy_of_failure", "status"), [("error", 500), ("first", 200)])
def test_a_scorer_that_fails_is_said_and_never_replaced_by_chance(
    policy_of_failure: str, status: int, probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(application(policy_of(probe), ServeSettings(when_scoring_fails=policy_of_failure))) as served:
        from qprobe.probe.estimator import QProbe

        def broken(*_: Any) -> Any:
            raise RuntimeError("the probe is broken")

        monkeypatch.setattr(QProbe, "score", broken)
        for seed in range(3):
            asked = body(served, qprobe={"seed": seed, "return_candidates": True})
            found, headers, said = post(f"{served.url}/chat/completions", asked)
            assert found == status
            if status == 500:
                assert "the probe is broken" in said["error"]["message"]
            else:
                assert (headers["x-qprobe-index"], headers["x-qprobe-score"]) == ("0", "none")
                assert said["choices"][0]["message"]["content"] == said["qprobe"]["candidates"][0]["text"]


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Make every step of sampling take longer; gives back the rows of every step."""
    from qprobe.sampling import hf

    draw, steps = hf.draw_tokens, []

    def slow(logits: Any, uniforms: Any, settings: Any) -> Any:
        steps.append(len(logits))
        time.sleep(seconds)
        return draw(logits, uniforms, settings)

    monkeypatch.setattr(hf, "draw_tokens", slow)
    return steps


def test_more_requests_than_it_takes_are_told_to_come_again(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.05)
    with serving(application(policy_of(probe), ServeSettings(most_in_work=2))) as served:
        asked = body(served)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: post(f"{served.url}/chat/completions", asked), range(6)))
        assert sorted(status for status, _, _ in found) == [200, 200, 429, 429, 429, 429]
        refused = next(one for one in found if one[0] == 429)
        assert int(refused[1]["retry-after"]) >= 1
        assert refused[2]["error"]["type"] == "rate_limit_error"


def test_what_came_in_time_is_scored_and_nothing_in_time_is_said(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.04)
    settings = ServeSettings(candidate_seconds=0.5, request_seconds=5)
    with serving(application(policy_of(probe, "sampler.max_new_tokens=60"), settings)) as served:
        asked = body(served, messages=[{"role": "user", "content": "a"}], temperature=3, top_p=1)
        status, headers, said = post(f"{served.url}/chat/completions", asked | {"qprobe": {"k": 64, "seed": 0}})
        assert status == 200  # some of 64 flat completions end within a dozen tokens of 300
        assert 1 <= int(headers["x-qprobe-valid"]) < 64
        assert "not finished in time" in said["usage"]["qprobe"]["faults"][0]
        assert said["choices"][0]["finish_reason"] == "stop"
    settings = ServeSettings(candidate_seconds=0.05, request_seconds=5)
    with serving(application(policy_of(probe, "sampler.max_new_tokens=60"), settings)) as served:
        status, _, said = post(f"{served.url}/chat/completions", body(served))
        assert (status, said["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_work(stream: bool, probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "KEEP_ALIVE", 0.05)
    steps = slowly(monkeypatch, 0.05)
    with serving(application(policy_of(probe, "sampler.max_new_tokens=100"), ServeSettings())) as served:
        asked = body(served)
        connection = http.client.HTTPConnection(served.root.removeprefix("http://"), timeout=10)
        sent = json.dumps(asked | {"stream": stream})
        connection.request("POST", "/v1/chat/completions", sent, {"content-type": "application/json"})
        if stream:
            response = connection.getresponse()
            assert response.read(1) == b":"
            response.close()
        else:
            time.sleep(0.4)
        connection.close()
        time.sleep(0.4)
        made = len(steps)
        time.sleep(0.3)
        assert 0 < len(steps) == made < 60  # of 100
        assert counted(served, "qprobe_clients_gone_total") == 1
        assert counted(served, "qprobe_requests_in_work") == 0
        assert post(f"{served.url}/chat/completions", asked | {"max_tokens": 2})[0] == 200


def test_the_command_serves_a_probe(
    probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qprobe.cli.main import main

    ran: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: ran.append(server.config))
    assert main(["serve", "--probe", str(probe), "--port", "8123", "--n", "3", "--beta", "0"]) == 0
    words = ["--host", "0.0.0.0", "--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "theirs"]
    assert main(["serve", "--probe", str(probe), *words]) == 0
    monkeypatch.undo()
    config = ran[0]
    assert (config.host, config.port) == ("127.0.0.1", 8123)
    said = capsys.readouterr().err
    assert "http://127.0.0.1:8123/v1" in said
    assert "QPROBE_SERVE_TOKEN" in said
    with serving(config.app) as served:
        usage = post(f"{served.url}/chat/completions", body(served))[2]["usage"]["qprobe"]
        assert (usage["candidates"], usage["beta"]) == (3, 0)
    assert main(["serve", "--probe", str(probe), "--upstream-model", "x"]) == 1
    assert main(["serve", "--probe", str(probe), "--n", "0"]) == 1
    assert "k is 0" in capsys.readouterr().err


def test_a_token_is_wanted_where_one_is_set(
    probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openai

    monkeypatch.setenv("QPROBE_SERVE_TOKEN", "token-of-the-operator-1")
    with serving(application(policy_of(probe), ServeSettings())) as served:
        with pytest.raises(openai.AuthenticationError, match="token"):
            served.client("token-of-the-operator-2").models.list()
        assert served.client("token-of-the-operator-1").models.list().data
        assert counted(served, "qprobe_requests_total") >= 2  # metrics are open
    assert "token-of-the-operator" not in "".join(capsys.readouterr())


def test_langchain_is_a_client(served: Served, policy: Policy) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.ChatOpenAI(base_url=served.url, api_key="none", model=name_of(served), seed=7)
    expected = policy.answer([{"role": "user", "content": "the number"}], 7)
    assert model.invoke("the number").content == expected
    assert "".join(chunk.content for chunk in model.stream("the number")) == expected
