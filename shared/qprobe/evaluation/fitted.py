"""Scores of baselines that are fitted on hidden states and rewards: each of prompts that its fit did not see, as probes' are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qprobe.evaluation.layer_choice import At
from qprobe.evaluation.sweep import EvaluationSettings, fold_of, probe_seed
from qprobe.run.joined import Joined

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# (N, D) states, (N,) rewards and (N,) prompts -> what gives (M,) scores of (M, D) states and (M,) prompts.
Fit = Callable[[Floats, Floats, Integers], Callable[[Floats, Integers], Floats]]


def scores(
    fit: Fit,
    trained_on: At,
    tested: At,
    layers: Sequence[int],
    settings: EvaluationSettings,
    seed: int,
    *,
    folded: bool,
) -> Floats:
    """(S, N) scores of the tested rows, the mean over layers.

    Args:
        fit: of one layer.
        trained_on, tested: the rows that are learned from and scored; the same where they are cross-validated.
        layers: that are read, one after another.
        settings, seed: folds are those of the table's probes, and S is their seeds.
        folded: whether prompts are cross-validated; else S is 1, and all of the training rows are learned from.

    Raises:
        NothingToLearn: rows do not say what the fit needs.
    """
    found = [_of_layer(fit, trained_on(layer), tested(layer), settings, seed, folded) for layer in layers]
    return np.asarray(np.mean(found, axis=0))


def _of_layer(
    fit: Fit, trained_on: Joined, tested: Joined, settings: EvaluationSettings, seed: int, folded: bool
) -> Floats:
    states, rewards = np.asarray(trained_on.features, dtype=np.float64), trained_on.rewards.astype(np.float64)
    if not folded:
        return fit(states, rewards, trained_on.groups)(np.asarray(tested.features, dtype=np.float64), tested.groups)[
            None
        ]
    found = np.empty((settings.seeds, len(rewards)))
    for number in range(settings.seeds):
        own = probe_seed(seed, number)
        folds = fold_of(len(tested.task_ids), settings.folds, own, tested.clusters)[tested.groups]
        for fold in range(settings.folds):
            out = folds == fold
            score = fit(states[~out], rewards[~out], trained_on.groups[~out])
            found[number, out] = score(states[out], tested.groups[out])
    return found
