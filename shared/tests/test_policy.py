"""Selection against probabilities known by hand, its limit law for many candidates, and its KL to the base policy."""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from qprobe.probe.selection import (
    argmax_kl,
    best_of_law,
    expected_reward,
    kl_to_base,
    limit_policy,
    select,
    select_batch,
    selection_weights,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])
    torch.testing.assert_close(selection_weights(scores, 1.0), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    # At half the temperature the odds are squared: 1 to 9.
    torch.testing.assert_close(selection_weights(scores, 0.5), torch.tensor([[0.1, 0.9], [0.5, 0.5]]))


def test_argmax_shares_the_weight_among_ties() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [5.0, 4.0, -1.0]])
    assert torch.equal(selection_weights(scores, 0.0), torch.tensor([[0, 0.5, 0.5], [1, 0, 0]]))


@pytest.mark.parametrize("beta", [1e-40, 1e-3, 1.0])
def test_large_scores_do_not_overflow(beta: float) -> None:
    scores = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    weights = selection_weights(scores, beta)
    torch.testing.assert_close(weights.detach(), torch.tensor([0.5, 0.0, 0.5]))
    torch.autograd.backward(weights[0])
    assert scores.grad is not None
    assert not scores.grad.isnan().any()


def test_weights_carry_the_gradient_of_a_softmax() -> None:
    scores = torch.randn(2, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: selection_weights(s, 0.7), (scores,))


def test_draws_follow_the_weights() -> None:
    scores = torch.tensor([0.0, math.log(3.0), math.log(6.0)])
    drawn = select_batch(scores.expand(200, 100, 3), 1.0, seeded())
    assert drawn.shape == (200, 100)
    assert drawn.dtype == torch.int64
    share = torch.bincount(drawn.flatten(), minlength=3) / 20_000
    # Four standard errors of a share of 1/2 in 20,000 draws are 0.014.
    torch.testing.assert_close(share, torch.tensor([0.1, 0.3, 0.6]), atol=0.014, rtol=0.0)


def test_argmax_breaks_ties_by_lot_and_never_takes_less_than_the_best() -> None:
    drawn = select_batch(torch.tensor([2.0, 1.0, 2.0]).expand(1000, 3), 0.0, seeded())
    counts = torch.bincount(drawn, minlength=3)
    assert counts[1] == 0
    assert abs(counts[0].item() - 500) < 64  # four standard errors


def test_the_passed_generator_alone_decides() -> None:
    scores = torch.randn(50, 8, generator=seeded())
    state = torch.get_rng_state()
    first, again = (select_batch(scores, 1.0, seeded(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, select_batch(scores, 1.0, seeded(8)))
    assert torch.equal(torch.get_rng_state(), state)
    choice = select(scores[0], 0.0, seeded())
    assert type(choice) is int
    assert choice == int(scores[0].argmax())


def test_expected_reward_by_hand() -> None:
    scores, rewards = torch.tensor([[0.0, math.log(3.0)], [1.0, 0.0]]), torch.tensor([[1.0, 0.5], [0.2, 9.0]])
    got = expected_reward(scores, rewards, 1.0)
    e = math.e
    torch.testing.assert_close(got, torch.tensor([0.25 * 1.0 + 0.75 * 0.5, (0.2 * e + 9.0) / (e + 1)]))
    torch.testing.assert_close(expected_reward(scores, rewards, 0.0), torch.tensor([0.5, 0.2]))


P0 = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02, 0.0], dtype=torch.float64)
Q = torch.tensor([0.0, 0.3, 1.0, 0.5, 2.0, 50.0], dtype=torch.float64)


def objective(pi: Tensor, beta: float) -> Tensor:
    return (pi * Q).sum(-1) - beta * (torch.xlogy(pi, pi) - torch.xlogy(pi, P0)).sum(-1)


def test_limit_policy_by_hand_and_at_the_ends() -> None:
    # exp(Q / beta) = (1, 3): masses 1/2 and 3/2.
    got = limit_policy(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2 * math.log(3.0)]), 2.0)
    torch.testing.assert_close(got, torch.tensor([0.25, 0.75]))
    # beta = 0: the best that p0 can give, and completion 5 is none that it can.
    assert torch.equal(limit_policy(P0, Q, 0.0), torch.tensor([0, 0, 0, 0, 1.0, 0], dtype=torch.float64))
    torch.testing.assert_close(limit_policy(P0, Q, 1e9), P0, atol=1e-7, rtol=0.0)
    assert limit_policy(P0, Q * 1e4, 1e-3).isfinite().all()


