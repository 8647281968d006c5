"""A probe of a tiny model as `qprobe run` saves one, without the run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe


def probe_of(spec: ModelSpec, layer: int, **changes: Any) -> QProbe:
    """A linear probe that reads one layer of a model, fitted to planted rewards; `changes` of the card's use of a sampler."""
    embedder = HFEmbedder(spec, (layer,))
    width = int(embedder.embed([[5]], [[[6]]])[layer].shape[1])
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, width)).astype("float32")
    probe = QProbe(loss="reward_mse").fit(features, features[:, 0] + features[:, 1], np.arange(400) // 8)
    probe.source = EmbeddingSource.of(embedder.identity(), layer, embedder.tokenizer_fingerprint())
    sampler = {"backend": "hf", "greedy": True, "batch_rows": 12, "n": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    probe.use = {
        "prompts": "chat",
        "model": dataclasses.asdict(spec),
        "sampler": sampler | {"max_new_tokens": 6, "stop": []} | changes,
        "embedder": {"backend": "hf", "layers": [layer]},
    }
    return probe
