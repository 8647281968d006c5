"""GSM-8K: rows and files, prompts in both styles, the number that an answer ends in, rewards, which answers agree."""

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qprobe import store
from qprobe.baselines.consistency import SelfConsistency
from qprobe.evaluation.sweep import EvaluationSettings
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.training import TrainingSettings
from qprobe.run.pools import RewardBatch, Split
from qprobe.sampling import Completion
from qprobe.sampling.base import stop_position
from qprobe_code_gen.gsm8k import (
    REQUEST,
    FinalNumberReward,
    Question,
    QuestionStyle,
    SameNumber,
    final_number,
    load,
    number,
)

ROW = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many?",
    "answer": "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}


def published_file(split: str) -> str:
    folder = os.environ.get("QPROBE_TEST_DATA")
    if not folder:
        pytest.skip(f"QPROBE_TEST_DATA is not set: it names a folder with {split}.jsonl.gz")
    return str(Path(folder) / f"{split}.jsonl.gz")


@pytest.mark.parametrize(("split", "size"), [("gsm8k-train", 7473), ("gsm8k-test", 1319)])
def test_every_published_answer_is_read_and_rewarded(split: str, size: int) -> None:
    file = published_file(split)
    questions = load(split, file).problems
    rows = [json.loads(line) for line in gzip.decompress(Path(file).read_bytes()).splitlines()]
    assert len(questions) == len(rows) == size
    assert [q.text for q in questions] == [row["question"].strip() for row in rows]
    behind_mark = [Decimal(row["answer"].split("####")[1].strip().replace(",", "")) for row in rows]
    assert [final_number(row["answer"]) for row in rows] == behind_mark
    completions = [
        (q.task_id, i, text)
        for q, row in zip(questions, rows, strict=True)
        for i, text in enumerate(
            (row["answer"], q.worked, f"The answer is {behind_mark[int(q.task_id.split('/')[1])] + 1}.")
        )
    ]
    [(_, rewarded)] = FinalNumberReward(questions)([RewardBatch(tuple(q.task_id for q in questions), completions)])
    assert [row.verdict for row in rewarded] == ["right", "right", "wrong"] * size
    assert sum(row.reward for row in rewarded) == 2 * size


def test_a_row_becomes_a_question(jsonl: Callable[..., Path]) -> None:
    [question] = load("gsm8k-test", str(jsonl([ROW]))).problems
    assert question.task_id == "gsm8k-test/0"
    assert question.worked == "In May 48/2 = 24.\nIn all 48+24 = 72.\n#### 72"


def test_a_text_may_hold_line_ends_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW | {"question": "How\u2028many?"}, ensure_ascii=False))
    assert load("gsm8k-test", str(path)).problems[0].text == "How\u2028many?"


def test_plain_gzipped_and_hub_rows_give_the_same_problems(
    tmp_path: Path, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = jsonl([ROW]), tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    asked = []

    def hub(*words: str) -> dict[str, list[dict[str, str]]]:
        asked.append(words)
        return {"test": [ROW], "train": [ROW, ROW]}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    known = load("gsm8k-test", str(plain)).identity()
    assert load("gsm8k-test", str(packed)).identity() == load("gsm8k-test").identity() == known
    assert len(load("gsm8k-train").problems) == 2
    assert asked == [("openai/gsm8k", "main")] * 2
    assert load("gsm8k-test", str(jsonl([ROW | {"answer": "#### 73"}]))).identity() != known


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"question": "How many?"}, "answer"),
        ({"answer": "#### 2"}, "question"),
        (ROW | {"answer": "It is 72."}, "####"),
        (ROW | {"answer": "#### seventy"}, "seventy"),
        (ROW | {"question": " "}, "question"),
        (ROW | {"answer": 72}, "answer"),
        (7, "object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row: Any, word: str, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2 .*{word}"):
        load("gsm8k-test", str(jsonl([ROW, row], "bad.jsonl")))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (f"{json.dumps(ROW)}\n\n{{not json\n".encode(), "line 3"),
        (b'{"question": "caf\xe9"}\n', "line 1"),
        (b"", "GSM-8K"),
    ],
)
def test_a_bad_file_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        load("gsm8k-test", str(tmp_path / "bad"))


def test_data_that_is_not_there_names_the_key_of_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="train_file"):
        load("gsm8k-train", str(tmp_path / "nothing.jsonl"))

    def refuse(*_: str) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"no route\).*test_file"):
        load("gsm8k-test")


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
    assert stop_position(f"{answer}\n\nQuestion: And then?", style.stop()) in (len(answer), len(answer) + 1)
    assert QuestionStyle("chat").stop() == ()


