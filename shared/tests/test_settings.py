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
    ("make", "values", "more", "message"),
    [
        (TrainingSettings, {"speed": 1, "chunk": 3}, {}, r"^part has no key speed: it knows beta, check_every, chunk,"),
        (SamplingSettings, {"stop": ["x"]}, {"stop": ("y",)}, "part has no key stop"),  # the program's own to say
        (BackEnd, {"self": 1}, {"model": ""}, "part has no key self"),
        (Needy, {}, {}, "part cannot be used as configured: .*missing.*'name'"),
        (TrainingSettings, {"steps": "500"}, {}, "part.steps is '500': it should be int | null"),
        (TrainingSettings, {"steps": 2.5}, {}, "part.steps is 2.5"),
        (TrainingSettings, {"hidden": "256"}, {}, "part.hidden is '256'"),
        (TrainingSettings, {"hidden": ["256"]}, {}, r"part.hidden is \['256'\]"),
        (TrainingSettings, {"hidden": None}, {}, "part.hidden is None"),
        (TrainingSettings, {"standardize": "no"}, {}, "part.standardize is 'no': it should be bool"),
        (TrainingSettings, {"chunk": True}, {}, "part.chunk is True: it should be int"),
        (TrainingSettings, {"beta": False}, {}, "part.beta is False: it should be float"),
        (EvaluationSettings, {"losses": "policy_gradient"}, {}, "part.losses is 'policy_gradient'"),
        (EvaluationSettings, {"seeds": 2.5}, {}, "part.seeds is 2.5: it should be int"),
        (Needy, {"name": 3}, {}, "part.name is 3: it should be str"),
        (Needy, {"name": "a", "limit": []}, {}, r"part.limit is \[\]"),
        (BackEnd, {"layers": 3}, {"model": ""}, "part.layers is 3"),
        (TrainingSettings, {"steps": 0}, {}, "training.steps is 0: at least 1"),  # right kind, wrong value
    ],
)
def test_what_cannot_be_used_is_a_sentence(
    make: Any, values: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(make, values, "part", **more)


def test_keys_are_checked_by_name() -> None:
    check_keys({"a": 1}, {"a", "b"}, "part")
    with pytest.raises(ValueError, match=r"part has no key 1, c: it knows a, b\."):
        check_keys({"c": 1, 1: 2}, {"a", "b"}, "part")  # type: ignore[dict-item]
    assert accepted(BackEnd) == {"model", "layers", "size"}
