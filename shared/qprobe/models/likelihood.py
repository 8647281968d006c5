"""Log-likelihoods of given completions under a causal language model: log p(y|x), each prompt computed once.

Likelihood(ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct")).log_likelihood(prompts, completions)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.loading import OwnTokens
from qprobe.models.memory import UsesModel
from qprobe.models.prefix import check_rows, law_of, parts_of

# Scores of the whole vocabulary in one pass, in float32 twice: 2,048 tokens of 150,000 words are 2.5 GB.
MOST_TOKENS = 2048


class Likelihood(UsesModel, OwnTokens):
    """Log-likelihoods by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model

    def identity(self) -> dict[str, Any]:
        return {"likelihood": "hf", "model": self.model.identity(), **law_of(self.model)}

    @property
    def end(self) -> list[int]:
        """The token that ends a text or a turn of the model; none where its tokenizer names none."""
        end = models.load_tokenizer(self.model).tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def log_likelihood(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """The sum over a completion's tokens of log p(token | all before it), in nats, untempered.

        Args:
            prompts: P lists of token ids, none empty.
            completions: the completions of each prompt, token ids; an empty one has the likelihood 0.

        Raises:
            ValueError: lists of different lengths, an empty prompt, a token that the model does not know.
        """
        check_rows(prompts, completions)
        run, footprint = self.passes.run, self.passes.footprint
        every = [*prompts, *(row for of_prompt in completions for row in of_prompt)]
        check_tokens(every, footprint.vocabulary, self.model.name)
        owner = [p for p, of_prompt in enumerate(completions) for _ in of_prompt]
        rows = [list(ids) for of_prompt in completions for ids in of_prompt]
        at_once = min(run.tokens_per_pass, MOST_TOKENS)
        last = run.language_model.layer_count
        sums = torch.zeros(len(rows), dtype=torch.float64)

        def need(count: int, width: int, chosen: Sequence[int]) -> int:
            tokens = [len(rows[row]) for row in chosen]
            scores = (max(at_once, *tokens) + count) * footprint.vocabulary * (footprint.bytes + 8)
            return footprint.reading(count, width, tokens, [last]) + scores

        def score(chosen: list[int], used: list[Sequence[int]], places: list[int]) -> None:
            prefix = run.prefill(used, logits=True)
            assert prefix.logits is not None  # they were asked for
            first = prefix.logits.float().log_softmax(dim=-1)
            for row, place in zip(chosen, places, strict=True):
                sums[row] = float(first[place, rows[row][0]])
            # The last token is predicted, and predicts nothing.
            for part in parts_of([len(rows[row]) - 1 for row in chosen], at_once):
                own = [rows[chosen[r]] for r in part]
                logits = run.read(prefix, [row[:-1] for row in own], [places[r] for r in part], logits=True).logits
                assert logits is not None  # they were asked for
                following = torch.tensor([token for row in own for token in row[1:]], device=logits.device)
                found = logits.float().log_softmax(dim=-1).gather(1, following[:, None])[:, 0].double().cpu()
                of_row = torch.tensor([chosen[r] for r, row in zip(part, own, strict=True) for _ in row[1:]])
                sums.index_add_(0, of_row, found)

        self.passes.each([r for r, row in enumerate(rows) if row], owner, prompts, need, score)
        values = iter(sums.tolist())
        return [[next(values) for _ in of_prompt] for of_prompt in completions]


def check_tokens(sequences: Sequence[Sequence[int]], vocabulary: int, model: str) -> None:
    """Raise ValueError where a token is none of the model's."""
    for ids in sequences:
        if any(not 0 <= token < vocabulary for token in ids):
            raise ValueError(
                f"A token id is outside of 0..{vocabulary - 1}, which {model} knows: tokenize with its own tokenizer."
            )
