"""Training: many probes at once equal each alone, optima that are known, held-out prompts that are held out, sentences."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qprobe.probe.losses import LOSSES
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.ranking import mixed_prompts, within_prompt_auc
from qprobe.probe.training import (
    BETAS,
    Data,
    ProbeTask,
    TrainedProbe,
    TrainingSettings,
    batches,
    score_rows,
    train,
    trainer,
)

GOODNESS, HARDNESS = 0, 1  # features that differ within a prompt, and only between prompts


def planted(sizes: list[int], dimension: int = 8, noise: float = 0.3, seed: int = 0) -> Data:
    """Rewards of 0 and 1 from goodness - hardness; feature 1 says how hard the prompt is, the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    features = torch.randn(len(groups), dimension, generator=generator)
    features[:, HARDNESS] = torch.randn(len(sizes), generator=generator)[groups]
    margin = features[:, GOODNESS] - features[:, HARDNESS] + noise * torch.randn(len(groups), generator=generator)
    return Data(features, (margin > 0).float(), groups)


def everything(data: Data) -> Tensor:
    return torch.ones(len(data.sizes), dtype=torch.bool)


def only(data: Data, groups: Tensor) -> Data:
    """The rows of some groups alone."""
    rows = groups[data.groups]
    return Data(data.features[rows], data.rewards[rows], torch.unique(data.groups[rows], return_inverse=True)[1])


def quick(**changes: Any) -> TrainingSettings:
    values = {"steps": 60, "learning_rate": 0.02, "held_out": 0.0, "check_every": 10, "chunk": 4, "chunks_per_batch": 8}
    return TrainingSettings(**values | changes)


def full_batch(**changes: Any) -> TrainingSettings:
    return quick(**{"chunk": 1000, "chunks_per_batch": 1000} | changes)


def train_one(
    data: Data, loss: str, settings: TrainingSettings, groups: Tensor | None = None, **more: Any
) -> TrainedProbe:
    task = ProbeTask(loss, more.pop("task_seed", 0), everything(data) if groups is None else groups)
    return train(data, [task], settings, k=more.pop("k", 4), **more)[0]


def parameters(network: ProbeNetwork) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def learnt(probe: TrainedProbe, data: Data, loss: str) -> Tensor:
    """Scores of all rows; from losses that compare within prompts, less each prompt's mean, which only rounding moves."""
    scores = score_rows(probe.network, data.features)
    if LOSSES[loss].reads == "rows":
        return scores
    means = torch.zeros(len(data.sizes)).index_add(0, data.groups, scores) / data.sizes
    return scores - means[data.groups]


def held_out(data: Data, settings: TrainingSettings, groups: Tensor | None = None) -> Tensor:
    """Which groups the lot of seed 0 holds out."""
    mixed = torch.from_numpy(mixed_prompts(data.rewards.numpy(), data.groups.numpy()))
    task = ProbeTask("reward_mse", 0, everything(data) if groups is None else groups)
    return trainer._held_out(data, task, settings, mixed).held


def cross_entropy(scores: Tensor, rewards: Tensor) -> float:
    q, r = scores.double().numpy(), rewards.double().numpy()
    return float(np.mean(np.logaddexp(0, q) - r * q))


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_probes_trained_together_equal_each_alone_on_the_same_prompts(hidden: tuple[int, ...]) -> None:
    data = planted([3, 5, 9, 4] * 10)
    settings = quick(hidden=hidden, held_out=0.5, minimum_mixed=6, steps=20)
    tasks = [ProbeTask(loss, 1, everything(data)) for loss in LOSSES]
    together = train(data, tasks, settings, k=3, seed=4)
    for task, probe in zip(tasks, together, strict=True):
        alone = train(data, [task], settings, k=3, seed=4)[0]
        expected = learnt(alone, data, task.loss)
        torch.testing.assert_close(learnt(probe, data, task.loss), expected, rtol=1e-3, atol=1e-4)
        assert expected.std() > 0.05
        assert (probe.steps, probe.chosen, probe.held_out_mixed) == (alone.steps, alone.chosen, alone.held_out_mixed)
        assert probe.chosen
    # On rewards bradley_terry is pairwise_logistic; the others all differ.
    assert len({tuple(parameters(probe.network).tolist()) for probe in together}) >= len(together) - 1


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize("loss", LOSSES)
def test_in_full_batches_each_probe_learns_from_its_own_prompts_as_if_no_other_existed(
    loss: str, hidden: tuple[int, ...]
) -> None:
    data = planted([4, 6] * 10)
    tasks = [ProbeTask(loss, fold, torch.arange(20) % 3 != fold) for fold in range(3)]
    settings = full_batch(weight_decay=0.1, hidden=hidden, steps=30)
    together = train(data, tasks, settings, k=4)
    for task, probe in zip(tasks, together, strict=True):
        alone = train_one(only(data, task.groups), loss, settings, task_seed=task.seed)
        expected = learnt(alone, data, loss)
        torch.testing.assert_close(learnt(probe, data, loss), expected, rtol=1e-3, atol=1e-4)
        assert expected.std() > 0.05


