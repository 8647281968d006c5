"""What judges share: judgements of scores, and the reward stage against references, in a real run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qprobe.prompts import Prompt
from qprobe.run import rewarding, stages
from qprobe.run.joined import join
from qprobe.run.pools import Pool, RewardBatch, RewardRow
from qprobe_preference.judges import AgainstReference, Comparison, Judgement, tally
from qprobe_preference.judges.base import ScoreRule, folder_name

PAIR = Comparison("t", "Hi", "one", "two")


class ByNumber:
    """Prefers the answer with the larger number; fails on its call number `fails_on`, from 1."""

    name = "by-number"

    def __init__(self, fails_on: int | None = None) -> None:
        self.fails_on = fails_on
        self.seen: list[list[Comparison]] = []
        self.closed = 0

    def identity(self) -> dict[str, Any]:
        return {"judge": self.name}

    def check(self) -> None:
        raise ValueError("The judge cannot be had.")

    def close(self) -> None:
        self.closed += 1

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        self.seen.append(list(comparisons))
        if len(self.seen) == self.fails_on:
            raise RuntimeError("The judge is away.")
        numbers = [[int(text.removeprefix("answer ")) for text in (c.first, c.second)] for c in comparisons]
        return [ScoreRule().judgement(c, *map(float, pair)) for c, pair in zip(comparisons, numbers, strict=True)]


def reference_stage(fakes: ModuleType, judge: ByNumber | None = None) -> AgainstReference:
    """Every prompt's reference is 'answer 50'."""
    prompts = fakes.prompts(10)
    return AgainstReference(judge or ByNumber(), prompts, {prompt.task_id: "answer 50" for prompt in prompts})


@pytest.fixture
def pool(fakes: ModuleType, tmp_path: Path) -> Pool:
    """Ten prompts x 4 samples in batches of 3, 3, 3 and 1 prompts, sampled."""
    made = Pool(tmp_path, fakes.split(), "sample", fakes.Sampler(), seed=5, batch_rows=12)
    stages.sample(made, progress=False)
    return made


@pytest.mark.parametrize(
    ("first", "second", "win", "verdict"), [(2, 1, 1.0, "win"), (1, 2, 0.0, "loss"), (1, 1 + 1e-7, 0.5, "tie")]
)
def test_the_higher_score_wins(first: float, second: float, win: float, verdict: str) -> None:
    judgement = ScoreRule().judgement(PAIR, first, second)
    assert (judgement.win, judgement.verdict) == (win, verdict)
    assert json.loads(judgement.detail) == {"first": first, "second": second}


def test_a_soft_win_is_the_sigmoid_of_the_scaled_difference() -> None:
    # sigmoid(ln 3) = 3/4; with beta 2, sigmoid(2 ln 3) = 9/10.
    assert ScoreRule(soft=True).judgement(PAIR, math.log(3), 0.0).win == pytest.approx(0.75)
    assert ScoreRule(soft=True, beta=2.0).judgement(PAIR, 0.0, math.log(3)).win == pytest.approx(0.1)
    assert ScoreRule(soft=True).judgement(PAIR, 0.0, 1e6).win == 0.0


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_raised_and_no_loss(score: float) -> None:
    with pytest.raises(RuntimeError, match="answers to t"):
        ScoreRule().judgement(PAIR, 1.0, score)


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"beta": math.inf}, {"tie": -1.0}, {"tie": math.nan}])
def test_a_rule_that_cannot_be_is_a_sentence(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"judge\.beta"):
        ScoreRule(**values)  # type: ignore[arg-type]


def test_a_judgement_is_a_probability() -> None:
    for win in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            Judgement(win, "win")


def test_a_candidates_reward_is_its_win_against_its_prompts_reference(pool: Pool, fakes: ModuleType) -> None:
    judge = ByNumber()
    stage = reference_stage(fakes, judge)
    rewarding.reward(pool, stage, progress=False)
    joined = join(pool, stage)
    numbers = [int(text.removeprefix("answer ")) for text in joined.completions]
    assert joined.rewards.tolist() == [(n > 50) + 0.5 * (n == 50) for n in numbers]
    assert {*joined.verdicts} == {"win", "loss"}
    assert judge.closed == 1
    assert pool.rewards(stage).folder.name == "by-number"
    row = pool.rewards(stage).read(pool.batches, ["detail"]).to_pylist()[0]
    assert json.loads(row["detail"]) == {"first": float(numbers[0]), "second": 50.0}
    shown = {c.task_id: c.prompt for batch in judge.seen for c in batch}
    assert shown == {f"t-{number:03d}": f"task {number:03d}: " for number in range(10)}


