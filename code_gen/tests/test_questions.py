"""Questions: prompts in both styles, rewards and verdicts, which completions agree."""

from decimal import Decimal

import pytest

from qprobe.sampling.base import stop_position
from qprobe.stages import RewardBatch
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
