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
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import cohen_kappa_score

from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.prompts import Prompt
from qprobe.run import joined
from qprobe.run.stages import Split
from qprobe_preference import comparison, outcome, winrates
from qprobe_preference.comparison import Variant
from qprobe_preference.judges.base import AgainstReference, Comparison, Judgement
from qprobe_preference.pairs.base import Found, collect
from qprobe_preference.policy import Experiment, PolicySettings, Truth
from qprobe_preference.splits import PairLabel, pairs_split

STAGES = ["sample", "reward", "embed"]
TRAINING = TrainingSettings(steps=60, learning_rate=0.05, minimum_mixed=2, held_out=0.3, check_every=5)
SETTINGS = EvaluationSettings(
    losses=("bradley_terry",), seeds=2, controls=(), curve_shares=(), k=4, beta=0.0, draws=50, bootstrap=2000
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


class Silent(Larger):
    """It gives no verdict but where nothing needs to be said."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        return [Judgement(0.5, "tie" if one.first == one.second else "unparsed") for one in comparisons]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    """Experiments whose layer 1 says how good an answer is; layer 2, the highest, is noise."""

    class Layered(fakes.Embedder):  # type: ignore[misc, name-defined]
        def embed(self, prompts: Sequence[Any], completions: Sequence[Any]) -> dict[int, torch.Tensor]:
            states: dict[int, torch.Tensor] = super().embed(prompts, completions)
            states[2][:, 0] = states[2][:, 2]
            return states

    def made(
        clusters: dict[str, str] | None = None, judge: Any = None, first: bool = False, **changes: Any
    ) -> Experiment:
        """`first`: candidates are judged against their prompt's first one, and have true labels beside the judge."""
        rng = np.random.default_rng(3)
        lots = [rng.permutation(100)[:2] for _ in range(40)]
        found = [
            Found(f"task {i:03d}: ", f"answer {max(lot):02d}", f"answer {min(lot):02d}") for i, lot in enumerate(lots)
        ]
        pairs = collect("pairs", found, {})
        asked = [Prompt(f"t-{n:03d}", text=f"task {n:03d}: ") for n in range(100, 130)]
        against, recorded = {p.task_id: f"answer {REFERENCE}" for p in asked}, None
        truth = None
        if first:
            recorded = {p.task_id: [f"answer {n:02d}" for n in rng.integers(40, 60, 4)] for p in asked}
            against = {key: own[0] for key, own in recorded.items()}
            labels = {key: rng.integers(0, 2, 4).astype(float).tolist() for key in against}
            truth = Truth(labels, {key: own[0] for key, own in labels.items()}, greedy=False)
        reward = AgainstReference(judge or Larger(), asked, against)
        tested = Split("asked", asked, {"asked": 30}, recorded=recorded, reward=reward, clusters=clusters)
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
        return Experiment(config, settings, pipeline, pairs, "text", reward, "the reference", truth)

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
    assert float(found["base"]["rate"]) == pytest.approx(
        np.mean([np.mean([won(a) for a in own]) for own in answers(experiment)])
    )
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


def test_a_row_at_beta_0_is_the_argmax_and_mixed_temperatures_have_a_row_of_their_own(make: Make) -> None:
    """Two probes of three chose 0: their median is 0, and the policy of all three is not the argmax."""
    experiment = make()
    experiment.pipeline.execute(["sample", "reward"])
    pool = joined.join(experiment.pipeline.test_pools[0], experiment.reward)
    numbers = np.array([number(text) for text in pool.completions]) / 100
    beta = np.zeros((3, 30))
    beta[2] = 0.5
    scores = Scored(np.stack([numbers] * 3).astype(np.float32), beta, [])
    experiment.pipeline.settings = dataclasses.replace(SETTINGS, beta=None)
    judged = outcome.judgements(experiment, pool)
    base = winrates.win_rate(judged, judged.base_law())
    found = outcome._choices(experiment.pipeline, judged, base, {"Q linear": scores}, {"Q-probe": 50.1})
    assert [(row.name, row.beta, row.paper) for row in found] == [
        ("Q linear", 0.0, 50.1),
        ("Q linear, own beta (0 to 0.5)", None, None),
        ("skyline", 0.0, None),
    ]
    best, soft = [], []
    for own in answers(experiment):
        best.append(won(max(own)))
        soft.append(softmax(np.array(own) / 100 / 0.5) @ [won(answer) for answer in own])
    rates = [row.result.rate.value for row in found if row.result is not None]
    assert rates[0] == pytest.approx(np.mean(best))
    assert rates[1] == pytest.approx(2 / 3 * np.mean(best) + 1 / 3 * np.mean(soft), rel=1e-5)
    # One temperature for all is a row at that temperature.
    alike = dataclasses.replace(scores, beta=np.full((3, 30), 0.1))
    rows_at = outcome._choices(experiment.pipeline, judged, base, {"Q linear": alike}, {})
    assert [(row.name, row.beta) for row in rows_at[:2]] == [("Q linear", 0.0), ("Q linear", 0.1)]


@pytest.mark.parametrize(
    ("controls", "layer", "sentence"),
    [
        ((), 1, "No control was run (evaluation.controls)"),
        (("length",), 1, "Every probe beats the best control"),
        (
            ("length",),
            2,
            "Layer 2, linear: Q-probe L_QP does not beat the best control, longest (characters): it earns ",
        ),
    ],
)
def test_what_is_said_of_controls_follows_from_the_intervals(
    controls: tuple[str, ...], layer: int, sentence: str, make: Make
) -> None:
    settings = dataclasses.replace(SETTINGS, controls=controls, k=2, folds=3)
    experiment = make(settings=settings, layer=layer)
    pairs = experiment.pipeline.training_split
    assert pairs is not None
    pipeline = dataclasses.replace(
        experiment.pipeline, tests=[pairs], training_split=None, sampler=experiment.pipeline.sampler
    )
    pipeline.execute(STAGES)
    variants = [Variant(layer, ())]
    comparison.execute(pipeline, variants, ["train", "evaluate"])
    said = comparison.write(pipeline, variants)
    assert sentence in said
    assert sum(word in said for word in ("No control was", "Every probe beats", "does not beat")) == 1


def test_two_judges_are_not_said_to_agree_on_an_answer_against_itself(make: Make) -> None:
    experiment = make(first=True)
    experiment.pipeline.execute(STAGES)
    printed = outcome.write(experiment, [])
    truth, judged, true = experiment.truth, [], []
    assert truth is not None
    for key, own in zip(sorted(truth.labels), answers(experiment), strict=True):
        for answer, label in zip(own, truth.labels[key], strict=True):
            if answer != own[0]:
                judged.append(int(np.sign(answer - own[0])))
                true.append(int(np.sign(label - truth.labels[key][0])))
    itself = 30 * 4 - len(judged)
    assert itself > 30  # the first of each prompt, and copies of it
    agreed = np.mean(np.equal(judged, true))
    kappa = cohen_kappa_score(judged, true)
    words = " ".join(printed.split())
    assert f"larger and the true verdicts agree on {agreed:.1%} of {len(judged)} comparisons" in words
    assert f"Cohen's kappa {kappa:.2f} [" in words
    assert f"{itself} left out, of an answer with itself" in words


def test_a_judge_without_a_verdict_agrees_with_nobody(make: Make) -> None:
    experiment = make(first=True, judge=Silent())
    experiment.pipeline.execute(STAGES)
    words = " ".join(outcome.write(experiment, []).split())
    assert "agree on" not in words
    assert "nothing is known of their agreement" in words


def test_win_rates_resample_the_clusters_of_the_tested_prompts(make: Make) -> None:
    """Ten conversations of three prompts each: half the width of an interval is t times the error of ten means."""
    of_prompt = {f"t-{n:03d}": f"tree {n % 10}" for n in range(100, 130)}
    experiment = make(clusters=of_prompt)
    experiment.pipeline.execute(STAGES)
    outcome.write(experiment, [])
    base = np.array([np.mean([won(answer) for answer in own]) for own in answers(experiment)])
    means = base.reshape(3, 10).mean(axis=0)
    found = rows(experiment)["base"]
    low, high = float(found["low"]), float(found["high"])
    expected = stats.t.ppf(0.975, 9) * means.std(ddof=1) / np.sqrt(10)
    alone = stats.t.ppf(0.975, 29) * base.std(ddof=1) / np.sqrt(30)
    assert abs(expected / alone - 1) > 0.25  # the two can be told apart
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    best = np.array([won(max(own)) for own in answers(experiment)])
    gains = (best - base).reshape(3, 10).mean(axis=0)
    probe = rows(experiment)["Q-probe L_QP linear"]
    half = stats.t.ppf(0.975, 9) * gains.std(ddof=1) / np.sqrt(10)
    assert (float(probe["difference_high"]) - float(probe["difference_low"])) / 2 == pytest.approx(half, rel=0.1)