def test_a_judge_that_fails_leaves_what_was_finished_and_no_zero(pool: Pool, fakes: ModuleType) -> None:
    away = ByNumber(fails_on=3)
    with pytest.raises(RuntimeError, match="The judge is away"):
        rewarding.reward(pool, reference_stage(fakes, away), progress=False)
    assert away.closed == 1
    assert pool.rewards(reference_stage(fakes)).read().num_rows == 24
    judge = ByNumber()
    rewarding.reward(pool, reference_stage(fakes, judge), progress=False)
    assert [len(batch) for batch in judge.seen] == [12, 4]
    assert join(pool, reference_stage(fakes)).rewards.shape == (40,)


def test_conversations_reach_the_judge_as_messages_with_the_opening_of_both_answers() -> None:
    messages = ({"role": "user", "content": "Hi"},)
    opened, closed = (Prompt("o", messages=messages, opening=opening) for opening in ("Sure:\n", ""))
    judge = ByNumber()
    stage = AgainstReference(judge, [opened], {"o": "answer 1"})
    list(stage([RewardBatch(("o",), [("o", 0, "answer 2")])]))
    assert judge.seen == [[Comparison("o", messages, "answer 2", "answer 1", "Sure:\n")]]
    assert judge.seen[0][0].shown == ("Sure:\nanswer 2", "Sure:\nanswer 1")
    assert stage.identity() != AgainstReference(judge, [closed], {"o": "answer 1"}).identity()
    # White space around an answer is not shown.
    assert Comparison("t", "Hi", " one\n two\n\n", "\tthree").shown == ("one\n two", "three")


def test_the_identity_knows_judge_prompts_and_references(fakes: ModuleType) -> None:
    prompts = fakes.prompts(2)
    same = {prompt.task_id: "answer 50" for prompt in prompts}
    identities = [
        AgainstReference(ByNumber(), prompts, same).identity(),
        AgainstReference(ByNumber(), prompts, same | {"t-001": "answer 51"}).identity(),
        AgainstReference(ByNumber(), [prompts[0], Prompt("t-001", text="another")], same).identity(),
    ]
    assert identities[0]["judge"] == {"judge": "by-number"}
    assert len({json.dumps(identity) for identity in identities}) == 3
    # References of prompts that are not judged change nothing.
    assert AgainstReference(ByNumber(), prompts, same | {"x": "y"}).identity() == identities[0]


def test_what_cannot_be_judged_is_said_at_once(fakes: ModuleType) -> None:
    with pytest.raises(ValueError, match="t-001"):
        AgainstReference(ByNumber(), fakes.prompts(10), {"t-000": "answer 1"})
    with pytest.raises(ValueError, match="The judge cannot be had"):
        reference_stage(fakes).check()


def test_what_is_no_verdict_is_counted_and_told(fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Shrugs(ByNumber):
        def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
            flagged = Judgement(1.0, "win", json.dumps({"flagged": ["first"]}))
            return [flagged, *[Judgement(0.5, "unparsed")] * (len(comparisons) - 1)]

    rows = [("t-000", number, "answer 1") for number in range(4)]
    ((_, rewarded),) = reference_stage(fakes, Shrugs())([RewardBatch(("t-000",), rows)])
    assert tally(rewarded) == {"win": 1, "unparsed": 3, "flagged": 1}
    assert isinstance(rewarded[0], RewardRow)
    said = capsys.readouterr().err
    assert "Of 4 judgements by by-number: " in said
    assert "3 unparsed" in said
    assert "1 flagged" in said


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("", "a"),
        ((), "a"),
        (({"role": "user", "content": [{"type": "image_url"}]},), "a"),
        (({"content": "Hi"},), "a"),
        ("Hi", None),
    ],
)
def test_what_is_no_text_is_refused(prompt: Any, first: Any) -> None:
    with pytest.raises(ValueError, match="The prompt t "):
        Comparison("t", prompt, first, "b")


def test_a_judges_folder_is_a_plain_name(tmp_path: Path) -> None:
    assert folder_name(None, "org/model:v1", "soft") == "judge-org-model-v1-soft"
    assert folder_name("my judge", "m") == "my-judge"
    (tmp_path / "local").mkdir()
    assert folder_name(None, str(tmp_path / "local"), "") == "judge-local"
