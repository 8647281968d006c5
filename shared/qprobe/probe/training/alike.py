"""Why a probe that was trained tells no rows apart."""

from __future__ import annotations

import torch

from qprobe.probe.training import (
    Data,
    TrainedProbe,
    score_rows,
    statistics,
)

# Rows whose scores say whether a probe tells any apart.
ROWS_COMPARED = 10_000


def why_alike(trained: TrainedProbe, data: Data) -> str:
    """Why a probe gives the rows that it was trained on one score; empty where it does not."""
    some = torch.arange(0, len(data.features), -(-len(data.features) // ROWS_COMPARED))
    scores = score_rows(trained.network, data.features, some)
    rounding = 4 * torch.finfo(scores.dtype).eps
    if len(scores) == 1 or float(scores.max() - scores.min()) > rounding * float(scores.abs().max()):
        return ""
    if float(data.rewards.min()) == float(data.rewards.max()):
        return "all rewards are equal, so that there is nothing to learn."
    _, scale = statistics(data, torch.ones(1, len(data.sizes), dtype=torch.bool))
    if bool((scale == 1).all()):
        return (
            "no feature differs between rows by more than rounding does (a millionth of its mean): subtract the mean of "
            "every column in float64, or give other features."
        )
    if trained.chosen and trained.steps == 0:
        return (
            "on the prompts that were held out, no step of training was better than none; either these features do not "
            "tell good from bad here, or the learning_rate is too large, or rewards are far from a range of about 1."
        )
    return (
        "training moved its weights by nothing; rescale rewards to a range of about 1, or raise learning_rate or steps."
    )
