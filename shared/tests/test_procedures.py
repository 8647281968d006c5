"""The paper's procedure beside ours: its settings, its estimate on one partition, its rows, and what is said of the two."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qprobe.cli import composition
from qprobe.evaluation import comparisons
from qprobe.evaluation.best_control import BestControl
from qprobe.evaluation.sweep import EvaluationSettings, Procedure
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.intervals import Interval
from qprobe.probe.metrics import best_of_k, partition_reward, reward_grid
from qprobe.probe.training import TrainingSettings

pytestmark = pytest.mark.usefixtures("plain_figures")

OURS = TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5)
THEIRS = TrainingSettings(steps=None, epochs=20, held_out=0.0, standardize=False, learning_rate=0.01)
SETTINGS = EvaluationSettings(losses=("reward_mse", "policy_gradient"), seeds=2, folds=3, draws=5, bootstrap=100, k=2)
PARTITION = EvaluationSettings(
    losses=SETTINGS.losses, seeds=2, folds=3, draws=5, bootstrap=100, k=2, beta=0.1, partition=True, curve_shares=()
)

Make = Callable[..., Pipeline]


@pytest.fixture
def make(fakes: ModuleType, tmp_path: Path) -> Make:
    def made(**changes: Any) -> Pipeline:
        settled = {"training": OURS, "settings": SETTINGS, "embedder": fakes.Embedder((1, 2))} | changes
        piped: Pipeline = fakes.pipeline(**{"run": tmp_path / "run"} | settled)
        return piped

    return made


def partitions_in_two(rows: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    if not rows:
        return [[]]
    first, rest = rows[0], rows[1:]
    return [
        [(first, other), *more]
        for other in rest
        for more in partitions_in_two(tuple(row for row in rest if row != other))
    ]


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_one_partition_is_one_of_all_and_their_mean_is_the_exact_reward(beta: float) -> None:
    scores, rewards = np.array([0.1, 0.4, 0.4, -0.2]), np.array([0.0, 1.0, 0.0, 1.0])

    def earned(chosen: tuple[int, int]) -> float:
        q, r = scores[list(chosen)], rewards[list(chosen)]
        law = (q == q.max()) / (q == q.max()).sum() if beta == 0 else np.exp(q / beta) / np.exp(q / beta).sum()
        return float(law @ r)

    every = [np.mean([earned(pair) for pair in found]) for found in partitions_in_two((0, 1, 2, 3))]
    groups = np.zeros(4, dtype=np.int64)
    drawn = [
        partition_reward(scores, rewards, groups, 2, beta, rng=np.random.default_rng(seed))[0] for seed in range(300)
    ]
    assert {round(float(value), 9) for value in drawn} == {round(float(value), 9) for value in every}
    exact = np.mean([earned(pair) for pair in itertools.combinations(range(4), 2)])
    assert np.mean(every) == pytest.approx(exact)
    if beta == 0:
        assert exact == pytest.approx(best_of_k(scores, rewards, [2])[0])


def test_of_as_many_candidates_as_there_are_the_partition_is_exact_and_a_rest_is_not_used() -> None:
    rng = np.random.default_rng(0)
    scores, rewards, groups = rng.normal(size=10), rng.random(10), np.repeat([0, 1], 5)
    found = partition_reward(scores, rewards, groups, 5, [0.2, 0.0], rng=rng)
    grid = reward_grid(scores, rewards, groups, [5], [0.2, 0.0], draws=2, rng=rng).values[0]
    np.testing.assert_allclose(found, [grid[0, 0], grid[1, 1]])
    # Of five samples in sets of two, the best one is left over now and then.
    rewards = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    left = [partition_reward(rewards, rewards, np.zeros(5, int), 2, 0.0, rng=rng)[0] for _ in range(50)]
    assert set(left) == {0.0, 0.5}
    with pytest.raises(ValueError, match="k is 6: between 1 and 5"):
        partition_reward(rewards, rewards, np.zeros(5, int), 6, 0.0, rng=rng)
    with pytest.raises(ValueError, match="temperature"):
        partition_reward(rewards, rewards, np.zeros(5, int), 2, -1.0, rng=rng)


def test_the_papers_settings() -> None:
    paper, beside = composition.procedures(composition.composed("run", ["procedure=paper", "seed=3"]))
    training = paper.training
    assert beside is None
    assert (training.learning_rate, training.steps, training.epochs) == (5e-5, None, 150)
    assert training.chunks_per_batch * training.chunk == 1000
    assert (training.training_beta, training.held_out, training.standardize) == (1.0, 0.0, False)
    assert (paper.settings.beta, paper.settings.partition, paper.settings.curve_shares) == (0.1, True, (0.25, 0.5))
    words = ["probe.weight_decay=0.5", "probe.hidden=[8]", "layer=best"]
    ours, theirs = composition.procedures(composition.composed("run", ["procedure=both", "+authors.layer=3", *words]))
    assert (ours.training.steps, ours.training.weight_decay, ours.layer) == (500, 0.5, "best")
    assert theirs is not None
    assert (theirs.training.hidden, theirs.training.steps, theirs.training.weight_decay) == ((8,), None, 0.01)
    assert (theirs.settings.beta, theirs.settings.partition, theirs.layer) == (0.1, True, 3)
    # An experiment's layer alone asks for nothing; the paper's procedure chooses none.
    alone = composition.procedures(composition.composed("run", ["++authors={layer: 3}", "layer=best"]))
    assert (alone[0].layer, alone[1]) == ("best", None)
    lowest = composition.procedures(composition.composed("run", ["procedure=paper", "+authors.layer=0"]))
    assert lowest[0].layer == 0
    with pytest.raises(ValueError, match=r"authors\.evaluation\.losses"):
        composition.procedures(
            composition.composed("run", ["procedure=both", "+authors.evaluation.losses=[reward_mse]"])
        )
    with pytest.raises(ValueError, match="say procedure=both"):
        composition.procedures(composition.composed("run", ["++authors={probe: {steps: 3}}"]))


WORDS = {
    "probe.learning_rate=0.01": 0.01,
    "probe.held_out=0.5": 0.5,
    "probe.steps=7": 7,
    "evaluation.beta=0": 0,
    "layer=best": "best",
}


def found(procedure: Procedure) -> dict[str, Any]:
    training, settings = procedure.training, procedure.settings
    values = [training.learning_rate, training.held_out, training.steps, settings.beta, procedure.layer]
    return dict(zip(WORDS, values, strict=True))


@pytest.mark.parametrize("name", ["ours", "paper", "both"])
def test_what_the_user_says_is_what_runs(name: str) -> None:
    ours, theirs = composition.procedures(composition.composed("run", [f"procedure={name}", *WORDS]))
    assert found(ours) == WORDS
    assert (theirs is not None) == (name == "both")
    if theirs is None:
        return
    assert (theirs.training.learning_rate, theirs.training.steps, theirs.settings.beta) == (5e-5, None, 0.1)
    words = [f"authors.{word}" for word in WORDS if word != "layer=best"]
    ours, theirs = composition.procedures(composition.composed("run", ["procedure=both", *words, "+authors.layer=0"]))
    assert theirs is not None
    assert found(theirs) == WORDS | {"layer=best": 0}
    assert (ours.training.learning_rate, ours.training.steps, ours.settings.beta) == (1e-3, 500, None)


@pytest.mark.parametrize("key", composition.COMMON)
def test_what_two_procedures_share_is_refused_where_it_is_said_of_one(key: str) -> None:
    values = {"losses": "[centred_mse]", "curve_shares": "[0.1]", "curve_prompts": "[3]", "controls": "[]"}
    word = f"+authors.evaluation.{key}={values.get(key, 123)}"
    with pytest.raises(ValueError, match=rf"authors\.evaluation\.{key}.*not.*say evaluation\.{key}"):
        composition.procedures(composition.composed("run", ["procedure=both", word]))


def test_published_values_stand_beside_the_procedure_that_they_are_of(make: Make, tmp_path: Path) -> None:
    paper = {"numbers": {"Q-probe L_Q": 0.25, "pass@1": 0.5}}
    for name, authors in (("one", None), ("both", Procedure(THEIRS, PARTITION))):
        pipeline = make(outputs=tmp_path / name, paper=paper, authors=authors)
        pipeline.execute(["sample", "reward", "embed", "train", "evaluate"])
        rows = {row.method: row.paper for row in pipeline.results(pipeline.tests[0]).rows}
        assert rows["pass@1"] == 0.5
        beside = "Q-probe L_Q" if authors is None else "Q-probe L_Q, paper's procedure"
        assert [method for method, value in rows.items() if value == 0.25] == [beside]


def rows_of(pipeline: Pipeline) -> dict[str, Any]:
    return {row.method: row for row in pipeline.results(pipeline.tests[0]).rows}


def test_both_stand_in_one_table_and_neither_changes_the_other(make: Make, tmp_path: Path) -> None:
    ours = make(outputs=tmp_path / "ours", layer=2)
    theirs = make(outputs=tmp_path / "theirs", layer=1, training=THEIRS, settings=PARTITION)
    both = make(outputs=tmp_path / "both", layer=2, authors=Procedure(THEIRS, PARTITION, layer=1))
    for pipeline in (ours, theirs, both):
        pipeline.execute()
    alone, published, table = rows_of(ours), rows_of(theirs), rows_of(both)
    suffix = ", paper's procedure"
    assert set(table) == set(alone) | {f"Q-probe {loss}{suffix}" for loss in ("L_Q", "L_PG")}
    for method, row in alone.items():
        assert table[method] == row
    for loss in ("Q-probe L_Q", "Q-probe L_PG"):
        row = table[f"{loss}{suffix}"]
        assert (row.value, row.auc, row.beta) == (published[loss].value, published[loss].auc, 0.1)
    notes = both.results(both.tests[0]).notes
    assert sum("our procedure earns" in note for note in notes) == 2
    assert sum(" against Q-probe L_Q" in note for note in notes) == 2  # by each procedure
    # The final probes are ours.
    weights = [pipeline.final_probe() / "network.safetensors" for pipeline in (ours, both)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("layer", [0, 7])
def test_a_layer_of_theirs_that_is_not_embedded_is_said_before_any_work(make: Make, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"The probes read layer {layer}, but the embedder makes \[1, 2\]"):
        make(authors=Procedure(THEIRS, PARTITION, layer=layer))


def test_results_of_one_procedure_are_not_those_of_both(make: Make) -> None:
    make().execute(["sample", "reward", "embed", "train", "evaluate"])
    with pytest.raises(FileNotFoundError, match="settings"):
        make(authors=Procedure(THEIRS, PARTITION)).results(make().tests[0])


def test_the_sentences_say_what_can_be_told() -> None:
    def paired(a: np.ndarray, b: np.ndarray) -> Interval:
        value = float((a - b).mean())
        return Interval(value, value - 0.1, value + 0.1)

    q, ce, pg = (np.full(4, value) for value in (0.2, 0.25, 0.5))
    assert comparisons.ordering({"L_Q": q, "L_CE": ce, "L_PG": pg}, paired) == [
        "L_CE against L_Q: +0.050 [-0.050, +0.150]: not told apart.",
        "L_PG against L_CE: +0.250 [+0.150, +0.350]: better.",
    ]
    assert comparisons.procedures({"L_Q": q}, {"L_Q, paper's procedure": pg}, paired) == [
        "L_Q: our procedure earns -0.300 [-0.400, -0.200] over the paper's: worse."
    ]
    gains = {"L_Q": paired(q, ce), "L_PG": paired(pg, ce)}
    best = BestControl("shortest", ce, "the best of 2 on these very prompts")
    assert comparisons.against_controls(gains, best) == [
        "L_Q does not beat the best control (shortest, the best of 2 on these very prompts): it earns -0.050 [-0.150, +0.050] "
        "against it."
    ]
