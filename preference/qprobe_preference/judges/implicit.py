"""A judge without a judge's model: r(x, y) = log pi_a(y|x) - log pi_b(y|x), of two models or of one under two system prompts.

With pi_a trained by DPO from pi_b this is the reward that its training implied, up to a factor and a constant of the prompt,
neither of which changes who wins. Where it stops: with two tokenizers, each side reads the answer in its own tokens.

Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from qprobe import models
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.prompts import Prompt
from qprobe_preference.judges.base import Comparison, Conversation, Judgement, ScoreRule, folder_name, undecided

_Ids = list[int]
_MARK = "an answer to be found again"


@dataclass(frozen=True)
class Side:
    """A model, with a system prompt or without.

    Args:
        model: which one.
        system: its system prompt; None is none.
    """

    model: ModelSpec
    system: str | None = None


class ImplicitJudge:
    """Prefers the answer of the higher implicit reward.

    Args:
        a: the side whose log-probability counts for an answer.
        b: the side whose log-probability counts against it.
        per: "sequence", sums over tokens, or "token", means; a side's mean is over its own tokens.
        end: whether the token that ends the assistant's turn is the answer's last one.
        soft, beta, tie: how rewards become judgements, see `ScoreRule`.
        name: what the run folder calls the judge; None is made of its models.
    """

    def __init__(
        self,
        a: Side,
        b: Side,
        per: str = "sequence",
        end: bool = True,
        soft: bool = False,
        beta: float = 1.0,
        tie: float = 1e-6,
        name: str | None = None,
    ) -> None:
        if per not in ("sequence", "token"):
            raise ValueError(f"judge.per is {per!r}: choose sequence or token.")
        if a == b:
            raise ValueError(
                "judge.a and judge.b are the same: their difference is 0; change the model or system prompt."
            )
        self.sides = a, b
        self.per, self.end = per, end
        self.rule = ScoreRule(soft, beta, tie)
        made_of = list(dict.fromkeys(side.model.name for side in self.sides))
        self.name = folder_name(name, "implicit", *made_of, per if per == "token" else "")

    def identity(self) -> dict[str, Any]:
        sides = [{"model": side.model.identity(), "system": side.system} for side in self.sides]
        law = {"per": self.per, "end": self.end, "soft": self.rule.soft, "tie": self.rule.tie}
        return {"judge": "implicit", "sides": sides, **law, "beta": self.rule.beta if self.rule.soft else None}

    def check(self) -> None:
        """Load both tokenizers and see that they render what they are given.

        Raises:
            OSError: a model cannot be loaded.
            ValueError: a chat template that refuses or ignores the system prompt.
        """
        for side in self.sides:
            if models.load_tokenizer(side.model).has_chat_template:
                self._rendered(side, "check", ({"role": "user", "content": "Hello."},))

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, rewards in its detail; what exceeds a side's context is "too_long"."""
        answers: dict[str, dict[str, None]] = {}
        for c in comparisons:
            answers.setdefault(_asked(c), {}).update(dict.fromkeys(_continuations(c)))
        # Equal answers to a prompt are scored once, so that they tie.
        by_prompt = {_asked(c): c for c in comparisons}
        grouped = [(by_prompt[prompt], list(texts)) for prompt, texts in answers.items()]
        of_a, of_b = (self._values(side, grouped) for side in self.sides)
        return [self._judgement(c, of_a[_asked(c)], of_b[_asked(c)]) for c in comparisons]

    def _judgement(self, comparison: Comparison, a: Mapping[str, float], b: Mapping[str, float]) -> Judgement:
        rewards = []
        for answer in _continuations(comparison):
            if answer not in a or answer not in b:
                return undecided("too_long")
            rewards.append(a[answer] - b[answer])
        return self.rule.judgement(comparison, *rewards)

    def _values(self, side: Side, grouped: Sequence[tuple[Comparison, list[str]]]) -> dict[str, dict[str, float]]:
        """Log-likelihoods by prompt and answer, of the answers that fit the side's context."""
        tokenizer, context = models.load_tokenizer(side.model), models.outline(side.model).context_length
        prompts: list[_Ids] = []
        tokens: list[dict[str, _Ids]] = []
        for comparison, answers in grouped:
            text = self._rendered(side, comparison.task_id, comparison.prompt, comparison.opening)
            templated = not isinstance(comparison.prompt, str)
            prompts.append(tokenizer.encode_prompt(text, templated))
            last = [_end_of_turn(side.model, templated)] if self.end else []
            encoded = {answer: tokenizer.encode_completion(answer) + last for answer in answers}
            left = math.inf if context is None else context - len(prompts[-1])
            tokens.append({answer: ids for answer, ids in encoded.items() if len(ids) <= left})
        asked = [list(of_prompt.values()) for of_prompt in tokens]
        sums = Likelihood(side.model).log_likelihood(prompts, asked)
        per_token = self.per == "token"  # the empty answer without an end has probability 1, and no token to share it
        return {
            _asked(comparison): {
                answer: total / max(1, len(ids)) if per_token else total
                for (answer, ids), total in zip(of_prompt.items(), totals, strict=True)
            }
            for (comparison, _), of_prompt, totals in zip(grouped, tokens, sums, strict=True)
        }

    def _rendered(self, side: Side, task_id: str, conversation: Conversation, opening: str = "") -> str:
        """The prompt as a side reads it, its system prompt before the conversation's own."""
        if isinstance(conversation, str):
            return ("" if side.system is None else f"{side.system}\n\n") + conversation + opening
        messages = list(conversation)
        if side.system is not None:
            system = side.system
            if messages[0]["role"] == "system":
                system += f"\n\n{messages.pop(0)['content']}"
            messages.insert(0, {"role": "system", "content": system})
        template = f"The chat template of {side.model.name!r}"
        try:
            text = models.load_tokenizer(side.model).render_prompt(Prompt(task_id, tuple(messages), opening=opening))[0]
        except TemplateError as error:
            raise ValueError(
                f"{template} refuses the conversation {task_id} ({error}): drop judge's system prompts, or choose another model."
            ) from error
        if side.system is not None and side.system.strip() not in text:
            raise ValueError(f"{template} leaves system prompts out: the sides would not differ; choose another model.")
        return text


def _asked(comparison: Comparison) -> str:
    """What the answers of a comparison continue."""
    return repr((comparison.prompt, comparison.opening))


def _continuations(comparison: Comparison) -> tuple[str, str]:
    """The answers as they stand behind what they continue; a whole turn begins and ends without white space."""
    whole = not comparison.opening and not isinstance(comparison.prompt, str)
    return comparison.shown if whole else (comparison.first, comparison.second)


@functools.lru_cache(maxsize=8)
def _end_of_turn(spec: ModelSpec, templated: bool) -> int:
    """The token that ends an answer: what the chat template puts behind it, for plain text the end of the sequence."""
    tokenizer = models.load_tokenizer(spec).tokenizer
    if templated:
        turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _MARK}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).partition(_MARK)[2]
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in tokenizer.added_tokens_decoder:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"Model {spec.name!r} has no token that ends an answer: set judge.end=false.")
    return int(tokenizer.eos_token_id)
