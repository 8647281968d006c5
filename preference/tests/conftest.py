"""What several test files of this half need: composed configurations, pairs in a file, the shipped configurations of judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import qprobe_preference
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.models.language_model import ModelSpec
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.prompts import Prompt
from qprobe.run.pools import Split
from qprobe_preference.judges.base import AgainstReference, Comparison, Judgement
from qprobe_preference.pairs.base import Found, collect
from qprobe_preference.policy import Experiment, PolicySettings, Truth
from qprobe_preference.splits import PairLabel, pairs_split

CONF = Path(qprobe_preference.__file__).parent / "conf"
COLOURS = ["red", "blue", "green", "gold", "grey", "pink", "black", "white", "brown", "plum"]


@pytest.fixture(scope="session")
def conf() -> Path:
    """The folder of the shipped configuration."""
    return CONF


@pytest.fixture(scope="session")
def composed() -> Callable[..., dict[str, Any]]:
    """Composes the configuration of a command line."""

    def make(*words: str, missing: bool = False) -> dict[str, Any]:
        with initialize_config_module("qprobe_preference.conf", version_base="1.3"):
            config = compose("config", list(words))
            values = OmegaConf.to_container(config, resolve=not missing, throw_on_missing=not missing)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}

    return make


@pytest.fixture
def judge_config() -> Callable[..., dict[str, Any]]:
    """The shipped configuration of a judge, with some keys changed; `api` changes keys of its part."""

    def make(name: str, api: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "judge" / f"{name}.yaml"))
        values |= changes
        if name == "openai":
            values["api"] = values["api"] | {"model": "tiny"} | (api or {})
        return dict(values)

    return make


@pytest.fixture
def hh_file(tmp_path: Path) -> Path:
    """HH-RLHF's format: ten pairs of two turns, each about a colour, and one whose rejected answer is empty."""
    start = "\n\nHuman: Is {0} a colour?\n\nAssistant: Yes.\n\nHuman: And {0} again?\n\nAssistant:"
    rows = [{"chosen": f"{start.format(w)} {w}!", "rejected": f"{start.format(w)} no {w}"} for w in COLOURS]
    rows.append({"chosen": f"{start.format('x')} x", "rejected": f"{start.format('x')} "})
    path = tmp_path / "hh.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def tiny_words(tiny_code_model: ModelSpec, tmp_path: Path, hh_file: Path) -> list[str]:
    """Command-line words for a run of seconds on the pairs of `hh_file`, by the tiny model."""
    return [
        *("model=hub", f"model.name={tiny_code_model.name}", "model.dtype=float32", "model.device=cpu"),
        *(f"paths.runs={tmp_path}", "probe.steps=5", "evaluation.seeds=2", "evaluation.bootstrap=100"),
        f"dataset.path={hh_file}",
    ]


@pytest.fixture
def policy_words(tiny_words: list[str]) -> list[str]:
    """The same for a policy experiment."""
    return [
        *tiny_words,
        *("embedder.layers=[2]", "sampler.n=3", "sampler.max_new_tokens=4", "probe.chunks_per_batch=4"),
        *("evaluation.k=3", "evaluation.draws=10", "policy.prompts=4"),
    ]


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
        signs = [int(np.sign(number(one.first) - number(one.second))) for one in comparisons]
        return [Judgement((1 + sign) / 2, ("tie", "win", "loss")[sign]) for sign in signs]


@pytest.fixture
def planted(fakes: ModuleType, tmp_path: Path) -> Callable[..., Experiment]:
    """Makes policy experiments whose layer 1 says how good an answer is; layer 2, the highest, is noise.

    `first`: candidates are judged against their prompt's first one, and have true labels as well.
    """

    class Layered(fakes.Embedder):  # type: ignore[misc, name-defined]
        def embed(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[int, torch.Tensor]:
            states: dict[int, torch.Tensor] = super().embed(prompts, completions)
            states[2][:, 0] = states[2][:, 2]
            return states

    def make(clusters: dict[str, str] | None = None, first: bool = False) -> Experiment:
        rng = np.random.default_rng(3)
        drawn = [rng.permutation(100)[:2] for _ in range(40)]
        found = [
            Found(f"task {n:03d}: ", f"answer {max(two):02d}", f"answer {min(two):02d}") for n, two in enumerate(drawn)
        ]
        pairs = collect("pairs", found, {})
        asked = [Prompt(f"t-{n:03d}", text=f"task {n:03d}: ") for n in range(100, 130)]
        against, recorded, truth = {p.task_id: "answer 60" for p in asked}, None, None
        if first:
            recorded = {p.task_id: [f"answer {n:02d}" for n in rng.integers(40, 60, 4)] for p in asked}
            against = {key: own[0] for key, own in recorded.items()}
            labels = {key: rng.integers(0, 2, 4).astype(float).tolist() for key in against}
            truth = Truth(labels, {key: own[0] for key, own in labels.items()})
        reward = AgainstReference(Larger(), asked, against)
        pipeline: Pipeline = fakes.pipeline(
            tmp_path / "run",
            tests=[Split("asked", asked, {"asked": 30}, recorded=recorded, reward=reward, clusters=clusters)],
            training_split=pairs_split(pairs, "text"),
            reward=PairLabel(),
            sampler=fakes.Sampler(4),
            greedy=None,
            embedder=Layered((1, 2)),
            layer="best",
            training=TrainingSettings(steps=60, learning_rate=0.05, minimum_mixed=2, held_out=0.3, check_every=5),
            settings=EvaluationSettings(
                losses=("bradley_terry",),
                seeds=2,
                controls=(),
                curve_shares=(),
                k=4,
                beta=0.0,
                draws=50,
                bootstrap=2000,
            ),
        )
        config = {"seed": 0, "judge": {"backend": "larger"}, "model": {"name": "numbers"}}
        settings = PolicySettings(prompts=None)
        return Experiment(config, settings, pipeline, pairs, "text", reward, "the reference", truth)

    return make