@pytest.mark.parametrize("loss", ["reward_cross_entropy", "policy_gradient"])
def test_few_prompts_beside_many_are_learnt_from_as_alone(loss: str) -> None:
    data = planted([12] * 64, noise=1.0)
    settings = quick(steps=100, weight_decay=0.1)
    masks = [everything(data), torch.arange(64) < 8, torch.arange(64) % 8 == 3]
    together = train(data, [ProbeTask(loss, 0, mask) for mask in masks], settings, k=4)
    for mask, probe in zip(masks[1:], together[1:], strict=True):
        alone = train_one(data, loss, settings, groups=mask)
        # Passes of their own, or shared with others as small: as many own prompts a batch, in another order.
        found, expected = learnt(probe, data, loss), learnt(alone, data, loss)
        assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.99
        assert float(found.std() / expected.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(parameters(together[0].network), parameters(train_one(data, loss, settings).network))


def test_probes_of_several_learning_rates_equal_each_alone() -> None:
    data = planted([4] * 40)
    tasks = [ProbeTask("reward_mse", 0, everything(data), rate) for rate in (None, 0.003, 0.1)]
    settings = quick(held_out=0.4, minimum_mixed=3)
    found = train(data, tasks, settings, k=4)
    assert [probe.learning_rate for probe in found] == [0.02, 0.003, 0.1]
    for probe in found:
        alone = train_one(data, "reward_mse", dataclasses.replace(settings, learning_rate=probe.learning_rate))
        torch.testing.assert_close(parameters(probe.network), parameters(alone.network), rtol=1e-3, atol=1e-5)
        assert (probe.steps, probe.beta, probe.note) == (alone.steps, alone.beta, "")


def test_the_learning_rate_of_the_lowest_held_out_loss_is_taken_by_every_probe() -> None:
    data = planted([4] * 60, dimension=20, noise=2.0)
    rates = (1e-6, 0.01, 3.0)  # too slow to move, good, and too fast
    settings = quick(held_out=0.4, minimum_mixed=3, learning_rates=rates, steps=30)
    tasks = [ProbeTask(loss, 0, everything(data)) for loss in ("reward_mse", "reward_cross_entropy")]
    tasks.append(ProbeTask("reward_mse", 0, everything(data), 1e-6))
    found = train(data, tasks, settings, k=4)
    assert [probe.learning_rate for probe in found] == [0.01, 0.01, 1e-6]  # a task's own is not for choice
    alone = train_one(data, "reward_mse", dataclasses.replace(settings, learning_rates=(), learning_rate=0.01))
    torch.testing.assert_close(parameters(found[0].network), parameters(alone.network), rtol=1e-3, atol=1e-5)


def test_without_held_out_prompts_candidates_are_left_and_that_is_said() -> None:
    data = planted([4] * 40)
    candidates = quick(held_out=0.4, minimum_mixed=41, learning_rates=(0.1, 0.2))
    found = train_one(data, "reward_mse", candidates)
    plain = train_one(data, "reward_mse", quick(held_out=0.4, minimum_mixed=41))
    assert torch.equal(parameters(found.network), parameters(plain.network))
    assert found.learning_rate == 0.02
    assert re.match(
        r"The learning rate was not chosen among 2: \d+ held-out prompts .* fewer than 41; it is 0.02", found.note
    )
    assert plain.note == ""


def test_patience_ends_training_that_no_longer_helps_and_null_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    data = planted([4] * 30, dimension=20, noise=0.5)
    settings = full_batch(held_out=0.5, minimum_mixed=3, steps=400, learning_rate=0.03, patience=None)
    made: list[int] = []
    step = batches.StackedAdamW.step
    monkeypatch.setattr(batches.StackedAdamW, "step", lambda *arguments: made.append(1) or step(*arguments))

    def count(*more: ProbeTask, **changes: Any) -> tuple[TrainedProbe, int]:
        made.clear()
        tasks = [ProbeTask("reward_cross_entropy", 0, everything(data)), *more]
        return train(data, tasks, dataclasses.replace(settings, **changes), k=4)[0], len(made)

    whole, all_steps = count()
    assert 0 < whole.steps < 300
    assert all_steps == 400
    patient, steps = count(patience=3)
    assert steps == whole.steps + 3 * settings.check_every
    assert torch.equal(parameters(whole.network), parameters(patient.network))
    # A companion with too few mixed prompts to hold any out has no loss to watch: it gets all its steps.
    few = ProbeTask("reward_mse", 0, torch.arange(30) < 15)
    assert count(few, patience=3, minimum_mixed=8)[1] >= 400


def test_cross_entropy_reaches_the_optimum_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    data = planted([10] * 60, noise=3.0)
    found = train_one(data, "reward_cross_entropy", full_batch(steps=400, learning_rate=0.05, weight_decay=0.0))
    reference = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(data.features.numpy(), data.rewards.numpy())
    optimum = cross_entropy(torch.from_numpy(reference.decision_function(data.features.numpy())), data.rewards)
    assert optimum > 0.3  # noise: the optimum is finite
    reached = cross_entropy(score_rows(found.network, data.features), data.rewards)
    assert optimum - 1e-6 <= reached < optimum + 1e-4
    np.testing.assert_allclose(found.network.weights[0].detach().numpy(), reference.coef_, atol=0.03)


def test_squared_error_reaches_least_squares_with_an_intercept() -> None:
    data = planted([6, 11, 3] * 20)
    found = train_one(data, "reward_mse", full_batch(steps=600, learning_rate=0.02, weight_decay=0.0))
    design = np.column_stack([data.features.double().numpy(), np.ones(len(data.rewards))])
    solution = np.linalg.lstsq(design, data.rewards.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(parameters(found.network).numpy(), solution, atol=2e-3)


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_standardisation_is_folded_into_the_weights(hidden: tuple[int, ...]) -> None:
    plain = planted([5] * 40)
    scale = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0, 3.0, 0.5, 2.0])
    raw = dataclasses.replace(plain, features=plain.features * scale + 20 * scale)
    values = raw.features.double()
    standard = dataclasses.replace(raw, features=((values - values.mean(0)) / values.std(0, correction=0)).float())
    settings = quick(hidden=hidden)
    on_raw = train_one(raw, "reward_mse", settings)
    by_hand = train_one(standard, "reward_mse", dataclasses.replace(settings, standardize=False))
    scores = score_rows(by_hand.network, standard.features)
    assert float(scores.std()) > 0.1
    torch.testing.assert_close(score_rows(on_raw.network, raw.features), scores, rtol=1e-3, atol=1e-3)


