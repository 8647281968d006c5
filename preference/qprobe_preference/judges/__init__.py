"""Judges of pairs of answers: a model behind an API, an implicit reward, a reward model.

judge = configured(config["judge"], folder)              # judge=openai, implicit or reward_model
judge.compare([Comparison(task_id, prompt, a, b)])       # win: how probably the first answer is preferred
AgainstReference(judge, prompts, references)             # the reward stage of a pipeline
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qprobe.registry import Registry
from qprobe.settings import accepted, build
from qprobe_preference.judges.base import AgainstReference, Comparison, Conversation, Judge, Judgement, tally

__all__ = ["JUDGES", "AgainstReference", "Comparison", "Conversation", "Judge", "Judgement", "configured", "tally"]

JUDGES = Registry("qprobe.judges")


def configured(config: Mapping[str, Any], folder: Path) -> Judge:
    """The judge that a configuration of the group `judge` describes.

    Args:
        folder: where an API's replies are kept; several judges and runs may share it.

    Raises:
        ValueError: an unknown judge or key, or a value that cannot be; before any work.
    """
    values = dict(config)
    judge = JUDGES.find(values.pop("backend", None), "judge.backend")
    made: Judge = build(judge, values, "judge", **({"folder": folder} if "folder" in accepted(judge) else {}))
    return made
