"""What a saved probe says of itself: its card's file, and the embeddings that it reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.files import fingerprint

CARD_FILE = "probe.json"


@dataclass(frozen=True)
class EmbeddingSource:
    """What embeddings a probe reads. Embeddings of another source mean nothing to it.

    Args:
        model: name of the embedding model, with what identifies its weights; where that is its content, its folder is left out.
        layer: hidden layer, counted from the token embeddings (0).
        token: which token's state is read.
        template: fingerprint of the tokenizer with its chat template; empty where unknown.
        blocks: layers that lie beside each other in its features, where it reads several; -1 are the likelihood columns.
        likelihood: what decides these columns, such as the ending; empty where it reads none.
    """

    model: dict[str, Any]
    layer: int
    token: str = "last"
    template: str = ""
    blocks: tuple[int, ...] = ()
    likelihood: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        # The dtype rounds the states and does not change their meaning: a probe works across dtypes.
        model = {k: v for k, v in self.model.items() if k not in ("dtype", "attention")}
        if model.get("content") and "name" in model:  # what is known by its content may lie anywhere
            model["name"] = Path(model["name"]).name
        object.__setattr__(self, "model", model)

    @classmethod
    def of(cls, identity: dict[str, Any], layer: int, template: str = "") -> EmbeddingSource:
        """The source that an embedder's `identity()` describes: its key `model` where that is a model's own identity."""
        rest = {key: value for key, value in identity.items() if key != "token"}
        model = rest["model"] if isinstance(rest.get("model"), dict) else rest
        return cls(model, layer, identity.get("token", "last"), template)


def described(source: EmbeddingSource) -> str:
    read = "layers " + ", ".join(map(str, source.blocks)) if source.blocks else f"layer {source.layer}"
    return f"{read} of {source.model.get('name')} ({fingerprint(dataclasses.asdict(source))})"


def from_hub(name: str, revision: str | None, files: list[str]) -> Path:
    """The folder of some files of a repository of the hub.

    Raises:
        FileNotFoundError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"Probe {name!r} is neither a folder here nor to be had from the hub: check the name."
        ) from error