def test_the_step_of_the_lowest_held_out_loss_is_taken() -> None:
    data = planted([4] * 30, dimension=20, noise=0.5)
    settings = full_batch(held_out=0.5, minimum_mixed=3, steps=105, learning_rate=0.03)
    held = held_out(data, settings)
    assert 14 <= int(held.sum()) <= 15
    steps = [*range(10, 101, 10), 105]
    networks = [
        train_one(
            data, "reward_cross_entropy", dataclasses.replace(settings, held_out=0.0, steps=s), groups=~held
        ).network
        for s in steps
    ]
    rows = held[data.groups]
    losses = [cross_entropy(score_rows(n, data.features[rows]), data.rewards[rows]) for n in networks]
    best = int(np.argmin(losses))
    assert 0 < best < len(steps) - 1  # it overfits, so that there is something to see
    assert losses[best] < np.log(2)  # better than step 0, where every score is 0
    found = train_one(data, "reward_cross_entropy", settings)
    assert found.steps == steps[best]
    assert torch.equal(parameters(found.network), parameters(networks[best]))


def test_the_last_step_is_looked_at_wherever_it_falls() -> None:
    found = train_one(planted([6] * 40, noise=0.1), "reward_mse", quick(held_out=0.3, minimum_mixed=3, steps=17))
    assert (found.steps, found.chosen) == (17, True)


