"""A user's reward function: every form of it, what it is given, and a sentence for all that can go wrong with it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qprobe.run.pools import RewardBatch, RewardRow
from qprobe.run.rewards import FunctionReward, RecordedReward, RewardError
from qprobe.store.jsonl import PromptRow

ROWS = [
    PromptRow("a", 1, "Ask a", {"word": "sea", "length": 3}),
    PromptRow("b", 4, [{"role": "user", "content": "Ask b"}], {"word": "sky", "length": 5}),
]
BATCH = RewardBatch(("a", "b"), [("a", 0, "the sea"), ("a", 1, "no"), ("b", 0, "the sky")])

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module of rewards into the working directory; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)

    def written(source: str, name: str = "my_rewards.py") -> str:
        (tmp_path / name).write_text(source)
        return name

    yield written
    for name in set(sys.modules) - known:
        if name.removeprefix("qprobe_reward_") in ("my_rewards", "beside"):
            del sys.modules[name]


def rewards(reward: FunctionReward, batch: RewardBatch = BATCH) -> list[float]:
    reward.check()
    ((given, rows),) = reward([batch])
    assert given is batch
    assert all(row.seconds >= 0 and row.verdict == "" for row in rows)
    return [row.reward for row in rows]


SINGLE = "def f(prompt, completion, word): return float(word in completion)"


@pytest.mark.parametrize("where", ["my_rewards:f", "my_rewards.py:f", "./my_rewards.py:f"])
def test_a_function_is_found_by_module_or_file(where: str, write: Write) -> None:
    write(SINGLE)
    reward = FunctionReward(where, ROWS)
    assert reward.name == "my_rewards.f"
    assert rewards(reward) == [1.0, 0.0, 1.0]


def test_a_function_of_an_installed_package_is_found() -> None:
    assert FunctionReward("os.path:basename", ROWS).function is __import__("os").path.basename


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(completion): return len(completion) / 10", [0.7, 0.2, 0.7]),
        ("def f(completion, prompt): return prompt == 'Ask a'", [1.0, 1.0, 0.0]),
        ("def f(completion, prompt): return prompt == [{'role': 'user', 'content': 'Ask b'}]", [0.0, 0.0, 1.0]),
        ("def f(prompt, completion, task_id): return int(task_id == 'b')", [0.0, 0.0, 1.0]),
        ("def f(prompt, completion, *, length, word): return (length + len(word)) / 10", [0.6, 0.6, 0.8]),
        ("def f(prompt, completion, **fields): return float(sorted(fields) == ['length', 'word'])", [1.0, 1.0, 1.0]),
        ("def f(prompt, completion, word, **rest): return float(list(rest) == ['length'])", [1.0, 1.0, 1.0]),
        ("def f(prompt, completion, strict=True): return float(strict)", [1.0, 1.0, 1.0]),
        ("def f(prompt, completion, length=0): return length / 10", [0.3, 0.3, 0.5]),
        ("import numpy as np\ndef f(completion): return np.float32(0.5)", [0.5, 0.5, 0.5]),
        ("import numpy as np\ndef f(completion): return np.bool_(True)", [1.0, 1.0, 1.0]),
        ("class F:\n    def __call__(self, completion): return 1\nf = F()", [1.0, 1.0, 1.0]),
        ("class C:\n    @staticmethod\n    def g(completion): return 1\nf = C.g", [1.0, 1.0, 1.0]),
    ],
)
def test_it_is_given_by_name_what_it_asks_for(source: str, expected: list[float], write: Write) -> None:
    write(source)
    assert rewards(FunctionReward("my_rewards.py:f", ROWS)) == expected


@pytest.mark.parametrize(
    "source",
    [
        "def f(prompts, completions, word): return [float(w in c) for w, c in zip(word, completions)]",
        "def f(prompt, completion, **fields): return tuple(w in c for w, c in zip(fields['word'], completion))",
        "import numpy as np\ndef f(completions, **_): return np.array(['sea' in c or 'sky' in c for c in completions])",
    ],
)
def test_batched_it_takes_lists_and_gives_one(source: str, write: Write) -> None:
    write(source)
    assert rewards(FunctionReward("my_rewards.py:f", ROWS, batched=True)) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("where", "source", "message"),
    [
        ("rewards", "", r"file\.py"),
        (":f", "", "reward"),
        ("nowhere_at_all:f", "", "nowhere_at_all"),
        ("none.py:f", "", r"none\.py"),
        ("my_rewards:g", SINGLE, "my_rewards"),
        ("my_rewards.py:x", "x = 3", "function"),
        ("my_rewards.py:f", "import nothing_of_the_kind", "ModuleNotFoundError"),
        ("my_rewards:f", "1 / 0", "my_rewards"),
        ("my_rewards:f", "def f(:", "SyntaxError"),
        ("my_rewards:f", "raise SystemExit(3)", "SystemExit"),
        ("my_rewards.py:f", "async def f(completion): return 1", "function"),
        ("my_rewards.py:f", "def f(prompt): return 1", "completion"),
        ("my_rewards.py:f", "def f(prompts, completions): return [1]", "completion"),
        ("my_rewards.py:f", "def f(completion, /): return 1", "completion"),
        (
            "my_rewards.py:f",
            "def f(prompt, completion, colour): return 1",
            "colour",
        ),
    ],
)
def test_what_cannot_be_called_is_a_sentence_beforehand(where: str, source: str, message: str, write: Write) -> None:
    write(source)
    with pytest.raises(ValueError, match=message):
        FunctionReward(where, ROWS).check()


def test_a_field_is_in_every_line_or_in_none(write: Write) -> None:
    write("def f(completion, colour=None): return 1")
    rows = [*ROWS, PromptRow("c", 9, "Ask c", {"colour": "red"})]
    with pytest.raises(ValueError, match="colour"):
        FunctionReward("my_rewards.py:f", rows).check()
    write("def f(completion, **fields): return float(not fields)")
    assert rewards(FunctionReward("my_rewards.py:f", rows)) == [1.0, 1.0, 1.0]  # those that every line has: none


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.5", r"gave 1.5 for completion 1 of prompt a \(line 1\): a reward lies in \[0, 1\]"),
        ("-0.01", "gave -0.01"),
        ("float('nan')", "gave nan"),
        ("float('inf')", "gave inf"),
        ("None", "gave None for completion 1 of prompt a .*: a reward is a number in"),
        ("'1'", "gave '1'"),
        ("[1.0]", r"gave \[1.0\]"),
        ("1j", "gave 1j"),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_no_reward_is_a_sentence_with_function_and_prompt(
    value: str, message: str, batched: bool, write: Write
) -> None:
    write(
        f"def f(completion): return {value} if completion == 'no' else 1\n"
        f"def g(completions): return [f(c) for c in completions]"
    )
    where = "my_rewards.py:g" if batched else "my_rewards.py:f"
    with pytest.raises(RewardError, match=f"The reward function {where} {message}"):
        rewards(FunctionReward(where, ROWS, batched))


@pytest.mark.parametrize(("value", "said"), [("[1.0]", "1 values"), ("0.5", "0.5"), ("None", "None"), ("{}", "{}")])
def test_batched_it_gives_one_number_a_completion(value: str, said: str, write: Write) -> None:
    write(f"def f(completions): return {value}")
    with pytest.raises(RewardError, match=rf"gave {said} for 3 completions \(from prompt a \(line 1\) on\)"):
        rewards(FunctionReward("my_rewards.py:f", ROWS, batched=True))


@pytest.mark.parametrize("batched", [False, True])
def test_a_failure_is_raised_with_prompt_function_and_its_line_never_a_zero(batched: bool, write: Write) -> None:
    write("import json\ndef f(completion):\n    return json.loads('{')\n")
    place = "a batch from prompt a" if batched else "completion 0 of prompt a"
    with pytest.raises(
        RewardError, match=rf"my_rewards.py:f failed on {place} \(line 1\).*JSONDecodeError.*my_rewards.py, line 3"
    ):
        rewards(FunctionReward("my_rewards.py:f", ROWS, batched))
    write("import sys\ndef f(completion): sys.exit('done')")
    with pytest.raises(RewardError, match="SystemExit: done"):
        rewards(FunctionReward("my_rewards.py:f", ROWS, batched))


def test_the_identity_is_that_of_the_source_and_of_the_fields_it_reads(write: Write) -> None:
    def identity(rows: list[PromptRow] = ROWS, batched: bool = False) -> dict[str, Any]:
        return FunctionReward("my_rewards.py:f", rows, batched).identity()

    write("LIMIT = 3\ndef f(completion, word): return LIMIT / 10")
    first = identity()
    assert identity() == first
    assert identity(ROWS[::-1]) == first  # the order of the prompts decides nothing
    assert identity(batched=True) != first
    changed = [PromptRow("a", 1, "Ask a", {"word": "sea!", "length": 3}), ROWS[1]]
    assert identity(changed) != first
    unread = [PromptRow("a", 1, "Ask a", {"word": "sea", "length": 4}), ROWS[1]]
    assert identity(unread) == first
    write("LIMIT = 4\ndef f(completion, word): return LIMIT / 10")  # not the function itself
    assert identity() != first


def test_recorded_rewards_are_given_by_prompt_and_sample() -> None:
    reward = RecordedReward({"a": [0.25, -3.0], "b": [7.0]})
    reward.check()
    assert list(reward([BATCH])) == [(BATCH, [RewardRow(0.25), RewardRow(-3.0), RewardRow(7.0)])]
    assert reward.identity() != RecordedReward({"a": [0.25, -3.0], "b": [7.5]}).identity()
