"""Configurations of judges: what is shipped builds a judge, what cannot be names its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qprobe_preference.judges import configured


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"user": "{fence}{conversation}{answer_a}"}, r"judge\.user lacks \{answer_b\}"),
        ({"verdict": "([AB]"}, r"judge\.verdict"),
        ({"verdict": "[AB]"}, r"judge\.verdict has no group"),
        ({"suspicious": ["("]}, r"judge\.suspicious"),
        ({"retries": -1}, "retries"),
        ({"soft": "yes"}, r"judge\.soft"),
        ({"colour": "red"}, "colour"),
        ({"api": {"url": "x"}}, r"judge\.api has no key url"),
        ({"backend": "oracle"}, r"judge\.backend"),
    ],
)
def test_a_configuration_that_cannot_be_names_its_key(
    tmp_path: Path, changes: dict[str, Any], key: str, judge_config: Callable[..., dict[str, Any]]
) -> None:
    configured(judge_config("openai"), tmp_path)
    with pytest.raises(ValueError, match=key):
        configured(judge_config("openai", **changes), tmp_path)


def test_the_model_must_be_said_and_the_template_asks_as_the_paper_does(conf: Path) -> None:
    text = (conf / "judge" / "openai.yaml").read_text()
    assert "  model: ???" in text
    assert "more helpful, harmless, and concise" in text
