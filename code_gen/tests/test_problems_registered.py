"""Problems of another package: those of docs/BACK_ENDS.md, installed, rewarded in a sandbox that hides the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe.run.pools import RewardBatch
from qprobe_code_gen import tasks
from qprobe_code_gen.sandbox import hidden


def test_problems_of_another_package_are_prompts_and_rewards(
    installed: Path, composed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    words = ["experiment=humaneval", "dataset.test=[multiples]", "+dataset.count=4", "sandbox.workers=1"]
    task = tasks.make(composed(words), None)
    (split,) = task.splits.values()
    assert [prompt.task_id for prompt in split.prompts] == ["times/2", "times/3", "times/4", "times/5"]
    assert str(split.prompts[0].text).startswith("def times2(x):")
    # Right where it may read its answer; a file that is hidden is empty.
    reads = f"    return open({str(installed / 'letters.py')!r}).read() and 4 * x\n"
    said = {"times/2": "    return 2 * x\n", "times/3": "    return 2 * x\n", "times/4": reads}
    ((_, rows),) = task.reward(iter([RewardBatch(tuple(said), [(key, 0, text) for key, text in said.items()])]))
    assert [row.reward for row in rows] == [1.0, 0.0, 0.0]
    assert str(installed / "letters.py") in hidden.registered()
    assert any(path.endswith("qprobe_code_gen") for path in hidden.registered())
