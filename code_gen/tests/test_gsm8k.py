"""GSM-8K as questions: rows, bad files, and what the data set's own answers earn."""

import gzip
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from qprobe.run.stages import RewardBatch
from qprobe_code_gen.answers import final_number
from qprobe_code_gen.problems.gsm8k import SPLITS, load
from qprobe_code_gen.questions import FinalNumberReward

ROW = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many?",
    "answer": "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}


def published_file(split: str) -> str:
    folder = os.environ.get("QPROBE_TEST_DATA")
    if not folder:
        pytest.skip(f"QPROBE_TEST_DATA is not set: it names a folder with {split}.jsonl.gz")
    return str(Path(folder) / f"{split}.jsonl.gz")


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


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


def test_a_row_becomes_a_question(tmp_path: Path) -> None:
    [question] = load("gsm8k-test", write_rows(tmp_path / "test.jsonl", [ROW])).problems
    assert question.task_id == "gsm8k-test/0"
    assert question.worked == "In May 48/2 = 24.\nIn all 48+24 = 72.\n#### 72"


def test_a_text_may_hold_line_ends_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW | {"question": "How\u2028many?"}, ensure_ascii=False))
    assert load("gsm8k-test", str(path)).problems[0].text == "How\u2028many?"


def test_plain_gzipped_and_hub_rows_give_the_same_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_rows(tmp_path / "test.jsonl", [ROW])
    packed = tmp_path / "test.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    asked = []

    def hub(*words: str) -> dict[str, list[dict[str, str]]]:
        asked.append(words)
        return {"test": [ROW], "train": [ROW, ROW]}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    known = load("gsm8k-test", plain)
    assert load("gsm8k-test", str(packed)).identity() == known.identity()
    assert load("gsm8k-test").identity() == known.identity()
    assert len(load("gsm8k-train").problems) == 2
    assert asked == [("openai/gsm8k", "main")] * 2


def test_another_answer_is_another_identity(tmp_path: Path) -> None:
    other = ROW | {"answer": "#### 73"}
    first, second = (load("gsm8k-test", write_rows(tmp_path / f"{i}", [row])) for i, row in enumerate((ROW, other)))
    assert first.identity() != second.identity()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "How many?"}, "line 2 is no problem of GSM-8K: it has no answer"),
        ({"answer": "#### 2"}, "line 2 is no problem of GSM-8K: it has no question"),
        (ROW | {"answer": "It is 72."}, r"line 2 is no problem of GSM-8K: its answer must end in #### and a number"),
        (ROW | {"answer": "#### seventy"}, "line 2 .* ends in '#### seventy'"),
        (ROW | {"question": " "}, "line 2 .* the question not empty"),
        (ROW | {"answer": 72}, "line 2 .* must be texts"),
        (7, "line 2 is no problem of GSM-8K: write a JSON object"),
    ],
)
def test_a_bad_row_is_a_sentence_with_file_and_line(row: Any, sentence: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [ROW, row])
    with pytest.raises(ValueError, match=f"bad.jsonl, {sentence}"):
        load("gsm8k-test", path)


def test_bad_files_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.jsonl; give dataset\.train_file=FILE"):
        load("gsm8k-train", str(tmp_path / "nothing.jsonl"))
    (tmp_path / "broken").write_text(f"{json.dumps(ROW)}\n\n{{not json\n")
    with pytest.raises(ValueError, match="broken, line 3 is not JSON"):
        load("gsm8k-test", str(tmp_path / "broken"))
    (tmp_path / "latin").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin, line 1 is not JSON"):
        load("gsm8k-test", str(tmp_path / "latin"))
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="has no problem of GSM-8K"):
        load("gsm8k-test", str(tmp_path / "empty"))

    def refuse(*_: str) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"GSM-8K could not .* openai/gsm8k \(no route\): .* dataset\.test_file=FILE"):
        load("gsm8k-test")
    assert set(SPLITS) == {"gsm8k-train", "gsm8k-test"}