def test_a_probe_that_only_worsens_on_held_out_prompts_stays_at_its_start() -> None:
    data = planted([4] * 40)
    settings = quick(held_out=0.5, minimum_mixed=3)
    held = held_out(data, settings)[data.groups]
    flipped = dataclasses.replace(data, rewards=torch.where(held, 1 - data.rewards, data.rewards))
    found = train_one(flipped, "policy_gradient", settings)
    assert found.steps == 0
    assert not parameters(found.network).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_held_out_prompts_choose_and_never_teach(loss: str) -> None:
    # Two looks only, at the start and at the end. The end stays the better one, so the weights say what was learnt from.
    data = planted([6] * 40, noise=0.1)
    settings = quick(held_out=0.3, minimum_mixed=3, check_every=60)
    held = held_out(data, settings)[data.groups]
    before = train_one(data, loss, settings)
    assert before.steps == 60
    noise_grown, rewards = data.features.clone(), data.rewards.clone()
    noise_grown[held, 2:] *= 1.5
    rewards[held] = 0.1 + 0.8 * rewards[held]
    changed = train_one(Data(noise_grown, rewards, data.groups), loss, settings)
    assert (changed.steps, changed.chosen) == (60, True)
    assert torch.equal(parameters(changed.network), parameters(before.network))
    rewards = data.rewards.clone()
    rewards[~held] = 0.1 + 0.8 * (rewards[~held] if loss == "policy_gradient" else 1 - rewards[~held])
    other = train_one(dataclasses.replace(data, rewards=rewards), loss, settings)
    assert not torch.equal(parameters(other.network), parameters(before.network))


