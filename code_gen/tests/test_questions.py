"""Questions: prompts in both styles, rewards and verdicts, which completions agree."""

import csv
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from qprobe import store
from qprobe.baselines.consistency import SelfConsistency
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.run.stages import RewardBatch, Split
from qprobe.sampling import Completion
from qprobe.sampling.base import stop_position
from qprobe_code_gen.problems.gsm8k import Question
from qprobe_code_gen.questions import REQUEST, FinalNumberReward, QuestionStyle, SameNumber

CLIPS = Question("t/0", "How many clips?", "48 + 24 = 72.", "72")
COINS = Question("t/1", "How much money?", "Twice $500.", "1,000")


def test_few_shot_shows_worked_examples_as_the_answer_should_look() -> None:
    assert QuestionStyle("few_shot", examples=[CLIPS]).prompt(COINS).text == (
        "Question: How many clips?\nAnswer: 48 + 24 = 72.\n#### 72\n\nQuestion: How much money?\nAnswer:"
    )


def test_chat_shows_them_as_turns() -> None:
    messages = QuestionStyle("chat", examples=[CLIPS]).prompt(COINS).messages
    assert messages == (
        {"role": "user", "content": f"{REQUEST}\n\nHow many clips?"},
        {"role": "assistant", "content": "48 + 24 = 72.\n#### 72"},
        {"role": "user", "content": f"{REQUEST}\n\nHow much money?"},
    )
    assert len(QuestionStyle("chat").prompt(COINS).messages) == 1


def test_a_further_question_ends_a_continued_text_and_a_chat_ends_by_itself() -> None:
    style = QuestionStyle("few_shot", examples=[CLIPS])
    answer = " Twice 500 is 1000.\n#### 1000"
    assert stop_position(f"{answer}\n\nQuestion: And then?", style.stop([COINS])) in (len(answer), len(answer) + 1)
    assert QuestionStyle("chat").stop([COINS]) == ()


def test_unfit_styles_are_sentences() -> None:
    with pytest.raises(ValueError, match="'zero_shot' does not suit questions: choose one of few_shot, chat"):
        QuestionStyle("zero_shot")
    with pytest.raises(ValueError, match="few_shot was given no examples"):
        QuestionStyle("few_shot")


def test_rewards_and_verdicts_batch_by_batch() -> None:
    first = RewardBatch(("t/0",), [("t/0", 0, "The answer is 72."), ("t/0", 1, "#### 27"), ("t/0", 2, "Many.")])
    second = RewardBatch(("t/1",), [("t/1", 0, "#### $1000.00")])
    found = dict(zip("ab", FinalNumberReward([CLIPS, COINS])([first, second]), strict=True))
    assert found["a"][0] is first
    rows = [(r.reward, r.verdict, r.detail) for _, rewarded in found.values() for r in rewarded]
    assert rows == [(1.0, "right", "72"), (0.0, "wrong", "27"), (0.0, "no_number", ""), (1.0, "right", "1000.00")]


def test_completions_agree_that_end_in_the_same_number() -> None:
    batches = [[("t/0", "#### 72"), ("t/0", "so 72.0"), ("t/0", "Many.")], [("t/1", "The answer is 3/4.")]]
    assert list(SameNumber().keys(batches)) == [[Decimal(72), Decimal(72), None], [Decimal("0.75")]]


def test_a_pipeline_learns_which_numbers_are_right(fakes: ModuleType, tmp_path: Path) -> None:
    """Without a model: of four candidates one is right, and the features tell them apart."""

    class Sampler(fakes.Sampler):  # type: ignore[misc, name-defined]
        def _completion(self, seed: int) -> Completion:
            text = ("so 7.0 clips", "#### 8", "The answer is 9.", "I cannot say.")[seed % 4]
            return Completion(text, list(text.encode()), "stop", 0.0, seed)

    class Embedder(fakes.Embedder):  # type: ignore[misc, name-defined]
        def _state(self, prompt: list[int], completion: list[int]) -> Tensor:
            return torch.tensor([float(letter in completion) for letter in b"789I"])

    questions = [Question(f"t/{i:02d}", f"How many for {i}?", "Count.", "7") for i in range(12)]
    style = QuestionStyle("chat")
    pipeline = Pipeline(
        run=tmp_path / "run",
        title="Questions",
        tests=[Split("questions", [style.prompt(q) for q in questions], {"data": "made"})],
        reward=FinalNumberReward(questions),
        sampler=Sampler(8),
        greedy=None,
        embedder=Embedder(),
        baselines=[SelfConsistency(SameNumber())],
        training=TrainingSettings(steps=25, learning_rate=0.1, minimum_mixed=2, check_every=5),
        settings=EvaluationSettings(losses=("policy_gradient",), seeds=2, folds=3, draws=5, bootstrap=100),
        progress=False,
    )
    pipeline.execute()
    rewards = store.found_table(tmp_path / "run" / "rewards" / "questions.sample" / "final_number", store.REWARDS)
    verdicts = Counter(row["verdict"] for row in rewards.read().to_pylist())
    assert set(verdicts) == {"right", "wrong", "no_number"}
    table = {
        row["method"]: row for row in csv.DictReader((tmp_path / "run/tables/questions.csv").read_text().splitlines())
    }
    assert float(table["pass@1"]["value"]) == pytest.approx(verdicts["right"] / 96)
    assert table["Q-probe L_PG"]["value"] == table["skyline pass@8"]["value"]
    assert "self-consistency" in table
