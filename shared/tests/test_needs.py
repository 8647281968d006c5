"""What a run is said to need, against sums by hand; what is plainly missing ends it before any work."""

import dataclasses
import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qprobe import models
from qprobe.cli import composition
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.models.language_model import ModelSpec
from qprobe.pipeline import needs
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings

Make = Callable[..., Pipeline]
# The published configuration of CodeLlama-7b-hf, and its published number of parameters.
CODE_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32016,
}
CODE_LLAMA_PARAMETERS = 6_738_546_688
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    def made(**more: Any) -> Pipeline:
        given: dict[str, Any] = {
            "run": tmp_path / "run",
            "title": "numbers",
            "training_split": fakes.split("train", 10),
            "tests": [fakes.split("test", 6, start=100)],
            "reward": fakes.Reward(),
            "sampler": fakes.Sampler(4),
            "greedy": fakes.Sampler(1, temperature=0.0),
            "embedder": fakes.Embedder((1, 2)),
            "training": TrainingSettings(steps=5),
            "settings": EvaluationSettings(seeds=2, bootstrap=100, curve_shares=()),
            "batch_rows": 8,
            "progress": False,
        }
        return Pipeline(**given | more)

    return made


@pytest.fixture
def code_llama(tmp_path: Path) -> ModelSpec:
    """A folder with nothing but the configuration of a model of 7 billion parameters."""
    folder = tmp_path / "CodeLlama-7b-hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CODE_LLAMA))
    return ModelSpec(str(folder), dtype="bfloat16", device="cpu")


def test_what_is_left_to_do_is_counted_by_hand(make: Make) -> None:
    # A prompt is "task 000: ", ten characters: three tokens. A completion has at most 300.
    work = needs.count(make(), STAGES)
    assert work == needs.Work(
        prompts=16,
        drawn=10 * 4 + 6 * 4 + 6,
        drawn_tokens=70 * 300,
        drawn_prompt_tokens=(10 + 6 + 6) * 3,
        calls=10 + 6 + 6,
        rewarded=70,
        read=64,
        read_tokens=64 * 300,
        read_prompt_tokens=16 * 3,
        joined_tokens=64 * 303,
        features=64 * 2,
    )


def test_finished_work_is_not_counted_and_a_shard_counts_its_own(make: Make) -> None:
    make(shard=(1, 2)).execute(["sample"])
    # Batches of two prompts: of 5, 3 and (one prompt a row, eight a batch) 1 every second one from the first on is done.
    left = needs.count(make(), STAGES)
    assert left.drawn == (2 * 2 + 1 * 2) * 4
    assert (left.prompts, left.rewarded, left.read) == (6, 70, 64)
    assert needs.count(make(shard=(2, 2)), STAGES).drawn == left.drawn
    assert needs.count(make(shard=(1, 2)), STAGES).drawn == 0
    assert needs.count(make(), ["reward"]) == needs.Work(rewarded=70)
    make().execute(STAGES[:3])
    assert needs.count(make(), STAGES) == needs.Work()
    assert needs.of(make(), STAGES) == needs.Needs()


def test_completions_that_are_there_are_only_read(make: Make, fakes: ModuleType) -> None:
    recorded = {f"t-{number:03d}": ["answer 73"] * 3 for number in range(100, 106)}
    split = dataclasses.replace(fakes.split("test", 6, start=100), recorded=recorded)
    work = needs.count(make(training_split=None, tests=[split], greedy=None), STAGES)
    # "answer 73" has nine characters: three tokens, as have the prompts.
    assert (work.drawn, work.read, work.read_tokens, work.joined_tokens) == (0, 18, 18 * 3, 18 * 6)


