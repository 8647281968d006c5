"""Optima of the losses without a closed form, against scikit-learn and against scipy on the written-out formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from qprobe.probe import losses
from qprobe.probe.solvers import Rows
from qprobe.probe.solvers.smooth import SmoothRows, evaluation, ordered_pairs, path
from qprobe.probe.solvers.space import Design

LOSSES: tuple[Any, ...] = ("reward_cross_entropy", "policy_gradient", "pairwise_logistic")


def table(seed: int = 0, columns: int = 4, weighted: bool = True) -> SmoothRows:
    """Prompts of 2 to 5 rows; an intercept and an anchor without L2."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, size=30)
    groups = np.repeat(np.arange(30), sizes)
    z = rng.normal(size=(len(groups), columns)) * np.logspace(0, -2, columns)
    rewards = np.clip(np.round(0.5 + z[:, 0] / 3 + rng.normal(size=len(groups)) / 3, 1), 0, 1)
    weights = rng.uniform(0.3, 2, len(groups)) if weighted else np.ones(len(groups))
    free = np.stack([np.ones(len(groups)), rng.normal(size=len(groups))], axis=1)
    variances = np.average(np.square(z), axis=0, weights=weights)
    return SmoothRows(z, free, rewards, groups, weights, variances)


def of_torch(loss: str, rows: SmoothRows, scores: torch.Tensor) -> torch.Tensor:
    """The loss as `qprobe.probe.losses` has it."""
    rewards, groups, weights = map(torch.from_numpy, (rows.rewards, rows.groups, rows.weights))
    if loss == "reward_cross_entropy":
        return losses.reward_cross_entropy(scores, rewards, weights=weights)
    if loss == "policy_gradient":
        return losses.policy_gradient(scores, rewards, groups, beta=1.0, weights=weights)
    return losses.pairwise_logistic(scores, rewards, groups, weights=weights)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_values_and_slopes_are_those_of_the_losses(loss: Any, scale: float) -> None:
    rows = table()
    scores = torch.tensor(np.random.default_rng(1).normal(size=len(rows.rewards)) * scale, requires_grad=True)
    value = of_torch(loss, rows, scores)
    (expected,) = torch.autograd.grad(value, scores)
    found, slope = evaluation(loss, rows)(scores.detach().numpy())
    offset = 0.0
    if loss == "policy_gradient":  # its baseline: the least reward of each prompt, which moves the value only
        least = np.array([rows.rewards[rows.groups == g].min() for g in range(30)])
        mass = np.array([rows.weights[rows.groups == g].mean() for g in range(30)])
        offset = float((least * mass).sum() / mass.sum())
    assert found - offset == pytest.approx(value.item(), abs=1e-9)
    np.testing.assert_allclose(slope, expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_optima_are_those_of_another_optimiser(loss: Any) -> None:
    rows = table()
    for strength in (1e-1, 1e-2, 1e-3):

        def objective(values: np.ndarray, strength: float = strength) -> tuple[float, np.ndarray]:
            own = torch.tensor(values, requires_grad=True)
            scores = torch.from_numpy(rows.coordinates) @ own[:4] + torch.from_numpy(rows.free) @ own[4:]
            value = of_torch(loss, rows, scores) + strength * own[:4].square().sum() + 1e-6 * own[4:].square().sum()
            value.backward()
            assert own.grad is not None
            return value.item(), own.grad.numpy()

        other = minimize(objective, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-9})
        (fit,) = path(loss, rows, [strength], anchored=True, tolerance=1e-9)
        found = np.r_[fit.direction, fit.free]
        assert objective(found)[0] == pytest.approx(other.fun, abs=1e-9)
        if loss != "reward_cross_entropy":  # which alone feels the intercept
            found[4] = other.x[4] = 0
        np.testing.assert_allclose(found, other.x, atol=2e-4)


def test_cross_entropy_is_scikit_learns_logistic_regression() -> None:
    rows = table(weighted=False)
    labels = (rows.rewards > 0.5).astype(float)
    rows = SmoothRows(rows.coordinates, rows.free[:, :1], labels, rows.groups, rows.weights, rows.variances)
    for strength in (1e-2, 1e-4):
        other = LogisticRegression(C=1 / (2 * strength * len(labels)), tol=1e-10, max_iter=10_000)
        other.fit(rows.coordinates, labels)
        (fit,) = path("reward_cross_entropy", rows, [strength], tolerance=1e-9)
        np.testing.assert_allclose(fit.direction, other.coef_[0], rtol=1e-3, atol=1e-4)
        assert fit.free[0] == pytest.approx(other.intercept_[0], abs=1e-3)


