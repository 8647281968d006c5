"""Which control a probe is held against: the one that earns most on the training prompts, not on the tested ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qprobe.evaluation.methods import Kind, Method


@dataclass(frozen=True)
class BestControl:
    """The control that probes are held against.

    Args:
        name: its row; of several, one for every fold, how often each was the best.
        rewards: (P,) what it earns on every tested prompt.
        among: of how many, and where it was the best, in words; empty where there is one.
    """

    name: str
    rewards: np.ndarray
    among: str


def best_control(
    methods: Sequence[Method], training: Mapping[str, float] | None = None, folds: np.ndarray | None = None
) -> BestControl | None:
    """The best control, chosen without the tested prompts' rewards; None where none was run.

    Args:
        methods: all of a table.
        training: control -> mean reward on a training set, where probes have one; controls that are not in it are not chosen.
        folds: (P,) fold of every prompt, in cross-validation: each fold's control is the best on the others. None of both: the
            best on the tested prompts themselves, which is more than a control can do.
    """
    run = [method for method in methods if method.kind == Kind.CONTROL and method.by_seed is not None]
    if training is not None:
        run = [method for method in run if method.name in training]
    if not run:
        return None
    rewards = np.stack([method.rewards for method in run])
    if training is not None:
        chosen, where = run[int(np.argmax([training[method.name] for method in run]))], "on the training prompts"
        return BestControl(chosen.name, chosen.rewards, _among(run, where))
    if folds is None:
        best = int(rewards.mean(axis=1).argmax())
        return BestControl(run[best].name, rewards[best], _among(run, "on these very prompts"))
    own, names = np.empty(rewards.shape[1]), Counter[str]()
    for fold in np.unique(folds):
        best = int(rewards[:, folds != fold].mean(axis=1).argmax())
        own[folds == fold] = rewards[best, folds == fold]
        names[run[best].name] += 1
    said = [f"{name} in {count} folds" for name, count in names.most_common()]
    name = next(iter(names)) if len(names) == 1 else ", ".join(said)
    return BestControl(name, own, _among(run, "on every fold's training prompts"))


def _among(run: Sequence[Method], where: str) -> str:
    return f"the best of {len(run)} {where}" if len(run) > 1 else ""
