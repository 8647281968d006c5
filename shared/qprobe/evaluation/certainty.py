"""How well probes know which of their choices are right: predicted against observed, and what the surest choices earn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qprobe.evaluation.methods import name_of
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.tested import Tested
from qprobe.report.results import Certainties, Certainty

# Prompts in a part of the reliability plot: below some thirty its interval is as wide as the plot. At most ten parts.
PROMPTS_A_PART, MOST_PARTS = 30, 10
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def certainty(tested: Tested, scored: Mapping[str, Scored]) -> Certainties | None:
    """Of the best candidate of every prompt, by probes that never saw it; None where no probe is calibrated.

    Args:
        scored: loss -> scores.
    """
    series = {}
    for loss, scores in scored.items():
        if scores.right is not None and np.isfinite(scores.right).all() and len(tested.base) >= 2 * PROMPTS_A_PART:
            series[name_of(loss)] = _of(tested, scores.q[0], scores.right[0])
    return Certainties(series=series) if series else None


def _of(tested: Tested, q: np.ndarray, right: np.ndarray) -> Certainty:
    """Of the first seed's probes."""
    chosen = np.array([rows[q[rows].argmax()] for rows in tested.by_prompt])
    predicted, earned = right[chosen], tested.joined.rewards[chosen]
    prompts = len(chosen)
    place = np.empty(prompts, dtype=np.int64)
    place[np.argsort(-predicted, kind="stable")] = np.arange(prompts)  # 0 is the surest
    parts = min(MOST_PARTS, prompts // PROMPTS_A_PART)
    of_part = (parts - 1) - place * parts // prompts  # the least sure first
    inside = [of_part == part for part in range(parts)]
    surest = [place < max(1, round(share * prompts)) for share in SHARES]
    return Certainty(
        predicted=[float(predicted[own].mean()) for own in inside],
        observed=tested.band_of([earned[own] for own in inside], inside),
        prompts=[int(own.sum()) for own in inside],
        brier=float(np.square(predicted - earned).mean()),
        brier_of_mean=float(np.square(earned.mean() - earned).mean()),
        shares=list(SHARES),
        surest=tested.band_of([earned[own] for own in surest], surest),
    )