@pytest.mark.parametrize("pairs", [False, True])
def test_groups_outside_the_mask_are_neither_trained_on_nor_held_out_nor_measured(pairs: bool) -> None:
    data = planted([4] * 40)
    mask = torch.arange(40) < 30
    if pairs:  # two groups a prompt, and only one of them in the mask
        data, mask = dataclasses.replace(data, prompts=torch.arange(40) // 2), torch.arange(40) % 2 == 0
    outside = ~mask[data.groups]
    settings = quick(held_out=0.4, minimum_mixed=3)
    held = held_out(data, settings, mask)
    assert int(held.sum()) == int(0.4 * int(mask.sum()))
    before = train_one(data, "policy_gradient", settings, groups=mask)
    features, rewards = torch.where(outside[:, None], 1e3, data.features), torch.where(outside, 7.0, data.rewards)
    rewards[outside.nonzero()[::4, 0]] = 3.0  # mixed, all of them
    spoilt = dataclasses.replace(data, features=features, rewards=rewards)
    after = train_one(spoilt, "policy_gradient", settings, groups=mask)
    assert torch.equal(parameters(after.network), parameters(before.network))
    assert dataclasses.replace(after, network=before.network) == before


def test_too_few_mixed_prompts_hold_out_nothing_and_choose_nothing() -> None:
    data = planted([4] * 40)
    settings = quick(held_out=0.5, minimum_mixed=1, beta=0.37)
    held = held_out(data, settings)
    rewards = data.rewards.reshape(40, 4)
    mixed = int((held & (rewards.amin(1) < rewards.amax(1))).sum())
    assert mixed > 3
    chosen = train_one(data, "reward_mse", dataclasses.replace(settings, minimum_mixed=mixed))
    default = train_one(data, "reward_mse", dataclasses.replace(settings, minimum_mixed=mixed + 1))
    assert chosen.chosen
    assert (default.chosen, default.beta, default.steps, default.held_out_mixed) == (False, 0.37, 60, mixed)
    on_all = train_one(data, "reward_mse", dataclasses.replace(settings, held_out=0.0))
    assert torch.equal(parameters(default.network), parameters(on_all.network))
    assert (on_all.chosen, on_all.held_out_mixed) == (False, 0)
    none = train_one(data, "reward_mse", dataclasses.replace(settings, held_out=0.0, minimum_mixed=0))
    assert not none.chosen  # nothing was held out, so nothing was chosen


def test_a_probe_that_may_choose_and_one_that_may_not_train_side_by_side() -> None:
    data = planted([4] * 40)
    few = torch.arange(40) < 6
    settings = quick(held_out=0.5, minimum_mixed=6, beta=0.37)
    chosen, default = train(
        data, [ProbeTask("reward_mse", 0, everything(data)), ProbeTask("reward_mse", 0, few)], settings, k=4
    )
    assert (chosen.chosen, default.chosen) == (True, False)
    assert (default.steps, default.beta) == (60, 0.37)
    assert parameters(default.network).any()


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_the_temperature_that_earns_most_on_held_out_prompts_is_taken(noise: float) -> None:
    data = planted([4] * 60, noise=noise)
    settings = quick(held_out=0.5, minimum_mixed=3)
    found = train_one(data, "reward_cross_entropy", settings, k=100)  # k beyond a group: all of it
    rows = held_out(data, settings)[data.groups]
    scores = score_rows(found.network, data.features[rows]).double().reshape(-1, 4)
    rewards = data.rewards[rows].double().reshape(-1, 4)
    earned = [float((scores == scores.amax(1, keepdim=True)).double().mul(rewards).sum(1).mean())]
    earned += [float((torch.softmax(scores / beta, 1) * rewards).sum(1).mean()) for beta in BETAS[1:]]
    assert found.beta == BETAS[int(np.argmax(earned))]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_the_planted_direction(loss: str) -> None:
    data, new = planted([6] * 80), planted([6] * 80, seed=1)
    found = train_one(data, loss, quick(steps=150, learning_rate=0.05))
    weights = found.network.weights[0][0].detach()
    scores = score_rows(found.network, new.features)
    auc = within_prompt_auc(scores.numpy(), new.rewards.numpy(), new.groups.numpy())
    assert np.nanmean(auc) > 0.9
    # Only a loss that looks at rows one by one has anything to win from knowing which prompts are hard.
    share = float(weights[HARDNESS].abs() / weights[GOODNESS].abs())
    if LOSSES[loss].reads == "rows":
        assert share > 0.5
    else:
        assert share < 0.02


def test_float16_features_are_read_as_the_numbers_they_are() -> None:
    data = planted([4] * 30)
    half = dataclasses.replace(data, features=data.features.half())
    whole = dataclasses.replace(data, features=data.features.half().float())
    settings = quick(held_out=0.4, minimum_mixed=3)
    found, expected = (train_one(rows, "policy_gradient", settings) for rows in (half, whole))
    assert torch.equal(parameters(found.network), parameters(expected.network))
    assert found.network.weights[0].dtype == torch.float32
    assert torch.equal(score_rows(found.network, half.features), score_rows(expected.network, whole.features))


@pytest.mark.parametrize("value", [0.0, 3.7, 2e4])
def test_a_constant_feature_does_no_harm(value: float) -> None:
    data = planted([5] * 30)
    widened = dataclasses.replace(data, features=torch.cat([data.features, torch.full((150, 1), value)], 1))
    found, without = (train_one(rows, "reward_mse", quick(weight_decay=0.0)) for rows in (widened, data))
    torch.testing.assert_close(
        score_rows(found.network, widened.features), score_rows(without.network, data.features), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_one_and_of_equal_rewards_are_borne(loss: str) -> None:
    data = planted([1, 1, 2, 7, 13, 1, 30])
    data.rewards[:4] = 1.0
    found = train_one(data, loss, quick(held_out=0.3, minimum_mixed=1))
    assert torch.isfinite(parameters(found.network)).all()
    nothing = dataclasses.replace(data, rewards=torch.ones(len(data.rewards)))
    empty = train_one(nothing, loss, quick(weight_decay=0.0))
    assert torch.isfinite(parameters(empty.network)).all()
    if LOSSES[loss].reads != "rows":
        torch.testing.assert_close(score_rows(empty.network, data.features), torch.zeros(55), atol=1e-4, rtol=0)


def test_epochs_count_passes_and_steps_count_steps() -> None:
    data = planted([9] * 10)  # chunks of at most 4: 3 a prompt, 30 chunks, 8 in a batch: 4 steps an epoch
    assert train_one(data, "reward_mse", quick(steps=None, epochs=3)).steps == 12
    assert train_one(data, "reward_mse", quick(steps=5, epochs=3)).steps == 5


def test_the_seed_decides_and_the_process_keeps_its_random_state() -> None:
    data = planted([4] * 30)
    state = torch.get_rng_state()
    first, again, other = (parameters(train_one(data, "reward_mse", quick(), seed=s).network) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_temperature_of_training_scales_what_is_learnt() -> None:
    # A loss of Q / beta: Adam does not see the gradient's scale, so beta times the steps lead to beta times the weights.
    data = planted([4] * 30)
    cold = quick(training_beta=0.25, learning_rate=0.005, weight_decay=0.0)
    warm = quick(training_beta=1.0, learning_rate=0.02, weight_decay=0.0)
    found, expected = (learnt(train_one(data, "policy_gradient", s), data, "policy_gradient") for s in (cold, warm))
    torch.testing.assert_close(found, 0.25 * expected, rtol=1e-2, atol=1e-3)


def test_weight_decay_spares_the_bias() -> None:
    data = planted([4] * 30)
    rewards = dataclasses.replace(data, rewards=torch.ones(120))
    found = train_one(rewards, "reward_mse", full_batch(steps=800, learning_rate=0.02, weight_decay=5.0))
    assert float(found.network.biases[0].detach()) == pytest.approx(1.0, abs=0.02)


DATA = planted([4] * 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: train_one(DATA, "reward_mse", quick(), groups=torch.zeros(10, dtype=torch.bool)),
            "prompts",
        ),
        (lambda: train_one(DATA, "reward_mse", quick(), groups=torch.ones(9, dtype=torch.bool)), "prompts"),
        (lambda: train_one(DATA, "nonsense", quick()), "nonsense"),
        (lambda: train(DATA, [], quick(), k=4), "probe"),
        (
            lambda: train_one(dataclasses.replace(DATA, rewards=DATA.rewards * 2), "reward_cross_entropy", quick()),
            "0, 1",
        ),
        (lambda: Data(DATA.features * torch.nan, DATA.rewards, DATA.groups), "features"),
        (lambda: Data(DATA.features, DATA.rewards / 0, DATA.groups), "infinity"),
        (lambda: Data(DATA.features, DATA.rewards[:-1], DATA.groups), "rewards"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups[:-1]), "groups"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups * 2), "groups"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups - 1), "int64"),
        (lambda: Data(DATA.features[0], DATA.rewards, DATA.groups), "features"),
        (lambda: Data(DATA.features[:0], DATA.rewards[:0], DATA.groups[:0]), "row"),
        (lambda: Data(DATA.features, DATA.rewards, DATA.groups, torch.arange(9)), "entries"),
        (lambda: quick(steps=0), "steps"),
        (lambda: quick(chunk=0), "chunk"),
        (lambda: quick(held_out=1.0), "held_out"),
        (lambda: quick(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: quick(learning_rate=float("nan")), "learning_rate=nan"),
        (lambda: quick(beta=-0.1), "beta"),
        (lambda: quick(hidden=(0,)), r"training\.hidden"),
        (lambda: quick(hidden=("8",)), r"training\.hidden"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
