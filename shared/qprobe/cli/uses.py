"""What a saved probe's card holds for its use: a configuration of model, sampler, embedder and style of the prompts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from qprobe.cli import configuration
from qprobe.embedding import LIKELIHOOD
from qprobe.probe.estimator import QProbe
from qprobe.settings import UsageError, meant

_KEYS = {"prompts", "model", "sampler", "embedder"}


def used(probe: QProbe, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that a saved probe's card holds for its use: prompts, model, sampler, embedder.

    Args:
        overrides: KEY=VALUE each, such as `sampler.temperature=0.7` or `model.device=cpu`.

    Raises:
        ValueError: a card that lacks one of them, or an override that cannot be.
    """
    if missing := sorted(_KEYS - set(probe.use)):
        raise ValueError(
            f"The probe's card does not say {', '.join(missing)}: it was not made by `qprobe run` or `qprobe import`. In "
            "Python, Policy(sampler, embedder, probe) takes any."
        )
    config = _overridden(probe.use, overrides)
    if config["embedder"].get("backend") == "given":
        raise ValueError(
            f"The probe reads features of your own ({', '.join(config['embedder']['files'])}), which a new completion has not: "
            "make them, and score them by QProbe.from_pretrained(...).score(features), blocks beside each other."
        )
    if probe.source is not None:
        blocks = probe.source.blocks
        if "layers" in config["embedder"]:  # an embedder of another package may have one layer and no such key
            config["embedder"]["layers"] = [layer for layer in blocks if layer != LIKELIHOOD] or [probe.source.layer]
        if "likelihood" in config["embedder"]:  # not read where the probe does not
            config["embedder"]["likelihood"] = LIKELIHOOD in blocks
    config["sampler"]["greedy"] = False
    return config


def _overridden(use: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with some values changed; no key is added."""
    config, known = copy.deepcopy(use), sorted(configuration.leaves(use))
    for name, value in configuration.values(overrides):
        if name not in known:
            raise UsageError(
                f"A probe's card has no setting {name}{meant(name, known)}: choose from {', '.join(known)}."
            )
        *parents, key = name.split(".")
        functools.reduce(dict.__getitem__, parents, config)[key] = value
    return config
