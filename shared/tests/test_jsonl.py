"""A user's files: what is read of them, how candidates are grouped, and a sentence with the line for all that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from qprobe.prompts import Prompt
from qprobe.store import jsonl


def written(folder: Path, *lines: Any, name: str = "file.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def candidate(completion: str, reward: Any = 1, prompt: str = "p", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "reward": reward, **more}


def test_prompts_are_named_by_their_lines_unless_they_name_themselves(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo\u2028?"}]
    path = written(
        tmp_path,
        {"prompt": " one", "word": "sea"},
        "",
        {"messages": messages, "task_id": "mine"},
        {"prompt": "3", "task_id": 7},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as Windows writes
    rows = jsonl.read_prompts(path, "prompts")
    assert [(row.task_id, row.line, row.prompt, row.fields) for row in rows] == [
        ("prompts-00001", 1, " one", {"word": "sea"}),
        ("mine", 3, messages, {}),
        ("7", 4, "3", {}),
    ]
    assert rows[0].as_prompt("text") == Prompt("prompts-00001", text=" one")
    assert rows[0].as_prompt("chat").messages == ({"role": "user", "content": " one"},)
    assert rows[1].as_prompt("text").messages == tuple(messages)  # a conversation stays one


def test_a_line_may_hold_any_separator_that_is_no_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\n', encoding="utf-8")
    assert [row.prompt for row in jsonl.read_prompts(path, "p")] == ["a\u2028b\x85c", "d"]


OTHER = {"prompt": "other"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([OTHER, '{"prompt": "a"'], "line 2: .*JSON"),
        ([OTHER, "", "[1]"], "line 3: .*JSON"),
        ([OTHER, {"text": "a"}], "line 2: .*neither"),
        ([{"prompt": "a", "messages": []}], "line 1: .*both"),
        ([{"prompt": 3}], "line 1: prompt"),
        ([{"prompt": " \n"}], "line 1: .*empty"),
        (['{"prompt": "a\\ud800"}'], "line 1: prompt"),
        ([{"messages": []}], "line 1: messages"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages"),
        ([{"messages": [{"role": "user", "content": 1}]}], "line 1: messages"),
        ([OTHER, {"messages": [{"role": "wizard", "content": "a"}]}], "line 2: .*wizard"),
        ([{"messages": [{"role": "usr", "content": "a"}]}], "line 1: .*did you mean user"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: .*assistant"),
        ([{"prompt": "a", "task_id": ""}], "line 1: task_id"),
        ([{"prompt": "a", "task_id": True}], "line 1: task_id"),
        ([OTHER, {"prompt": "a", "task_id": "x"}, {"prompt": "b", "task_id": "x"}], "line 3: .*line 2"),
        ([OTHER, {"prompt": "a"}, {"prompt": "a"}], "line 3: .*line 2"),
        ([{"prompt": "a", "completion": "b"}], "line 1: .*completion"),
        (["", " "], "no prompts"),
    ],
)
def test_a_line_that_is_no_prompt_is_a_sentence_with_its_number(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        jsonl.read_prompts(written(tmp_path, *lines), "prompts")


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        jsonl.read_prompts(tmp_path / "none.jsonl", "prompts")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="byte 12"):
        jsonl.read_prompts(tmp_path / "latin.jsonl", "prompts")


def test_test_prompts_are_not_among_the_training_prompts(tmp_path: Path) -> None:
    training = jsonl.read_prompts(written(tmp_path, OTHER, {"prompt": "a", "task_id": "x"}), "prompts")
    jsonl.check_apart(training, jsonl.read_prompts(written(tmp_path, {"prompt": "b"}), "test"))
    for line, message in [
        ({"prompt": "a"}, "Line 1 .*line 2"),
        ({"prompt": "b", "task_id": "x"}, "Line 1 .*line 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            jsonl.check_apart(training, jsonl.read_prompts(written(tmp_path, line), "test"))


def test_candidates_are_grouped_by_prompt_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        candidate("1", 0.5, "a", model="m"),
        candidate("2", True, "b"),
        candidate("3", -2, "a"),
        candidate("4", 0, "b", note=""),
        candidate("5", 1, "a"),
    )
    found = jsonl.read_candidates(path, "mine")
    assert [(row.task_id, row.prompt) for row in found.prompts] == [("mine-00001", "a"), ("mine-00002", "b")]
    assert found.completions == {"mine-00001": ["1", "3", "5"], "mine-00002": ["2", "4"]}
    assert found.rewards == {"mine-00001": [0.5, -2.0, 1.0], "mine-00002": [1.0, 0.0]}
    assert found.notes == ["Fields that are not read: model, note."]


def test_candidates_with_a_task_id_are_grouped_by_it(tmp_path: Path) -> None:
    path = written(tmp_path, *(candidate(str(n), 0, p, task_id=p.upper()) for n, p in enumerate("abab")))
    assert jsonl.read_candidates(path, "mine").completions == {"A": ["0", "2"], "B": ["1", "3"]}


def test_repeated_completions_are_kept_and_told(tmp_path: Path) -> None:
    path = written(tmp_path, candidate("yes"), candidate("no", 0), candidate("yes"), candidate("yes", 0.5))
    found = jsonl.read_candidates(path, "mine")
    assert found.completions == {"mine-00001": ["yes", "no", "yes", "yes"]}
    assert found.notes[0].startswith("2 of 4 lines repeat a completion of their prompt (the first: line 3)")


def test_a_prompt_with_a_single_candidate_is_left_out_and_told(tmp_path: Path) -> None:
    path = written(tmp_path, candidate("1"), candidate("2", 1, "alone"), candidate("3"))
    found = jsonl.read_candidates(path, "mine")
    assert list(found.completions) == list(found.rewards) == [row.task_id for row in found.prompts] == ["mine-00001"]
    assert found.notes == [
        "1 of 2 prompts have a single candidate (the first: line 2): there is nothing to choose, and they are left out."
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "p", "reward": 1}], "line 1: .*completion"),
        ([candidate("1"), {"prompt": "p"}], "line 2: .*completion and no reward"),
        ([{"completion": "c", "reward": 1}], "line 1: .*neither"),
        ([candidate("1", float("nan"))], "line 1: .*nan"),
        ([candidate("1", float("-inf"))], "line 1: .*-inf"),
        (['{"prompt": "p", "completion": "c", "reward": 1' + 400 * "0" + "}"], "line 1: .*1000"),
        ([candidate("1", "good")], "line 1: .*good"),
        ([candidate("1", None)], "line 1: .*None"),
        ([{"prompt": "p", "completion": None, "reward": 1}], "line 1: completion"),
        (["{", candidate("1")], "line 1: .*JSON"),
        ([candidate("1", task_id="a"), candidate("2", task_id="b")], "line 2: .*line 1"),
        ([candidate("1", task_id="a"), candidate("2", 1, "q", task_id="a")], "line 2: .*line 1"),
        ([], "no candidates"),
        ([candidate("1"), candidate("2", 1, "q")], "single candidate"),
    ],
)
def test_a_line_that_is_no_candidate_is_a_sentence_with_its_number(
    lines: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        jsonl.read_candidates(written(tmp_path, *lines), "mine")
