"""Sentences on paired differences: what may be concluded from the rows of a table, and what may not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from qprobe.metrics import Interval
from qprobe.scoring import Scored

# (P,) rewards of two choices on the same prompts -> their mean difference and its interval.
Paired = Callable[[np.ndarray, np.ndarray], Interval]
ByMethod = Mapping[str, np.ndarray]


def against_controls(at_use: ByMethod, controls: Mapping[str, np.ndarray | None], paired: Paired) -> list[str]:
    """Which probes are not better than the best choice that needs no probe.

    Args:
        at_use: method -> (P,) rewards of a probe's choice.
        controls: method -> (S, P) rewards; None: not run.
        paired: compares.
    """
    run = {name: earned.mean(axis=0) for name, earned in controls.items() if earned is not None}
    if not run:
        return []
    best = max(run, key=lambda name: float(run[name].mean()))
    among = f"{best}, the best of {len(run)} on these very prompts" if len(run) > 1 else best
    gains = {method: paired(earned, run[best]) for method, earned in at_use.items()}
    return [
        f"{method} does not beat the best control ({among}): it earns {_in_words(gain)} against it."
        for method, gain in gains.items()
        if gain.low <= 0 and math.isfinite(gain.low)
    ]


def more_prompts(method: str, by_share: Mapping[float, np.ndarray], paired: Paired) -> list[str]:
    """Whether more training prompts would help: what the last step of the learning curve brought."""
    if len(by_share) < 2:
        return []
    share = sorted(by_share)[-2]
    gain = paired(by_share[1.0], by_share[share])
    if not math.isfinite(gain.low):
        return []
    verdict = (
        "more prompts would help"
        if gain.low > 0
        else "more prompts do harm, which is a sign of noise"
        if gain.high < 0
        else "whether more prompts would help cannot be told"
    )
    return [f"{method}: all training prompts earn {_in_words(gain)} against {share:.0%} of them: {verdict}."]


def ordering(at_use: ByMethod, paired: Paired) -> list[str]:
    """Every loss against the one before it: the paper finds L_PG >= L_CE >= L_Q."""
    notes = []
    for (lower, before), (higher, after) in itertools.pairwise(at_use.items()):
        gain = paired(after, before)
        if math.isfinite(gain.low):
            notes.append(f"{higher} against {lower}: {_in_words(gain)}: {_told(gain)}.")
    return notes


def procedures(ours: ByMethod, theirs: ByMethod, paired: Paired) -> list[str]:
    """What our procedure changes, loss by loss.

    Args:
        ours, theirs: method -> (P,) rewards, the same losses in the same order.
    """
    notes = []
    for (method, mine), published in zip(ours.items(), theirs.values(), strict=True):
        gain = paired(mine, published)
        if math.isfinite(gain.low):
            notes.append(f"{method}: our procedure earns {_in_words(gain)} over the paper's: {_told(gain)}.")
    return notes


def layers(scored: Mapping[str, Scored], by_layer: Mapping[int, object]) -> list[str]:
    """What a reader must know of the layers that probes chose."""
    if not by_layer:
        return []
    notes = [
        "Rewards by layer are those on the tested prompts, for information: every probe took its layer by its loss on prompts "
        "that were held out of its training."
    ]
    probes = [probe for scores in scored.values() for probe in scores.probes]
    if blind := sum(probe.trained.held_out_loss is None for probe in probes):
        notes.append(
            f"{blind} of {len(probes)} probes read the highest layer, {max(by_layer)}: no prompts could be held out to choose on."
        )
    return notes


def _in_words(gain: Interval) -> str:
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _told(gain: Interval) -> str:
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "not told apart"
