"""A key of the command line is the value that runs, whatever the experiment says, or is refused in a sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import qprobe_preference.__main__ as command
from qprobe.cli import composition
from qprobe_preference import comparison

EXPERIMENTS = sorted(path.stem for path in (Path(command.__file__).parent / "conf" / "experiment").glob("*.yaml"))
PROBE: dict[str, Any] = {"hidden": [3], "steps": 7, "learning_rate": 0.123, "held_out": 0.37, "standardize": True}
EVALUATION: dict[str, Any] = {"seeds": 3, "k": 2, "beta": 0.7, "curve_shares": [0.3], "controls": ["length", "logprob"]}


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_module("qprobe_preference.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", list(words)), resolve=False)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def said(group: str, values: dict[str, Any]) -> list[str]:
    return [f"{group}.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_model_that_is_chosen_is_the_one_that_runs(experiment: str) -> None:
    chosen = composed(f"experiment={experiment}", "model=embedded")["model"]
    assert (chosen["name"], chosen["device_map"]) == ("embedded", None)
    assert composed(f"experiment={experiment}", "model=hub", "model.name=own")["model"] == chosen | {"name": "own"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("choice", ["probe=linear", "probe=mlp"])
def test_what_is_said_is_what_runs(experiment: str, choice: str) -> None:
    config = composed(
        f"experiment={experiment}", choice, "layer=best", *said("probe", PROBE), *said("evaluation", EVALUATION)
    )
    ours, theirs = composition.procedures(config)
    assert theirs is None
    found = dataclasses.asdict(ours.training) | dataclasses.asdict(ours.settings)
    expected = PROBE | EVALUATION
    assert {key: list(v) if isinstance(v := found[key], tuple) else v for key in expected} == expected
    assert ours.layer == "best"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_probe_that_would_not_be_among_those_compared_is_refused(experiment: str) -> None:
    compare = composed(f"experiment={experiment}")["compare"]
    layers, shapes = [6, 12] if compare["layers"] else [], compare["hidden"]
    own = {"layers": layers, "hidden": shapes}
    if layers:
        with pytest.raises(ValueError, match=r"layer is 9, but compare\.layers asks for \[6, 12\]"):
            comparison.variants(own, 9)
        assert next(variant.layer for variant in comparison.variants(own, 12)) == 6
    if shapes:
        with pytest.raises(ValueError, match=r"probe\.hidden is \[3\], but compare\.hidden asks for"):
            comparison.variants(own, None, [3])
        assert len(comparison.variants(own, None, shapes[-1])) == len(comparison.variants(own))
    if not layers and not shapes:
        assert comparison.variants(own, 9, [3]) == []


def test_the_command_refuses_it_before_any_work(tmp_path: Path) -> None:
    words = ["experiment=hh_local", f"paths.runs={tmp_path}", "dataset.path=none.jsonl"]
    for word, sentence in (("layer=9", "layer is 9"), ("probe.hidden=[3]", r"probe\.hidden is \[3\]")):
        with initialize_config_module("qprobe_preference.conf", version_base="1.3"):
            config = OmegaConf.to_container(compose("config", [*words, word]), resolve=True)
        assert isinstance(config, dict)
        with pytest.raises(ValueError, match=sentence):
            command.run({str(key): value for key, value in config.items()})
    assert list(tmp_path.iterdir()) == []
