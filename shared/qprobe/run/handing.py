"""A sampler that hands over what the embedder would read of its completions, so that no model runs over them a second time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from qprobe.embedding import Embedder
from qprobe.embedding.hf import HFEmbedder
from qprobe.sampling import Sampler
from qprobe.sampling.hf import HFSampler


def can_hand(sampler: Sampler, embedder: Embedder, layers: Sequence[int]) -> bool:
    """Whether transformers runs one model for both in this process, and draws all that these of the embedder's layers hold.

    Args:
        layers: the likelihood columns among them; these may be of an ending of several tokens or a question, which is not drawn.
    """
    both = _of_one_model(sampler, embedder)
    return both is not None and both[1].is_drawn(layers)


def handing(sampler: Sampler, embedder: Embedder, layers: Sequence[int]) -> Sampler:
    """A copy of the sampler whose completions bring these of the embedder's layers along (`Completion.states`); itself where it
    cannot hand them over."""
    both = _of_one_model(sampler, embedder)
    if both is None or not can_hand(sampler, embedder, layers):
        return sampler
    made = copy.copy(both[0])
    made.keep = both[1].kept(layers)
    return made


def _of_one_model(sampler: Sampler, embedder: Embedder) -> tuple[HFSampler, HFEmbedder] | None:
    if isinstance(sampler, HFSampler) and isinstance(embedder, HFEmbedder) and sampler.model == embedder.model:
        return sampler, embedder
    return None
