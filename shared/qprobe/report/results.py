"""The results of one evaluation: what tables and figures are made of, kept as one JSON file.

Every class converts its fields when it is built: numpy scalars and arrays become plain numbers and lists, NaN becomes None
("not run"), and what does not fit its declared type is an error that names the field. So what was built can be written, and
what was written reads back equal. An unknown key is an error too: a file of another version is refused.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.files import write_whole
from qprobe.settings import build, converted, kinds_of

BASE_METHOD = "pass@1"
"""The row that the differences are paired against: one completion of the base model, drawn at random."""


class _Data:
    """A frozen dataclass whose fields are converted to their declared types.

    Raises:
        ValueError: a field of the wrong type, or an infinite number.
    """

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, kind in kinds_of(own).items():
            where = f"{own.__name__}.{name}"
            object.__setattr__(self, name, converted(_plain(getattr(self, name), where), kind, where))

    def _refuse_negative(self, where: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{where}: {name} is {value}: it cannot be below 0.")


def _plain(value: Any, where: str) -> Any:
    """Without numpy's types; None for NaN."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise ValueError(f"{where} is {value}: give a finite number.")
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class Row(_Data):
    """One method of the table. Intervals `NAME_low` to `NAME_high` are 95 %, by bootstrap over prompts.

    Args:
        method: display name, such as "pass@1", "greedy", "Q-probe L_PG", "skyline pass@8".
        value, low, high: mean reward over prompts (and seeds) with its interval; None if the method was not run.
        prompts: prompts that the value is a mean over.
        samples_per_prompt: completions of a prompt that the method used; where prompts differ, the most.
        fewest_samples: the fewest, where prompts differ; 0 where they do not.
        seeds: probes that were trained and averaged; 0 if nothing is random in the method but the completions.
        seed_spread: standard deviation of the value over seeds.
        beta: temperature of the softmax over scores; 0 picks the highest score.
        auc: within-prompt area under the ROC curve, in [0, 1].
        difference: value minus that of pass@1, paired over prompts.
        over_greedy: value minus that of greedy decoding, paired over prompts.
        over_control: value minus that of the best control (`Results.best_control`), paired over prompts; of probes only.
        simulation_error: standard error of the value by drawing candidate sets at random; 0 where it is exact.
        paper: the published value, only where the set-up is the paper's.

    Raises:
        ValueError: a field of the wrong type or below 0, an infinite number, or an interval that is upside down.
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
    over_control: float | None = None
    over_control_low: float | None = None
    over_control_high: float | None = None
    simulation_error: float | None = None
    paper: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"row {self.method!r}"
        self._refuse_negative(where, "prompts", "samples_per_prompt", "fewest_samples", "seeds", "seed_spread", "beta")
        self._refuse_negative(where, "simulation_error")
        for name in ("", "auc_", "difference_", "over_greedy_", "over_control_"):
            low, high = getattr(self, f"{name}low"), getattr(self, f"{name}high")
            if low is not None and high is not None and low > high:
                raise ValueError(f"{where}: {name}low is {low}, above {name}high, {high}: swap them.")


@dataclass(frozen=True, kw_only=True)
class Band(_Data):
    """One line of a figure with its 95 % interval, one entry a point of the x axis; None where nothing was measured."""

    value: list[float | None]
    low: list[float | None]
    high: list[float | None]


def _check_lines(
    where: str, xs: Sequence[int], lines: Mapping[str, Sequence[Sequence[Any]]], first: int, step: int
) -> None:
    """Raise ValueError where xs begin below `first` or rise by less than `step`, or a line has another length."""
    if not xs or xs[0] < first or any(b - a < step for a, b in itertools.pairwise(xs)):
        raise ValueError(f"{where} is {xs}: give rising numbers from {first} up.")
    for method, parts in lines.items():
        if lengths := {len(part) for part in parts} - {len(xs)}:
            raise ValueError(
                f"{where}, {method!r}: a line has {lengths.pop()} entries: give one for each of {len(xs)}."
            )


def _parts(series: dict[str, Band]) -> dict[str, tuple[Sequence[Any], ...]]:
    return {method: (band.value, band.low, band.high) for method, band in series.items()}


@dataclass(frozen=True, kw_only=True)
class Curve(_Data):
    """Reward against the number of candidates (the paper's Fig. 3 and 5).

    Args:
        k: numbers of candidates, at least 1, increasing. Where the first is 1 the figure draws its value as the base.
        series: method -> one line; names that begin with "skyline" are drawn as the bound that they are.

    Raises:
        ValueError: k does not increase, or a line has another length.
    """

    k: list[int]
    series: dict[str, Band]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lines("reward_against_k.k", self.k, _parts(self.series), first=1, step=1)


@dataclass(frozen=True, kw_only=True)
class LearningCurve(_Data):
    """Reward against the number of training prompts.

    Args:
        prompts: numbers of training prompts, at least 1, not falling.
        series: method -> one line, an entry for every number of prompts.

    Raises:
        ValueError: prompts fall, or a line has another length.
    """

    prompts: list[int]
    series: dict[str, Band]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lines("reward_against_prompts.prompts", self.prompts, _parts(self.series), first=1, step=0)


@dataclass(frozen=True, kw_only=True)
class LayerCurve(_Data):
    """Reward against the hidden layer that probes read, measured on the tested prompts: to be looked at, not to choose by.

    Args:
        layers: their numbers, rising.
        series: method -> one line, an entry for every layer.
        taken: method -> how many of its probes took each layer, by their held-out prompts.

    Raises:
        ValueError: layers do not rise, or a line has another length.
    """

    layers: list[int]
    series: dict[str, Band]
    taken: dict[str, list[int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        lines = {method: (*parts, self.taken.get(method, [])) for method, parts in _parts(self.series).items()}
        _check_lines("reward_against_layer.layers", self.layers, lines, first=0, step=1)


@dataclass(frozen=True, kw_only=True)
class TradeOffPoint(_Data):
    """Reward and distance at one temperature.

    Args:
        beta: temperature, >= 0; 0 picks the highest score.
        kl: KL(pi_k || p0) in nats, mean over prompts.
        reward: expected reward, mean over prompts.
        low, high: ends of the 95 % interval of the reward, if known.
    """

    beta: float
    kl: float | None
    reward: float | None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_negative("reward_against_kl", "beta")


@dataclass(frozen=True, kw_only=True)
class TradeOff(_Data):
    """Reward against KL to the base policy, one line a method, one point a temperature."""

    series: dict[str, list[TradeOffPoint]]


@dataclass(frozen=True, kw_only=True)
class PromptScore(_Data):
    """Where a probe puts one prompt.

    Args:
        task_id: the prompt.
        base: its expected reward under the base policy, in the unit of the rewards.
        score: mean over its samples of the score Q, centred over all samples of the method.
    """

    task_id: str
    base: float
    score: float | None


@dataclass(frozen=True, kw_only=True)
class PromptScores(_Data):
    """Base expected reward against centred score of every prompt, one cloud a method (the paper's Fig. 4)."""

    series: dict[str, list[PromptScore]]

    def line(self, method: str) -> tuple[float, float] | None:
        """(slope, intercept) of score on base by least squares; None with fewer than two different base rewards.

        Source: Fig. 4, where a steep slope says that the probe spends its capacity on the difficulty of prompts.
        """
        points = [(point.base, point.score) for point in self.series[method] if point.score is not None]
        if len({base for base, _ in points}) < 2:
            return None
        slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
        return slope, intercept


@dataclass(frozen=True, kw_only=True)
class Certainty(_Data):
    """How well a method knows which of its choices are right.

    Args:
        predicted, observed: of prompts in order of the predicted probability, in parts of about equal size: the mean probability
            that the choice is right, and what the choices earned, with its interval.
        prompts: in each part.
        brier: mean squared error of the predicted probability, in [0, 1].
        brier_of_mean: that of saying the mean reward of these choices of every one: what a number that knows no prompt gets.
        shares: of the prompts, those that the method is surest of, rising to 1.
        surest: what the choices of each share earned.
    """

    predicted: list[float]
    observed: Band
    prompts: list[int]
    brier: float
    brier_of_mean: float
    shares: list[float]
    surest: Band

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({len(self.predicted), len(self.observed.value), len(self.prompts)}) > 1:
            raise ValueError(
                "certainty: predicted, observed and prompts have different lengths: give one for each part."
            )
        if len(self.shares) != len(self.surest.value):
            raise ValueError("certainty: shares and surest have different lengths: give one value for each share.")


@dataclass(frozen=True, kw_only=True)
class Certainties(_Data):
    """How well methods know which of their choices are right, one entry a method."""

    series: dict[str, Certainty]


@dataclass(frozen=True, kw_only=True)
class Results(_Data):
    """One evaluation, whole.

    Args:
        title: what was evaluated, for the head of a table.
        protocol: what was trained on what, such as "5-fold cross-validation over prompts".
        pool: the set of completions, such as "humaneval".
        k: candidates that a method chooses between.
        prompts: prompts of the pool.
        samples: completions of the pool, all prompts together.
        samples_per_prompt: completions of a prompt; where prompts differ, the most that any has.
        mixed_prompts: prompts with both good and bad completions, the only ones where choosing matters.
        seeds: probes that every trained row averages.
        rows: the table, in the order of printing.
        reward_against_k, reward_against_kl, reward_against_prompts, reward_against_layer, scores_per_prompt,
            certainty: data of the figures of these names, or None.
        notes: sentences that belong under the table.
        advice: what to do, by these numbers.
        best_control: the method of the control that earned most on the training prompts; empty where none was run.
        made_from: identity of the inputs; empty where unknown.

    Raises:
        ValueError: a field of the wrong type, or counts that cannot be.
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
    certainty: Certainties | None = None
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    best_control: str = ""
    made_from: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"results of {self.pool!r}"
        self._refuse_negative(where, "k", "prompts", "samples", "samples_per_prompt", "mixed_prompts", "seeds")
        if self.mixed_prompts > self.prompts:
            raise ValueError(f"{where}: mixed_prompts is {self.mixed_prompts}, of only {self.prompts} prompts.")

    def to_json(self) -> str:
        """The results as strict JSON text (no NaN, ends with a newline)."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Results equal to those that `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or a key is unknown, missing or of the wrong type.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"the results are not JSON ({error}): evaluate again to write them anew.") from error
        try:
            return build(cls, data, "results")
        except ValueError as error:
            raise ValueError(f"{error} The file may come from another version of qprobe: evaluate again.") from error

    def write(self, path: Path) -> None:
        """Write the results to a JSON file, whole or not at all; its folder is made if missing.

        Raises:
            OSError: the file cannot be written; what was there before is untouched.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a file that `write` wrote.

        Raises:
            ValueError: the file does not hold results; with its path.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the results hold {name}, which is not JSON: write null for what was not measured.")
