"""From a configuration to settings: unknown keys, missing keys and values of the wrong type are errors with their place."""

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


@dataclass(frozen=True)
class Whole:
    part: Needy
    parts: tuple[Needy, ...] = ()
    other: Needy | None = None


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


def test_parts_that_are_dataclasses_are_built_and_numbers_stay_as_configured() -> None:
    made = build(Whole, {"part": {"name": "a"}, "parts": [{"name": "b", "share": 1}], "other": None}, "whole")
    assert made == Whole(Needy("a"), (Needy("b", 1),))
    assert isinstance(made.parts[0].share, int)  # identities of tables hold what was said


@pytest.mark.parametrize(
    ("make", "values", "more", "place"),
    [
        (TrainingSettings, {"speed": 1, "chunk": 3}, {}, "part has no key speed: it knows beta, check_every, chunk,"),
        (SamplingSettings, {"stop": ["x"]}, {"stop": ("y",)}, "part has no key stop"),  # the program's own to say
        (BackEnd, {"self": 1}, {"model": ""}, "part has no key self"),
        (Needy, {}, {}, "part .*missing.*'name'"),
        (TrainingSettings, {"steps": "500"}, {}, r"part.steps is '500'.* int \| null"),
        (TrainingSettings, {"steps": 2.5}, {}, "part.steps is 2.5"),
        (TrainingSettings, {"hidden": "256"}, {}, "part.hidden is '256'"),
        (TrainingSettings, {"hidden": ["256"]}, {}, r"part.hidden\[0\] is '256'"),
        (TrainingSettings, {"hidden": None}, {}, "part.hidden is None"),
        (TrainingSettings, {"standardize": "no"}, {}, "part.standardize is 'no'.* bool"),
        (TrainingSettings, {"chunk": True}, {}, "part.chunk is True"),
        (TrainingSettings, {"beta": False}, {}, "part.beta is False"),
        (EvaluationSettings, {"losses": "policy_gradient"}, {}, "part.losses is 'policy_gradient'"),
        (EvaluationSettings, {"seeds": 2.5}, {}, "part.seeds is 2.5"),
        (Needy, {"name": 3}, {}, "part.name is 3"),
        (Needy, {"name": "a", "limit": []}, {}, r"part.limit is \[\]"),
        (BackEnd, {"layers": 3}, {"model": ""}, "part.layers is 3"),
        (TrainingSettings, {"steps": 0}, {}, "steps is 0"),  # the right type, a wrong value
        (Whole, {"part": {"nam": "a"}}, {}, "part.part has no key nam"),
        (Whole, {"part": {"name": "a"}, "other": {"name": 1}}, {}, "part.other.name is 1"),
        (Whole, {"part": {"name": "a"}, "parts": [3]}, {}, r"part.parts\[0\] is 3"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_its_place(
    make: Any, values: dict[str, Any], more: dict[str, Any], place: str
) -> None:
    with pytest.raises(ValueError, match=place):
        build(make, values, "part", **more)


def test_keys_are_checked_by_name() -> None:
    check_keys({"a": 1}, {"a", "b"}, "part")
    with pytest.raises(ValueError, match="1, c"):
        check_keys({"c": 1, 1: 2}, {"a", "b"}, "part")  # type: ignore[dict-item]
    assert accepted(BackEnd) == {"model", "layers", "size"}
