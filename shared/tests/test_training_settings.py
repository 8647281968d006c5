"""One default everywhere: what the configuration files say is what the library does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

import qprobe
from qprobe.probe.training import TrainingSettings
from qprobe.settings import build


@pytest.mark.parametrize(("name", "changes"), [("linear", {}), ("mlp", {"hidden": (256,)})])
def test_the_configuration_repeats_the_defaults_key_by_key(name: str, changes: dict[str, Any]) -> None:
    text = (Path(qprobe.__file__).parent / "conf" / "probe" / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    assert list(values) == [f.name for f in dataclasses.fields(TrainingSettings)]
    assert build(TrainingSettings, values, "probe") == TrainingSettings(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 0}, "patience is 0: at least 1 look, or null"),
        ({"learning_rates": (0.1, -0.1)}, r"learning_rates is \(0.1, -0.1\): each must be above 0"),
        ({"learning_rates": (float("nan"),)}, "each must be above 0"),
    ],
)
def test_values_out_of_range_are_sentences(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**values)
