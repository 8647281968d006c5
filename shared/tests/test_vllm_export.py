"""An exported probe behind vLLM's own server: `classify` gives the probe's scores of our token ids. `make test-vllm` runs it."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from saved import probe_of

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.serving.export import SequenceClassifier

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

TEXTS = [("def add(", ["x, y)", "", "é🙂\n"]), ("The answer", [" is the number of the letters", "z" * 90])]


def qwen2(folder: Path, like: ModelSpec) -> ModelSpec:
    """Heads of 32 numbers, as those of `like`, whose tokenizer it has."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    values = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 3, "eos_token_id": 1}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 192, "bos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(**values, initializer_range=0.25, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    models.load_tokenizer(like).tokenizer.save_pretrained(folder)
    return ModelSpec(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_classify_gives_the_scores_of_the_probe(
    family: str, make_model: Callable[..., ModelSpec], vllm_server: ModuleType, tmp_path: Path
) -> None:
    spec = make_model(head_dim=32)  # the fewest numbers that vLLM computes on a CPU
    if family == "qwen2":
        spec = qwen2(tmp_path / "base", spec)
    layer = models.outline(spec).layer_count
    probe, tokenizer = probe_of(spec, layer), models.load_tokenizer(spec)
    with torch.no_grad():
        probe.network_.biases[0].fill_(0.7)
    classifier = SequenceClassifier(probe, spec)
    classifier.save(tmp_path / "classifier")
    prompts = [tokenizer.encode_prompt(prompt, templated=False) for prompt, _ in TEXTS]
    completions = [[tokenizer.encode_completion(text) for text in texts] for _, texts in TEXTS]
    ours = probe.score(HFEmbedder(spec, (layer,)).embed(prompts, completions)[layer])
    rows = [[*ids, *own] for ids, of_prompt in zip(prompts, completions, strict=True) for own in of_prompt]
    # The words that `qprobe export` prints.
    words = ["--runner", "pooling", "--pooler-config", json.dumps({"logit_mean": -classifier.bias})]
    server = vllm_server.VLLMServer(ModelSpec(str(tmp_path / "classifier"), dtype="float32", device="cpu"), more=words)
    try:
        request = urllib.request.Request(
            server.url.removesuffix("v1") + "classify",
            json.dumps({"model": vllm_server.MODEL, "input": rows}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = sorted(json.load(answer)["data"], key=lambda entry: entry["index"])
    finally:
        server.close()
    assert np.ptp(ours) > 0.1
    scores = np.array([entry["probs"] for entry in found])[:, 0]
    print(f"largest relative difference to ours: {np.max(np.abs(scores - ours) / np.abs(ours)):.2g}")
    assert scores == pytest.approx(ours, rel=1e-4)
