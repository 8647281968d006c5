"""The API embedder sends prompt + completion as text, in batches, and takes no embedding for another."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiError

PROMPTS = ["naïve 🙂 ", "add("]
COMPLETIONS = [["one", "", "zwei\n"], ["a, b)", "é"]]


def embedder(there: Any, **changes: Any) -> OpenAIEmbedder:
    api, own = there.divided(changes)
    return OpenAIEmbedder(None, api, **own)


def embed(one: OpenAIEmbedder) -> torch.Tensor:
    prompts = [one.encode_prompt(text, templated=False) for text in PROMPTS]
    found = one.embed(prompts, [[one.encode_completion(text) for text in row] for row in COMPLETIONS])
    assert list(found) == list(one.layers) == [0]
    return found[0]


def data(*embeddings: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault: these embeddings."""
    return lambda answer: answer | {"data": [{"embedding": values} for values in embeddings]}


@pytest.mark.parametrize("inputs_per_call", [1, 2, 64])
def test_texts_are_sent_whole_in_batches_and_rows_keep_their_places(
    server: Any, tiny_model: ModelSpec, inputs_per_call: int, relative_error: Callable[..., float]
) -> None:
    found = embed(embedder(server, inputs_per_call=inputs_per_call))
    texts = [prompt + text for prompt, row in zip(PROMPTS, COMPLETIONS, strict=True) for text in row]
    sent = [body["input"] for _, _, body in server.requests]
    assert sorted(text for inputs in sent for text in inputs) == sorted(texts)
    assert max(map(len, sent)) == min(inputs_per_call, 5)
    assert len(sent) == -(-5 // inputs_per_call)
    local = HFEmbedder(tiny_model)
    wanted = local.embed([local.encode_prompt(text, False) for text in texts], [[[]]] * 5)[4]
    assert relative_error(found, wanted) <= 1e-4


def test_the_request_holds_what_was_asked_for(server: Any) -> None:
    found = embed(embedder(server, dimensions=7, extra_body={"truncate": False}))
    assert found.shape == (5, 7)
    (body,) = [body for _, _, body in server.requests]
    del body["input"]
    assert body == {"model": "tiny", "dimensions": 7, "encoding_format": "float", "truncate": False}
    server.requests.clear()
    embed(embedder(server))
    assert "dimensions" not in server.requests[0][2]


def test_bytes_that_are_no_text_are_replaced(server: Any) -> None:
    # A completion that another sampler's tokens cut inside of a character is stored as text; ours are whole.
    one = embedder(server)
    one.embed([[97, 0xF0]], [[[0x9F]]])
    assert server.requests[0][2]["input"] == ["a\ufffd"]


@pytest.mark.parametrize("between", [False, True])
def test_a_changed_dimension_is_a_sentence(server: Any, between: bool) -> None:
    one = embedder(server)
    if between:
        embed(one)
    server.always = data([1.0, 2.0], [1.0, 2.0], [1.0, 2.0] if between else [1.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ApiError, match="32 values" if between else "2 values"):
        embed(one)


@pytest.mark.parametrize(("status", "said"), [(400, "The model does not support Embeddings API"), (404, "Not Found")])
def test_a_model_without_embeddings_is_a_sentence(server: Any, refusal: Any, status: int, said: str) -> None:
    # vLLM knows no such endpoint (404) where its model only generates; others refuse the request.
    server.always = refusal(status, said)
    with pytest.raises(ApiError, match="embedding model"):
        embed(embedder(server))


def test_identity_holds_what_decides_embeddings_and_no_key(server: Any, key: str) -> None:
    def identity(**changes: Any) -> str:
        return json.dumps(embedder(server, **changes).identity())

    base = identity()
    for changes in ({"model": "m"}, {"dimensions": 3}, {"extra_body": {"a": 1}}, {"server": "s"}):
        assert identity(**changes) != base
    for changes in ({"concurrency": 99}, {"max_calls": 3}, {"inputs_per_call": 1}, {"layers": [24]}):
        assert identity(**changes) == base
    assert key not in base
    assert embedder(server, model="org/name v2").folder_name() == "openai-org-name-v2"


def test_options_out_of_range_are_refused(server: Any) -> None:
    for changes in ({"inputs_per_call": 0}, {"dimensions": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            embedder(server, **changes)
