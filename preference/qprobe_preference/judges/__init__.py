"""Judges of pairs of answers: a model behind an API, an implicit reward, a reward model.

judge = configured(config["judge"], folder)              # judge=openai, implicit or reward_model
judge.compare([Comparison(task_id, prompt, a, b)])       # win: how probably the first answer is preferred
AgainstReference(judge, prompts, references)             # the reward stage of a pipeline
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiSettings
from qprobe.settings import build
from qprobe_preference.judges.base import AgainstReference, Comparison, Conversation, Judge, Judgement, tally
from qprobe_preference.judges.implicit import ImplicitJudge, Side
from qprobe_preference.judges.openai import OpenAIJudge
from qprobe_preference.judges.reward_model import RewardModelJudge

__all__ = ["AgainstReference", "Comparison", "Conversation", "Judge", "Judgement", "configured", "tally"]


def configured(config: Mapping[str, Any], folder: Path) -> Judge:
    """The judge that a configuration of the group `judge` describes.

    Args:
        folder: where an API's replies are kept; several judges and runs may share it.

    Raises:
        ValueError: an unknown judge or key, or a value that cannot be; before any work.
    """
    values = dict(config)
    backend = values.pop("backend", None)
    if backend == "openai":
        api = build(ApiSettings, values.pop("api", {}), "judge.api")
        return build(OpenAIJudge, values, "judge", api=api, folder=folder)
    if backend == "implicit":
        sides = {name: _side(values.pop(name, {}), f"judge.{name}") for name in ("a", "b")}
        return build(ImplicitJudge, values, "judge", **sides)
    if backend == "reward_model":
        model = build(ModelSpec, values.pop("model", {}), "judge.model")
        return build(RewardModelJudge, values, "judge", model=model)
    raise ValueError(f"judge.backend is {backend!r}: choose from openai, implicit, reward_model.")


def _side(config: Mapping[str, Any], where: str) -> Side:
    values = dict(config)
    return build(Side, values, where, model=build(ModelSpec, values.pop("model", {}), f"{where}.model"))
