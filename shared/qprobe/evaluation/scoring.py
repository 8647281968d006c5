"""What the probes of a sweep say of completions, each of prompts that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qprobe.evaluation.sweep import EvaluationSettings, SweepProbe, fold_of, probe_seed
from qprobe.probe.training import ROWS_AT_A_TIME, score_rows
from qprobe.run.joined import Joined


@dataclass(frozen=True)
class Scored:
    """A loss's scores on prompts its probes have not seen, one row a seed.

    Args:
        q: (S, N) float32 scores.
        beta: (S, P) the temperature that belongs to each prompt's probe.
        probes: those that scored.
        right: (S, N) probability that each row is right, if it is the one that is chosen of its prompt; NaN where its probe was
            not calibrated; None where none is.
    """

    q: np.ndarray
    beta: np.ndarray
    probes: list[SweepProbe]
    right: np.ndarray | None = None


def score(
    sweep: Sequence[SweepProbe],
    joined: Joined,
    settings: EvaluationSettings,
    seed: int,
    into: dict[float, dict[str, Scored]] | None = None,
) -> dict[float, dict[str, Scored]]:
    """Scores of a pool's rows: share of the training prompts that the probes learned from -> loss -> scores.

    Args:
        sweep: probes that read the rows' features.
        joined: the rows.
        seed: of the sweep.
        into: scores of other probes of the same sweep, which read other features, to be added to.
    """
    assert joined.features is not None  # the callers join with features
    features = torch.from_numpy(joined.features)
    prompts = len(joined.task_ids)
    by_share = {} if into is None else into
    tested: dict[int, np.ndarray] = {}
    for number, probe in enumerate(sweep):
        by_loss = by_share.setdefault(probe.share, {})
        if probe.loss not in by_loss:
            shape = settings.seeds, len(features)
            by_loss[probe.loss] = Scored(
                np.empty(shape, np.float32), np.empty((settings.seeds, prompts)), [], np.full(shape, np.nan)
            )
        by_loss[probe.loss].probes.append(probe)
        tested[number] = np.ones(prompts, dtype=bool)
        if probe.fold is not None:
            tested[number] = (
                fold_of(prompts, settings.folds, probe_seed(seed, probe.seed), joined.clusters) == probe.fold
            )
        beta = probe.trained.beta if settings.beta is None else settings.beta
        by_loss[probe.loss].beta[probe.seed, tested[number]] = beta
        if (calibration := probe.trained.calibration) is not None:
            rows = np.flatnonzero(tested[number][joined.groups])
            right = by_loss[probe.loss].right
            assert right is not None  # made above
            right[probe.seed, rows] = calibration.probabilities(joined.features[rows], joined.groups[rows])
    # All probes read a piece of the features while it is in memory: the whole may be a file.
    for start in range(0, len(features), ROWS_AT_A_TIME):
        piece = features[start : start + ROWS_AT_A_TIME].float()
        groups = joined.groups[start : start + ROWS_AT_A_TIME]
        for number, probe in enumerate(sweep):
            rows = np.flatnonzero(tested[number][groups])
            own = piece if len(rows) == len(piece) else piece[torch.from_numpy(rows)]
            by_share[probe.share][probe.loss].q[probe.seed, start + rows] = score_rows(
                probe.trained.network, own
            ).numpy()
    return by_share