def test_hours_and_bytes_by_hand() -> None:
    # 2 x 7e9 x 1e6 operations at 5 % of 312e12 a second are 897.4 seconds.
    assert needs.hours(7_000_000_000, 1_000_000, 0.05) == pytest.approx(897.436 / 3600, rel=1e-5)
    assert needs.features_bytes(225_600, 4096) == 1_848_115_200
    assert [needs.estimated_tokens(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    words = needs.expected(1128, {"n": 200, "greedy": True, "max_new_tokens": 300}, 664)
    assert "226,264 completions of 1,128 prompts, at most 67,879,200 tokens" in words


def test_a_models_size_is_read_off_its_configuration(code_llama: ModelSpec) -> None:
    size = needs.Size.of(code_llama)
    assert size == needs.Size(CODE_LLAMA_PARAMETERS, 4096, 2 * CODE_LLAMA_PARAMETERS)
    assert "6.74 B parameters, 12.6 GiB of memory in bfloat16" in size.words(code_llama)


def test_the_needs_of_a_table_are_words_before_work(
    make: Make, code_llama: ModelSpec, fakes: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(needs.memory, "free_memory", lambda devices: 13 * 2**30)
    ends = composition.back_ends(configured(code_llama))
    pipeline = make(sampler=ends.sampler, greedy=None, embedder=ends.embedder, tests=[fakes.split("test", 2000)])
    needs.tell(pipeline, STAGES, ["and a judge."])
    first, model, judge = capsys.readouterr().err.splitlines()
    assert "8,040 completions of 2,010 prompts to draw (at most 2,412,000 tokens; about 6,030 of prompts)" in first
    # 2,412,000 tokens of 8 bytes, and 8,040 embeddings of 4,096 halves.
    assert f"On disk: at most {(2_412_000 * 8 + 8_040 * 8_192) / 2**20:.3g} MiB." in first
    tokens = 2_412_000 + 6_030
    hours = 2 * CODE_LLAMA_PARAMETERS * tokens / 312e12 / 0.05 / 3600  # what is drawn is not read again
    assert "8,040 of them read while they are drawn" in first
    assert f"about {hours:.2g} hours of one A100" in model
    assert "no GPU is here" in model
    assert judge == "and a judge."


def configured(spec: ModelSpec) -> dict[str, Any]:
    words = [f"model.{key}={value}" for key, value in dataclasses.asdict(spec).items() if value is not None]
    return composition.composed(
        "run", ["model=hub", *words, "sampler.max_new_tokens=300", "embedder.layers=[26]", "sampler.n=4"]
    )


def test_a_model_that_does_not_fit_ends_before_any_work(make: Make, code_llama: ModelSpec, monkeypatch: Any) -> None:
    monkeypatch.setattr(needs.memory, "free_memory", lambda devices: 12 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ends = composition.back_ends(configured(code_llama))
    pipeline = make(sampler=ends.sampler, greedy=None, embedder=ends.embedder)
    with pytest.raises(RuntimeError, match="weights"):
        needs.tell(pipeline, STAGES)
    assert not pipeline.run.exists()
    needs.tell(pipeline, STAGES, here=False)  # workers elsewhere have a memory of their own
    on_gpu = dataclasses.replace(code_llama, device="cuda")
    ends = composition.back_ends(configured(on_gpu))
    with pytest.raises(RuntimeError, match="cuda"):
        needs.tell(make(sampler=ends.sampler, greedy=None, embedder=ends.embedder), STAGES)


def test_a_model_that_the_hub_refuses_ends_before_any_work(
    make: Make, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: Any, **named: Any) -> None:
        raise OSError("403 Forbidden: you are not on the list")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refused)
    ends = composition.back_ends(configured(ModelSpec("nobody/no-such-model", dtype="bfloat16")))
    pipeline = make(sampler=ends.sampler, greedy=None, embedder=ends.embedder)
    with pytest.raises(RuntimeError, match="no-such-model") as caught:
        needs.tell(pipeline, STAGES)
    assert "\n" not in str(caught.value)
    assert "nobody/no-such-model: its size is unknown" in capsys.readouterr().err
    assert not pipeline.run.exists()


def test_too_small_a_disk_ends_before_any_work(make: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: Usage(0, 0, 70 * 300 * 8 - 1))
    with pytest.raises(RuntimeError, match="disk"):
        needs.tell(make(), STAGES)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: Usage(0, 0, 70 * 300 * 8))
    needs.tell(make(), STAGES)


def test_a_skeleton_has_every_parameter_and_no_weight(tiny_model: ModelSpec) -> None:
    skeleton, model = models.skeleton(tiny_model), models.load(tiny_model).model
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())


@pytest.mark.parametrize(("head", "counted"), [("none", 1), ("the embeddings, rounded", 1), ("another", 2)])
def test_a_head_that_a_gguf_file_holds_a_second_time_is_counted_once(tmp_path: Path, head: str, counted: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    rng = np.random.default_rng(0)
    width, vocabulary = 32, 64
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 48,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    for name, value in {"attention.head_count": 4, "attention.head_count_kv": 4, "rope.dimension_count": 8}.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.vocab_size", vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(vocabulary)])
    writer.add_token_merges([])
    writer.add_eos_token_id(1)
    embeddings = rng.normal(size=(vocabulary, width)).astype(np.float32)
    shapes = {
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
    }
    shapes |= {"ffn_gate": (48, width), "ffn_up": (48, width), "ffn_down": (width, 48)}
    inner = {f"blk.0.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    norms = {name: np.ones(width) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")}
    tensors = {"token_embd.weight": embeddings, **inner, **norms}
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float32))
    if head != "none":
        values = (
            embeddings if head == "the embeddings, rounded" else rng.normal(size=embeddings.shape).astype(np.float32)
        )
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("output.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = needs.Size.of(ModelSpec(str(tmp_path / "m.gguf"), dtype="float32", device="cpu"))
    without = sum(values.size for name, values in tensors.items() if name != "token_embd.weight")
    assert size.parameters == without + counted * vocabulary * width
    assert size.weights == 4 * (without + (1 if head == "none" else 2) * vocabulary * width)  # what is held in memory
