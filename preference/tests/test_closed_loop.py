"""The closed loop on known preferences: what pairs were drawn from is found again; its choices win as theory says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import norm

from qprobe.store.table import feature_rows, open_table

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "closed_loop.py"
PROMPTS, EACH, SPREAD = 240, 8, 2.0


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("closed_loop", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["closed_loop"] = module
    spec.loader.exec_module(module)
    return module


def test_pairs_follow_the_bradley_terry_model(loop: ModuleType) -> None:
    rng = np.random.default_rng(0)
    world = loop.draw_world(*loop.gaussian(PROMPTS, EACH, 32), SPREAD, rng)
    pairs = loop.draw_pairs(world, np.arange(0, PROMPTS, 2), 20_000, rng)
    won, lost = world.utility[pairs.T]
    assert set(world.groups[pairs[:, 0]]) == set(range(0, PROMPTS, 2))
    np.testing.assert_array_equal(*world.groups[pairs.T])
    # Of pairs that differ by |d| the better one is preferred with sigmoid(|d|): the mean over all, and over close ones.
    distance = np.abs(won - lost)
    for some in (distance > 0, distance < 1):
        expected = 1 / (1 + np.exp(-distance[some]))
        error = np.sqrt((expected * (1 - expected)).sum()) / some.sum()
        assert abs((won > lost)[some].mean() - expected.mean()) < 4 * error
    every = loop.all_pairs(world, np.arange(PROMPTS))
    assert len(every) == PROMPTS * EACH * (EACH - 1) / 2
    u = world.utility[every]
    # The spread is that of two independent completions: n / (n - 1) of what pairs of n without replacement show.
    assert np.sqrt(np.mean((u[:, 0] - u[:, 1]) ** 2) * (EACH - 1) / EACH) == pytest.approx(SPREAD, rel=1e-6)


def test_agreement_by_hand(loop: ModuleType) -> None:
    world = loop.World(np.zeros((4, 1), np.float32), np.array([0, 0, 1, 1]), np.array([0.0, np.log(3), 5.0, 5.0]))
    prompts = np.arange(2)
    # Q in the order of u, and any affine image of u: r = 1. The pair of prompt 1 is a toss whatever is said of it.
    for scores, correlation, accuracy in (
        (2 * world.utility + 7, 1.0, (3 / 4 + 1 / 2) / 2),
        (-world.utility, -1.0, (1 / 4 + 1 / 2) / 2),
        (np.zeros(4), 0.0, 1 / 2),
        (np.array([0, 3, 0, 4.0]), 0.6, (3 / 4 + 1 / 2) / 2),
    ):
        assert loop.agreement(world, scores, prompts) == pytest.approx((correlation, accuracy, 5 / 8))


def test_a_probe_finds_theta_the_better_the_more_pairs_it_has(loop: ModuleType) -> None:
    rng = np.random.default_rng(1)
    world = loop.draw_world(*loop.gaussian(PROMPTS, EACH, 32), SPREAD, rng)
    order = rng.permutation(PROMPTS)
    tested, trained = np.sort(order[:60]), order[60:]
    pairs = loop.draw_pairs(world, trained, 6000, rng)
    found = {n: loop.train(world, pairs[:n], seed=0) for n in (100, 600, 6000)}
    told = {n: loop.agreement(world, probe.score(world.features).astype(float), tested) for n, probe in found.items()}
    correlations = [correlation for correlation, _, _ in told.values()]
    assert correlations == sorted(correlations)
    assert correlations[0] < 0.9 < correlations[-1]
    _, accuracy, ceiling = told[6000]
    assert ceiling - 0.05 < accuracy <= ceiling
    # Labels turned round give theta turned round.
    turned = loop.train(world, pairs[:, ::-1].copy(), seed=0).score(world.features).astype(float)
    assert loop.agreement(world, turned, tested)[0] < -0.9
    scores = found[6000].score(world.features).astype(float)
    for k in (1, 3, 7):
        outcome = loop.outcome(world, scores, tested, k, rng, judges=50)
        assert outcome.judged.rate.low <= outcome.expected <= outcome.judged.rate.high
        assert outcome.covered >= 0.9


def theory(correlation: float, k: int, spread: float) -> float:
    """Win rate of the best of k by Q over one more completion, utilities and Q jointly Gaussian within a prompt.

    The best Q of k stands z standard deviations up, z of density k phi(z) Phi(z)^(k-1); the utility of that completion has
    mean r z and variance 1 - r^2; against another of variance 1 the win is the mean of a sigmoid, by quadrature.
    """
    z = np.linspace(-7, 7, 561)
    density = k * norm.pdf(z) * norm.cdf(z) ** (k - 1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    one = spread / np.sqrt(2)
    logits = one * (correlation * z[:, None] + np.sqrt(2 - correlation**2) * nodes)
    win = (weights / weights.sum() / (1 + np.exp(-logits))).sum(axis=1)
    return float((density * win).sum() / density.sum())


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
def test_win_rate_of_choices_follows_the_theory_of_order_statistics(loop: ModuleType, correlation: float) -> None:
    rng = np.random.default_rng(3)
    prompts, each = 2000, 8
    u, noise = rng.normal(size=(2, prompts * each))
    world = loop.World(np.zeros((len(u), 1), np.float32), np.repeat(np.arange(prompts), each), u * SPREAD / np.sqrt(2))
    scores = correlation * u + np.sqrt(1 - correlation**2) * noise
    for k in (1, 2, 7):
        expected = theory(correlation, k, SPREAD)
        of_choices = loop.outcome(world, scores, np.arange(prompts), k, rng, judges=1).judged.rate
        # 12 intervals of 95 %: as wide again as they are, so that the test is not left to luck.
        assert abs(of_choices.value - expected) < of_choices.high - of_choices.low
    assert theory(0.0, 7, SPREAD) == pytest.approx(0.5)
    assert theory(1.0, 1, SPREAD) == pytest.approx(0.5)


def test_the_benchmark_runs_on_a_run_folder(loop: ModuleType, tmp_path: Path) -> None:
    features, groups = loop.gaussian(40, EACH, 32)
    table = open_table(tmp_path, "features", "pool", "embedder", "layer=07", inputs={"made": "here"})
    table.begin()
    ids = [f"task/{g:03}" for g in groups]
    table.write(sorted(set(ids)), feature_rows(ids, list(range(EACH)) * 40, features)[0])
    command = [
        sys.executable,
        str(BENCHMARK),
        str(tmp_path),
        "--pairs",
        "20",
        "400",
        "--thetas=1",
        "--judges=5",
        "--steps=50",
    ]
    child = subprocess.run([*command, f"--json={tmp_path / 'out.json'}"], capture_output=True, text=True, check=False)
    assert child.returncode in (0, 1), child.stderr
    lines = json.loads((tmp_path / "out.json").read_text())
    assert [line["pairs"] for line in lines] == [20, 400]
    assert set(lines[0]["win rate"]) == {"1", "2", "4", "7"}
    assert "with 400 pairs (goal 0.9)" in child.stdout


def test_a_folder_without_features_is_said(loop: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no features"):
        loop.read_run(tmp_path)
