"""One default everywhere: what the configuration files say is what the library does."""

import dataclasses
from typing import Any

import pytest

from qprobe.cli import composition
from qprobe.probe.training import TrainingSettings
from qprobe.settings import build


@pytest.mark.parametrize(("name", "changes"), [("linear", {}), ("mlp", {"hidden": (256,)})])
def test_the_configuration_repeats_the_defaults_key_by_key(name: str, changes: dict[str, Any]) -> None:
    values = composition.composed("run", [f"probe={name}"])["probe"]
    assert list(values) == [f.name for f in dataclasses.fields(TrainingSettings)]
    assert build(TrainingSettings, values, "probe") == TrainingSettings(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"chunk": 0}, "chunk"),
        ({"held_out": 1.0}, "held_out"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"beta": -0.1}, "beta"),
        ({"hidden": (0,)}, r"training\.hidden"),
        ({"hidden": ("8",)}, r"training\.hidden"),
        ({"patience": 0}, "patience"),
        ({"learning_rates": (0.1, -0.1)}, "learning_rates"),
        ({"learning_rates": (float("nan"),)}, "each"),
    ],
)
def test_values_out_of_range_are_sentences(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**values)
