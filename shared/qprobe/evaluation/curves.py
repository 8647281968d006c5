"""The lines of the figures: reward against candidates, KL, training prompts and layers; scores by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qprobe.evaluation.methods import Kind, Method, name_of
from qprobe.evaluation.scoring import Scored
from qprobe.evaluation.tested import Tested, finite
from qprobe.probe import selection
from qprobe.probe.metrics import reward_grid
from qprobe.probe.training import BETAS
from qprobe.report.results import Curve, LayerCurve, LearningCurve, PromptScore, PromptScores, TradeOff, TradeOffPoint

# Temperatures of the curve of reward against KL, besides those that training may choose.
CURVE_BETAS = (*BETAS, 2.0, 5.0)
# Random subsets a sample for the KL where they are too many to take them all.
KL_DRAWS = 100


def against_k(tested: Tested, methods: Sequence[Method]) -> Curve:
    """Reward against the number of candidates: the probes, and the best of k as their bound (the paper's Fig. 3 and 5)."""
    series = {
        "skyline pass@k" if m.kind == Kind.SKYLINE else m.name: tested.band(m.by_k)
        for m in methods
        if m.by_k is not None
    }
    return Curve(k=tested.ks, series=series)


def kl_candidates(tested: Tested) -> int:
    """Candidates of the KL curve: at most half a pool, whose finite size would otherwise show as divergence."""
    return min(tested.k, max(2, tested.smallest // 2))


def against_kl(tested: Tested, scored: Mapping[str, Scored]) -> TradeOff | None:
    """Reward and KL at every temperature, first seed, mean over prompts; None where a prompt has one completion.

    Args:
        scored: loss -> scores.
    """
    if tested.smallest < 2:
        return None
    return TradeOff(series={name_of(loss): _trade_off(tested, scores.q[0]) for loss, scores in scored.items()})


def _trade_off(tested: Tested, q: np.ndarray) -> list[TradeOffPoint]:
    joined, k = tested.joined, kl_candidates(tested)
    draws = tested.settings.draws
    grid = reward_grid(q, joined.rewards, joined.groups, [k], CURVE_BETAS, draws=draws, rng=tested.rng())
    generator = torch.Generator().manual_seed(tested.seed)
    points = []
    for beta, rewards in zip(CURVE_BETAS, grid.values[0], strict=True):
        kl = [
            selection.kl_to_base(torch.from_numpy(q[rows]), k, beta, draws=KL_DRAWS, generator=generator)
            for rows in tested.by_prompt
        ]
        found = tested.interval(rewards)
        low, high = finite(found.low), finite(found.high)
        points.append(TradeOffPoint(beta=beta, kl=float(np.mean(kl)), reward=found.value, low=low, high=high))
    return points


def against_prompts(
    tested: Tested, methods: Sequence[Method], curve: Mapping[float, Mapping[str, Scored]]
) -> LearningCurve | None:
    """Reward at use against the number of training prompts; None where all probes learned from all of them.

    Args:
        methods: the probes.
        curve: share -> loss -> scores; their mean number of prompts is shown, for probes differ by a fold's rounding.
    """
    shares = sorted(curve)
    if len(shares) < 2:
        return None
    counts = [
        round(float(np.mean([probe.prompts for scores in curve[share].values() for probe in scores.probes])))
        for share in shares
    ]
    bands = {
        m.name: tested.band(np.stack([m.by_share[share] for share in shares])) for m in methods if len(m.by_share) > 1
    }
    return LearningCurve(prompts=counts, series=bands)


def against_layer(
    tested: Tested, scored: Mapping[str, Scored], by_layer: Mapping[int, Mapping[str, Scored]]
) -> LayerCurve | None:
    """Reward at use by layer, and how many probes of the table read each; None where there is no choice.

    Args:
        scored: loss -> scores by the probes of the table.
        by_layer: layer -> loss -> scores by probes of that layer.
    """
    if not by_layer:
        return None
    series, taken = {}, {}
    for loss, scores in scored.items():
        if not all(loss in of_layer for of_layer in by_layer.values()):
            continue  # it reads all layers
        own = [tested.earned(of_layer[loss], [tested.k], tested.settings)[0][:, 0] for of_layer in by_layer.values()]
        series[name_of(loss)] = tested.band(np.stack([by_seed.mean(axis=0) for by_seed in own]))
        taken[name_of(loss)] = [sum(probe.layer == layer for probe in scores.probes) for layer in by_layer]
    return LayerCurve(layers=list(by_layer), series=series, taken=taken)


def by_prompt(tested: Tested, scored: Mapping[str, Scored]) -> PromptScores:
    """The paper's Fig. 4: where each prompt's scores lie, against how often the base model solves it."""
    series = {}
    for loss, scores in scored.items():
        mean = scores.q.mean(axis=0)
        mean = mean - mean.mean()
        series[name_of(loss)] = [
            PromptScore(task_id=task, base=float(base), score=float(mean[rows].mean()))
            for task, base, rows in zip(tested.joined.task_ids, tested.base, tested.by_prompt, strict=True)
        ]
    return PromptScores(series=series)
