"""Few-shot on successes: which are shown, how they are put, and how many a prompt can have."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

from qprobe.baselines.base import TrainingRow
from qprobe.baselines.few_shot import FewShot, FewShotSettings, Shot, successes, with_shots
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool


def row(task: str, completion: str, reward: float) -> TrainingRow:
    return TrainingRow(Prompt(task, text=f"{task}: "), f"{task}: ", [1], completion, None, reward)


def test_the_prompts_that_earned_most_are_shown_with_their_best_completion() -> None:
    rewards = {"a": [0.0, 0.5], "b": [1.0, 0.0], "c": [0.2, 0.9], "d": [0.1, 0.1]}
    rows = [row(task, f"{task}{n}", r) for task, own in rewards.items() for n, r in enumerate(own)]
    chosen = successes(rows, FewShotSettings(shots=2, success=0.5))
    assert [shot.completion for shot in chosen] == ["b0", "c1"]


def test_among_equals_the_seed_decides() -> None:
    rows = [row(f"t{task}", f"{sample}", 1.0) for task in range(30) for sample in range(4)]
    first = successes(rows, FewShotSettings(shots=5, seed=1))
    assert first == successes(rows, FewShotSettings(shots=5, seed=1))
    assert first != successes(rows, FewShotSettings(shots=5, seed=2))
    assert len({shot.prompt.task_id for shot in first}) == 5
    assert len({shot.completion for shot in successes(rows, FewShotSettings(shots=30))}) == 4


def test_too_few_successes_are_said_and_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(successes([row("a", "x", 1.0), row("b", "y", 0.0)], FewShotSettings())) == 1
    assert "only 1 training prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no success"):
        successes([row("a", "x", 0.5)], FewShotSettings())
    with pytest.raises(ValueError, match="shots"):
        FewShotSettings(shots=0)


def test_text_is_preceded_by_solved_blocks() -> None:
    shots = [
        Shot(Prompt("a", text="def a():\n"), "    return 1\n\n"),
        Shot(Prompt("b", text="\ndef b():\n"), "    pass"),
    ]
    put = with_shots(Prompt("c", text="def c():\n"), shots)
    assert put == Prompt("c", text="def a():\n    return 1\n\ndef b():\n    pass\n\ndef c():\n")


def test_a_conversation_is_preceded_by_turns_whose_fences_are_closed() -> None:
    system = {"role": "system", "content": "Be brief."}
    user = [{"role": "user", "content": name} for name in "abc"]
    opened = Prompt("a", messages=(system, user[0]), opening="```python\ndef a():")
    shots = [Shot(opened, "\n    return 1\n"), Shot(Prompt("b", messages=(system, user[1])), "No code.")]
    put = with_shots(Prompt("c", messages=(system, user[2]), opening="```python\n"), shots)
    assert put.messages == (
        system,
        user[0],
        {"role": "assistant", "content": "```python\ndef a():\n    return 1\n```"},
        user[1],
        {"role": "assistant", "content": "No code."},
        user[2],
    )
    assert put.opening == "```python\n"


def test_a_prompt_that_would_be_too_long_gets_fewer_shots(
    fakes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = fakes.Sampler(1, temperature=0.0)
    shots = [Shot(Prompt("t-900", text="task 900: "), f"answer {n}") for n in (10, 20)]
    # "task 900: answer 10", an empty line, the other block, an empty line, "task 000: "
    for longest, count in ((52, 2), (51, 1), (31, 1), (30, 0)):
        few = FewShot(greedy, FewShotSettings(shots=2), lambda longest=longest: longest)
        pool = few._split(fakes.split("test", 1), shots)
        assert pool.prompts[0].text.count("answer") == count, longest
        assert ("fewer shots" in capsys.readouterr().out) == (count < 2)
    few = FewShot(greedy, FewShotSettings(), lambda: 40)
    assert "answer 20" in few._split(fakes.split("t", 1), shots).prompts[0].text


def test_its_pool_asks_other_prompts_under_the_same_names(fakes: ModuleType, tmp_path: Path) -> None:
    tested = Pool(tmp_path, fakes.split("test", 3, 100), "sample", fakes.Sampler(), 0)
    few = FewShot(fakes.Sampler(1, temperature=0.0), FewShotSettings(shots=1), lambda: None)
    (tmp_path / "shots.json").write_text(
        '[{"prompt": {"task_id": "t-101", "messages": [], "text": "task 101: ", "opening": ""}, "completion": "answer 99"}]'
    )
    pool = few.pool(tested, tmp_path)
    assert (pool.name, pool.task_ids) == ("test.few_shot", tested.task_ids)
    texts = [prompt.text for prompt in pool.split.prompts]
    assert texts[0] == "task 101: answer 99\n\ntask 100: "
    assert texts[1] == "task 101: "  # no prompt is shown its own answer
    assert pool.prompts.folder.name == "test.few_shot"
    assert tested.prompts.folder.name == "test"
    assert pool.completions.identity != dataclasses.replace(pool, split=tested.split).completions.identity
