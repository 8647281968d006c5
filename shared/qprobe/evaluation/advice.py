"""What to do, from a table's own numbers: which choice to use, and whether more candidates or more prompts would earn more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qprobe.evaluation.best_control import BestControl
from qprobe.evaluation.comparisons import beaten, in_words, more_prompts
from qprobe.evaluation.methods import Kind, Method, name_of
from qprobe.evaluation.tested import Tested
from qprobe.probe.losses import AUTO
from qprobe.report.results import Certainties


def advice(
    tested: Tested, methods: Sequence[Method], best: BestControl | None, certainties: Certainties | None = None
) -> list[str]:
    """Sentences in the order of importance; none where there is nothing to choose or nothing to measure it on.

    The probe that is spoken of is `auto`, or else the last of the table: never the one that did best on these prompts.

    Args:
        methods: all of the table.
        best: the control that probes are held against.
        certainties: how well probes know which of their choices are right.
    """
    probes = [method for method in methods if method.kind == Kind.PROBE]
    if not probes or not tested.mixed.any():
        return []
    probe = next((method for method in probes if method.name == name_of(AUTO)), probes[-1])
    gain = tested.difference(probe.rewards, tested.base)
    if not math.isfinite(gain.low):
        return []
    return [
        _use(tested, probe, best),
        *_candidates(tested, probe),
        *_sure(probe, certainties),
        *more_prompts(probe.name, probe.by_share, tested.difference),
    ]


def _use(tested: Tested, probe: Method, best: BestControl | None) -> str:
    """Which choice to use."""
    gain = tested.difference(probe.rewards, tested.base)
    said = f"it earns {in_words(gain)} over one completion"
    if best is None:
        if beaten(gain):
            return f"Use {probe.name}: {said}."
        return f"Take one completion: of {probe.name} no gain can be told, {in_words(gain)}."
    over, untrained = tested.difference(probe.rewards, best.rewards), tested.difference(best.rewards, tested.base)
    if beaten(gain) and beaten(over):
        return f"Use {probe.name}: {said}, and {in_words(over)} over the best control, {best.name}."
    if beaten(untrained):
        return (
            f"Use the best control, {best.name}, which needs no training: it earns {in_words(untrained)} over one completion, "
            f"and {probe.name} {in_words(over)} against it."
        )
    if beaten(gain):
        return f"Use {probe.name}: {said}; from the best control, {best.name}, it is not told apart."
    return f"Take one completion: of {probe.name} no gain can be told, {in_words(gain)}, nor of the best control, {best.name}."


def _sure(probe: Method, certainties: Certainties | None) -> list[str]:
    """Whether the probability of being right tells which prompts to answer."""
    own = None if certainties is None else certainties.series.get(probe.name)
    if own is None:
        return []
    half, every = own.shares.index(0.5), len(own.shares) - 1
    value, low, high = (side[half] for side in (own.surest.value, own.surest.low, own.surest.high))
    of_all = own.surest.value[every]
    if value is None or low is None or high is None or of_all is None:
        return []
    known = f"of the half of the prompts that it is surest of, {value:.3f} [{low:.3f}, {high:.3f}] are right, of all {of_all:.3f}"
    error = f"Brier score {own.brier:.3f}, {own.brier_of_mean:.3f} without knowing the prompt"
    if low > of_all and own.brier < own.brier_of_mean:
        return [f"Being right: {known} ({error}): an application may say none of these to the others."]
    return [f"Being right: {known} ({error}): how sure it is says too little to leave prompts unanswered."]


def _candidates(tested: Tested, probe: Method) -> list[str]:
    """What the second half of the candidates brought."""
    half = tested.k // 2
    # Over a single one it is the gain itself, and a pair has no third.
    if probe.by_k is None or half not in tested.ks or half < 2:
        return []
    gain = tested.difference(probe.by_k[tested.ks.index(tested.k)], probe.by_k[tested.ks.index(half)])
    if beaten(gain):
        said = "more of them would help"
    else:
        said = "fewer would do" if round(gain.high, 3) <= 0.005 else "whether more of them would help cannot be told"
    return [f"Candidates: {tested.k} earn {in_words(gain)} over {half} of them: {said}."]
