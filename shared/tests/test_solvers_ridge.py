"""Left-out scores of the ridge against refits without the cluster, written out as normal equations on the plain columns."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from qprobe.probe.solvers import Rows
from qprobe.probe.solvers.ridge import Ridge
from qprobe.probe.solvers.space import Contrasts, Design, OwnSpace

CLUSTERS = 12


def table(columns: int, blocks: int = 1, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Prompts of 2 to 6 rows in clusters of one to three, in no order, with weights and an anchor; columns have large means."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, size=2 * CLUSTERS)
    cluster_of_prompt = np.sort(np.r_[np.arange(CLUSTERS), rng.integers(0, CLUSTERS, CLUSTERS)])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    lot = rng.permutation(len(groups))
    made: dict[str, Any] = {
        f"b{i}": rng.normal(size=(len(groups), columns)) * rng.uniform(0.1, 9, columns) + rng.normal(size=columns) * 20
        for i in range(blocks)
    }
    rows = Rows(
        made,
        rng.normal(size=len(groups)),
        groups[lot],
        clusters=cluster_of_prompt[groups[lot]],
        weights=rng.uniform(0.3, 3, len(groups)),
    )
    return rows, rng.normal(size=len(groups))


def within(values: np.ndarray, rows: Rows) -> np.ndarray:
    """Values less the weighted mean of their prompt."""
    centred = values.astype(np.float64).copy()
    for prompt in np.unique(rows.groups):
        own = rows.groups == prompt
        centred[own] -= np.average(centred[own], axis=0, weights=rows.weights[own])
    return centred


def scaled(rows: Rows, weighting: dict[str, float]) -> np.ndarray:
    """Every block standardised by weighted statistics, at variance 1 all columns together, times its weight."""
    parts = []
    for name, weight in weighting.items():
        block = rows.blocks[name]
        mean = np.average(block, axis=0, weights=rows.weights)
        deviation = np.sqrt(np.average(np.square(block - mean), axis=0, weights=rows.weights))
        parts.append(weight * (block - mean) / deviation / np.sqrt(block.shape[1]))
    return np.concatenate(parts, axis=1)


def refitted(x: np.ndarray, free: np.ndarray, r: np.ndarray, w: np.ndarray, strength: float) -> np.ndarray:
    """Coefficients of x and of the free columns, by least squares on rows that stand for the penalty."""
    root = np.sqrt(w)[:, None]
    penalty = np.concatenate([np.sqrt(strength) * np.eye(x.shape[1]), np.zeros((x.shape[1], free.shape[1]))], axis=1)
    design = np.concatenate([root * np.concatenate([x, free], axis=1), penalty])
    return np.linalg.lstsq(design, np.r_[root[:, 0] * r, np.zeros(x.shape[1])], rcond=None)[0]


def problem(
    columns: int, is_within: bool, anchored: bool, weighting: dict[str, float]
) -> tuple[Rows, Design, OwnSpace, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows, anchor = table(columns, len(weighting))
    design = Design(rows, within=is_within, row_weights=rows.weights)
    space = design.space(weighting)
    own = [] if is_within else [design.root]
    own += [design.column(anchor)] if anchored else []
    free = np.column_stack(own) if own else np.empty((design.size, 0))
    x, r = scaled(rows, weighting), rows.rewards
    plain = [] if is_within else [np.ones(len(rows))]
    plain += [anchor] if anchored else []
    plain_free = np.column_stack(plain) if plain else np.empty((len(rows), 0))
    if is_within:
        x, r, plain_free = within(x, rows), within(r, rows), within(plain_free, rows)
    return rows, design, space, free, x, r, plain_free


@pytest.mark.parametrize("columns", [5, 60, 250], ids=["fewer columns", "about as many", "more columns"])
@pytest.mark.parametrize("is_within", [False, True], ids=["intercept", "within prompts"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchored"])
def test_left_out_scores_are_those_of_refits(columns: int, is_within: bool, anchored: bool) -> None:
    rows, design, space, free, x, r, plain_free = problem(columns, is_within, anchored, {"b0": 1.0})
    shares = [1e-6, 1e-3, 1.0, 100.0]
    ridge = Ridge(space, design.column(rows.rewards))
    found = ridge.left_out([share * space.largest for share in shares], [free])[0]
    weights = rows.weights / rows.weights.sum()
    for share, own in zip(shares, found, strict=True):
        expected = np.empty(len(rows))
        for cluster in range(CLUSTERS):
            out = rows.clusters == cluster
            solved = refitted(x[~out], plain_free[~out], r[~out], weights[~out], share * space.largest)
            expected[out] = np.concatenate([x[out], plain_free[out]], axis=1) @ solved
        np.testing.assert_allclose(design.unordered(design.plain(own)), expected, rtol=0, atol=1e-8 * np.ptp(expected))


@pytest.mark.parametrize("columns", [5, 300])
@pytest.mark.parametrize("is_within", [False, True])
def test_blocks_at_weights_are_columns_times_weights(columns: int, is_within: bool) -> None:
    weighting = {"b0": 1.0, "b1": 0.3, "b2": 2.0}
    rows, design, space, free, x, r, plain_free = problem(columns, is_within, True, weighting)
    strength = 0.01 * space.largest
    ridge = Ridge(space, design.column(rows.rewards))
    fit = ridge.fit(strength, free)
    weights = rows.weights / rows.weights.sum()
    solved = refitted(x, plain_free, r, weights, strength)
    expected = np.concatenate([x, plain_free], axis=1) @ solved
    fitted = design.unordered(design.plain(ridge.fitted(fit, free)))
    np.testing.assert_allclose(fitted, expected, atol=1e-9)
    # Coefficients of plain columns say the same, up to a constant that the intercept takes.
    plain = sum(rows.blocks[name] @ own for name, own in space.columns(fit.direction).items())
    wanted = x @ solved[: x.shape[1]]
    assert np.ptp((within(plain, rows) if is_within else plain) - wanted) < 1e-8


@pytest.mark.parametrize("is_within", [False, True])
@pytest.mark.parametrize("columns", [5, 300])
def test_the_end_of_the_path_is_the_difference_of_means(columns: int, is_within: bool) -> None:
    rows, design, space, free, x, r, _plain_free = problem(columns, is_within, False, {"b0": 1.0})
    ridge = Ridge(space, design.column(rows.rewards))
    found = design.unordered(design.plain(ridge.ends(free)))
    weights = rows.weights / rows.weights.sum()
    for cluster in range(CLUSTERS):
        out = rows.clusters == cluster
        own = weights[~out]
        rest = r[~out] - (0 if is_within else np.average(r[~out], weights=own))
        direction = x[~out].T @ (own * rest)
        assert np.corrcoef(found[out], x[out] @ direction)[0, 1] > 1 - 1e-9
    # Very strong L2 points the same way, on all rows and left out.
    far = ridge.left_out([1e7 * space.largest], [free])[0, 0]
    for cluster in range(CLUSTERS):
        out = rows.clusters == cluster
        scores = design.unordered(design.plain(far))[out]
        assert np.corrcoef(scores, found[out])[0, 1] > 1 - 1e-5
    end, strong = ridge.fit(np.inf, free), ridge.fit(1e9 * space.largest, free)
    cosine = end.direction @ strong.direction / np.linalg.norm(end.direction) / np.linalg.norm(strong.direction)
    assert cosine > 1 - 1e-9


def test_with_an_anchor_the_end_of_the_path_is_the_anchor() -> None:
    rows, design, space, free, *_ = problem(300, True, True, {"b0": 1.0})
    _, anchor = table(300)
    ridge = Ridge(space, design.column(rows.rewards))
    scores = design.unordered(design.plain(ridge.left_out([np.inf], [free])[0, 0]))
    for cluster in range(CLUSTERS):
        out = rows.clusters == cluster
        assert abs(np.corrcoef(scores[out], within(anchor, rows)[out])[0, 1]) > 1 - 1e-9


def test_one_solution_is_scikit_learns() -> None:
    rows, design, space, free, x, *_ = problem(300, False, False, {"b0": 1.0})
    strength = 0.003 * space.largest
    ridge = Ridge(space, design.column(rows.rewards))
    weights = rows.weights / rows.weights.sum()
    other = SklearnRidge(alpha=strength).fit(x, rows.rewards, sample_weight=weights)
    fitted = design.unordered(design.plain(ridge.fitted(ridge.fit(strength, free), free)))
    np.testing.assert_allclose(fitted, other.predict(x), atol=1e-8)


@pytest.mark.parametrize("columns", [40, 250])
@pytest.mark.parametrize("is_within", [False, True])
def test_float32_agrees_with_float64_to_a_thousandth(columns: int, is_within: bool) -> None:
    rows, anchor = table(columns)
    scores = []
    for dtype in (np.float32, np.float64):
        design = Design(rows, within=is_within, row_weights=rows.weights, dtype=dtype)
        space = design.space({"b0": 1.0})
        free = np.column_stack([design.column(anchor)] if is_within else [design.root, design.column(anchor)])
        ridge = Ridge(space, design.column(rows.rewards))
        scores.append(ridge.left_out([share * space.largest for share in (1e-4, 1e-2, 1.0)], [free])[0])
    deviation = scores[1].std(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(scores[0] - scores[1]) / deviation, 1e-3)


def test_contrasts_are_an_orthonormal_basis_of_what_differs_within_prompts() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), [1, 2, 3, 4, 1])
    weights = rng.uniform(0.1, 2, 11)
    contrasts = Contrasts(groups, weights)
    basis = contrasts.of(np.eye(11))
    assert basis.shape == (6, 11)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-12)
    for prompt in range(5):
        own = np.where(groups == prompt, np.sqrt(weights), 0)
        np.testing.assert_allclose(basis @ own, 0, atol=1e-12)
    values = rng.normal(size=(11, 3))
    np.testing.assert_allclose(contrasts.back(contrasts.of(values)), basis.T @ basis @ values, atol=1e-12)
    np.testing.assert_allclose(contrasts.of(values[1:6], slice(1, 6)), contrasts.of(values)[:3], atol=1e-12)


@pytest.mark.parametrize("is_within", [False, True])
def test_rows_read_in_pieces_are_the_same(is_within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = table(7)
    whole = Design(rows, within=is_within, row_weights=rows.weights).space({"b0": 1.0})
    for name in ("rows", "space"):
        monkeypatch.setattr(f"qprobe.probe.solvers.{name}.VALUES_AT_A_TIME", 7 * 9)
    parts = Design(rows, within=is_within, row_weights=rows.weights).space({"b0": 1.0})
    np.testing.assert_allclose(parts.variances, whole.variances, rtol=1e-10)
    np.testing.assert_allclose(np.abs(parts.coordinates), np.abs(whole.coordinates), atol=1e-9)
