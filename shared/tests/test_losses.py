"""The losses against values worked out by hand, numerical gradients, and the invariances of the paper."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from qprobe.probe.losses import (
    LOSSES,
    bradley_terry,
    centred_mse,
    check_finite,
    check_rewards,
    find_loss,
    group_softmax,
    pairwise_logistic,
    policy_gradient,
    reward_cross_entropy,
    reward_mse,
)

LN3 = math.log(3.0)  # sigma(ln 3) = 3/4, and the softmax of (0, ln 3) is (1/4, 3/4)

# Three prompts of 3, 1 and 4 completions, in no order; the rewards of prompt 2 are not all different.
GROUPS = torch.tensor([2, 0, 2, 1, 0, 2, 0, 2])
REWARDS = torch.tensor([0.0, 1.0, 1.0, 0.25, 0.5, 1.0, 0.0, 0.0], dtype=torch.float64)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_rows(name: str, rewards: Tensor = REWARDS, groups: Tensor = GROUPS) -> Callable[..., Tensor]:
    """The named loss as a function of scores and weights; pairs are the even rows against the odd ones."""
    loss = find_loss(name)
    if loss.reads == "rows":
        return lambda scores, weights=None: loss.function(scores, rewards, weights=weights)
    if loss.reads == "groups":
        return lambda scores, weights=None: loss.function(scores, rewards, groups, weights=weights)
    return lambda scores, weights=None: loss.function(
        scores[0::2], scores[1::2], weights=None if weights is None else weights[0::2]
    )


def gradient(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    scores = scores.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(scores).sum(), scores)
    return grad


def assert_equal(got: Tensor | None, *expected: float) -> None:
    assert got is not None
    want = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), want.reshape(got.shape), rtol=1e-12, atol=1e-12)


def test_reward_mse_by_hand() -> None:
    scores, rewards = double(2.0, -1.0), torch.tensor([1.0, 0.5])
    loss = reward_mse(scores, rewards)
    torch.autograd.backward(loss)
    assert_equal(loss, (1.0**2 + 1.5**2) / 2)
    assert_equal(scores.grad, 2 * 1.0 / 2, 2 * -1.5 / 2)


def test_reward_cross_entropy_by_hand() -> None:
    scores, rewards = double(LN3, LN3, 0.0), torch.tensor([1.0, 0.0, 0.5])
    loss = reward_cross_entropy(scores, rewards)
    torch.autograd.backward(loss)
    assert_equal(loss, (-math.log(3 / 4) - math.log(1 / 4) - math.log(1 / 2)) / 3)
    assert_equal(scores.grad, (3 / 4 - 1) / 3, (3 / 4 - 0) / 3, 0.0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_policy_gradient_by_hand(beta: float) -> None:
    # Prompt 0: rho = (1/4, 3/4), rewards (1, 0). Prompt 1: one row, rho = 1, reward 1/2.
    scores = double(0.0, 5.0, beta * LN3)
    loss = policy_gradient(scores, torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 0]), beta=beta, baseline=0.1)
    torch.autograd.backward(loss)
    assert_equal(loss, -((1 - 0.1) / 4 + (0 - 0.1) * 3 / 4 + (0.5 - 0.1)) / 2)
    # d/ds_i of -sum r rho is -rho_i (r_i - sum r rho) / beta, with sum r rho = 1/4; half of it for two prompts.
    assert_equal(scores.grad, -(1 / 4) * (3 / 4) / beta / 2, 0.0, (3 / 4) * (1 / 4) / beta / 2)


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = double(LN3, 1.0), double(0.0, 1.0 + LN3)
    loss = bradley_terry(chosen, rejected)
    torch.autograd.backward(loss)
    assert_equal(loss, (-math.log(3 / 4) - math.log(1 / 4)) / 2)
    assert_equal(chosen.grad, -(1 - 3 / 4) / 2, -(1 - 1 / 4) / 2)
    assert_equal(rejected.grad, (1 - 3 / 4) / 2, (1 - 1 / 4) / 2)


def test_centred_mse_by_hand() -> None:
    # Prompt 0: scores (3, 5) centre to (-1, 1), rewards (1, 0) to (1/2, -1/2): errors (-3/2, 3/2). Prompt 1, one row: 0.
    scores = double(3.0, 100.0, 5.0)
    loss = centred_mse(scores, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 1, 0]))
    torch.autograd.backward(loss)
    assert_equal(loss, ((9 / 4 + 9 / 4) / 2 + 0) / 2)
    # The errors sum to 0 within the prompt, so centring adds nothing: 2 e_i / (2 rows) / (2 prompts).
    assert_equal(scores.grad, -3 / 4, 0.0, 3 / 4)


def test_pairwise_logistic_by_hand() -> None:
    # Prompt 0 has the pairs (a, b) and (a, c); b and c tie. Prompt 1 has one row and no pair, so it does not count.
    scores = double(LN3, 7.0, 0.0, 2 * LN3)
    loss = pairwise_logistic(scores, torch.tensor([1.0, 0.5, 0.2, 0.2]), torch.tensor([0, 1, 0, 0]))
    torch.autograd.backward(loss)
    assert_equal(loss, (-math.log(3 / 4) - math.log(1 / 4)) / 2)
    assert_equal(scores.grad, -(1 / 4 + 3 / 4) / 2, 0.0, (1 / 4) / 2, (3 / 4) / 2)


def test_pairwise_logistic_is_bradley_terry_on_the_pairs_of_each_prompt() -> None:
    scores = normal(8)
    means = []
    for prompt in (0, 2):
        rows = torch.eq(GROUPS, prompt).nonzero()[:, 0].tolist()
        pairs = [(i, j) for i in rows for j in rows if REWARDS[i] > REWARDS[j]]
        better, worse = torch.tensor(pairs).T
        means.append(bradley_terry(scores[better], scores[worse]))
    torch.testing.assert_close(pairwise_logistic(scores, REWARDS, GROUPS), torch.stack(means).mean())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_equal_finite_differences(name: str, weighted: bool) -> None:
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0, 0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    loss = on_rows(name)
    assert torch.autograd.gradcheck(lambda scores: loss(scores, weights), (normal(8, 2).requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
def test_many_probes_at_once_equal_each_alone(name: str) -> None:
    loss, scores, weights = on_rows(name), normal(8, 3), normal(8, 3, seed=1).abs()
    for each in (None, weights[:, 0], weights):
        together = loss(scores, each)
        assert together.shape == (3,)
        alone = [loss(scores[:, m], each if each is None or each.ndim == 1 else each[:, m]) for m in range(3)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)
    assert gradient(lambda s: loss(s, weights)[1], scores)[:, [0, 2]].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_probe_without_rows_has_no_loss_and_no_gradient(name: str) -> None:
    weights = torch.stack([torch.zeros(8), torch.ones(8)], dim=1).double()
    scores = normal(8, 2)
    assert_equal(on_rows(name)(scores, weights)[0], 0.0)
    grad = gradient(lambda s: on_rows(name)(s, weights), scores)
    assert grad[:, 0].abs().max() == 0
    assert grad[:, 1].abs().max() > 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_zero_are_not_there(name: str) -> None:
    # Rows 0 and 1 are one pair, and members of two prompts with other rows.
    weights = torch.tensor([0.0, 0.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    scores, far = normal(8), normal(8)
    far[:2] = 1e4
    loss = on_rows(name)
    torch.testing.assert_close(loss(far, weights), loss(scores, weights), rtol=1e-12, atol=0.0)
    grad = gradient(lambda s: loss(s, weights), far)
    assert grad[:2].abs().max() == 0
    assert grad.abs().max() > 0


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reads == "groups"])
def test_a_weight_is_a_number_of_copies(name: str) -> None:
    scores = normal(8)
    prompt_copies = torch.tensor([2, 1, 3])  # a bootstrap of prompts: each copy is a group of its own
    rows: list[Tensor] = []
    ids: list[int] = []
    for prompt, copies in enumerate(prompt_copies.tolist()):
        members = torch.eq(GROUPS, prompt).nonzero()[:, 0]
        for _ in range(copies):
            ids += [len(rows)] * len(members)
            rows.append(members)
    copied = torch.cat(rows)
    torch.testing.assert_close(
        on_rows(name)(scores, prompt_copies[GROUPS].double()),
        on_rows(name, REWARDS[copied], torch.tensor(ids))(scores[copied]),
    )
    one, row_copies = torch.zeros(8, dtype=torch.int64), torch.tensor([1, 2, 3, 1, 1, 4, 0, 2])
    copied = torch.arange(8).repeat_interleave(row_copies)
    torch.testing.assert_close(
        on_rows(name, REWARDS, one)(scores, row_copies.double()),
        on_rows(name, REWARDS[copied], one[: len(copied)].new_zeros(len(copied)))(scores[copied]),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_large_scores_give_the_limit_and_no_overflow(name: str) -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    loss = on_rows(name, rewards, groups)
    scores = torch.tensor([1e4, -1e4, 1e4, -1e4])
    # Prompt 0 is ordered right without doubt, prompt 1 wrong by 2e4.
    expected = {
        "reward_mse": (9999.0**2 + 1e4**2 + 1e4**2 + 10001.0**2) / 4,
        "reward_cross_entropy": (0 + 0 + 1e4 + 1e4) / 4,
        "policy_gradient": -(1 + 0) / 2,
        "bradley_terry": 0.0,
        "centred_mse": (9999.5**2 + 10000.5**2) / 2,
        "pairwise_logistic": (0 + 2e4) / 2,
    }
    assert loss(scores).item() == pytest.approx(expected[name], rel=1e-6)
    assert gradient(loss, scores).isfinite().all()


def test_bradley_terry_of_a_pair_that_is_wrong_by_far_does_not_overflow() -> None:
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.tensor([1e4]))
    torch.autograd.backward(loss)
    assert_equal(loss, 2e4)
    assert_equal(chosen.grad, -1.0)


def test_baselines_leave_the_policy_gradient_unchanged() -> None:
    scores = normal(8, 2)
    plain = gradient(lambda s: policy_gradient(s, REWARDS, GROUPS), scores)
    per_prompt = normal(3, seed=2)[GROUPS]
    for baseline in (0.7, per_prompt):
        moved = gradient(partial(policy_gradient, rewards=REWARDS, groups=GROUPS, baseline=baseline), scores)
        torch.testing.assert_close(moved, plain, rtol=1e-12, atol=1e-12)
    unequal = gradient(lambda s: policy_gradient(s, REWARDS, GROUPS, baseline=normal(8, seed=3)), scores)
    assert (unequal - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["policy_gradient", "pairwise_logistic"])
def test_equal_rewards_in_every_prompt_give_no_gradient(name: str) -> None:
    equal = torch.tensor([0.2, 1.0, 0.6], dtype=torch.float64)[GROUPS]
    assert gradient(on_rows(name, equal), normal(8)).abs().max() < 1e-16


@pytest.mark.parametrize("name", ["policy_gradient", "centred_mse", "pairwise_logistic"])
def test_group_losses_do_not_see_what_is_constant_in_a_prompt(name: str) -> None:
    scores = normal(8)
    shifted = scores + torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64)[GROUPS]
    torch.testing.assert_close(on_rows(name)(shifted), on_rows(name)(scores))


def test_group_softmax_equals_softmax_of_each_group() -> None:
    scores = normal(8, 2) * 50
    rho = group_softmax(scores, GROUPS, 0.3)
    for prompt in range(3):
        rows = prompt == GROUPS
        torch.testing.assert_close(rho[rows], torch.softmax(scores[rows] / 0.3, dim=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_mse(torch.zeros(3), torch.zeros(2)), "rewards"),
        (lambda: reward_mse(torch.zeros(3), torch.zeros(3, 1)), "rewards"),
        (lambda: reward_cross_entropy(torch.zeros(0), torch.zeros(0)), "row"),
        (lambda: reward_mse(torch.zeros(3, 2), torch.zeros(3), torch.ones(2)), "weights"),
        (lambda: bradley_terry(torch.zeros(3), torch.zeros(1)), "rejected"),
        (
            lambda: policy_gradient(torch.zeros(3), torch.zeros(3), torch.zeros(4, dtype=torch.int64)),
            "groups",
        ),
        (lambda: centred_mse(torch.zeros(3), torch.zeros(3), torch.zeros(3)), r"torch\.float32"),
        (
            lambda: policy_gradient(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64), beta=0.0),
            "beta",
        ),
        (lambda: group_softmax(torch.zeros(1), torch.zeros(1, dtype=torch.int64), math.nan), "beta"),
        (lambda: find_loss("mse"), "reward_mse"),
        (
            lambda: check_rewards(torch.tensor([0.0, 1.5, 2.0]), "reward_cross_entropy"),
            "such",
        ),
        (lambda: check_rewards(torch.tensor([0.0, math.nan]), "reward_mse"), "infinity"),
        (
            lambda: check_finite(torch.tensor([[0.0], [-math.inf]]), "features"),
            "features",
        ),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_good_input_passes_the_checks() -> None:
    check_rewards(torch.tensor([-3.0, 8.0]), "policy_gradient")
    check_rewards(torch.tensor([0.0, 1.0]), "reward_cross_entropy")
    check_finite(torch.zeros(0, 4), "features")
    assert [LOSSES[name].symbol for name in list(LOSSES)[:4]] == ["L_Q", "L_CE", "L_PG", "L_QP"]
