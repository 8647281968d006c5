"""Training: many probes at once equal each alone, optima that are known, held-out prompts that are held out, sentences."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trained import (
    GOODNESS,
    HARDNESS,
    cross_entropy,
    everything,
    full_batch,
    held_out,
    parameters,
    planted,
    quick,
    train_one,
)

from qprobe.probe.losses import LOSSES
from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.training import BETAS, Data, ProbeTask, TrainedProbe, score_rows, train


def only(data: Data, groups: Tensor) -> Data:
    """The rows of some groups alone."""
    rows = groups[data.groups]
    return Data(data.features[rows], data.rewards[rows], torch.unique(data.groups[rows], return_inverse=True)[1])


def learnt(probe: TrainedProbe, data: Data, loss: str) -> Tensor:
    """Scores of all rows; from losses that compare within prompts, less each prompt's mean, which only rounding moves."""
    scores = score_rows(probe.network, data.features)
    if LOSSES[loss].reads == "rows":
        return scores
    means = torch.zeros(len(data.sizes)).index_add(0, data.groups, scores) / data.sizes
    return scores - means[data.groups]


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
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
