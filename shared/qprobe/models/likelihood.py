"""Log-likelihoods of given completions under a causal language model: log p(y|x), each prompt computed once.

Likelihood(ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct")).log_likelihood(prompts, completions)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qprobe import models
from qprobe.models.language_model import ModelSpec, OwnTokens
from qprobe.models.memory import Footprint, Passes
from qprobe.models.prefix import PrefixRun, check_prompts, law_of, parts_of

# Scores of the whole vocabulary in one pass, in float32 twice: 2,048 tokens of 150,000 words are 2.5 GB.
MOST_TOKENS = 2048


class Likelihood(OwnTokens):
    """Log-likelihoods by transformers.

    Args:
        model: which model; it is loaded at the first call and shared with the process.
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self._run: PrefixRun | None = None
        self._passes: Passes | None = None

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
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but completions of {len(completions)}: give one list a prompt.")
        check_prompts(prompts)
        if self._run is None or self._passes is None:
            self._run = PrefixRun(models.load(self.model))
            self._passes = Passes(self._run.language_model)
        run = self._run
        footprint = Footprint(run.language_model, run.shared, run.tokens_per_pass)
        every = [*prompts, *(row for of_prompt in completions for row in of_prompt)]
        check_tokens(every, footprint.vocabulary, self.model.name)
        owner = [p for p, of_prompt in enumerate(completions) for _ in of_prompt]
        rows = [list(ids) for of_prompt in completions for ids in of_prompt]
        lengths = [len(prompt) for prompt in prompts]
        at_once = min(run.tokens_per_pass, MOST_TOKENS)
        last = run.language_model.layer_count
        sums = torch.zeros(len(rows), dtype=torch.float64)

        def need(chosen: Sequence[int]) -> int:
            used = {owner[row] for row in chosen}
            read = footprint.reading(len(used), max(lengths[p] for p in used), [len(rows[r]) for r in chosen], [last])
            longest = max(len(rows[row]) for row in chosen)
            scores = (max(at_once, longest) + len(used)) * footprint.vocabulary * (footprint.bytes + 8)
            return read + scores

        def score(chosen: list[int]) -> None:
            used = list(dict.fromkeys(owner[row] for row in chosen))
            places = {p: place for place, p in enumerate(used)}
            prefix = run.prefill([prompts[p] for p in used], logits=True)
            assert prefix.logits is not None  # they were asked for
            first = prefix.logits.float().log_softmax(dim=-1)
            for row in chosen:
                sums[row] = float(first[places[owner[row]], rows[row][0]])
            # The last token is predicted, and predicts nothing.
            for part in parts_of([len(rows[row]) - 1 for row in chosen], at_once):
                own = [rows[chosen[r]] for r in part]
                logits = run.read(
                    prefix, [row[:-1] for row in own], [places[owner[chosen[r]]] for r in part], logits=True
                ).logits
                assert logits is not None  # they were asked for
                following = torch.tensor([token for row in own for token in row[1:]], device=logits.device)
                found = logits.float().log_softmax(dim=-1).gather(1, following[:, None])[:, 0].double().cpu()
                of_row = torch.tensor([chosen[r] for r, row in zip(part, own, strict=True) for _ in row[1:]])
                sums.index_add_(0, of_row, found)

        self._passes.run([r for r, row in enumerate(rows) if row], owner, lengths, need, score)
        values = iter(sums.tolist())
        return [[next(values) for _ in of_prompt] for of_prompt in completions]


def check_tokens(sequences: Sequence[Sequence[int]], vocabulary: int, model: str) -> None:
    """Raise ValueError where a token is none of the model's."""
    for ids in sequences:
        if any(not 0 <= token < vocabulary for token in ids):
            raise ValueError(
                f"A token id is outside of 0..{vocabulary - 1}, which {model} knows: tokenize with its own tokenizer."
            )
