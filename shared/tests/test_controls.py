"""Controls against values by hand, and what a table says where a probe does not beat them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tables import joined as table
from tables import row

from qprobe.evaluation import controls
from qprobe.evaluation import evaluate as evaluation
from qprobe.evaluation.layer_choice import Scores
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.sweep import EvaluationSettings, cross_validate, probe_seed, train_on_all
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import STAGES
from qprobe.probe.training import TrainingSettings
from qprobe.report import to_text
from qprobe.report.results import Results
from qprobe.run.joined import Joined
from qprobe.run.pools import Split

SETTINGS = EvaluationSettings(losses=("reward_mse",), seeds=3, folds=3, curve_shares=(), bootstrap=200)
TRAINING = TrainingSettings(steps=40, learning_rate=0.05, minimum_mixed=2)


def pool(prompts: int = 40, samples: int = 6, seed: int = 0) -> Joined:
    """Good completions have a high first feature; lengths and log-probabilities are noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(3.0, [1.0, 50.0, 0.1], size=(prompts * samples, 3)).astype(np.float32)
    rewards = (features[:, 0] > 3).astype(np.float32)
    tokens = rng.integers(1, 30, size=len(rewards))
    return Joined(
        [f"p{number:03d}" for number in range(prompts)],
        np.repeat(np.arange(prompts), samples),
        [f"{number} " + "x" * count for number, count in enumerate(tokens)],
        rewards,
        ["passed" if reward else "failed" for reward in rewards],
        features,
        tokens=tokens,
        logprobs=(-rng.exponential(size=len(rewards)) * tokens).astype(np.float32),
    )


def balanced(joined: Joined) -> Joined:
    """Half of every prompt's completions are good, and its features have the mean 0: prompts differ in nothing."""
    rewards = np.tile(np.float32([1, 0, 1, 0, 0, 1]), 40)
    assert joined.features is not None
    features = joined.features.reshape(40, 6, 3)
    features = (features - features.mean(axis=1, keepdims=True)).reshape(240, 3)
    features[:, 0] += 2 * rewards - 1
    return dataclasses.replace(joined, rewards=rewards, features=features)


def evaluate(joined: Joined, q: np.ndarray, made: controls.Scores, k: int, seeds: int = 1) -> Results:
    scored = {1.0: {"reward_mse": Scored(q, np.zeros((len(q), len(joined.task_ids))), [])}}
    settings = dataclasses.replace(SETTINGS, seeds=seeds)
    return evaluation.evaluate(joined, Scores(scored), settings, k=k, seed=0, controls=made)


def test_length_and_log_probability_by_hand() -> None:
    joined = dataclasses.replace(
        pool(1, 4),
        completions=["a", "bbb", "", "cc"],
        tokens=np.array([5, 2, 0, 4]),
        logprobs=np.float32([-4, -3, 0, -4]),
    )
    settings = dataclasses.replace(SETTINGS, controls=("length", "logprob"))
    made = controls.scores(joined, settings, 0)
    expected = {
        "longest (tokens)": [5, 2, 0, 4],
        "shortest (tokens)": [-5, -2, 0, -4],
        "highest logprob": [-4, -3, 0, -4],
        "highest logprob per token": [-4 / 6, -1, 0, -4 / 5],
    }
    assert list(made) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(made[name], [values], rtol=1e-6)
    # Texts of unknown tokens: characters, and no log-probability per token.
    texts = controls.scores(dataclasses.replace(joined, tokens=None), settings, 0)
    np.testing.assert_array_equal(texts["longest (characters)"], [[1, 3, 0, 2]])
    assert texts["highest logprob"] is not None
    assert texts["highest logprob per token"] is None
    unknown = dataclasses.replace(joined, logprobs=np.float32([-4, np.nan, 0, -4]))
    assert controls.scores(unknown, settings, 0)["highest logprob"] is None
    assert controls.scores(joined, dataclasses.replace(SETTINGS, controls=()), 0) == {}


def test_agreement_is_nearness_in_standardised_features_and_how_often_a_text_is_there() -> None:
    features = np.float32([[0, 7], [1, 7], [10, 7], [0, 7], [9, 7], [10, 7]])
    joined = table([[0, 1, 0], [1, 0, 1]], features)
    joined = dataclasses.replace(joined, completions=["a", "b", "a", "a", "c", "c"])
    made = controls.scores(joined, dataclasses.replace(SETTINGS, controls=("agreement",)), 0)
    near, often = made["nearest to the others"], made["most repeated"]
    assert near is not None
    assert often is not None
    deviation = float(features[:, 0].std())
    np.testing.assert_allclose(near[0] * deviation, [-11 / 3, -10 / 3, -19 / 3, -19 / 3, -10 / 3, -11 / 3], rtol=1e-4)
    assert often.tolist() == [[2, 1, 2, 1, 2, 2]]


def test_random_directions_read_standardised_features_and_choose_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = pool(300, 4)
    monkeypatch.setattr(controls, "RANDOM_DIRECTIONS", 40)
    settings = dataclasses.replace(SETTINGS, controls=("random_direction",))
    made = controls.scores(joined, settings, 5)["random direction"]
    assert made is not None
    assert made.shape == (40, 1200)
    np.testing.assert_allclose(made.mean(axis=1), 0, atol=1e-3)
    assert joined.features is not None
    weights = np.linalg.lstsq(joined.features - joined.features.mean(axis=0), made.T, rcond=None)[0]
    standard = (weights * joined.features.std(axis=0)[:, None]).T
    # Standard normal in every direction: a column that is 500 times as wide has no more to say.
    np.testing.assert_allclose(standard.std(axis=0), 1, atol=0.4)
    monkeypatch.setattr(controls, "ROWS_AT_A_TIME", 7)
    np.testing.assert_allclose(controls.scores(joined, settings, 5)["random direction"], made, rtol=1e-4, atol=1e-4)
    found = row(evaluate(joined, joined.rewards[None], {"random direction": made}, k=2), "random direction")
    assert found.seeds == 40
    # A direction's sign is a coin's: over 40 seeds the mean is the base, with a spread that says why one would not do.
    assert found.difference == pytest.approx(0, abs=0.06)
    assert found.seed_spread is not None
    assert found.seed_spread > 0.05
    assert found.auc == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("own_set", [True, False])
def test_shuffled_labels_keep_a_prompts_rewards_and_teach_nothing_of_its_completions(own_set: bool) -> None:
    learnt, tested = (balanced(pool(40, 6, seed)) for seed in (0, 0 if own_set else 1))
    seen: list[tuple[Joined, int]] = []

    def make(joined: Joined, *arguments: Any, **more: Any) -> Any:
        seen.append((joined, more["seed"]))
        return (cross_validate if own_set else train_on_all)(joined, *arguments, **more)

    # What one learns is the coin's: all good or all bad. So their mean is looked at, over many.
    many = dataclasses.replace(SETTINGS, seeds=24)
    made = controls.shuffled_labels(learnt, tested, make, TRAINING, many, k=6, seed=7)
    scores = made["shuffled labels L_Q"]
    assert scores is not None
    assert scores.shape == (24, len(tested.rewards))
    assert [seed for _, seed in seen] == [probe_seed(7, number) for number in range(24)]
    shuffled = [joined.rewards.reshape(40, 6) for joined, _ in seen]
    for rewards in shuffled:
        np.testing.assert_array_equal(np.sort(rewards), np.sort(learnt.rewards.reshape(40, 6)))
    assert len({rewards.tobytes() for rewards in [*shuffled, learnt.rewards]}) == 25
    results = evaluate(tested, tested.rewards[None], made, k=6)
    chance = row(results, "shuffled labels L_Q")
    assert chance.difference == pytest.approx(0, abs=0.3)  # three standard errors
    assert chance.auc == pytest.approx(0.5, abs=0.3)
    assert row(results, "Q-probe L_Q").auc == 1.0


