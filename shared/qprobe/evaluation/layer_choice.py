"""Which hidden layer a probe reads: probes are trained at every layer that is asked for, and held-out prompts choose.

Layers are read one after another, so that memory holds the features of one (and a file those of large ones).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qprobe.evaluation.scoring import Scored, score
from qprobe.evaluation.sweep import EvaluationSettings, Maker, SweepProbe, training_data
from qprobe.probe.training import ProbeTask, TrainedProbe, TrainingSettings, refitted, train
from qprobe.run.joined import Joined

# The rows of a pool with the features of a layer.
At = Callable[[int], Joined]


@dataclass(frozen=True)
class Scores:
    """What the probes of a sweep say of rows.

    Args:
        by_share: share of their training prompts that probes learned from -> loss -> scores.
        plain: loss -> scores by probes of all training prompts that learned as those of smaller shares (`SweepProbe.plain`);
            None where those of `by_share` did.
        by_layer: layer -> loss -> scores by probes of each layer, where these were asked for.
    """

    by_share: dict[float, dict[str, Scored]]
    plain: dict[str, Scored] | None = None
    by_layer: dict[int, dict[str, Scored]] = field(default_factory=dict)

    @property
    def curve(self) -> dict[float, dict[str, Scored]]:
        """Share -> loss -> scores of the learning curve."""
        return self.by_share if self.plain is None else self.by_share | {1.0: self.plain}


def sweep_over(
    at: At,
    layers: Sequence[int],
    make: Maker,
    training: TrainingSettings,
    settings: EvaluationSettings,
    *,
    k: int,
    seed: int,
    progress: bool,
) -> list[SweepProbe]:
    """The sweep at every layer; of probes that differ in their layer alone, one is marked as taken.

    Args:
        at: the training rows.
        layers: rising.
        make: `sweep.cross_validate` or `sweep.train_on_all`.
        k: candidates at use.
        seed: of folds, held-out prompts and the order of training, the same at every layer.
    """
    made = [
        [
            dataclasses.replace(probe, layer=layer)
            for probe in make(at(layer), training, settings, k=k, seed=seed, progress=progress)
        ]
        for layer in layers
    ]
    best = _best([[probe.trained for probe in own] for own in made])
    return [
        dataclasses.replace(probe, taken=best[number] == place)
        for place, own in enumerate(made)
        for number, probe in enumerate(own)
    ]


def final_probes(
    at: At, layers: Sequence[int], losses: Sequence[str], training: TrainingSettings, *, k: int, seed: int
) -> list[tuple[int, TrainedProbe]]:
    """(layer, probe) of every loss, trained on every prompt: on those too that chose its layer, steps and beta.

    Arguments as of `sweep_over`.
    """
    made = []
    for layer in layers:
        data = training_data(at(layer))
        tasks = [ProbeTask(loss, seed, data.sizes > 0) for loss in losses]
        made.append(train(data, tasks, training, k=k, seed=seed))
    best = _best(made)
    whole: dict[int, tuple[int, TrainedProbe]] = {}
    for place in sorted(set(best)):
        data = training_data(at(layers[place]))
        own = [number for number in range(len(losses)) if best[number] == place]
        tasks = [ProbeTask(losses[number], seed, data.sizes > 0) for number in own]
        found = refitted(data, tasks, [made[place][number] for number in own], training, k=k, seed=seed)
        whole |= {number: (layers[place], probe) for number, probe in zip(own, found, strict=True)}
    return [whole[number] for number in range(len(losses))]


def score_over(
    sweep: Sequence[SweepProbe],
    at: At,
    layers: Sequence[int],
    settings: EvaluationSettings,
    seed: int,
    *,
    compare: bool = False,
) -> Scores:
    """Scores of rows by the probes of a sweep.

    Args:
        at: the rows to be scored.
        compare: whether scores by layer are asked for, from probes that learned from all their training prompts.
    """
    scored: dict[float, dict[str, Scored]] = {}
    plain: dict[float, dict[str, Scored]] = {}
    by_layer = {}
    for layer in layers:
        own = [probe for probe in sweep if probe.layer in (layer, None) and not probe.plain]
        joined = at(layer)
        score([probe for probe in own if probe.taken], joined, settings, seed, scored)
        others = [probe for probe in sweep if probe.layer in (layer, None) and probe.plain and probe.taken]
        score(others, joined, settings, seed, plain)
        if compare and len(layers) > 1:
            by_layer[layer] = score([probe for probe in own if probe.share == 1], joined, settings, seed)[1.0]
    in_order = {share: {loss: own[loss] for loss in settings.losses} for share, own in scored.items()}
    return Scores(in_order, {loss: plain[1.0][loss] for loss in settings.losses} if plain else None, by_layer)


def _best(by_layer: Sequence[Sequence[TrainedProbe]]) -> list[int]:
    """The place of the layer with the lowest held-out loss, for each probe; of the last where nothing was held out."""
    places = []
    for probes in zip(*by_layer, strict=True):
        losses = [math.inf if probe.held_out_loss is None else probe.held_out_loss for probe in probes]
        known = min(losses) < math.inf
        places.append(losses.index(min(losses)) if known else len(losses) - 1)
    return places
