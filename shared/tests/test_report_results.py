"""Results as JSON: what was built is written and reads back equal, and what does not fit is an error with its place."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qprobe.report.results import (
    Band,
    Curve,
    LayerCurve,
    LearningCurve,
    PromptScore,
    PromptScores,
    Results,
    Row,
    TradeOff,
    TradeOffPoint,
)

PROBE = "Q-probe L_PG"
BAND = Band(value=[0.1, None, 0.2], low=[0.05, None, 0.1], high=[0.15, None, 0.3])
# With data for every figure.
RICH = Results(
    title="A title",
    protocol="trained on mbpp-train, tested here",
    pool="human_eval",
    k=8,
    prompts=164,
    samples=1312,
    samples_per_prompt=8,
    mixed_prompts=31,
    seeds=10,
    rows=[Row(method="pass@1", value=0.123, low=0.087, high=0.16), Row(method="SFT"), Row(method=PROBE, value=0.2)],
    notes=["A note."],
    reward_against_k=Curve(k=[1, 2, 8], series={PROBE: BAND}),
    reward_against_kl=TradeOff(series={PROBE: [TradeOffPoint(beta=0, kl=1.2, reward=0.2)]}),
    reward_against_layer=LayerCurve(layers=[1, 2, 3], series={PROBE: BAND}, taken={PROBE: [1, 0, 4]}),
    reward_against_prompts=LearningCurve(prompts=[5, 5, 9], series={PROBE: BAND}),
    scores_per_prompt=PromptScores(series={PROBE: [PromptScore(task_id="HumanEval/0", base=0.5, score=-0.1)]}),
)


def test_results_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    assert Results.from_json(RICH.to_json()) == RICH
    RICH.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == RICH


def test_json_holds_null_and_plain_numbers_where_numpy_and_nan_were_given() -> None:
    row = Row(method="probe", value=float("nan"), auc=np.float32(0.5), prompts=np.int64(3))  # type: ignore[arg-type]
    curve = Curve(k=np.array([1, 2]), series={"probe": Band(value=[1, math.nan], low=np.zeros(2), high=np.ones(2))})  # type: ignore[arg-type]
    results = dataclasses.replace(RICH, rows=[row], reward_against_k=curve)
    data = json.loads(results.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (data["rows"][0]["value"], data["rows"][0]["auc"], data["rows"][0]["prompts"]) == (None, 0.5, 3)
    assert data["reward_against_k"] == {
        "k": [1, 2],
        "series": {"probe": {"value": [1.0, None], "low": [0.0, 0.0], "high": [1.0, 1.0]}},
    }
    assert isinstance(data["reward_against_k"]["series"]["probe"]["value"][0], float)
    assert Results.from_json(results.to_json()) == results


def edited(*path: str | int, value: Any) -> str:
    data = json.loads(RICH.to_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (edited("colour", value=1), "colour"),
        (edited("rows", 2, "aucc", value=1), r"rows\[2\].*aucc"),
        (edited("rows", 1, "value", value="0.3"), r"rows\[1\]\.value"),
        (edited("k", value=True), r"results\.k is True"),
        (edited("k", value=1.5), r"results\.k is 1\.5"),
        (edited("rows", value={}), r"results\.rows"),
        (edited("rows", 0, "low", value=math.nan), "NaN"),
        (edited("rows", 0, "low", value=0.2), "pass@1.*low"),
        (edited("rows", 0, "seeds", value=-1), "pass@1.*seeds"),
        (edited("mixed_prompts", value=165), "mixed_prompts"),
        (edited("reward_against_k", "k", value=[1, 4, 2]), "reward_against_k"),
        (edited("reward_against_k", "k", value=[0, 1, 2]), "reward_against_k"),
        (edited("reward_against_k", "k", value=[1, 2]), "reward_against_k.*L_PG"),
        (edited("reward_against_prompts", "prompts", value=[5, 4, 9]), "reward_against_prompts"),
        (edited("reward_against_layer", "layers", value=[1, 1, 3]), "reward_against_layer"),
        (edited("reward_against_layer", "taken", PROBE, value=[5]), "reward_against_layer.*L_PG"),
        (edited("reward_against_kl", "series", PROBE, 0, "beta", value=-1), "beta"),
        ("{}", "title"),
        ("{", "not JSON"),
    ],
)
def test_json_that_does_not_fit_is_an_error_with_its_place(text: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=place):
        Results.from_json(text)
    path = tmp_path / "humaneval.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Results.read(path)


def test_an_infinite_number_is_refused_when_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"Row\.value"):
        Row(method="probe", value=math.inf)


def test_the_line_through_prompt_scores_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.random(30), rng.standard_normal(30)
    points = [PromptScore(task_id=str(i), base=float(base[i]), score=float(2 * base[i] + noise[i])) for i in range(30)]
    points.append(PromptScore(task_id="not scored", base=0.9, score=None))
    scores = PromptScores(series={"probe": points, "one": points[:1], "equal": [points[0], points[0]]})
    assert scores.line("probe") == pytest.approx(tuple(np.polyfit(base, 2 * base + noise, 1)))
    assert scores.line("one") is None
    assert scores.line("equal") is None