def test_the_shuffled_control_learns_from_as_many_prompts_as_the_probes_do() -> None:
    learnt, counts = balanced(pool(40, 6)), []

    def make(*arguments: Any, **more: Any) -> Any:
        made = train_on_all(*arguments, **more)
        counts.append({probe.prompts for probe in made})
        return made

    make(learnt, TRAINING, SETTINGS, k=6, seed=7, progress=False)
    controls.shuffled_labels(learnt, balanced(pool(40, 6, 1)), make, TRAINING, SETTINGS, k=6, seed=7)
    assert counts == [{36}] * 4  # nine tenths


def test_the_rows_are_argmax_at_k_and_paired_and_the_notes_say_what_does_not_beat_them() -> None:
    # Ten times two prompts of two completions. The longest is right in all of the first, and wrong in half of the second.
    rewards = np.float32([[1, 0]] * 10 + [[0, 1]] * 10)
    longest = np.array([[2, 1]] * 10 + [[1, 2], [2, 1]] * 5).ravel()
    joined = dataclasses.replace(pool(20, 2), rewards=rewards.ravel(), tokens=longest)
    made = controls.scores(joined, dataclasses.replace(SETTINGS, controls=("length", "logprob")), 0)
    made["highest logprob"] = None
    results = evaluate(joined, rewards.ravel()[None], made, k=2)
    assert [entry.method for entry in results.rows] == [
        "pass@1",
        "greedy",
        "longest (tokens)",
        "shortest (tokens)",
        "highest logprob",
        "highest logprob per token",
        "Q-probe L_Q",
        "skyline pass@2",
    ]
    found = row(results, "longest (tokens)")
    assert (found.value, found.difference, found.auc, found.beta, found.seeds) == (0.75, 0.25, 0.75, 0.0, 0)
    assert row(results, "shortest (tokens)").value == 0.25
    assert row(results, "highest logprob").value is None
    assert "not run" in next(line for line in to_text(results).splitlines() if line.startswith("highest logprob  "))
    assert not any("best control" in note for note in results.notes)  # a perfect probe beats them
    poor = np.where(np.arange(40) % 4 < 2, rewards.ravel(), 1 - rewards.ravel())[None]  # right in every other prompt
    (note,) = [note for note in evaluate(joined, poor, made, k=2).notes if "best control" in note]
    assert note.startswith(
        "Q-probe L_Q does not beat the best control (longest (tokens), the best of 3 on these very prompts): it earns -0.250 ["
    )
    same = evaluate(joined, longest[None].astype(float), made, k=2)
    assert any("it earns +0.000 [+0.000, +0.000] against it" in note for note in same.notes)


def test_a_pipeline_has_the_controls_that_are_asked_for(fakes: ModuleType, tmp_path: Path) -> None:
    def run(split: Split, greedy: Any, **changes: Any) -> list[str]:
        pipeline = Pipeline(
            run=tmp_path / split.name,
            title="Numbers",
            tests=[split],
            reward=fakes.Reward(),
            sampler=fakes.Sampler(),
            greedy=greedy,
            embedder=fakes.Embedder(),
            training=TRAINING,
            settings=dataclasses.replace(SETTINGS, **changes),
            progress=False,
        )
        pipeline.execute(STAGES[:-1])
        return [f"{entry.method}{'' if entry.value is not None else '?'}" for entry in pipeline.results(split).rows]

    four = ["longest (tokens)", "shortest (tokens)", "highest logprob", "highest logprob per token"]
    rows = run(fakes.split("numbers", 12), None, controls=("shuffled_labels", "length", "logprob", "random_direction"))
    assert rows == [
        "pass@1",
        "greedy?",
        *four,
        "random direction",
        "shuffled labels L_Q",
        "Q-probe L_Q",
        "skyline pass@4",
    ]
    prompts = fakes.prompts(12)
    texts = {prompt.task_id: [f"answer {7 * n + 3:02d}" for n in range(4)] for prompt in prompts}
    rows = run(Split("mine", prompts, {}, texts), None, controls=("logprob",))
    assert rows == [
        "pass@1",
        "greedy?",
        "highest logprob?",
        "highest logprob per token?",
        "Q-probe L_Q",
        "skyline pass@4",
    ]


@pytest.mark.parametrize("names", [("lenght",), ("length", "greedy")])
def test_an_unknown_control_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.controls"):
        EvaluationSettings(controls=names)
