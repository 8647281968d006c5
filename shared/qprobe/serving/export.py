"""A probe that leaves: its base model's folder with the probe as the `score` head of a sequence classifier.

AutoModelForSequenceClassification.from_pretrained(folder) and vLLM's `classify` then score the token ids of prompt + completion.
Only a linear probe on the last layer's last token is such a head. The heads have no bias: the probe's own, a constant that moves
no choice, stands in config.json under `qprobe`, so that Q = logit + bias.

Where it stops: our token ids are those of the prompt and of the completion, each tokenised by itself. Whoever tokenises the
joined text may get others; `joined_text` says what that changes.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qprobe.embedding import LIKELIHOOD
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.cache import save_dense
from qprobe.models.language_model import ModelSpec
from qprobe.models.loading import load, load_tokenizer, outline, quiet_transformers
from qprobe.models.tokenizer import Tokenizer
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe

_MOST_SCORED = 32  # rows that are run to see what tokenising the joined text changes


@dataclass(frozen=True)
class Row:
    """A completion of a prompt, as text and as the token ids that were embedded.

    Args:
        prompt: as rendered.
        templated: whether by a chat template, special tokens included.
    """

    prompt: str
    prompt_ids: list[int]
    templated: bool
    completion: str
    completion_ids: list[int]


@dataclass(frozen=True)
class JoinedText:
    """What tokenising prompt and completion as one text changes.

    Args:
        rows: that were looked at.
        others: of them, those that it cuts into other tokens.
        scored: of these, those that were scored both ways.
        mean, largest: how far their scores moved.
        spread: standard deviation of the scores of our tokens, of some of all rows.
    """

    rows: int
    others: int
    scored: int
    mean: float
    largest: float
    spread: float

    def sentence(self) -> str:
        first = f"Tokenised as one text, {self.others} of {self.rows} rows of the run are cut into other tokens"
        if not self.scored:
            return f"{first}."
        return (
            f"{first}; the scores of {self.scored} of these move by {self.mean:.3g} on average, {self.largest:.3g} at most "
            f"(standard deviation of all: {self.spread:.3g}). Tokenise prompt and completion apart, and join their ids."
        )


class SequenceClassifier:
    """The base model with the probe as its head.

    Args:
        probe: linear, on the last layer's last token.
        spec: its base model, in the type that is to be saved.

    Raises:
        ValueError: a probe that is no such head, another model, or a family without such a classifier; in one sentence.
        OSError: the model cannot be had.
    """

    def __init__(self, probe: QProbe, spec: ModelSpec) -> None:
        check(probe, spec)
        self.probe = probe
        self.bias = float(probe.network_.biases[0].detach())
        self.tokenizer = load_tokenizer(spec)
        base = load.__wrapped__(spec)  # a copy of its own, which no back end has rearranged
        self.pad_token_id = self._pad(base.eos_token_ids)
        self.model: Any = _with_head(base.model, probe.network_.weights[0].detach(), self._config(base.model.config))

    def _pad(self, ends: frozenset[int]) -> int:
        """The token that fills rows up: the last that is another one is read, and no completion ends in an end of sequence."""
        tokenizer = self.tokenizer.tokenizer
        if tokenizer.pad_token_id in ends:
            return int(tokenizer.pad_token_id)
        found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        if found is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name!r} has neither an end of sequence nor a padding token: give it one."
            )
        return int(found)

    def _config(self, base: Any) -> Any:
        config = copy.deepcopy(base)
        config.num_labels = 1
        config.problem_type = "regression"  # else vLLM and pipelines put the score through a sigmoid
        config.pad_token_id = self.pad_token_id
        config.qprobe = {"bias": self.bias, "beta": self.probe.beta_, "loss": self.probe.loss}
        return config

    @property
    def loading(self) -> dict[str, str]:
        """What transformers must be told when it loads the folder: its usual attention leaves out the capping of scores."""
        capped = getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        return {"attn_implementation": "eager"} if capped else {}

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer; the folder appears whole or not at all.

        Raises:
            FileExistsError: the folder is there and not empty.
            OSError: it cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is there already: name another folder, or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = copy.deepcopy(self.tokenizer.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_token_id)
        tokenizer.padding_side = "right"  # filled from the left, a model with learned positions would read others
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making, quiet_transformers():
            made = Path(making) / "model"
            save_dense(self.model, tokenizer, made)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)

    def joined_text(self, rows: Sequence[Row]) -> JoinedText:
        """What tokenising prompt and completion as one text would change.

        Args:
            rows: some of what the probe scores.
        """
        others = [(row, ids) for row in rows if (ids := joined_ids(self.tokenizer, row)) != _own_ids(row)]
        seen = _evenly(others)
        own = {id(row): self._score(_own_ids(row)) for row in [*_evenly(rows), *(row for row, _ in seen)]}
        moved = [abs(self._score(ids) - own[id(row)]) for row, ids in seen]
        spread = float(np.std(list(own.values()))) if own else 0.0
        mean, largest = (float(np.mean(moved)), max(moved)) if moved else (0.0, 0.0)
        return JoinedText(len(rows), len(others), len(seen), mean, largest, spread)

    @torch.inference_mode()
    def _score(self, ids: Sequence[int]) -> float:
        states = self.model.base_model(torch.tensor([list(ids)], device=self.model.device)).last_hidden_state
        return float(self.model.score(states[0, -1].float())) + self.bias


def check(probe: QProbe, spec: ModelSpec) -> None:
    """Raise ValueError where a probe is no head of a model's last layer at its last token, in one sentence."""
    source = probe.source
    if source is None:
        raise ValueError("The probe's card does not say what it reads: only a probe of a run can be exported.")
    if probe.network_.hidden:
        raise ValueError(
            "The probe has hidden layers, and a classifier's head is linear: train it with probe.hidden=[]."
        )
    read = source.blocks or (source.layer,)
    if LIKELIHOOD in read:
        raise ValueError(
            "The probe reads likelihood columns, which no classifier's head sees: export a probe of one loss that reads the last "
            "layer alone, or train with embedder.likelihood=false."
        )
    if source.token != "last":
        raise ValueError(
            f"The probe reads the {source.token}, and a classifier's head the last token: it cannot be exported."
        )
    last = outline(spec).layer_count
    if read != (last,):
        raise ValueError(
            f"The probe reads layer {', '.join(map(str, read))} of {last}, and a classifier's head reads the last: train a probe "
            "there (embedder.layers=[-1])."
        )
    own = EmbeddingSource.of(HFEmbedder(spec, (last,)).identity(), last, load_tokenizer(spec).fingerprint())
    probe.check_source(dataclasses.replace(own, blocks=source.blocks))


def joined_ids(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Token ids of prompt and completion as one text."""
    return tokenizer.encode_prompt(row.prompt + row.completion, row.templated)


def _own_ids(row: Row) -> list[int]:
    return [*row.prompt_ids, *row.completion_ids]


def _evenly(rows: Sequence[Any]) -> list[Any]:
    return [rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, _MOST_SCORED).astype(int))] if rows else []


def _with_head(base: Any, weight: torch.Tensor, config: Any) -> Any:
    """A sequence classifier around a model's own layers.

    Args:
        base: a causal language model of transformers.
        weight: (1, D) float32 of the head, which stays float32.
    """
    from transformers import AutoModelForSequenceClassification

    none = f"transformers has no sequence classifier with a linear head `score` for {type(base).__name__}: it cannot be exported."
    try:
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    except ValueError as error:
        raise ValueError(none) from error
    head = getattr(model, "score", None)
    plain = isinstance(head, nn.Linear) and "bias" not in dict(head.named_parameters())
    if not plain or type(model.base_model) is not type(base.base_model):
        raise ValueError(none)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = nn.Linear(weight.shape[1], 1, bias=False)
    model.score.weight = nn.Parameter(weight.float().to(base.device), requires_grad=False)
    return model.eval()
