"""DeepConf, offline: candidates vote for what they say, with the confidence that the model had where it was least sure.

Source: Fu et al. 2025, "Deep Think with Confidence", arXiv 2508.15260; where its text leaves a choice, the authors' code
(facebookresearch/deepconf, analysis_offline.py). Theirs: a token's confidence is minus the mean log-probability of the 20
likeliest tokens; a group is a window of 2,048 tokens, and a shorter answer is one; an answer's confidence is that of its lowest
group, of the lowest tenth of its groups or of its last 2,048 tokens; the most confident 10 or 90 % vote, weighted by it.
Ours: a score for every candidate: its place by the weight of what it says (as those who vote gave it), among equals by its own
confidence. `model` reads the candidates, untempered, in a pass of its own, whoever drew them; a token that was drawn and is none
of the 20 is not added to them, as it is by their code. Stopping early (online) is left out. Without an agreement nobody votes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qprobe import models
from qprobe.baselines.base import Ranker
from qprobe.baselines.consistency import Agreement, said_by
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import LikelihoodColumns
from qprobe.models.prefix import law_of
from qprobe.run.pools import Pool, RewardBatch, RewardRow, completions_of
from qprobe.run.stages import tokens_of

TOP = 20  # likeliest tokens
MEASURES = ("bottom_10", "lowest", "tail")
NOBODY = -1.0  # weight of what says nothing: below every vote


@dataclass(frozen=True)
class DeepConfSettings:
    """How a candidate's confidence is measured, and who votes.

    Args:
        measure: one of `MEASURES`.
        window: tokens of a group and of the tail, at least 1.
        keep: share of a prompt's candidates, the most confident, that vote, above 0 and at most 1.
    """

    measure: str = "bottom_10"
    window: int = 2048
    keep: float = 0.9

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"baselines.deepconf.measure is {self.measure!r}: choose from {', '.join(MEASURES)}.")
        if self.window < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"baselines.deepconf: window={self.window} is 1 or more, keep={self.keep} in (0, 1].")


def confidence(tokens: NDArray[np.float64], settings: DeepConfSettings) -> float:
    """Of a candidate by those of its tokens, (T,), T at least 1, in nats."""
    if settings.measure == "tail":
        return float(tokens[-settings.window :].mean())
    width = min(settings.window, len(tokens))
    groups = np.sort(np.lib.stride_tricks.sliding_window_view(tokens, width).mean(axis=1))
    return float(groups[: max(1, len(groups) // 10) if settings.measure == "bottom_10" else 1].mean())


def ranks(keys: Sequence[Hashable | None], own: Sequence[float], keep: float) -> list[float]:
    """Places of one prompt's candidates by the weight of what they say, then by their own confidence; equals share one.

    Args:
        keys: what each says; None, which is nothing, has no vote.
        own: its confidence.
        keep: share of those with a vote, the most confident, that use it.
    """
    rows = list(zip(keys, own, strict=True))
    voters = [confident for key, confident in rows if key is not None]
    least = np.percentile(voters, 100 * (1 - keep)) if voters else 0.0
    weights: dict[Hashable, float] = defaultdict(float)
    for key, confident in rows:
        weights[key] += confident * (confident >= least)
    weights[None] = NOBODY
    pairs = [(weights[key], confident) for key, confident in rows]
    order = sorted(set(pairs))
    return [float(order.index(pair)) for pair in pairs]


class DeepConf(Ranker):
    """Confidence-weighted votes: `model` reads the candidates, `agreement` knows what they say."""

    name, method = "deepconf", "DeepConf"

    def __init__(self, model: ModelSpec, settings: DeepConfSettings, agreement: Agreement | None) -> None:
        self.model, self.settings, self.agreement = model, settings, agreement
        self.of_all = agreement is not None

    def identity(self) -> dict[str, Any]:
        agreement = None if self.agreement is None else self.agreement.identity()
        own = {"model": self.model.identity(), "top": TOP, "agreement": agreement, **law_of(self.model)}
        return own | dataclasses.asdict(self.settings)

    def check(self) -> None:
        models.load_tokenizer(self.model)  # a model that cannot be had, in a sentence
        if self.agreement is not None:
            self.agreement.check()

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        reader = LikelihoodColumns(self.model)
        prompts = {row["task_id"]: row for row in tested.prompts.read([tested.task_ids]).to_pylist()}
        nothing = ((batch, [None] * len(batch.rows)) for batch in batches)
        for batch, keys in nothing if self.agreement is None else said_by(self.agreement, batches):
            tokens = tokens_of(tested, batch.keys, completions_of(tested, batch.keys), prompts, reader)
            own = [confidence(found, self.settings) for found in reader.confidences(*tokens, TOP)]
            scores: list[float] = []
            for key in batch.keys:
                at = [place for place, (task_id, _, _) in enumerate(batch.rows) if task_id == key]
                scores += ranks([keys[place] for place in at], [own[place] for place in at], self.settings.keep)
            yield batch, [RewardRow(score) for score in scores]
