"""A judge of another package: that of docs/BACK_ENDS.md, installed."""

from pathlib import Path

import pytest

from qprobe.cli import configuration
from qprobe_preference.judges import Comparison, configured


def test_a_judge_of_another_package_is_a_choice_and_judges(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    words = ["experiment=hh", "judge=letters", "judge.margin=2"]
    judge = configured(configuration.composed("qprobe_preference.conf", "config", words)["judge"], tmp_path)
    pairs = [Comparison("t", "Say.", first, "four") for first in ("a", "two", "longer")]
    assert [found.win for found in judge.compare(pairs)] == [1.0, 0.0, 0.0]
