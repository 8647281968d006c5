"""SFT and Finetune RM as rows of a run: composed, trained once, found again, each refused in a sentence where it cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qprobe import models
from qprobe.baselines import TrainingData
from qprobe.baselines.objectives import examples_of
from qprobe.cli import composition
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.pipeline.pipeline import Pipeline
from qprobe.prompts import Prompt
from qprobe.run.pools import RewardBatch, RewardRow, Split

pytestmark = pytest.mark.usefixtures("plain_figures")

pytest.importorskip("peft", reason="the extra `lora` is not installed")

Make = Callable[..., Pipeline]
ROWS = ("SFT on successes", "Finetune RM")


class HasLetter:
    """1 for a completion with any of some letters."""

    name = "letters"

    def __init__(self, letters: str = "aeiou") -> None:
        self.letters = letters

    def identity(self) -> dict[str, Any]:
        return {"letters": self.letters}

    def check(self) -> None:
        pass

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, [RewardRow(float(any(x in text for x in self.letters))) for _, _, text in batch.rows]


@pytest.fixture
def make(tiny_model: ModelSpec, tmp_path: Path) -> Make:
    """8 training and 4 test prompts x 4 samples of 6 tokens, both baselines at one epoch."""

    def made(*overrides: str, letters: str = "aeiou", names: str = "[sft,finetune_rm]") -> Pipeline:
        config = composition.composed(
            "run",
            [
                f"model.name={tiny_model.name}",
                "model.dtype=float32",
                "model.device=cpu",
                "sampler.n=4",
                "sampler.max_new_tokens=6",
                "embedder.layers=[2]",
                "probe.steps=10",
                "evaluation.losses=[policy_gradient]",
                "evaluation.folds=2",
                f"baselines.names={names}",
                *[f"baselines.{name}.{key}" for name in ("sft", "finetune_rm") for key in ("epochs=1", "rank=2")],
                *overrides,
            ],
        )
        splits = [
            Split(name, [Prompt(f"{name}-{i}", text=f"word {i}: ") for i in range(count)], {"data": name})
            for name, count in (("train", 8), ("test", 4))
        ]
        pipeline = composition.pipeline(
            config,
            run=tmp_path / "run",
            title="Letters",
            tests=splits[1:],
            training_split=splits[0],
            reward=HasLetter(letters),
        )
        return dataclasses.replace(pipeline, progress=False)

    return made


def test_a_run_has_rows_of_what_was_trained_and_trains_once(
    make: Make,
    tiny_model: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = make()
    pipeline.execute(["sample", "reward", "embed", "baselines", "train", "evaluate"])
    said = capsys.readouterr().out
    assert "SFT on successes: trained on" in said
    assert "Finetune RM: trained on 32 completions of 8 prompts" in said
    results = pipeline.results(pipeline.tests[0])
    means = {row.method: row.value for row in results.rows}
    assert all(means[name] is not None for name in ROWS)

    # The scores are the head's, of the adapted model's last layer.
    pool = pipeline.test_pools[0]
    (ranked,) = pipeline.every_baseline().rankings(pool).values()
    assert ranked is not None
    assert ranked.shape == (1, 16)
    folder = tmp_path / "run" / "baselines" / "finetune_rm" / "adapter"
    from safetensors.torch import load_file

    head = load_file(folder / "head.safetensors")
    row = pool.completions.read(pool.batches).to_pylist()[5]
    (prompt,) = (p for p in pool.prompts.read([pool.task_ids]).to_pylist() if p["task_id"] == row["task_id"])
    embedder = HFEmbedder(dataclasses.replace(tiny_model, adapter=str(folder)), [4])
    state = embedder.embed([prompt["prompt_token_ids"]], [[row["token_ids"]]])[4][0]
    assert ranked[0, 5] == pytest.approx(float(state @ head["weight"][0] + head["bias"]), abs=1e-4)

    monkeypatch.setattr(models.load, "__wrapped__", lambda spec: pytest.fail("trained again"))
    again = make()
    again.execute(["sample", "reward", "embed", "baselines", "train", "evaluate"])
    assert np.array_equal(ranked, next(iter(again.every_baseline().rankings(again.test_pools[0]).values())))


def test_examples_are_the_rows_of_the_tables(make: Make, tiny_model: ModelSpec) -> None:
    pipeline = make()
    pipeline.execute(["sample", "reward"])
    pool = pipeline.training_pools[0]
    rows = pool.completions.read(pool.batches).to_pylist()
    examples = examples_of(TrainingData(pool, pipeline.reward), Likelihood(tiny_model))
    assert [example.completion_ids for example in examples] == [row["token_ids"] for row in rows]
    assert [example.ended for example in examples] == [row["finish_reason"] != "length" for row in rows]
    assert {example.target for example in examples} == {0.0, 1.0}
    kept = examples_of(TrainingData(pool, pipeline.reward), Likelihood(tiny_model), least=1.0)
    assert kept == [example for example in examples if example.target == 1]


@pytest.mark.parametrize(("names", "word"), [("[sft]", "successes"), ("[finetune_rm]", "all 0")])
def test_a_reward_that_nothing_earns_is_said(make: Make, names: str, word: str) -> None:
    pipeline = make(letters="", names=names)
    with pytest.raises(ValueError, match=word):
        pipeline.execute(["sample", "reward", "baselines"])


def test_what_cannot_be_trained_is_said_before_any_work(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.adapter"):
        make("model.adapter=x").check(["baselines"])
    with pytest.raises(ValueError, match=r"sft.*openai"):
        make("sampler=openai", "sampler.api.model=x")
    with pytest.raises(ValueError, match="ranks"):
        make("+baselines.sft.ranks=3")
    # A recording holds greedy completions of the model as it was: under the name of another policy they would mislead.
    (tmp_path / "recording.json").write_text("{}")
    for name in ("sft", "few_shot"):
        with pytest.raises(ValueError, match=f"{name}.*recorded"):
            make("sampler=recorded", f"sampler.recording={tmp_path}", names=f"[{name}]")
    assert not (tmp_path / "run").exists()
