"""The rows of the table, one a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qprobe.evaluation.methods import Kind, Method
from qprobe.evaluation.tested import Tested, finite
from qprobe.probe.intervals import Interval
from qprobe.report.results import Row


def rows(
    tested: Tested, methods: Sequence[Method], over_control: Mapping[str, Interval], published: Mapping[str, float]
) -> list[Row]:
    """The table.

    Args:
        over_control: name of a probe's row -> what it earns over the best control.
        published: values by method, only where the set-up is the paper's.
    """
    greedy = next((m.by_seed[0] for m in methods if m.kind == Kind.GREEDY and m.by_seed is not None), None)
    return [_row(tested, method, greedy, over_control.get(method.name), published) for method in methods]


def _row(
    tested: Tested,
    method: Method,
    greedy: np.ndarray | None,
    over_control: Interval | None,
    published: Mapping[str, float],
) -> Row:
    if method.by_seed is None:
        return Row(method=method.name)
    values, seeds = method.rewards, len(method.by_seed)
    reward = tested.interval(values)
    more: dict[str, Any] = {}
    if method.kind != Kind.BASE:
        more |= _ends("difference", tested.difference(values, tested.base))
        if greedy is not None and method.kind != Kind.GREEDY:
            more |= _ends("over_greedy", tested.difference(values, greedy))
    elif tested.smallest < tested.largest:
        more["fewest_samples"] = tested.smallest
    if over_control is not None:
        more |= _ends("over_control", over_control)
    if seeds > 1:
        more["seed_spread"] = float(method.by_seed.mean(axis=1).std(ddof=1))
    if method.kind in (Kind.PROBE, Kind.PAPER) or seeds > 1:
        more["seeds"] = seeds
    if method.kind in (Kind.CONTROL, Kind.RANKING):
        more["beta"] = 0.0
    if method.scored is not None:
        more["beta"] = float(np.median(method.scored.beta))
    if method.errors is not None:
        # All seeds choose from the same random sets, so over seeds errors do not cancel: at most their mean.
        errors = method.errors
        more["simulation_error"] = float(np.sqrt((errors.mean(axis=0) ** 2).sum()) / errors.shape[1])
    auc = None if method.q is None else tested.auc(method.q)
    if auc is not None:
        more |= _ends("auc", auc)
    return Row(
        method=method.name,
        value=reward.value,
        low=finite(reward.low),
        high=finite(reward.high),
        prompts=len(values),
        samples_per_prompt=method.samples,
        paper=published.get(method.published_as),
        **more,
    )


def _ends(name: str, found: Interval) -> dict[str, Any]:
    """An interval as fields of a row."""
    return {name: found.value, f"{name}_low": finite(found.low), f"{name}_high": finite(found.high)}
