"""What a run advises follows from its numbers: the probe where it is better, the control where that does as well."""

from __future__ import annotations

import numpy as np
import pytest

from qprobe.evaluation import tested as completions
from qprobe.evaluation.advice import advice
from qprobe.evaluation.best_control import BestControl
from qprobe.evaluation.methods import Kind, Method
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.report.results import Band, Certainties, Certainty
from qprobe.run.joined import Joined

PROMPTS, ROWS = 40, 4


def pool(*, solved: bool = False) -> completions.Tested:
    """Prompts of which every one has two good and two bad completions: one completion earns .5."""
    made = np.ones(PROMPTS * ROWS) if solved else np.tile([0.0, 1.0, 0.0, 1.0], PROMPTS)
    groups = np.repeat(np.arange(PROMPTS), ROWS)
    names = [f"t/{number:02d}" for number in range(PROMPTS)]
    texts = [f"text {number}" for number in range(len(groups))]
    joined = Joined(names, groups, texts, made.astype(np.float32), [""] * len(groups), None)
    return completions.Tested(joined, EvaluationSettings(bootstrap=500), ROWS, seed=0)


def probe(mean: float, half: float = 0.5, name: str = "Q-probe auto") -> Method:
    by_k = np.stack([np.full(PROMPTS, at) for at in (0.5, half, half, mean)])
    return Method(name, Kind.PROBE, ROWS, spread(mean)[None], by_k=by_k)


def spread(mean: float) -> np.ndarray:
    """(P,) 0 or 1 with this mean."""
    return (np.arange(PROMPTS) < round(mean * PROMPTS)).astype(float)[np.random.default_rng(1).permutation(PROMPTS)]


def control(mean: float) -> BestControl:
    return BestControl("shortest", spread(mean), "")


@pytest.mark.parametrize(
    ("own", "best", "begins"),
    [
        (0.9, control(0.5), "Use Q-probe auto: it earns +0.400 ["),
        (0.9, None, "Use Q-probe auto: it earns +0.400 ["),
        (0.9, control(0.9), "Use the best control, shortest, which needs no training: it earns +0.400 ["),
        (0.5, control(0.9), "Use the best control, shortest, which needs no training"),
        (0.5, control(0.5), "Take one completion: of Q-probe auto no gain can be told, +0.000 ["),
        (0.5, None, "Take one completion: of Q-probe auto no gain can be told, +0.000 ["),
        (0.2, control(0.4), "Take one completion"),
        (0.7, control(0.6), "Use Q-probe auto: it earns +0.200 ["),
    ],
)
def test_what_to_use(own: float, best: BestControl | None, begins: str) -> None:
    assert advice(pool(), [probe(own)], best)[0].startswith(begins)


def test_the_probe_that_is_spoken_of_is_auto_or_else_the_last_and_not_the_luckiest() -> None:
    lucky, last = probe(0.9, name="Q-probe L_Q"), probe(0.5, name="Q-probe L_PG")
    assert "Q-probe auto" in advice(pool(), [lucky, probe(0.5), last], None)[0]
    assert "Q-probe L_PG" in advice(pool(), [lucky, last], None)[0]


@pytest.mark.parametrize(
    ("half", "said"),
    [
        (0.6, "+0.200 [+0.200, +0.200] over 2 of them: more of them would help"),
        (0.8, "fewer would do"),
        (0.9, "fewer would do"),
    ],
)
def test_whether_more_candidates_would_help(half: float, said: str) -> None:
    found = advice(pool(), [probe(0.8, half)], None)
    assert said in next(sentence for sentence in found if sentence.startswith("Candidates: 4 earn"))


def test_of_a_pair_the_gain_says_it_and_no_third_answer_is_asked_for() -> None:
    two = completions.Tested(pool().joined, EvaluationSettings(bootstrap=500), 2, seed=0)
    found = advice(two, [probe(0.8, 0.8)], None)
    assert found
    assert not [sentence for sentence in found if sentence.startswith("Candidates")]


@pytest.mark.parametrize(
    ("low", "brier", "end"),
    [(0.75, 0.15, "none of these to the others."), (0.55, 0.15, "too little"), (0.75, 0.25, "too little")],
)
def test_whether_being_sure_says_which_prompts_to_answer(low: float, brier: float, end: str) -> None:
    known = Certainty(
        predicted=[0.4, 0.8],
        observed=Band(value=[0.4, 0.8], low=[0.2, 0.6], high=[0.6, 0.9]),
        prompts=[20, 20],
        brier=brier,
        brier_of_mean=0.24,
        shares=[0.5, 1.0],
        surest=Band(value=[0.8, 0.6], low=[low, 0.5], high=[0.9, 0.7]),
    )
    found = advice(pool(), [probe(0.6)], None, Certainties(series={"Q-probe auto": known}))[-1]
    assert f"surest of, 0.800 [{low:.3f}, 0.900] are right, of all 0.600" in found
    assert end in found
    assert (
        advice(pool(), [probe(0.6, name="Q-probe L_Q")], None, Certainties(series={"Q-probe auto": known}))[-1] != found
    )


def test_where_there_is_nothing_to_choose_nothing_is_advised() -> None:
    assert advice(pool(solved=True), [probe(0.9)], None) == []
    assert advice(pool(), [], control(0.9)) == []
