"""What a LoRA adapter is trained on, and what it minimises: completions to imitate, or their rewards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from qprobe.baselines.base import TrainingData
from qprobe.embedding import ReadsTokens, tokens_to_read
from qprobe.models.language_model import LanguageModel


@dataclass(frozen=True)
class Example:
    """A completion to train on.

    Args:
        prompt: name of its prompt (or cluster of prompts): what is capped, and held out together.
        prompt_ids: token ids of the prompt, at least one.
        completion_ids: token ids of the completion, without a token that ends it.
        target: its reward.
        ended: whether the completion ended by itself; the end of others is not trained on.
    """

    prompt: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    target: float = 1.0
    ended: bool = True

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.completion_ids]


def examples_of(data: TrainingData, reader: ReadsTokens, least: float = -math.inf) -> list[Example]:
    """The training completions that earned at least so much, as tokens of the model that is trained.

    Args:
        reader: has the tokenizer of that model.
    """
    sampled_by, clusters = data.pool.sampler.tokenizer_fingerprint(), data.pool.split.clusters or {}
    examples = []
    for row in data.read():
        if row.reward >= least:
            name, prompt = row.prompt.task_id, (row.rendered, row.prompt_token_ids)
            completion, templated = (row.completion, row.token_ids), bool(row.prompt.messages)
            prompt_ids, (ids,) = tokens_to_read(reader, sampled_by, prompt, [completion], templated=templated)
            ended = row.finish_reason != "length"
            examples.append(Example(clusters.get(name, name), prompt_ids, ids, row.reward, ended))
    return examples


def digest_of(rows: Sequence[Example]) -> str:
    """Equal for the same rows in the same order."""
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(astuple(row)).encode())
    return content.hexdigest()[:16]


def check_targets(rows: Sequence[Example]) -> None:
    """Raise ValueError where rewards are outside of [0, 1], or all the same."""
    targets = {row.target for row in rows}
    if outside := [target for target in targets if not 0 <= target <= 1]:
        raise ValueError(
            f"A reward model is trained on rewards from 0 to 1, and there is one of {outside[0]}: scale them."
        )
    if len(targets) < 2:
        known = f"are all {targets.pop():g}" if targets else "are missing"
        raise ValueError(
            f"Nothing to train a reward model on: the rewards of the training completions {known}. Draw more completions or take "
            "more prompts."
        )


class Objective(Protocol):
    """What is minimised: the sum of `loss` over rows, divided by the sum of their `units`."""

    name: str

    def prepare(self, language_model: LanguageModel, rows: Sequence[Example]) -> nn.Module | None:
        """Called once before training; a module that is trained with the adapter, or None."""

    def units(self, rows: Sequence[Example]) -> int: ...

    def loss(self, model: Any, rows: Sequence[Example]) -> Tensor:
        """() float32, a sum over units."""


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, T) token ids, padded behind, and their mask: under a causal mask nothing that is kept sees the padding."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), mask.long().to(device)


class Imitation:
    """Cross-entropy of the tokens of the completions, the token that ends them included."""

    name = "fine-tuning"
    end: int

    def prepare(self, language_model: LanguageModel, rows: Sequence[Example]) -> None:
        end = language_model.tokenizer.eos_token_id
        self.end = min(language_model.eos_token_ids) if end is None else int(end)

    def _targets(self, row: Example) -> list[int]:
        return [*row.completion_ids, *([self.end] if row.ended else [])]

    def units(self, rows: Sequence[Example]) -> int:
        return sum(len(self._targets(row)) for row in rows)

    def loss(self, model: Any, rows: Sequence[Example]) -> Tensor:
        continued = [self._targets(row) for row in rows]
        ids, mask = _padded([[*row.prompt_ids, *own] for row, own in zip(rows, continued, strict=True)], model.device)
        # Scores of the whole vocabulary are most of the memory: none are made where every row is still a prompt.
        first = min(len(row.prompt_ids) for row in rows) - 1
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False).logits
        targets = torch.full(logits.shape[:2], -100)
        for place, (row, own) in enumerate(zip(rows, continued, strict=True)):
            start = len(row.prompt_ids) - 1 - first  # the state before a token predicts it
            targets[place, start : start + len(own)] = torch.tensor(own)
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().to(logits.device), reduction="sum"
        )


class Judgement:
    """Binary cross-entropy of the logit at the last token."""

    name = "reward model"
    head: nn.Linear

    def prepare(self, language_model: LanguageModel, rows: Sequence[Example]) -> nn.Module:
        check_targets(rows)
        self.head = nn.Linear(language_model.width, 1)
        nn.init.zeros_(self.head.weight)
        mean = sum(row.target for row in rows) / len(rows)
        nn.init.constant_(self.head.bias, math.log(mean / (1 - mean)))
        self.head.to(language_model.device)
        return self.head

    def units(self, rows: Sequence[Example]) -> int:
        return len(rows)

    def logits(self, model: Any, rows: Sequence[Example]) -> Tensor:
        """(R,) float32."""
        ids, mask = _padded([row.ids for row in rows], model.device)
        # The model without its scores of the vocabulary.
        states = (
            model.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        )
        last = states[torch.arange(len(rows), device=states.device), mask.sum(dim=1).to(states.device) - 1]
        logits: Tensor = self.head(last.float().to(self.head.weight.device))[:, 0]
        return logits

    def loss(self, model: Any, rows: Sequence[Example]) -> Tensor:
        logits = self.logits(model, rows)
        targets = torch.tensor([row.target for row in rows], dtype=torch.float32, device=logits.device)
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
