"""Tables of a policy experiment on planted data: what is printed is what a few plain lines say of the same candidates."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import cohen_kappa_score

from qprobe.evaluation.scoring import Scored
from qprobe.run import joined
from qprobe_preference import comparison, outcome, winrates
from qprobe_preference.comparison import Variant
from qprobe_preference.judges.base import Comparison, Judgement
from qprobe_preference.policy import Experiment

STAGES = ["sample", "reward", "embed"]
REFERENCE = 60  # what the planted experiments judge against: "answer 61" beats it, "answer 60" ties

Make = Callable[..., Experiment]


def answers(experiment: Experiment) -> list[list[int]]:
    """The candidates of every prompt, as numbers."""
    pool = joined.join(experiment.pipeline.test_pools[0], experiment.reward)
    texts = np.array(pool.completions)
    return [
        [int(text.removeprefix("answer ")) for text in texts[pool.groups == group]]
        for group in range(len(pool.task_ids))
    ]


def rows(experiment: Experiment) -> dict[str, dict[str, str]]:
    path = experiment.pipeline.run / "tables" / "win_rates.csv"
    return {row["method"]: row for row in csv.DictReader(path.read_text().splitlines())}


def won(answer: float) -> float:
    return (1 + np.sign(answer - REFERENCE)) / 2


@pytest.mark.parametrize("variants", [[], [Variant(None, ())]])
def test_win_rates_of_probes_that_choose_their_layer_are_those_of_the_layer_that_carries_the_signal(
    planted: Make, variants: list[Variant]
) -> None:
    experiment = planted()
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


def test_a_row_at_beta_0_is_the_argmax_and_mixed_temperatures_have_a_row_of_their_own(planted: Make) -> None:
    """Two probes of three chose 0: their median is 0, and the policy of all three is not the argmax."""
    experiment = planted()
    experiment.pipeline.execute(["sample", "reward"])
    pool = joined.join(experiment.pipeline.test_pools[0], experiment.reward)
    numbers = np.array([int(text.removeprefix("answer ")) for text in pool.completions]) / 100
    beta = np.zeros((3, 30))
    beta[2] = 0.5
    scores = Scored(np.stack([numbers] * 3).astype(np.float32), beta, [])
    experiment.pipeline.settings = dataclasses.replace(experiment.pipeline.settings, beta=None)
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


def test_two_judges_are_not_said_to_agree_on_an_answer_against_itself(planted: Make) -> None:
    experiment = planted(first=True)
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


def test_a_judge_without_a_verdict_agrees_with_nobody(planted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(comparisons: Sequence[Comparison]) -> list[Judgement]:
        return [Judgement(0.5, "tie" if one.first == one.second else "unparsed") for one in comparisons]

    experiment = planted(first=True)
    monkeypatch.setattr(experiment.reward.judge, "compare", silent)
    experiment.pipeline.execute(STAGES)
    words = " ".join(outcome.write(experiment, []).split())
    assert "agree on" not in words
    assert "no agreement is known" in words


def test_win_rates_resample_the_clusters_of_the_tested_prompts(planted: Make) -> None:
    """Ten conversations of three prompts each: half the width of an interval is t times the error of ten means."""
    of_prompt = {f"t-{n:03d}": f"tree {n % 10}" for n in range(100, 130)}
    experiment = planted(clusters=of_prompt)
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
