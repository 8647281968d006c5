"""From a configuration to settings: unknown keys, missing keys and values of the wrong kind are sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.probe.training import TrainingSettings
from qprobe.sampling import SamplingSettings
from qprobe.settings import accepted, build, check_keys


@dataclass(frozen=True)
class Needy:
    name: str
    share: float = 0.5
    limit: int | None = None


class BackEnd:
    """A factory that is no dataclass."""

    def __init__(self, model: object, layers: Sequence[int] = (-1,), size: int = 8) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.size = size


def test_values_become_settings() -> None:
    settings = build(
        TrainingSettings, {"hidden": [8], "steps": None, "learning_rate": 1, "standardize": False}, "probe"
    )
    assert settings == TrainingSettings(hidden=(8,), steps=None, learning_rate=1.0, standardize=False)
    assert build(SamplingSettings, {"n": 3}, "sampler", stop=("x",)) == SamplingSettings(n=3, stop=("x",))
    made = build(BackEnd, {"layers": [1, 2]}, "embedder", model="m")
    assert (made.model, made.layers, made.size) == ("m", (1, 2), 8)


@pytest.mark.parametrize(
    ("make", "values", "more", "word"),
    [
        (TrainingSettings, {"speed": 1, "chunk": 3}, {}, "speed"),
        (SamplingSettings, {"stop": ["x"]}, {"stop": ("y",)}, "stop"),  # the program's own to say
        (BackEnd, {"self": 1}, {"model": ""}, "self"),
        (Needy, {}, {}, "name"),
        (TrainingSettings, {"steps": "500"}, {}, r"part\.steps .*int \| null"),
        (TrainingSettings, {"steps": 2.5}, {}, "steps"),
        (TrainingSettings, {"hidden": "256"}, {}, "hidden"),
        (TrainingSettings, {"hidden": ["256"]}, {}, "hidden"),
        (TrainingSettings, {"hidden": None}, {}, "hidden"),
        (TrainingSettings, {"standardize": "no"}, {}, "bool"),
        (TrainingSettings, {"chunk": True}, {}, "int"),
        (TrainingSettings, {"beta": False}, {}, "float"),
        (EvaluationSettings, {"losses": "policy_gradient"}, {}, "losses"),
        (EvaluationSettings, {"seeds": 2.5}, {}, "seeds"),
        (Needy, {"name": 3}, {}, "str"),
        (Needy, {"name": "a", "limit": []}, {}, "limit"),
        (BackEnd, {"layers": 3}, {"model": ""}, "layers"),
        (TrainingSettings, {"steps": 0}, {}, "steps"),  # right kind, wrong value
    ],
)
def test_what_cannot_be_used_is_a_sentence(make: Any, values: dict[str, Any], more: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build(make, values, "part", **more)


def test_keys_are_checked_by_name() -> None:
    check_keys({"a": 1}, {"a", "b"}, "part")
    with pytest.raises(ValueError, match="1, c"):
        check_keys({"c": 1, 1: 2}, {"a", "b"}, "part")  # type: ignore[dict-item]
    assert accepted(BackEnd) == {"model", "layers", "size"}
