"""What is chosen on planted data, what is said where nothing can be learnt, nested use, and bad input."""

from typing import Any

import numpy as np
import pytest

from qprobe.probe.ranking import within_prompt_auc
from qprobe.probe.solvers import Candidate, Rows, block_weightings, cross_fitted, solve
from qprobe.probe.solvers.choice import BETA_SHARES, WithinPrompts, best_beta, choose

FEW = (np.inf, 1.0, 0.03)  # strengths, where it does not matter which
LOSSES: tuple[Any, ...] = ("reward_mse", "centred_mse", "reward_cross_entropy", "pairwise_logistic", "policy_gradient")


def planted(signal: str | None, prompts: int = 50, columns: int = 12, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Blocks "hidden" and "likelihood" of which one decides within prompts, an untrained score that is noise, and the margin."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), 6)
    count = len(groups)
    level = rng.normal(size=prompts)[groups]
    blocks = {
        "hidden": rng.normal(size=(count, columns)) + level[:, None] * rng.normal(size=columns),
        "likelihood": rng.normal(size=(count, 5)) * 100 - 50,
    }
    anchors = {"entropy": rng.normal(size=count)}
    margin = rng.normal(size=count)
    if signal in blocks:
        margin = blocks[signal][:, 0] / blocks[signal][:, 0].std() * 3 + level
    if signal == "entropy":
        margin = anchors["entropy"] * 3 + level
    rewards = (margin + rng.normal(size=count) > 0).astype(float)
    lot = rng.permutation(count)
    return (
        Rows(
            {name: block[lot] for name, block in blocks.items()},
            rewards[lot],
            groups[lot],
            anchors={name: values[lot] for name, values in anchors.items()},
        ),
        margin[lot],
    )


def auc(scores: np.ndarray, rows: Rows) -> float:
    return float(np.nanmean(within_prompt_auc(scores, rows.rewards, rows.groups)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("signal", ["hidden", "likelihood"])
def test_the_block_that_carries_the_signal_is_chosen(loss: Any, signal: str) -> None:
    rows, _ = planted(signal)
    solution = solve(rows, loss, strengths=FEW)
    assert solution.choice is not None
    assert solution.choice.learnt
    # Chance may add a little of another block or of the anchor; what the probe says comes from the right one.
    shares = {name: float(np.var(rows.blocks[name] @ own)) for name, own in solution.coefficients.items()}
    shares["entropy"] = float(np.var(solution.anchor_weight * rows.anchors["entropy"]))
    assert shares[signal] > 0.8 * sum(shares.values())
    assert signal in solution.choice.candidate.weighting
    assert signal in solution.sentence()
    fresh, margin = planted(signal, seed=1)
    scores = solution.score(fresh.blocks, fresh.anchors)
    assert auc(scores, fresh) > auc(margin, fresh) - 0.05
    assert auc(solution.left_out, rows) == pytest.approx(solution.choice.auc, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_of_candidates_is_judged_where_some_prompts_have_equal_rewards(loss: Any) -> None:
    rows, _ = planted("hidden")
    rows.rewards[rows.groups < 5] = 1.0
    solution = solve(rows, loss, strengths=FEW, average=True)
    assert solution.choice is not None
    assert solution.choice.averaged > 1
    assert auc(solution.left_out, rows) == pytest.approx(solution.choice.auc, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_untrained_score_that_knows_it_all_is_chosen_as_it_is(loss: Any) -> None:
    rows, _ = planted("entropy")
    solution = solve(rows, loss, strengths=[np.inf, 3.0], weightings=[{"hidden": 1.0}])
    assert solution.choice is not None
    assert solution.choice.candidate.untrained
    assert solution.anchor == "entropy"
    assert not any(own.any() for own in solution.coefficients.values())
    assert "entropy as it is, untrained" in solution.sentence()
    scores = solution.score(rows.blocks, rows.anchors)
    assert np.corrcoef(scores, rows.anchors["entropy"])[0, 1] > 1 - 1e-9
    with pytest.raises(ValueError, match="anchored at entropy"):
        solution.score(rows.blocks)


def test_an_anchor_and_features_together_beat_either() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(150), 6)
    x, s = rng.normal(size=(900, 20)), rng.normal(size=900)
    rewards = (x[:, 0] + s + 0.5 * rng.normal(size=900) > 0).astype(float)
    rows = Rows(x, rewards, groups, anchors={"logprob": 40 * s - 7})
    both, alone = solve(rows, "centred_mse"), solve(rows, "centred_mse", anchor="none")
    assert both.choice is not None
    assert alone.choice is not None
    assert (both.anchor, alone.anchor) == ("logprob", "")
    assert both.choice.auc > alone.choice.auc + 0.1
    assert both.choice.against_anchor is not None
    assert both.choice.against_anchor[0] > 4 * both.choice.against_anchor[1]
    assert "ahead of the best untrained" in both.sentence()


@pytest.mark.parametrize("loss", ["reward_mse", "centred_mse"])
def test_where_nothing_carries_a_signal_that_is_said(loss: Any) -> None:
    said = [solve(planted(None, seed=seed)[0], loss).sentence().startswith("Nothing") for seed in range(20)]
    assert sum(said) >= 16  # 5 % of tables look like more; of 20, four or more do in 1.6 % of cases


@pytest.mark.parametrize("loss", LOSSES)
def test_nested_scores_do_not_know_their_rewards(loss: Any) -> None:
    rows, _ = planted("likelihood")
    folds = rows.groups % 3
    scores, solutions = cross_fitted(rows, loss, folds, weightings=[{"likelihood": 1.0}], strengths=FEW)
    assert sorted(solutions) == [0, 1, 2]
    # Other rewards, features and anchors in a fold change nothing in what it is scored by.
    out = folds == 0
    changed = Rows(rows.blocks, np.where(out, 1 - rows.rewards, rows.rewards), rows.groups, anchors=rows.anchors)
    again, _ = cross_fitted(changed, loss, folds, weightings=[{"likelihood": 1.0}], strengths=FEW)
    np.testing.assert_array_equal(again[out], scores[out])
    assert not np.allclose(again[~out], scores[~out])
    assert auc(scores, rows) > 0.8
    nothing, _ = planted(None, prompts=120)
    empty, _ = cross_fitted(nothing, loss, nothing.groups % 3, strengths=FEW, anchor="none")
    assert abs(auc(empty, nothing) - 0.5) < 0.08  # over two standard errors of 120 prompts with 9 pairs each


@pytest.mark.parametrize("loss", ["reward_mse", "centred_mse"])
def test_left_out_scores_are_those_of_solving_without_the_prompt(loss: Any) -> None:
    rows, _ = planted("hidden", prompts=8, columns=3)
    strength = 0.1
    options: dict[str, Any] = {"weightings": [{"hidden": 1.0}], "strengths": [strength], "anchor": "none"}
    whole = solve(rows, loss, **options)
    for prompt in range(8):
        out = rows.groups == prompt
        without = solve(rows.take(~out), loss, **options)
        mine, theirs = whole.left_out[out], without.score({"hidden": rows.blocks["hidden"][out]})
        # Scales of columns and the largest variance were those of all rows, so that the two are near and not equal.
        if np.ptp(rows.rewards[out]):
            assert np.corrcoef(mine, theirs)[0, 1] > 0.98


def test_rewards_of_any_range_give_the_same_choice() -> None:
    rows, _ = planted("hidden")
    for loss in ("reward_mse", "centred_mse", "pairwise_logistic", "policy_gradient"):
        expected = solve(rows, loss, strengths=FEW, anchor="none")  # type: ignore[arg-type]
        for scale, shift in ((1e30, 0.0), (5.0, -3.0)):
            scaled = Rows(rows.blocks, rows.rewards * scale + shift, rows.groups)
            other = solve(scaled, loss, strengths=FEW, anchor="none")  # type: ignore[arg-type]
            assert other.choice is not None
            assert expected.choice is not None
            assert other.choice.candidate == expected.choice.candidate
            regression = loss in ("reward_mse", "centred_mse")
            found = (other.left_out - shift * (loss == "reward_mse")) / (scale if regression else 1.0)
            np.testing.assert_allclose(found, expected.left_out, atol=1e-3 * expected.left_out.std())


def test_constant_columns_and_rows_in_another_order_change_nothing() -> None:
    rows, _ = planted("hidden", columns=4)
    hidden = rows.blocks["hidden"]
    plain = solve(Rows(hidden, rows.rewards, rows.groups), "centred_mse")
    padded = np.column_stack([hidden, np.full(len(rows), 0.1), np.zeros(len(rows))])
    more = solve(Rows(padded, rows.rewards, rows.groups), "centred_mse")
    np.testing.assert_allclose(more.left_out, plain.left_out, atol=1e-9)
    assert not more.coefficients["features"][4:].any()
    lot = np.random.default_rng(5).permutation(len(rows))
    moved = solve(Rows(hidden[lot], rows.rewards[lot], rows.groups[lot]), "centred_mse")
    np.testing.assert_allclose(moved.left_out, plain.left_out[lot], atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_few_prompts_and_equal_candidates_work(loss: Any) -> None:
    rng = np.random.default_rng(0)
    for prompts in (1, 2, 3):
        groups = np.repeat(np.arange(prompts), 3)
        x = rng.normal(size=(len(groups), 1000 * len(groups)))
        rewards = np.tile([0.0, 1.0, 1.0], prompts)
        x[2::3] = x[1::3]  # equal candidates
        solution = solve(Rows(x, rewards, groups), loss, strengths=FEW)
        assert np.isfinite(solution.score(x)).all()
        assert np.isfinite(solution.left_out).all()
        assert (solution.choice is None) == (prompts == 1)
        assert solution.sentence()


X = np.random.default_rng(0).normal(size=(12, 2))
R = np.tile([0.0, 1.0, 1.0], 4)
G = np.repeat(np.arange(4), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(Rows(X, R * 0 + 1, G), "reward_mse"), "No prompt has rewards that differ"),
        (lambda: solve(Rows(X, R, np.arange(12)), "centred_mse"), "No prompt has rewards that differ"),
        (lambda: solve(Rows(X * 0 + 3, R, G), "reward_mse"), "No column differs"),
        (lambda: solve(Rows(np.repeat(X[::3], 3, axis=0), R, G), "centred_mse"), "No column differs between rows of"),
        (lambda: solve(Rows(X, R * 2, G), "reward_cross_entropy"), r"outside \[0, 1\]"),
        (lambda: solve(Rows(X, R, G), "nonsense"), "no solver for the loss"),  # type: ignore[arg-type]
        (lambda: solve(Rows(X, R, G), "reward_mse", anchor="entropy"), "There is no anchor 'entropy'"),
        (lambda: solve(Rows(X, R, G), "reward_mse", strengths=[-1.0]), "strengths above 0"),
        (lambda: solve(Rows(X, R, G), "reward_mse", strengths=[]), "nothing to choose from"),
        (lambda: solve(Rows(X, R, G), "reward_mse", weightings=[{"other": 1.0}]), "There is no block other"),
        (
            lambda: solve(Rows(X, R, G, anchors={"s": G * 1.0}), "reward_mse", anchor="s"),
            "the same for all rows of a prompt",
        ),
        (lambda: Rows(np.where(X > 1, np.nan, X), R, G), "features holds NaN or infinity in row"),
        (lambda: Rows((X * 1e6).astype(np.float16), R, G), "float16 holds no more than 65504"),
        (lambda: Rows(X, np.where(R > 0, np.inf, R), G), "rewards holds NaN or infinity in row 1"),
        (lambda: Rows(X[:-1], R, G), "features has 11 rows, rewards has 12"),
        (lambda: Rows(X.astype(str), R, G), "features is <U"),
        (lambda: Rows(X, R, G[:-1]), r"groups is int64 of shape \(11,\)"),
        (lambda: Rows(X, R, G * 0.5), "groups is float64"),
        (lambda: Rows(X, R, G, clusters=np.arange(12)), "A prompt is in two clusters"),
        (lambda: Rows(X, R, G, weights=R), "weights holds a value that is not above 0"),
        (lambda: Rows({}, R, G), "nothing to learn from"),
        (lambda: cross_fitted(Rows(X, R, G), "reward_mse", np.arange(12) % 2), "A cluster is in two folds"),
        (lambda: cross_fitted(Rows(X, R, G), "reward_mse", [0]), r"folds has shape \(1,\)"),
        (lambda: solve(Rows(X, R, G), "reward_mse").score(X[:, :1]), r"has shape \(12, 1\)"),
    ],
)
def test_bad_input_is_a_sentence(call: Any, message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        call()


def test_clusters_are_left_out_whole() -> None:
    # Two prompts of a cluster are copies: with only one of them left out, its twin would tell.
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(20, 1, 4, 200)), 2, axis=1).reshape(160, 200)
    rewards = np.repeat(rng.permuted(np.tile([0.0, 0.0, 1.0, 1.0], (20, 1, 1)), axis=2), 2, axis=1).reshape(160)
    groups = np.repeat(np.arange(40), 4)
    for loss in LOSSES:
        apart = solve(Rows(x, rewards, groups), loss, strengths=[1e-3])
        together = solve(Rows(x, rewards, groups, clusters=groups // 2), loss, strengths=[1e-3])
        assert apart.choice is not None
        assert together.choice is not None
        assert apart.choice.auc > 0.8  # 1 where every prompt is left out by itself
        assert together.choice.auc < 0.7


# --- the choice


def test_auc_is_that_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 30, 200))
    rewards = np.round(rng.uniform(size=200), 1) * 1e3
    scores = np.round(rng.normal(size=200), 1)
    within = WithinPrompts(rewards, groups, groups)
    expected = within_prompt_auc(scores, rewards, groups)
    np.testing.assert_allclose(within.auc(scores), expected[~np.isnan(expected)], atol=1e-12)


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 2)
    within = WithinPrompts(np.tile([0.0, 1.0], 400), groups, groups)
    base = rng.uniform(0.4, 0.9, 400)
    noise = rng.normal(size=400)
    noise -= noise.mean()
    candidates = [Candidate({"b": 1.0}, "", s, f) for s, f in ((10.0, 1.0), (1.0, 5.0), (0.1, 9.0), (0.01, 20.0))]
    # The difference to the best has a standard error of 0.2 / 20 = 0.01.
    short = np.array([0.013, 0.008, 0.0, 0.002])
    aucs = np.stack([base - s + (0.2 * noise / noise.std() if s else 0) for s in short])
    number, chosen = choose(candidates, aucs, within)
    assert number == 1
    assert (chosen.within, chosen.candidates, chosen.prompts) == (3, 4, 400)
    assert chosen.auc == pytest.approx(base.mean() - 0.008)
    assert chosen.best_auc == pytest.approx(base.mean())
    expected = (base - 0.008 + 0.2 * noise / noise.std()).std(ddof=1) / 20
    assert chosen.error == pytest.approx(expected, rel=1e-6)


def test_standard_errors_are_over_clusters() -> None:
    groups = np.repeat(np.arange(100), 2)
    within = WithinPrompts(np.tile([0.0, 1.0], 100), groups, groups // 5)
    values = np.repeat(np.random.default_rng(0).normal(size=20), 5)  # clusters of five prompts that are alike
    expected = values[::5].std(ddof=1) / np.sqrt(20)
    assert float(within.error(values)) == pytest.approx(expected, rel=1e-9)


def test_beta_is_argmax_for_scores_that_are_right_and_soft_for_noise_with_a_trap() -> None:
    groups = np.repeat(np.arange(200), 4)
    rng = np.random.default_rng(0)
    rewards = rng.permuted(np.tile([0.0, 0.0, 0.0, 1.0], (200, 1)), axis=1).reshape(-1)
    beta, earned = best_beta(rewards * 3.0, rewards, groups)
    assert beta == 0
    assert earned[0] == 1
    assert len(earned) == len(BETA_SHARES)
    # The best row is the second of each prompt, the top score is always a bad one's: argmax earns nothing.
    trap = np.tile([1.0, 0.9, 0.0, 0.0], 200)
    beta, earned = best_beta(trap, np.tile([0.0, 1.0, 0.0, 0.0], 200), groups)
    assert beta > 0
    assert earned[0] == 0
    odds = np.exp(np.array([1.0, 0.9, 0.0, 0.0]) / beta)
    assert earned.max() == pytest.approx(odds[1] / odds.sum())


def test_weightings_are_each_alone_all_alike_and_each_stressed() -> None:
    assert block_weightings(["a"]) == [{"a": 1.0}]
    assert block_weightings(["a", "b"]) == [
        {"a": 1.0},
        {"b": 1.0},
        {"a": 1.0, "b": 1.0},
        {"a": 3.0, "b": 1.0},
        {"a": 1.0, "b": 3.0},
    ]
