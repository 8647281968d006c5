"""Controls: scores of completions that no trained probe made. A probe is worth its training where it beats the best of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from qprobe.evaluation.scoring import score
from qprobe.evaluation.sweep import EvaluationSettings, Maker, probe_seed, training_data
from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED
from qprobe.probe.losses import find_loss
from qprobe.probe.training import ROWS_AT_A_TIME, TrainingSettings, statistics
from qprobe.run.joined import Joined

Scores = dict[str, np.ndarray | None]

# Rows of the table that are likelihood columns; length and log-probabilities have rows of their own.
COLUMN_CONTROLS = {
    "lowest mean entropy": "entropy_mean",
    "lowest worst window of entropy": "entropy_max_window_9",
    "highest self-certainty": "self_certainty_mean",
    "highest least log-probability": "logprob_min",
    "highest log-odds of Yes": "question_log_odds",
}

# One of them may choose well or badly by luck, far beyond the interval over prompts; their mean is what a row should say.
RANDOM_DIRECTIONS = 20


def scores(joined: Joined, settings: EvaluationSettings, seed: int) -> Scores:
    """The scores of the controls that a setting names and that need no training.

    Args:
        joined: the rows, with features where random directions are asked for.
        settings: `controls` names them.
        seed: of the random directions.

    Returns: method -> (S, N) scores, S = 1 where nothing is random; None where a completion's score is unknown.
    """
    made: Scores = {}
    if "length" in settings.controls:
        unit, lengths = "tokens", joined.tokens
        if lengths is None:
            unit, lengths = "characters", np.array([len(text) for text in joined.completions])
        made[f"longest ({unit})"] = lengths[None].astype(float)
        made[f"shortest ({unit})"] = -lengths[None].astype(float)
    if {"logprob", "likelihood"} & set(settings.controls):
        summed = joined.logprobs
        made["highest logprob"] = _known(summed)
        # The end is in the sum: it counts as a token.
        by_token = None if summed is None or joined.tokens is None else summed / (joined.tokens + 1)
        made["highest logprob per token"] = _known(by_token)
    if "agreement" in settings.controls:
        made["nearest to the others"] = _nearness(joined)[None]
        made["most repeated"] = _repeats(joined)[None]
    if "random_direction" in settings.controls:
        made["random direction"] = _random_directions(joined, RANDOM_DIRECTIONS, seed)
    return made


def of_columns(joined: Joined, settings: EvaluationSettings, names: Sequence[str] = COLUMNS) -> Scores:
    """The scores of the likelihood columns' controls, where "likelihood_columns" is asked for; rows as of `scores`.

    Args:
        joined: the rows with likelihood columns as features.
        names: of these columns.
    """
    if "likelihood_columns" not in settings.controls:
        return {}
    assert joined.features is not None  # the callers join with them
    columns = np.asarray(joined.features, dtype=float)
    known = {method: name for method, name in COLUMN_CONTROLS.items() if name in names}
    return {method: UNTRAINED[name] * columns[None, :, list(names).index(name)] for method, name in known.items()}


def shuffled_labels(
    trained_on: Joined,
    tested: Joined,
    make: Maker,
    training: TrainingSettings,
    settings: EvaluationSettings,
    *,
    k: int,
    seed: int,
) -> Scores:
    """Scores of probes of the first loss trained on rewards shuffled within each prompt, S seeds.

    A prompt's mean reward is kept: what L_Q and L_CE learn from prompts being hard or easy is learned here too, and what they
    learn by comparing the completions of a prompt is not. The losses that only compare are left with nothing.

    Args:
        trained_on, tested: the rows that they are trained on and score; the same in cross-validation.
        make: `sweep.cross_validate` or `sweep.train_on_all`.
        k: candidates at use.
        seed: of the run; each has one of its own (`probe_seed`).
    """
    loss = settings.losses[0]
    # As many prompts as a probe of the table learns from, though each is the only one of its sweep.
    share = settings.drawn_share
    one = dataclasses.replace(settings, losses=(loss,), seeds=1, curve_shares=(), train_share=share)
    rows = []
    for own_seed in (probe_seed(seed, s) for s in range(settings.seeds)):
        lot = np.random.default_rng([own_seed, len(trained_on.rewards)]).random(len(trained_on.rewards))
        # Rows are sorted by prompt, so the order below moves none out of its own.
        shuffled = trained_on.rewards[np.lexsort((lot, trained_on.groups))]
        probes = make(
            dataclasses.replace(trained_on, rewards=shuffled), training, one, k=k, seed=own_seed, progress=False
        )
        rows.append(score(probes, tested, one, own_seed)[1.0][loss].q[0])
    return {f"shuffled labels {find_loss(loss).symbol}": np.stack(rows)}


def _known(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None or not np.isfinite(values).all() else values[None].astype(float)


def _nearness(joined: Joined) -> np.ndarray:
    """(N,) less the mean distance to the candidates of the prompt, in standardised features: the highest is their medoid."""
    data = training_data(joined)
    mean, scale = statistics(data, torch.ones(1, len(joined.task_ids), dtype=torch.bool))
    found = np.zeros(len(joined.groups))
    for rows in np.split(np.arange(len(joined.groups)), np.flatnonzero(np.diff(joined.groups)) + 1):
        own = (data.features[rows].float() - mean) / scale
        found[rows] = -torch.cdist(own, own).mean(dim=1).numpy()
    return found


def _repeats(joined: Joined) -> np.ndarray:
    """(N,) how many of the prompt's candidates are the same text."""
    keys = list(zip(joined.groups.tolist(), joined.completions, strict=True))
    counts = Counter(keys)
    return np.array([counts[key] for key in keys], dtype=float)


def _random_directions(joined: Joined, count: int, seed: int) -> np.ndarray:
    """(count, N) projections of the standardised features on random directions."""
    data = training_data(joined)
    features = data.features
    mean, scale = statistics(data, torch.ones(1, len(joined.task_ids), dtype=torch.bool))
    lot = np.random.default_rng([seed, features.shape[1]]).normal(size=(features.shape[1], count))
    directions = torch.from_numpy(lot).float() / scale.T
    pieces = [(piece.float() - mean) @ directions for piece in features.split(ROWS_AT_A_TIME)]
    return torch.cat(pieces).numpy().T
