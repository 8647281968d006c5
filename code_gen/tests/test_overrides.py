"""A key of the command line is the value that runs, whatever experiment and procedure say, or is refused in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import ConfigCompositionException

import qprobe
import qprobe_code_gen.__main__ as command
from qprobe.cli import composition
from qprobe.evaluation.sweep import EvaluationSettings, Procedure
from qprobe.probe.training import TrainingSettings

CORE = Path(qprobe.__file__).parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (Path(command.__file__).parent / "conf" / "experiment").glob("*.yaml"))
# None of these is what any experiment, procedure or group says.
PROBE: dict[str, Any] = {
    "hidden": [3],
    "steps": 7,
    "epochs": 9,
    "chunks_per_batch": 11,
    "chunk": 5,
    "learning_rate": 0.123,
    "learning_rates": [0.5],
    "weight_decay": 0.2,
    "training_beta": 2.5,
    "standardize": True,
    "held_out": 0.37,
    "minimum_mixed": 3,
    "check_every": 4,
    "patience": 6,
    "beta": 0.9,
}
EVALUATION: dict[str, Any] = {
    "losses": ["centred_mse", "reward_mse"],
    "seeds": 3,
    "folds": 4,
    "k": 2,
    "train_share": 0.95,
    "curve_shares": [0.3],
    "curve_prompts": [13],
    "beta": 0.7,
    "partition": True,
    "controls": ["length", "shuffled_labels", "logprob"],
    "draws": 33,
    "bootstrap": 777,
}
Configured = Callable[..., dict[str, Any]]
SAMPLER: dict[str, Any] = {"n": 5, "temperature": 0.33, "top_p": 0.44, "max_new_tokens": 17, "batch_rows": 21}


def words(group: str, values: dict[str, Any]) -> list[str]:
    return [f"{group}.{key}={value}" for key, value in values.items()]


@pytest.fixture
def configured(composed: Callable[..., dict[str, Any]]) -> Configured:
    """The configuration of an experiment with further words."""

    def configure(experiment: str, *more: str) -> dict[str, Any]:
        api = ["++sampler.api.model=m"] if experiment.startswith(("table2", "table4")) else []
        chosen = experiment not in ("mbpp", "humaneval", "gsm8k") or any(word.startswith("model=") for word in more)
        name = [] if chosen else ["model.name=m"]
        return composed([f"experiment={experiment}", *api, *name, *more])

    return configure


def plain(settings: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def of(procedure: Procedure) -> tuple[dict[str, Any], dict[str, Any]]:
    return plain(procedure.training), plain(procedure.settings)


def test_every_key_of_a_probe_and_its_evaluation_is_looked_at() -> None:
    assert set(PROBE) == {entry.name for entry in dataclasses.fields(TrainingSettings)}
    assert set(EVALUATION) == {entry.name for entry in dataclasses.fields(EvaluationSettings)}
    for choice in ("linear", "mlp"):
        assert set(composition.composed("run", [f"probe={choice}"])["probe"]) == set(PROBE)
    assert set(yaml.safe_load((CORE / "evaluation" / "default.yaml").read_text())) == set(EVALUATION)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_said_of_probes_evaluation_and_layer_is_what_runs(experiment: str, configured: Configured) -> None:
    said = [*words("probe", PROBE), *words("evaluation", EVALUATION), "layer=best"]
    for procedure in ("ours", "paper", "both"):
        ours, papers = composition.procedures(configured(experiment, f"procedure={procedure}", *said))
        assert of(ours) == (PROBE, EVALUATION), procedure
        assert ours.layer == "best"
        assert (papers is not None) == (procedure == "both")
    assert papers is not None
    # What the paper's procedure says is its own; the rest is the experiment's.
    published = yaml.safe_load((CORE / "on_top" / "published.yaml").read_text())
    training, settings = of(papers)
    assert training == PROBE | published["probe"]
    assert settings == EVALUATION | published["evaluation"] | {"curve_shares": [], "curve_prompts": []}
    # And what is said of it runs in its place, and not in ours.
    own = {key: PROBE[key] for key in published["probe"]}
    both = configured(experiment, "procedure=both", *words("authors.probe", own), "authors.evaluation.beta=0.7")
    ours, papers = composition.procedures(both)
    assert papers is not None
    assert {key: of(papers)[0][key] for key in own} == own
    assert papers.settings.beta == 0.7
    alone, _ = composition.procedures(configured(experiment, "procedure=ours"))
    assert of(ours) == of(alone)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_model_that_is_chosen_is_the_one_that_runs(experiment: str, configured: Configured) -> None:
    chosen = configured(experiment, "model=embedded")["model"]
    assert chosen == yaml.safe_load((CORE / "model" / "hub.yaml").read_text()) | {"name": "embedded"}
    assert configured(experiment, "model=hub", "model.name=own")["model"] == chosen | {"name": "own"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("choice", ["probe=linear", "probe=mlp"])
def test_a_choice_of_a_group_leaves_the_other_words_in_force(
    experiment: str, choice: str, configured: Configured
) -> None:
    # No experiment says hidden widths on top of a choice that the user makes.
    assert configured(experiment, choice)["probe"]["hidden"] == ([] if choice == "probe=linear" else [256])
    if experiment.startswith("recorded"):  # what was recorded has its law, and other words on it are refused
        with pytest.raises(ConfigCompositionException, match=r"Could not override 'sampler\.temperature'"):
            configured(experiment, choice, "sampler.temperature=0.33")
        assert configured(experiment, choice, *words("probe", PROBE))["probe"] == PROBE
        return
    config = configured(experiment, choice, *words("probe", PROBE), *words("sampler", SAMPLER))
    assert config["probe"] == PROBE
    assert {key: config["sampler"][key] for key in SAMPLER} == SAMPLER
    ends = composition.back_ends({**config, "model": {**config["model"], "name": "m"}}, stop=())
    drawn = {key: getattr(ends.sampler.settings, key) for key in SAMPLER if key != "batch_rows"}
    assert drawn | {"batch_rows": ends.batch_rows} == SAMPLER
    assert (ends.rival.settings.temperature, ends.rival.settings.max_new_tokens) == (0.0, 17)