def test_limit_policy_maximises_reward_less_kl() -> None:
    best = limit_policy(P0, Q, 0.5)
    others = torch.zeros(1000, 6, dtype=torch.float64)
    others[:, :5] = best[:5] * torch.exp(0.1 * torch.randn(1000, 5, dtype=torch.float64, generator=seeded()))
    others /= others.sum(1, keepdim=True)
    assert (objective(others, 0.5) < objective(best, 0.5)).all()
    # The optimum's value is beta log E_p0[exp(Q / beta)].
    torch.testing.assert_close(objective(best, 0.5), 0.5 * (P0 * torch.exp(Q / 0.5))[:5].sum().log())


def test_selection_reaches_the_kl_regularised_optimum_as_k_grows() -> None:
    beta, sets, generator = 0.5, 10_000, seeded()
    limit = limit_policy(P0, Q, beta)
    distances = []
    for k in (1, 4, 64, 1024):
        actions = torch.multinomial(P0, sets * k, replacement=True, generator=generator).reshape(sets, k)
        chosen = select_batch(Q[actions].float(), beta, generator)
        law = torch.bincount(actions.gather(1, chosen[:, None])[:, 0], minlength=6) / sets
        distances.append(float((law - limit).abs().sum() / 2))
    assert distances[0] == pytest.approx(float((P0 - limit).abs().sum() / 2), abs=0.02)
    assert distances == sorted(distances, reverse=True)
    # The distance falls as 1 / k, and noise alone makes about 0.01 with 10,000 sets.
    assert distances[2] < 0.1
    assert distances[3] < 0.02


def test_best_of_law_equals_the_count_of_subsets() -> None:
    for n in range(1, 8):
        for k in range(1, n + 1):
            tops = [max(subset) for subset in combinations(range(n), k)]
            expected = torch.tensor([tops.count(rank) / len(tops) for rank in range(n)], dtype=torch.float64)
            torch.testing.assert_close(best_of_law(n, k), expected, rtol=1e-12, atol=1e-15)
    assert float(best_of_law(100_000, 1000).sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 8, 48])
def test_kl_of_argmax_is_the_closed_form(k: int) -> None:
    pool = torch.randperm(100_000, generator=seeded()).double()
    assert argmax_kl(k) == math.log(k) - (k - 1) / k
    got = kl_to_base(pool, k, 0.0, draws=1, generator=seeded())
    assert got == pytest.approx(argmax_kl(k), abs=k / 100_000 + 1e-12)


def test_kl_at_a_low_temperature_is_that_of_argmax() -> None:
    # Sampled subsets against the closed form: another road through the code. 5 is prime to 10,003.
    pool = torch.randperm(10_003, generator=seeded()).double()
    got = kl_to_base(pool, 5, 1e-3, draws=500, generator=seeded())
    assert got == pytest.approx(argmax_kl(5), abs=0.01)


def exact_kl(scores: Tensor, k: int, beta: float) -> float:
    """KL from every subset, one at a time."""
    n = len(scores)
    chosen = torch.zeros(n, dtype=torch.float64)
    subsets = list(combinations(range(n), k))
    for subset in subsets:
        chosen[list(subset)] += selection_weights(scores[list(subset)], beta) / len(subsets)
    return float((chosen * (n * chosen).log().nan_to_num(neginf=0.0)).sum())


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_kl_equals_enumeration_of_a_small_pool(k: int, beta: float) -> None:
    scores = torch.tensor([0.3, 1.0, 1.0, -0.5, 0.0, 2.0, 1.0], dtype=torch.float64)  # three of them tie
    got = kl_to_base(scores, k, beta, draws=10_000, generator=seeded())
    assert got == pytest.approx(exact_kl(scores, k, beta), abs=0.0 if beta == 0 and k == 1 else 5e-3, rel=1e-12)


def test_kl_falls_to_zero_with_the_temperature() -> None:
    scores = torch.randn(400, generator=seeded())
    values = [kl_to_base(scores, 8, beta, draws=100, generator=seeded()) for beta in (0.0, 0.1, 0.5, 2.0, 1e6)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selection_weights(torch.zeros(2), -0.1), "beta"),
        (lambda: selection_weights(torch.zeros(2), math.nan), "beta"),
        (lambda: selection_weights(torch.zeros(3, 0), 1.0), "no candidate"),
        (lambda: selection_weights(torch.tensor([0.0, math.nan]), 1.0), "none"),
        (lambda: select(torch.zeros(2, 2), 1.0, seeded()), "select"),
        (lambda: expected_reward(torch.zeros(2), torch.zeros(3), 1.0), "rewards"),
        (lambda: limit_policy(torch.tensor([0.5, 0.6]), torch.zeros(2), 1.0), "sums"),
        (lambda: limit_policy(torch.ones(1), torch.zeros(2), 1.0), "shape"),
        (lambda: argmax_kl(0), "k is 0"),
        (lambda: best_of_law(3, 4), "holds"),
        (lambda: kl_to_base(torch.zeros(3), 4, 0.5, draws=1, generator=seeded()), "holds"),
        (lambda: kl_to_base(torch.zeros(3), 2, 0.5, draws=0, generator=seeded()), "draws"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
