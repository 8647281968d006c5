"""The results of one evaluation: what the tables and figures are made of, kept as one JSON file.

Every class converts its fields when it is built: numpy scalars and arrays become plain numbers and lists, NaN becomes
None ("not run"), and anything else that does not fit its declared type is an error that names the field. So what was
built can be written, and what was written reads back equal. An unknown key is an error too: a file of another version
is refused, not half understood.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.files import write_whole

BASE_METHOD = "pass@1"
"""The row that the differences are paired against: one completion of the base model, drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of the table.

    Args:
        method: display name, such as "pass@1", "greedy", "Q-probe L_PG", "skyline pass@8".
        value: mean reward over prompts (and seeds); None if the method was not run.
        low: lower end of the 95 % interval of `value`, by bootstrap over prompts.
        high: its upper end.
        prompts: prompts that the value is a mean over.
        samples_per_prompt: completions of a prompt that the method used; where prompts differ, the most.
        fewest_samples: the fewest, where prompts differ; 0 where they do not.
        seeds: probes that were trained and averaged; 0 if nothing is random in the method but the completions.
        seed_spread: standard deviation of the value over seeds.
        beta: temperature of the softmax over scores; 0 picks the highest score.
        auc: within-prompt area under the ROC curve, in [0, 1].
        auc_low: lower end of its 95 % interval.
        auc_high: upper end of its 95 % interval.
        difference: value minus that of pass@1, paired over prompts.
        difference_low: lower end of its 95 % interval.
        difference_high: upper end of its 95 % interval.
        over_greedy: value minus that of greedy decoding, paired over prompts.
        over_greedy_low: lower end of its 95 % interval.
        over_greedy_high: upper end of its 95 % interval.
        simulation_error: standard error of the value by drawing candidate sets at random; 0 where it is exact.
        paper: the published value, only where the set-up is the paper's.

    Raises:
        ValueError: if a field has the wrong type, is infinite, or an interval is upside down.
    """

    method: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    prompts: int = 0
    samples_per_prompt: int = 0
    fewest_samples: int = 0
    seeds: int = 0
    seed_spread: float | None = None
    beta: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    over_greedy: float | None = None
    over_greedy_low: float | None = None
    over_greedy_high: float | None = None
    simulation_error: float | None = None
    paper: float | None = None

    def __post_init__(self) -> None:
        _convert_fields(self)
        where = f"row {self.method!r}"
        _refuse_negative(
            self,
            ("prompts", "samples_per_prompt", "fewest_samples", "seeds", "seed_spread", "beta", "simulation_error"),
            where,
        )
        for name, low, high in (
            ("value", self.low, self.high),
            ("auc", self.auc_low, self.auc_high),
            ("difference", self.difference_low, self.difference_high),
            ("over_greedy", self.over_greedy_low, self.over_greedy_high),
        ):
            if low is not None and high is not None and low > high:
                raise ValueError(f"{where}: the interval of {name} is upside down, [{low}, {high}]: swap its ends.")


@dataclass(frozen=True, kw_only=True)
class Band:
    """One line of a figure with its 95 % interval, one entry a point of the x axis; None where nothing was measured."""

    value: list[float | None]
    low: list[float | None]
    high: list[float | None]

    def __post_init__(self) -> None:
        _convert_fields(self)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Reward against the number of candidates (the paper's Fig. 3 and 5).

    Args:
        k: numbers of candidates, at least 1, increasing. Where the first is 1 the figure draws its value as the base.
        series: method -> one line; names that begin with "skyline" are drawn as the bound that they are.

    Raises:
        ValueError: if k is not increasing or a line has another length than k.
    """

    k: list[int]
    series: dict[str, Band]

    def __post_init__(self) -> None:
        _convert_fields(self)
        if not self.k or self.k[0] < 1 or any(b <= a for a, b in zip(self.k, self.k[1:], strict=False)):
            raise ValueError(f"reward_against_k.k is {self.k}: give increasing numbers of candidates from 1 up.")
        for method, band in self.series.items():
            lengths = (len(band.value), len(band.low), len(band.high))
            if lengths != (len(self.k),) * 3:
                raise ValueError(
                    f"reward_against_k, {method!r}: value, low and high have {lengths[0]}, {lengths[1]} and "
                    f"{lengths[2]} entries, k has {len(self.k)}: give one entry for every k."
                )


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Reward against the number of training prompts.

    Args:
        prompts: numbers of training prompts, at least 1, not falling.
        series: method -> one line, an entry for every number of prompts.

    Raises:
        ValueError: if prompts fall or a line has another length.
    """

    prompts: list[int]
    series: dict[str, Band]

    def __post_init__(self) -> None:
        _convert_fields(self)
        if not self.prompts or self.prompts[0] < 1 or self.prompts != sorted(self.prompts):
            raise ValueError(f"reward_against_prompts.prompts is {self.prompts}: give rising numbers from 1 up.")
        for method, band in self.series.items():
            if {len(band.value), len(band.low), len(band.high)} != {len(self.prompts)}:
                raise ValueError(
                    f"reward_against_prompts, {method!r}: give one entry for each of {len(self.prompts)} numbers of prompts."
                )


@dataclass(frozen=True, kw_only=True)
class LayerCurve:
    """Reward against the hidden layer that probes read, measured on the tested prompts: to be looked at, not to choose by.

    Args:
        layers: their numbers, rising.
        series: method -> one line, an entry for every layer.
        taken: method -> how many of its probes took each layer, by their held-out prompts.

    Raises:
        ValueError: if layers do not rise or a line has another length.
    """

    layers: list[int]
    series: dict[str, Band]
    taken: dict[str, list[int]]

    def __post_init__(self) -> None:
        _convert_fields(self)
        if not self.layers or self.layers != sorted(set(self.layers)):
            raise ValueError(f"reward_against_layer.layers is {self.layers}: give rising numbers of layers.")
        for method, band in self.series.items():
            lengths = {len(band.value), len(band.low), len(band.high), len(self.taken.get(method, []))}
            if lengths != {len(self.layers)}:
                raise ValueError(
                    f"reward_against_layer, {method!r}: give one entry for each of {len(self.layers)} layers."
                )


@dataclass(frozen=True, kw_only=True)
class TradeOffPoint:
    """Reward and distance at one temperature.

    Args:
        beta: temperature, >= 0; 0 picks the highest score.
        kl: KL(pi_k || p0) in nats, mean over prompts.
        reward: expected reward, mean over prompts.
        low: lower end of the 95 % interval of the reward, if known.
        high: its upper end.
    """

    beta: float
    kl: float | None
    reward: float | None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        _convert_fields(self)
        _refuse_negative(self, ("beta",), "reward_against_kl")


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Reward against KL to the base policy, one line a method, one point a temperature."""

    series: dict[str, list[TradeOffPoint]]

    def __post_init__(self) -> None:
        _convert_fields(self)


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """Where a probe puts one prompt.

    Args:
        task_id: the prompt.
        base: its expected reward under the base policy, in [0, 1].
        score: mean over its samples of the score Q, centred over all samples of the method.
    """

    task_id: str
    base: float
    score: float | None

    def __post_init__(self) -> None:
        _convert_fields(self)
        if not 0 <= self.base <= 1:
            raise ValueError(
                f"scores_per_prompt, prompt {self.task_id!r}: base is {self.base}, an expected reward lies in [0, 1]."
            )


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Base expected reward against centred score of every prompt, one cloud a method (the paper's Fig. 4)."""

    series: dict[str, list[PromptScore]]

    def __post_init__(self) -> None:
        _convert_fields(self)

    def line(self, method: str) -> tuple[float, float] | None:
        """Fit score = slope * base + intercept by least squares.

        Args:
            method: a key of `series`.

        Returns:
            (slope, intercept), or None if fewer than two different base rewards were measured.

        Source: Fig. 4, where a steep slope says that the probe spends its capacity on the difficulty of prompts.
        """
        points = [(point.base, point.score) for point in self.series[method] if point.score is not None]
        if len({base for base, _ in points}) < 2:
            return None
        mean_base = math.fsum(base for base, _ in points) / len(points)
        mean_score = math.fsum(score for _, score in points) / len(points)
        variance = math.fsum((base - mean_base) ** 2 for base, _ in points)
        slope = math.fsum((base - mean_base) * (score - mean_score) for base, score in points) / variance
        return slope, mean_score - slope * mean_base


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation, whole.

    Args:
        title: what was evaluated, for the head of a table.
        protocol: what was trained on what: "5-fold cross-validation over prompts", "trained on mbpp-train, tested
            here".
        pool: the set of completions, such as "humaneval".
        k: candidates that a method chooses between.
        prompts: prompts of the pool.
        samples: completions of the pool, all prompts together.
        samples_per_prompt: completions of a prompt; where prompts differ, the most that any has.
        mixed_prompts: prompts with both good and bad completions, the only ones where choosing matters.
        seeds: probes that every trained row averages.
        rows: the table, in the order of printing.
        reward_against_k: data of the figure of that name, or None.
        reward_against_kl: data of the figure of that name, or None.
        reward_against_prompts: data of the figure of that name, or None.
        reward_against_layer: data of the figure of that name, or None.
        scores_per_prompt: data of the figure of that name, or None.
        notes: sentences that belong under the table.
        made_from: identity of the inputs; empty where unknown.

    Raises:
        ValueError: if a field has the wrong type, or the counts cannot be.
    """

    title: str
    protocol: str
    pool: str
    k: int
    prompts: int
    samples: int
    samples_per_prompt: int
    mixed_prompts: int
    seeds: int
    rows: list[Row]
    reward_against_k: Curve | None = None
    reward_against_kl: TradeOff | None = None
    reward_against_prompts: LearningCurve | None = None
    reward_against_layer: LayerCurve | None = None
    scores_per_prompt: PromptScores | None = None
    notes: list[str] = field(default_factory=list)
    made_from: str = ""

    def __post_init__(self) -> None:
        _convert_fields(self)
        _refuse_negative(
            self,
            ("k", "prompts", "samples", "samples_per_prompt", "mixed_prompts", "seeds"),
            f"results of {self.pool!r}",
        )
        if self.mixed_prompts > self.prompts:
            raise ValueError(
                f"results of {self.pool!r}: {self.mixed_prompts} prompts with both good and bad completions, "
                f"of only {self.prompts}: count them again."
            )

    def to_json(self) -> str:
        """Write the results as strict JSON text (no NaN, ends with a newline)."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Read what `to_json` wrote.

        Args:
            text: JSON text.

        Returns:
            Results equal to those that were written.

        Raises:
            ValueError: if the text is not JSON, or a key is unknown, missing or of the wrong type.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"the results are not JSON ({error}): evaluate again to write them anew.") from error
        converted = _convert(data, cls, "results")
        assert isinstance(converted, cls)
        return converted

    def write(self, path: Path) -> None:
        """Write the results to a JSON file, whole or not at all.

        Args:
            path: the file; its folder is made if missing.

        Raises:
            OSError: if the file cannot be written; what was there before is untouched.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a file that `write` wrote.

        Args:
            path: the file.

        Returns:
            The results.

        Raises:
            ValueError: if the file does not hold results, with its path.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the results hold {name}, which is not JSON: write null for what was not measured.")


def _refuse_negative(holder: Any, names: tuple[str, ...], where: str) -> None:
    for name in names:
        value = getattr(holder, name)
        if value is not None and value < 0:
            raise ValueError(f"{where}: {name} is {value}: it cannot be below 0.")


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert_fields(holder: object) -> None:
    cls: type = type(holder)
    for name, hint in _hints(cls).items():
        converted = _convert(getattr(holder, name), hint, f"{cls.__name__}.{name}")
        object.__setattr__(holder, name, converted)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Fit a value to a declared type; the error names the place."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        return _convert(value, arguments[0], where)
    if origin is list and isinstance(value, list | tuple):
        return [_convert(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _convert(key, arguments[0], where): _convert(item, arguments[1], f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict):
            return _build(hint, value, where)
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: give a finite number.")
        return float(value)
    expected = hint.__name__ if origin is None else str(hint)
    raise ValueError(f"{where} is {value!r}: it should be {expected}.")


def _build(cls: type, data: dict[str, Any], where: str) -> Any:
    hints = _hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(
            f"{where} has the unknown key {', '.join(map(repr, unknown))}: it knows {', '.join(hints)}. "
            "The file may come from another version of qprobe: evaluate again."
        )
    required = [
        entry.name
        for entry in dataclasses.fields(cls)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(
            f"{where} lacks the key {', '.join(map(repr, missing))}: evaluate again to write the file anew."
        )
    return cls(**{name: _convert(value, hints[name], f"{where}.{name}") for name, value in data.items()})
