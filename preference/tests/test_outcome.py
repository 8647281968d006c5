"""Tables of a policy experiment on planted data: what is printed is what a few plain lines say of the same candidates."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qprobe import joined
from qprobe.pipeline import Pipeline
from qprobe.prompts import Prompt
from qprobe.stages import Split
from qprobe.sweep import EvaluationSettings
from qprobe.training import TrainingSettings
from qprobe_preference import comparison, outcome
from qprobe_preference.comparison import Variant
from qprobe_preference.judges.base import AgainstReference, Comparison, Judgement
from qprobe_preference.pairs.base import Found, collect
from qprobe_preference.policy import Experiment, PolicySettings
from qprobe_preference.splits import PairLabel, pairs_split

STAGES = ["sample", "reward", "embed"]
TRAINING = TrainingSettings(steps=60, learning_rate=0.05, minimum_mixed=2, held_out=0.3, check_every=5)
SETTINGS = EvaluationSettings(
    losses=("bradley_terry",), seeds=2, controls=(), curve_shares=(), k=4, beta=0.0, draws=50, bootstrap=200
)
REFERENCE = 60  # a candidate "answer 61" beats it, "answer 60" ties

Make = Callable[..., Experiment]


def number(text: str) -> int:
    return int(text.removeprefix("answer "))


class Larger:
    """A judge that prefers the larger number."""

    name = "larger"

    def identity(self) -> dict[str, Any]:
        return {"judge": "larger"}

    def check(self) -> None:
        pass

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        found = []
        for one in comparisons:
            sign = np.sign(number(one.first) - number(one.second))
            found.append(Judgement((1 + sign) / 2, {1: "win", 0: "tie", -1: "loss"}[int(sign)]))
        return found


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """Experiments whose layer 1 says how good an answer is; layer 2, the highest, is noise."""

    class Layered(fakes.Embedder):  # type: ignore[misc, name-defined]
        def embed(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[int, torch.Tensor]:
            states: dict[int, torch.Tensor] = super().embed(prompts, completions)
            states[2][:, 0] = states[2][:, 2]
            return states

    def made(clusters: dict[str, str] | None = None, **changes: Any) -> Experiment:
        rng = np.random.default_rng(3)
        lots = [rng.permutation(100)[:2] for _ in range(40)]
        found = [Found(f"task {i:03d}: ", f"answer {max(lot):02d}", f"answer {min(lot):02d}") for i, lot in enumerate(lots)]
        pairs = collect("pairs", found, {})
        asked = [Prompt(f"t-{n:03d}", text=f"task {n:03d}: ") for n in range(100, 130)]
        reward = AgainstReference(Larger(), asked, {p.task_id: f"answer {REFERENCE}" for p in asked})
        tested = Split("asked", asked, {"asked": 30}, reward=reward, clusters=clusters)
        values: dict[str, Any] = {
            "tests": [tested],
            "training_split": pairs_split(pairs, "text"),
            "reward": PairLabel(),
            "sampler": fakes.Sampler(4),
            "greedy": None,
            "embedder": Layered((1, 2)),
            "layer": "best",
            "training": TRAINING,
            "settings": SETTINGS,
        }
        pipeline: Pipeline = fakes.pipeline(tmp_path / "run", **values | changes)
        config = {"seed": 0, "judge": {"backend": "larger"}, "model": {"name": "numbers"}}
        settings = PolicySettings(prompts=None)
        return Experiment(config, settings, pipeline, pairs, "text", reward, "the reference")

    return made


def answers(experiment: Experiment) -> list[list[int]]:
    """The candidates of every prompt, as numbers."""
    pool = joined.join(experiment.pipeline.test_pools[0], experiment.reward)
    texts = np.array(pool.completions)
    return [[number(text) for text in texts[pool.groups == group]] for group in range(len(pool.task_ids))]


def rows(experiment: Experiment) -> dict[str, dict[str, str]]:
    path = experiment.pipeline.run / "tables" / "win_rates.csv"
    return {row["method"]: row for row in csv.DictReader(path.read_text().splitlines())}


def won(answer: float) -> float:
    return (1 + np.sign(answer - REFERENCE)) / 2


@pytest.mark.parametrize("variants", [[], [Variant(None, ())]])
def test_win_rates_of_probes_that_choose_their_layer_are_those_of_the_layer_that_carries_the_signal(
    make: Make, variants: list[Variant]
) -> None:
    experiment = make()
    experiment.pipeline.execute(STAGES)
    if variants:
        comparison.execute(experiment.pipeline, variants, ["train", "evaluate"])
    printed = outcome.write(experiment, variants)
    best = [max(own) for own in answers(experiment)]
    found = rows(experiment)
    assert float(found["Q-probe L_QP linear"]["rate"]) == pytest.approx(np.mean([won(answer) for answer in best]))
    assert float(found["skyline"]["rate"]) == pytest.approx(np.mean([won(answer) for answer in best]))
    assert float(found["base"]["rate"]) == pytest.approx(np.mean([np.mean([won(a) for a in own]) for own in answers(experiment)]))
    assert "One example" in printed


def test_a_comparison_of_probes_that_choose_their_layer_says_so(make: Make) -> None:
    experiment = make()
    one = Variant(None, ()).of(experiment.pipeline)
    assert (one.layer, one.probe_layers) == ("best", [1, 2])
    assert one.outputs is not None
    assert one.outputs.name == "layer=best.linear"
    plain = dataclasses.replace(experiment.pipeline, layer=None)
    assert Variant(None, ()).of(plain).layer == 2
    assert Variant(1, (8,)).of(experiment.pipeline).probe_layers == [1]
