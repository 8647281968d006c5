"""A split of preference pairs through the core: best-of-2 is pair accuracy, and pairs of one prompt stay together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qprobe.evaluation.sweep import EvaluationSettings, fold_of, probe_seed
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.estimator import QProbe
from qprobe.probe.training import Data, ProbeTask, TrainedProbe, TrainingSettings, train
from qprobe.report import to_text
from qprobe.run.joined import join
from qprobe.run.pools import RewardBatch, RewardRow, Split

PAIRS, A_PROMPT = 60, 3
SETTINGS = EvaluationSettings(losses=("bradley_terry",), seeds=2, folds=4, beta=0.0, curve_shares=(), bootstrap=200)
TRAINING = TrainingSettings(steps=60, learning_rate=0.05, minimum_mixed=2, held_out=0.3)


class ChosenFirst:
    """The reward of a pairs split: its first completion is the chosen one."""

    name = "chosen"

    def identity(self) -> dict[str, Any]:
        return {"reward": "chosen"}

    def check(self) -> None:
        pass

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in batches:
            yield batch, [RewardRow(float(sample == 0)) for _, sample, _ in batch.rows]


@pytest.fixture
def pairs(fakes: ModuleType) -> Split:
    """Of two answers the better one is chosen with the probability of Bradley and Terry."""
    rng = np.random.default_rng(0)
    prompts = fakes.prompts(PAIRS)
    recorded = {}
    for prompt in prompts:
        a, b = rng.choice(100, 2, replace=False)
        first = rng.uniform() < 1 / (1 + np.exp(-(a - b) / 15))
        recorded[prompt.task_id] = [f"answer {n:02d}" for n in ((a, b) if first else (b, a))]
    clusters = {prompt.task_id: f"prompt {number // A_PROMPT}" for number, prompt in enumerate(prompts)}
    return Split("pairs", prompts, {"data": "pairs"}, recorded, ChosenFirst(), clusters)


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path, pairs: Split) -> Callable[..., Pipeline]:
    def made(**changes: Any) -> Pipeline:
        values: dict[str, Any] = {
            "run": tmp_path / "run",
            "title": "Pairs",
            "tests": [pairs],
            "reward": fakes.Reward(),
            "sampler": fakes.Sampler(),
            "greedy": None,
            "embedder": fakes.Embedder(),
            "training": TRAINING,
            "settings": SETTINGS,
            "batch_rows": 16,
            "progress": False,
        }
        return Pipeline(**values | changes)

    return made


def test_best_of_2_is_the_accuracy_on_pairs_of_prompts_that_were_not_seen(
    make: Callable[..., Pipeline], pairs: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Data, ProbeTask]] = []

    def spy(data: Data, tasks: list[ProbeTask], *arguments: Any, **more: Any) -> list[TrainedProbe]:
        seen.extend((data, task) for task in tasks)
        return train(data, tasks, *arguments, **more)

    monkeypatch.setattr("qprobe.evaluation.sweep.train", spy)
    pipeline = make()
    pipeline.execute(STAGES[:-1])
    results = pipeline.results(pairs)
    rows = {row.method: row for row in results.rows}
    assert (results.k, rows["pass@1"].value, rows["skyline pass@2"].value) == (2, 0.5, 1.0)

    pool = pipeline.test_pools[0]
    joined = join(pool, ChosenFirst(), pipeline.embedder, 1)
    assert joined.rewards.reshape(PAIRS, 2).tolist() == [[1.0, 0.0]] * PAIRS
    features = torch.from_numpy(np.asarray(joined.features)).float()
    clusters = np.arange(PAIRS) // A_PROMPT  # task ids are numbered
    right = np.full((SETTINGS.seeds, PAIRS), np.nan)
    sweep = pipeline.sweep(pool)
    for probe, (data, task) in zip(sweep, seen, strict=True):
        tested = fold_of(PAIRS, SETTINGS.folds, probe_seed(0, probe.seed), clusters) == probe.fold
        assert not set(clusters[tested]) & set(clusters[task.groups.numpy()])
        assert data.prompt_of_group.tolist() == clusters.tolist()  # held-out prompts are whole, too
        with torch.no_grad():
            q = probe.trained.network(features).numpy().reshape(PAIRS, 2)
        # A probe that was best before its first step ties every pair.
        right[probe.seed, tested] = (0.5 + 0.5 * np.sign(q[:, 0] - q[:, 1]))[tested]
    row = rows["Q-probe L_QP"]
    assert row.value == pytest.approx(right.mean())
    assert row.value > 0.7  # goodness is among the features
    assert (row.beta, row.auc) == (0.0, pytest.approx(right.mean()))
    each = (
        right.mean(axis=0).reshape(-1, A_PROMPT).mean(axis=1)
    )  # clusters are of one size: the bootstrap is that of theirs
    assert row.low is not None
    assert row.high is not None
    assert (row.high - row.low) / (2 * 1.96) == pytest.approx(each.std() / np.sqrt(len(each)), rel=0.25)
    assert any("The 60 prompts make 20 clusters" in note for note in results.notes)
    assert "Q-probe L_QP" in to_text(results)
    probe = QProbe.from_pretrained(pipeline.final_probe())
    assert probe.score(features.numpy()).reshape(PAIRS, 2)[:, 0].mean() > probe.score(features.numpy()).mean()


def test_probes_of_pairs_choose_among_more_candidates_of_another_reward(
    make: Callable[..., Pipeline], pairs: Split, fakes: ModuleType
) -> None:
    test = fakes.split("numbers", 12, 100)
    pipeline = make(tests=[test], training_split=pairs, greedy=fakes.Sampler(1, temperature=0.0))
    assert pipeline.k == 4  # pairs have two completions, which bounds nothing
    pipeline.execute(STAGES[:-1])
    rows = {row.method: row for row in pipeline.results(test).rows}
    completions = pipeline.test_pools[0].completions.read().to_pylist()
    passed = np.mean([fakes.passes(row["task_id"], row["completion"]) for row in completions])
    assert rows["pass@1"].value == pytest.approx(passed)
    assert rows["Q-probe L_QP"].value > passed  # type: ignore[operator]
    assert (pipeline.run / "rewards" / "pairs.sample" / "chosen").is_dir()
    assert (pipeline.run / "rewards" / "numbers.sample" / "passes").is_dir()


class Likes:
    """A model that finds an answer the likelier, the higher its number."""

    end: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        return {"likelihood": "likes"}

    def tokenizer_fingerprint(self) -> str:
        return "bytes of its own"

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return list(text.encode())

    def encode_completion(self, text: str) -> list[int]:
        return list(text.encode())

    def log_likelihood(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[list[float]]:
        return [[float(bytes(ids)[-2:]) - 100 for ids in of_prompt] for of_prompt in completions]


def test_likelihoods_of_answers_that_were_brought_along_are_a_control(
    make: Callable[..., Pipeline], pairs: Split
) -> None:
    assert pairs.recorded is not None
    controlled = dataclasses.replace(SETTINGS, controls=("likelihood", "length"))
    pipeline = make(settings=controlled, likelihood=Likes())
    pipeline.execute(STAGES[:-1])
    rows = {row.method: row for row in pipeline.results(pairs).rows}
    numbers = [[int(answer[-2:]) for answer in pairs.recorded[p.task_id]] for p in pairs.prompts]
    assert rows["highest logprob"].value == pytest.approx(np.mean([chosen > other for chosen, other in numbers]))
    assert rows["highest logprob per token"].value == rows["highest logprob"].value  # all answers have nine bytes
    assert rows["longest (tokens)"].value == 0.5
    unread = make(settings=controlled, run=pipeline.run.with_name("other"))
    unread.execute(STAGES[:-1])
    assert {row.method: row for row in unread.results(pairs).rows}["highest logprob"].value is None


def test_other_clusters_train_and_evaluate_anew(make: Callable[..., Pipeline], pairs: Split) -> None:
    def identities(clusters: dict[str, str] | None) -> tuple[str, str]:
        split = Split("pairs", pairs.prompts, pairs.source, pairs.recorded, ChosenFirst(), clusters)
        pipeline = make(tests=[split])
        pipeline.execute(STAGES[:-1])
        return (pipeline.run / "probes/pairs/sweep.json").read_text(), pipeline.results(split).made_from

    alone = identities(None)
    assert "clusters" not in alone[0]
    named = {prompt.task_id: prompt.task_id for prompt in pairs.prompts}
    for clusters in (named, dict(pairs.clusters or {})):
        assert not {*identities(clusters)} & {*alone}
    assert identities(None) == alone


def test_a_task_without_a_cluster_and_too_few_clusters_are_refused(make: Callable[..., Pipeline], pairs: Split) -> None:
    some = {prompt.task_id: "one" for prompt in pairs.prompts[1:]}
    with pytest.raises(ValueError, match="cluster"):
        Split("pairs", pairs.prompts, pairs.source, clusters=some)
    with pytest.raises(ValueError, match=r"evaluation\.folds"):
        make(settings=EvaluationSettings(losses=("bradley_terry",), folds=21))