def test_unfit_styles_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_shot"):
        QuestionStyle("zero_shot")
    with pytest.raises(ValueError, match="examples"):
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Behind the mark.
        ("48 / 2 = 24 in May.\n#### 72", "72"),
        ("#### $1,000.00", "1000"),
        ("####72", "72"),
        ("#### -5", "-5"),
        ("#### $-5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### 25%", "25"),
        ("#### **72**", "72"),
        ("####\n72", "72"),
        ("#### 72 clips in 2 months", "72"),
        ("#### 48 + 24 = 72", "72"),
        ("#### 72\n\nQ: another?\n#### 3", "72"),
        ("The answer is 5.\n#### 6", "6"),
        ("#### 3/4", "0.75"),
        ("#### The answer is 72", "72"),
        ("#### 1. Count\nThere are 3.\n#### 2. Add\nThe answer is 9.", "9"),
        ("####", None),
        # What the answer is said to be.
        ("The answer is 8.", "8"),
        ("the answer is therefore 3 of the 10", "3"),
        ("The final answer is: $\\boxed{72}$ out of 100", "72"),
        ("So the answer is 1,234.50 dollars", "1234.5"),
        ("The answer is **12** because 3 * 4 is easy: 7.", "12"),
        ("The answer is 5. No, the answer is 6. Checked 2 times.", "6"),
        ("The answer is 15 * 8 = 120 pints. It took 2 steps.", "120"),
        ("The answer to the question is 7, not 9", "7"),
        ("The answer should be 40 apples for 2.", "40"),
        ("**Answer:** $1,200 in 3 years", "1200"),
        ("Final answer: 7 of 9", "7"),
        ("Answer: She sold 48, then 24. In all 72.", "72"),
        ("The answer is unclear, I count 4.", "4"),
        # Boxed.
        ("\\boxed{42} is what 7 of us found", "42"),
        ("$\\boxed{\\frac{3}{4}}$ of 8", "0.75"),
        ("\\boxed{1{,}000} for 2", "1000"),
        ("\\boxed{\\$18} for 3", "18"),
        ("\\boxed{25\\%} of 60", "25"),
        ("\\boxed{\\text{about } 9} by 10", "9"),
        ("first \\boxed{1}, then \\boxed{2}, 3 times", "2"),
        ("\\boxed{x = 6} for 2", "6"),
        # The last number.
        ("She sold 48 and then 24, together 72 clips.", "72"),
        ("10-3", "3"),
        ("10 - 13 = -3", "-3"),
        ("10 - 13 = \u22123", "-3"),
        ("(-4)", "-4"),
        ("It costs $1,000,000.", "1000000"),
        ("He has .75", "0.75"),
        ("So he has...5", "5"),
        ("It is Rs.500", "500"),
        ("She needs 50 m2", "50"),
        ("1,2,3", "3"),
        ("half is 1/2", "0.5"),
        ("5/0", "0"),
        ("72.", "72"),
        ("007", "7"),
        ("<b>72</b>", "72"),
        # None.
        ("", None),
        ("I do not know.", None),
        ("seventy-two", None),
        ("Question: - $ , . / %", None),
    ],
)
def test_the_final_number_of_a_text(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=2), st.sampled_from(["#### {}", "answer is {}", "so {}"])
)
def test_a_number_is_read_as_it_was_written(value: Decimal, said: str) -> None:
    assert final_number(said.format(f"{value:,}")) == value
    assert final_number(said.format(value)) == value


@given(st.text(alphabet="#0123456789,.$-%/={}\\boxedanswer is:\n", max_size=200))
def test_no_text_is_too_strange(text: str) -> None:
    found = final_number(text)
    assert found is None or found.is_finite()


def test_equality_is_exact() -> None:
    assert number("1,000.00") == number("1000")
    assert number("3/4") == number(".75")
    assert number("0.1") != Decimal("0.1000000000000000055511151231257827")
    assert number("-" + "9" * 5000) == Decimal("-" + "9" * 5000)
    assert hash(number("1.50")) == hash(number("3/2"))


@pytest.mark.parametrize("text", ["", "72 clips", "4 5", "#### 4", "1,2", "five"])
def test_what_is_more_than_a_number_is_none(text: str) -> None:
    assert number(text) is None
