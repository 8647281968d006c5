"""The paper's values and settings: they are what the experiments run with, and values appear with these settings alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qprobe_code_gen.__main__ as command
from qprobe.cli import composition

pytestmark = pytest.mark.usefixtures("plain_figures")

EXPERIMENTS = sorted(path.stem for path in (Path(command.__file__).parent / "conf/experiment").glob("*.yaml"))
SERVED = "sampler.api.model=gpt-3.5-turbo-1106"
Composed = Callable[..., dict[str, Any]]
Values = Callable[..., dict[str, Any]]


@pytest.fixture
def values(composed: Composed) -> Values:
    """The published values that an experiment shows with further words."""
    return lambda name, *words: composition.published(composed([f"experiment={name}", *words]))


@pytest.mark.parametrize(
    ("name", "split", "row", "value"),
    [
        ("table1", "mbpp-test", "Q-probe L_PG", 0.4573),
        ("table2", "humaneval", "Q-probe L_CE", 0.64),
        ("table2_ours", "humaneval", "Q-probe L_CE", 0.64),
        ("table4", "mbpp-test", "Q-probe L_PG", 0.66),
        ("table4_mlp", "mbpp-test", "Q-probe L_PG", 0.68),
        ("table4_ours", "humaneval", "Q-probe L_CE", 0.54),
    ],
)
def test_the_papers_values_are_shown_with_the_papers_settings(
    name: str, split: str, row: str, value: float, values: Values
) -> None:
    assert values(name, *([SERVED] if name != "table1" else []))[split][row] == value


def test_figures_show_them_with_the_papers_procedure_alone(values: Values) -> None:
    for number in (2, 3, 4):
        assert values(f"fig{number}")
        assert values(f"fig{number}_ours") == {}
    assert values("demo") == {}
    # With ours as well, it is the paper's probes that have to be the paper's.
    assert values("table1_ours", "probe.learning_rate=0.1", "embedder.layers=[20,26]")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "table1",
            "model.name=other/model limit=8 sampler.temperature=1.0 evaluation.k=8 sampler.top_p=1.0 probe=mlp "
            "embedder.layers=[5] dataset.prompt_style=chat sampler.n=48 procedure=ours sampler.max_new_tokens=100 "
            "evaluation.seeds=1 probe.learning_rate=0.01 evaluation.beta=0 probe.hidden=[256] dataset.train=null "
            "sampler.top_k=40 evaluation.partition=false probe.epochs=10 +dataset.limits.mbpp-train=9 model.adapter=a "
            "dataset.shots=a baselines.prompt_rm.model=null",
        ),
        (
            "table1_ours",
            "authors.layer=20 authors.probe.learning_rate=0.1 authors.evaluation.beta=0 probe.hidden=[9]",
        ),
        (
            "table2",
            "sampler.api.model=another model.name=other/model sampler.n=48 procedure=ours probe=mlp "
            "dataset.prompt_style=zero_shot embedder.layers=[80]",
        ),
        ("table4", "probe.hidden=[256] embedder.api.model=another"),
        ("table4_mlp", "probe=linear"),
    ],
)
def test_one_other_setting_leaves_them_out(name: str, words: str, values: Values) -> None:
    own = [] if name.startswith("table1") else [SERVED]
    for word in words.split():
        assert values(name, *own, word) == {}, word


def test_values_without_a_condition_are_refused() -> None:
    with pytest.raises(ValueError, match="paper_when"):
        composition.published({"paper": {"a": {"pass@1": 0.5}}, "paper_when": {}})


def test_all_of_table_1_and_its_figures_read_one_run(composed: Composed) -> None:
    runs = {
        name: composed([f"experiment={name}"])["paths"] for name in EXPERIMENTS if name[:4] in ("fig2", "fig3", "fig4")
    }
    assert len(runs) == 6
    assert {paths["run"] for paths in runs.values()} == {composed(["experiment=table1"])["paths"]["run"]}
    assert len({paths["outputs"] for paths in runs.values()}) == 6


def test_papers_settings_are_the_papers_and_ours_are_the_defaults(composed: Composed) -> None:
    defaults = composed(["experiment=mbpp", "model.name=m"])
    for name in (name for name in EXPERIMENTS if name.startswith(("table", "fig"))):
        config = composed(
            [f"experiment={name}", *(["sampler.api.model=m"] if name.startswith(("table2", "table4")) else [])]
        )
        law = [config["sampler"][key] for key in ("temperature", "top_p", "max_new_tokens")]
        assert law == [0.8, 0.95, 300], name
        first, second = composition.procedures(config)
        assert (first.settings.k, first.settings.seeds) == (48, 10), name
        trained = [loss for loss in first.settings.losses if loss != "auto"]
        assert trained == ["reward_mse", "reward_cross_entropy", "policy_gradient"], name
        assert ("auto" in first.settings.losses) == name.endswith("_ours"), name
        if name.endswith("_ours"):
            assert (config["probe"], first.settings.beta) == (defaults["probe"], None), name
        # A table has both, so that the difference has a sentence; a figure has one.
        assert (second is not None) == (name.startswith("table") and name.endswith("_ours")), name
        if name.startswith("fig") and name.endswith("_ours"):
            continue
        papers = second or first
        assert papers.layer in (None, *config["embedder"]["layers"]), name
        training, beta = papers.training, papers.settings.beta
        assert (training.learning_rate, training.steps, training.epochs) == (5e-5, None, 150), name
        assert (training.chunks_per_batch, training.chunk, training.training_beta) == (100, 10, 1.0), name
        assert (training.standardize, training.held_out, beta) == (False, 0.0, 0.1), name
    assert composed(["experiment=table1"])["embedder"]["layers"] == [26]
    assert composed(["experiment=table1"])["sampler"]["n"] == 200
    assert composed(["experiment=fig2"])["evaluation"]["curve_prompts"] == [5, 10, 20, 50, 100, 200]