def test_pairs_are_scikit_learns_logistic_regression_on_differences() -> None:
    rows = table(weighted=False, seed=2)
    rows = SmoothRows(rows.coordinates, rows.free[:, :0], rows.rewards, rows.groups, rows.weights, rows.variances)
    better, worse = ordered_pairs(rows.rewards, rows.groups)
    of_pair = rows.groups[better]
    counts = np.bincount(of_pair)
    weights = 1 / counts[of_pair] / (counts > 0).sum()
    differences = rows.coordinates[better] - rows.coordinates[worse]
    strength = 1e-3
    other = LogisticRegression(C=1 / (2 * strength), fit_intercept=False, tol=1e-10, max_iter=10_000)
    # Every pair both ways round, at half its weight: scikit-learn wants two classes.
    other.fit(np.r_[differences, -differences], np.repeat([1, 0], len(of_pair)), np.tile(weights, 2) / 2)
    (fit,) = path("pairwise_logistic", rows, [strength], tolerance=1e-9)
    np.testing.assert_allclose(fit.direction, other.coef_[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_end_of_the_path_is_where_strong_l2_points(loss: Any) -> None:
    rows = table()
    rows = SmoothRows(rows.coordinates, rows.free[:, :1], rows.rewards, rows.groups, rows.weights, rows.variances)
    end, strong, weak = path(loss, rows, [np.inf, 1e4, 1e-3], tolerance=1e-9)
    cosine = end.direction @ strong.direction / np.linalg.norm(end.direction) / np.linalg.norm(strong.direction)
    assert cosine > 1 - 1e-6
    assert np.linalg.norm(weak.direction) > 100 * np.linalg.norm(strong.direction)
    # For the losses within prompts that is what good rows have more of than bad ones of the same prompt.
    if loss == "policy_gradient":
        expected = np.zeros(4)
        total = 0.0
        for g in range(30):
            own = rows.groups == g
            z, r, w = rows.coordinates[own], rows.rewards[own], rows.weights[own]
            expected += w.mean() * np.average((r - np.average(r, weights=w))[:, None] * z, axis=0, weights=w)
            total += w.mean()
        np.testing.assert_allclose(
            end.direction / np.linalg.norm(end.direction), expected / np.linalg.norm(expected), atol=1e-7
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("columns", [6, 200], ids=["fewer columns", "more columns"])
def test_coordinates_of_the_rows_own_space_give_the_solution_on_columns(loss: Any, columns: int) -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(25), 4)
    x = rng.normal(size=(100, columns)) * rng.uniform(0.2, 5, columns) + 7
    rewards = (x[:, 0] - 7 + rng.normal(size=100) > 0).astype(float)
    lot = rng.permutation(100)
    rows = Rows(x[lot], rewards[lot], groups[lot])
    within = loss != "reward_cross_entropy"
    design = Design(rows, within=within, row_weights=np.ones(100))
    space = design.space({"features": 1.0})
    intercept = np.ones((100, 0 if within else 1))
    own = SmoothRows(
        design.plain(space.coordinates),
        intercept,
        rows.rewards[design.order],
        design.groups,
        np.ones(100),
        space.variances,
    )
    strength = 0.02 * space.largest
    (fit,) = path(loss, own, [strength], tolerance=1e-9)
    found = (x - x.mean(0)) @ space.columns(fit.direction)["features"] + (0 if within else fit.free[0])
    # The same loss on the standardised columns themselves, which are more than the rows where they are.
    plain = (x - x.mean(0)) / x.std(0) / np.sqrt(columns)
    variances = np.full(columns, space.variances.sum() / columns)
    direct = SmoothRows(plain, intercept, rewards, groups, np.ones(100), variances)
    (other,) = path(loss, direct, [strength], tolerance=1e-9)
    expected = direct.scores(other)
    found, expected = (v - v.mean() if within else v for v in (found, expected))
    np.testing.assert_allclose(found, expected, atol=2e-4 * expected.std())
