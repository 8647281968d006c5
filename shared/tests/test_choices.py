"""Answers of half-broken servers to sampler and embedder: what the user sees, what is stored, what the same command does next.

A row of the table is what every answer looks like. Either the run ends in a sentence and stores nothing, or what is stored is
what the model said. With the server repaired, the same command has every completion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.models import openai_client
from qprobe.models.openai_client import ApiError, ApiUnusable
from qprobe.pipeline import inspection
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split
from qprobe.sampling import SamplingSettings
from qprobe.sampling.openai import OpenAISampler

Json = dict[str, Any]
CHATS = [Prompt(f"c-{i}", messages=({"role": "user", "content": f"What is {i}?"},)) for i in range(3)]
TEXTS = [Prompt(f"t-{i}", text=f"def add{i}(") for i in range(3)]
TOOL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def message(content: Any = None, reason: Any = "stop", **more: Any) -> Json:
    return {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}


def change(choice: Any, **answer: Any) -> Callable[[Json], Json]:
    """Every choice of an answer becomes this one."""
    return lambda given: given | {"choices": [choice for _ in given["choices"]]} | answer


HIDDEN = {"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9}}
# What every choice becomes -> a word of the sentence that the user sees.
NO_ANSWERS: dict[str, tuple[Any, str]] = {
    "an error and no text": (change(message("", "error")), "failed"),
    "an error in the middle of a text": (change(message("One is", "error")), "failed"),
    "an error in capitals": (change(message("One", "ERROR")), "failed"),
    "an error of the server": (change(message("One", "server_error")), "failed"),
    "aborted": (change(message("", "abort")), "failed"),
    "cancelled": (change(message("On", "cancelled")), "failed"),
    "no resources": (change(message("", "insufficient_system_resource")), "failed"),
    "a timeout": (change(message("On", "timeout")), "failed"),
    "an error beside the message": (change(message("", "stop") | {"error": {"code": 502}}), "failed"),
    "null content": (change(message(None)), "null"),
    "null content, cut": (change(message(None, "length")), "null"),
    "no content": (change({"message": {"role": "assistant"}, "finish_reason": "stop"}), "null"),
    "no message": (change({"index": 0, "finish_reason": "stop"}), "without a message"),
    "a null message": (change({"message": None, "finish_reason": "stop"}), "without a message"),
    "a text as message": (change({"message": "One", "finish_reason": "stop"}), "without a message"),
    "the other endpoint's text": (change({"text": "One", "finish_reason": "stop"}), "without a message"),
    "a number": (change(message(7)), "no text"),
    "an object": (change(message({"text": "One"})), "no text"),
    "a picture": (change(message([{"type": "image_url", "image_url": {"url": "x"}}])), "no text"),
    "no parts": (change(message([])), "no text"),
    "thoughts as parts": (change(message([{"type": "thinking", "text": "hm"}])), "no text"),
    "tool calls": (change(message(None, "tool_calls", tool_calls=TOOL)), "tool"),
    "tool calls and an empty text": (change(message("", "tool_calls", tool_calls=TOOL)), "tool"),
    "a function's call": (change(message(None, "function_call", function_call={"name": "f"})), "tool"),
    "reasoning": (change(message(None, "length", reasoning_content="hm")), "reasoning"),
    "reasoning that ended": (change(message("", "stop", reasoning="hm")), "reasoning"),
    "hidden reasoning": (change(message("", "length"), usage=HIDDEN), "reasoning"),
    "empty and no reason": (change(message("", None)), "no finish_reason"),
    "choices of numbers": (change(7), "no object"),
    "null choices": (change(None), "no object"),
    "no choices": (lambda answer: answer | {"choices": []}, "no choices"),
    "choices that are no list": (lambda answer: answer | {"choices": {"0": {}}}, "no choices"),
    "an error in a good status": ('{"error": {"message": "upstream is away"}}', "upstream is away"),
    "no JSON": ('{"choices": [', "no JSON"),
    "a list": ("[]", "no choices"),
    "nested too deep": ("[" * 100_000, "no JSON"),
    "a number too long": ('{"choices": ' + "1" * 5000 + "}", "no JSON"),
}


def pool(run: Path, server: Any, prompts: list[Prompt] = CHATS, **changes: Any) -> Pool:
    law = SamplingSettings(n=2, temperature=1.0, max_new_tokens=6)
    sampler = OpenAISampler(None, law, server.settings(**{"retries": 2} | changes))
    return Pool(run, Split("train", prompts, {"data": "own"}), "sample", sampler, 0, batch_rows=2)


def texts(of: Pool) -> list[str]:
    found: list[str] = of.completions.read(of.batches)["completion"].to_pylist()
    return found


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_is_never_an_empty_completion(
    name: str, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, word = NO_ANSWERS[name]
    server.always = answer
    with pytest.raises(ApiUnusable, match=f"{word}.*3 times") as caught:
        stages.sample(pool(tmp_path, server), progress=False)
    assert len(str(caught.value)) < 400
    assert "trying again" in capsys.readouterr().err
    assert not pool(tmp_path, server).completions.parts()  # what is stored: nothing
    # And the same command against the repaired server.
    server.always = None
    openai_client.close_clients()
    stages.sample(pool(tmp_path, server), progress=False)
    stages.sample(sound := pool(tmp_path / "sound", server), progress=False)
    assert texts(pool(tmp_path, server)) == texts(sound)
    assert len(texts(sound)) == 6


@pytest.mark.parametrize("name", list(NO_ANSWERS)[::5])
def test_what_passes_leaves_no_trace(name: str, server: Any, tmp_path: Path) -> None:
    server.faults += [NO_ANSWERS[name][0], None, NO_ANSWERS[name][0]]
    stages.sample(pool(tmp_path / "a", server), progress=False)
    assert pool(tmp_path / "a", server).completions.usage()["retries"] == 2
    stages.sample(sound := pool(tmp_path / "sound", server), progress=False)
    assert texts(pool(tmp_path / "a", server)) == texts(sound)


def test_of_a_call_only_the_choices_that_failed_are_asked_for_again(server: Any, tmp_path: Path) -> None:
    def second_fails(answer: Json) -> Json:
        *others, _ = answer["choices"]
        return answer | {"choices": [*others, message("half of", "error")]}

    server.faults += [second_fails] * 3
    stages.sample(one := pool(tmp_path, server, concurrency=1), progress=False)
    assert [body.get("n", 1) for _, _, body in server.requests] == [2, 1, 1, 1, 2, 2]
    stages.sample(sound := pool(tmp_path / "sound", server), progress=False)
    assert texts(one) == texts(sound)


# What is an answer, though an odd one: choice -> text and reason that are stored.
ANSWERS: dict[str, tuple[Json, str, str]] = {
    "empty": (message(""), "", "stop"),
    "empty and cut": (message("", "length"), "", "length"),
    "a refusal": (message(None, "stop", refusal="I will not."), "", "refusal"),
    "filtered": (message(None, "content_filter"), "", "content_filter"),
    "filtered with a text": (message("partly", "content_filter"), "partly", "content_filter"),
    "white space": (message(" \n"), " \n", "stop"),
    "no reason": (message("One", None), "One", "unknown"),
    "a number as reason": (message("One", 7), "One", "unknown"),
    "a text beside a tool's call": (message("One", "tool_calls", tool_calls=TOOL), "One", "tool_calls"),
    "a text behind reasoning": (message("One", "stop", reasoning_content="hm"), "One", "stop"),
    "parts": (message([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "One"}]), "One", "stop"),
    "half a character": (message("a\ud800b"), "a\ufffdb", "stop"),
    "the end of a turn": (message("One", "end_turn"), "One", "end_turn"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_odd_answers_are_kept_and_empty_ones_are_said(
    name: str, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice, text, reason = ANSWERS[name]
    server.always = change(choice)
    stages.sample(of := pool(tmp_path, server), progress=False)
    rows = of.completions.read(of.batches)
    assert set(texts(of)) == {text}
    assert set(rows["finish_reason"].to_pylist()) == {reason}
    said = capsys.readouterr().err
    assert ("6 of 6 completions of train.sample are empty" in said) == (text == "")
    assert ("6 empty" in inspection.to_text(inspection.inspect(tmp_path))) == (text == "")


@pytest.mark.parametrize("value", [None, 7, [7], {"a": 1}])
def test_texts_of_the_other_endpoint_are_looked_at_too(server: Any, tmp_path: Path, value: Any) -> None:
    server.always = change({"text": value, "finish_reason": "stop"})
    with pytest.raises(ApiUnusable, match="no text"):
        stages.sample(pool(tmp_path, server, TEXTS), progress=False)
    server.always = change({"text": "One", "finish_reason": "stop"})
    stages.sample(of := pool(tmp_path, server, TEXTS), progress=False)
    assert texts(of) == ["One"] * 6


def test_few_empty_completions_are_counted_and_not_said(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults += [change(message(""))]
    server.always = change(message("One"))
    many = [Prompt(f"c-{i:02}", messages=({"role": "user", "content": f"{i}?"},)) for i in range(11)]
    stages.sample(pool(tmp_path, server, many), progress=False)
    assert "empty" not in capsys.readouterr().err  # two of twenty-two
    assert "2 empty" in inspection.to_text(inspection.inspect(tmp_path))


# ------------------------------------------------------------------------------------------------ embeddings


def embeddings(*data: Any) -> Callable[[Json], Json]:
    return lambda answer: answer | {"data": list(data)}


EMBEDDINGS: dict[str, Any] = {
    "null": embeddings({"index": 0, "embedding": None}, {"index": 1, "embedding": None}),
    "one of two": lambda answer: answer | {"data": answer["data"][:1]},
    "three of two": lambda answer: answer | {"data": [*answer["data"], {"index": 2, "embedding": [1.0]}]},
    "numbers": embeddings(1, 2),
    "empty": embeddings({"index": 0, "embedding": []}, {"index": 1, "embedding": []}),
    "texts": embeddings({"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": "AAAA"}),
    "truth values": embeddings({"index": 0, "embedding": [True]}, {"index": 1, "embedding": [True]}),
    "a word as index": lambda answer: answer | {"data": [item | {"index": "first"} for item in answer["data"]]},
    "one index twice": lambda answer: answer | {"data": [item | {"index": 0} for item in answer["data"]]},
    "infinite": lambda answer: answer | {"data": [item | {"embedding": [float("inf")]} for item in answer["data"]]},
    "not a number": lambda answer: answer | {"data": [item | {"embedding": [float("nan")]} for item in answer["data"]]},
    "too large": lambda answer: answer | {"data": [item | {"embedding": [10**400]} for item in answer["data"]]},
    "an error": '{"error": {"message": "upstream is away"}}',
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_what_is_no_embedding_is_asked_for_again_and_never_stored(name: str, server: Any, tmp_path: Path) -> None:
    stages.sample(of := pool(tmp_path, server), progress=False)
    embedder = OpenAIEmbedder(None, server.settings(retries=2))
    server.always = EMBEDDINGS[name]
    with pytest.raises(ApiError, match="3 times"):
        stages.embed(of, embedder, progress=False)
    assert not of.features(embedder, 0).parts()
    server.always = None
    server.faults += [EMBEDDINGS[name]]
    stages.embed(of, embedder, progress=False)
    assert of.features(embedder, 0).read(of.batches).num_rows == 6
