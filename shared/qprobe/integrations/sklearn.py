"""Embeddings of prompts with completions as a transform of scikit-learn, for any estimator behind it, a QProbe among them.

Pipeline([("embed", Embeddings(sampler, embedder)), ("probe", QProbe())]).fit(rows, rewards, probe__prompts=ids)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, TransformerMixin

from qprobe.embedding import Embedder, tables_of
from qprobe.prompts import Prompt
from qprobe.sampling import Sampler
from qprobe.serving.policy import features_of

Row = tuple[str | Prompt, str]  # plain text is continued as it stands


class Embeddings(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """From (prompt, completion) to the states that the embedder reads; nothing is learned.

    Args:
        sampler: renders the prompts; it draws nothing.
        embedder: reads them; all its layers lie beside each other, likelihood columns last where it gives them.
    """

    def __init__(self, sampler: Sampler, embedder: Embedder) -> None:
        self.sampler, self.embedder = sampler, embedder

    def fit(self, rows: Sequence[Row], rewards: ArrayLike | None = None) -> Embeddings:
        """Nothing to learn."""
        return self

    def transform(self, rows: Sequence[Row]) -> np.ndarray:
        """(N, D) float32. Rows of one prompt that lie behind each other are read together."""
        prompts: list[Prompt] = []
        completions: list[list[tuple[str, list[int] | None]]] = []
        for said, text in rows:
            prompt = said if isinstance(said, Prompt) else Prompt("row", text=said)
            if not prompts or prompt != prompts[-1]:
                prompts.append(prompt)
                completions.append([])
            completions[-1].append((text, None))
        states: np.ndarray = features_of(
            self.sampler, self.embedder, tables_of(self.embedder), prompts, completions
        ).numpy()
        return states

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags
