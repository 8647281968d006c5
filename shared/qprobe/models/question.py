"""Asking a model whether its own completion is right: the log-odds of its answer.

The question follows the completion in the same pass, in the model's chat format where it has one: the model ends its turn, and
the user asks. Two columns come of it, behind the likelihood columns.

Source: P(True), Kadavath et al. 2022, "Language Models (Mostly) Know What They Know", arXiv 2207.05221.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qprobe.models.tokenizer import Tokenizer

QUESTION_COLUMNS = (
    "question_log_odds",  # log P(Yes) - log P(No), each the first token of the word
    "question_log_mass",  # log(P(Yes) + P(No)): how much of an answer this is
)
_WORDS = "Yes", "No"
# Stands for a completion while a conversation is rendered: no template changes it, and no model's tokens hold it.
_MARK = "qprobe:the-completion:eborpq"


@dataclass(frozen=True)
class Question:
    """A question in tokens.

    Args:
        behind: what follows a completion's tokens, the question and the beginning of the answer included.
        yes, no: the first token of either answer.
    """

    behind: tuple[int, ...]
    yes: int
    no: int

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, ending: str | None) -> Question:
        """A question as a model's tokenizer has it.

        Args:
            text: such as "Is this right? Answer Yes or No."
            ending: text that ends a completion before the question is asked, such as a closing fence.

        Raises:
            ValueError: an empty text, a template that leaves no place for it, or a tokenizer that begins both answers alike.
        """
        if not text.strip():
            raise ValueError("embedder.question is empty: ask something that Yes or No answers, or say null.")
        asked, space = f"\n\n{text}\nAnswer:", " "
        if tokenizer.has_chat_template:
            roles = ("user", "Go on."), ("assistant", _MARK), ("user", text)
            messages = [{"role": role, "content": content} for role, content in roles]
            rendered = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            asked, space = rendered.rpartition(_MARK)[2], ""
            if _MARK not in rendered or text.strip() not in asked:
                raise ValueError(
                    f"embedder.question: the chat template of {tokenizer.name!r} does not show a question behind an answer: "
                    "say null."
                )
        yes, no = (tokenizer.encode_completion(space + word)[0] for word in _WORDS)
        if yes == no and space:  # a tokenizer that cuts the space off
            asked += space
            yes, no = (tokenizer.encode_completion(word)[0] for word in _WORDS)
        if yes == no:
            raise ValueError(f"embedder.question: {tokenizer.name!r} begins Yes and No with the same token: say null.")
        before = tokenizer.encode_completion(ending or "")
        return cls((*before, *tokenizer.encode_completion(asked)), yes, no)

    def columns(self, logits: Tensor) -> NDArray[np.float64]:
        """(R, 2) float64 in the order of `QUESTION_COLUMNS`, of the scores (R, V) behind the question."""
        both = logits.float().log_softmax(dim=-1)[:, [self.yes, self.no]].double().cpu()
        return torch.stack([both[:, 0] - both[:, 1], both.logsumexp(dim=1)], dim=1).numpy()
