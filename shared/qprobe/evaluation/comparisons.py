"""Sentences on paired differences: what may be concluded from the rows of a table, and what may not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from qprobe.evaluation.best_control import BestControl
from qprobe.evaluation.scoring import Scored
from qprobe.probe.intervals import Interval
from qprobe.probe.losses import AUTO

# (P,) rewards of two choices on the same prompts -> their mean difference and its interval.
Paired = Callable[[np.ndarray, np.ndarray], Interval]
ByMethod = Mapping[str, np.ndarray]
# Decimals of a reward in sentences and tables: what is less is no difference.
DIGITS = 3


def beaten(gain: Interval) -> bool:
    """Whether a difference is above 0 by more than the digits that are printed of it."""
    return round(gain.low, DIGITS) > 0


def against_controls(gains: Mapping[str, Interval], best: BestControl) -> list[str]:
    """Which probes are not better than the best choice that needs no probe.

    Args:
        gains: method -> what a probe earns over the best control.
        best: that control.
    """
    among = f"{best.name}, {best.among}" if best.among else best.name
    return [
        f"{method} does not beat the best control ({among}): it earns {in_words(gain)} against it."
        for method, gain in gains.items()
        if math.isfinite(gain.low) and not beaten(gain)
    ]


def more_prompts(method: str, by_share: Mapping[float, np.ndarray], paired: Paired) -> list[str]:
    """Whether more training prompts would help: what the last step of the learning curve brought."""
    if len(by_share) < 2:
        return []
    share = sorted(by_share)[-2]
    gain = paired(by_share[1.0], by_share[share])
    if not math.isfinite(gain.low):
        return []
    verdicts = {
        "better": "more prompts would help",
        "worse": "more prompts do harm, which is a sign of noise",
        "not told apart": "whether more prompts would help cannot be told",
    }
    verdict = verdicts[_told(gain)]
    return [f"{method}: all training prompts earn {in_words(gain)} against {share:.0%} of them: {verdict}."]


def ordering(at_use: ByMethod, paired: Paired) -> list[str]:
    """Every loss against the one before it: the paper finds L_PG >= L_CE >= L_Q."""
    notes = []
    for (lower, before), (higher, after) in itertools.pairwise(at_use.items()):
        gain = paired(after, before)
        if math.isfinite(gain.low):
            notes.append(f"{higher} against {lower}: {in_words(gain)}: {_told(gain)}.")
    return notes


def against_baselines(name: str, rewards: np.ndarray, baselines: ByMethod, paired: Paired) -> list[str]:
    """A probe against every baseline that was run.

    Args:
        name: of the probe's row.
        rewards: (P,) what it earns.
        baselines: method -> (P,) rewards.
    """
    gains = {method: paired(rewards, other) for method, other in baselines.items()}
    known = {method: gain for method, gain in gains.items() if math.isfinite(gain.low)}
    return [f"{name} against {method}: {in_words(gain)}: {_told(gain)}." for method, gain in known.items()]


def procedures(ours: ByMethod, papers: ByMethod, paired: Paired) -> list[str]:
    """What our procedure changes, loss by loss.

    Args:
        ours, papers: method -> (P,) rewards.
    """
    notes = []
    for method, mine in ours.items():
        if f"{method}, paper's procedure" not in papers:
            continue
        gain = paired(mine, papers[f"{method}, paper's procedure"])
        if math.isfinite(gain.low):
            notes.append(f"{method}: our procedure earns {in_words(gain)} over the paper's: {_told(gain)}.")
    return notes


def layers(scored: Mapping[str, Scored], by_layer: Mapping[int, object]) -> list[str]:
    """What a reader must know of the layers that probes chose."""
    if not by_layer:
        return []
    notes = [
        "Rewards by layer are those on the tested prompts, for information: every probe took its layer by its loss on prompts "
        "that were held out of its training."
    ]
    probes = [probe for scores in scored.values() for probe in scores.probes if probe.loss != AUTO]
    if blind := sum(probe.trained.held_out_loss is None for probe in probes):
        notes.append(
            f"{blind} of {len(probes)} probes read the highest layer, {max(by_layer)}: no prompts could be held out to choose on."
        )
    return notes


def in_words(gain: Interval) -> str:
    """A difference and its interval, as tables print them."""
    # Adding 0.0 turns -0.0 into 0.0.
    value, low, high = (f"{round(end, DIGITS) + 0.0:+.{DIGITS}f}" for end in (gain.value, gain.low, gain.high))
    return f"{value} [{low}, {high}]"


def _told(gain: Interval) -> str:
    """What the interval says as it is printed: +0.000 is no difference."""
    if beaten(gain):
        return "better"
    return "worse" if round(gain.high, DIGITS) < 0 else "not told apart"
