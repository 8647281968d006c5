"""A judge of scores: any `*ForSequenceClassification` of transformers, the conversation in its own chat template.

A model without a chat template reads conversation and answer as a pair of texts, as encoders such as DeBERTa were trained
to. Weights are read from safetensors only, and no code of a repository is run. Where a model pads, its own padding token is
used, since decoders read their score at the last token that is not padding; one without reads answers one by one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from qprobe.models.language_model import ModelSpec
from qprobe_preference.judges.base import Comparison, Conversation, Judgement, ScoreRule, folder_name, undecided
from qprobe_preference.judges.form import written

_Encoded = dict[str, list[int]]


class RewardModelJudge:
    """Prefers the answer of the higher score.

    Args:
        model: a hub id or a folder.
        logit: which output is the score, from 0; None where there is a single one.
        minus: output that is subtracted from it; None is none.
        tokens_per_pass: tokens of one pass, padding included, 1 or more; a longer answer has a pass of its own.
        soft, beta, tie: how scores become judgements, see `ScoreRule`.
        name: what the run folder calls the judge; None is made of its model.
    """

    def __init__(
        self,
        model: ModelSpec,
        logit: int | None = None,
        minus: int | None = None,
        tokens_per_pass: int = 8192,
        soft: bool = False,
        beta: float = 1.0,
        tie: float = 1e-6,
        name: str | None = None,
    ) -> None:
        if model.source()[1] is not None:
            raise ValueError(
                f"judge.model.name is {model.name!r}: a reward model is a hub id or a folder with safetensors."
            )
        if tokens_per_pass < 1:
            raise ValueError(f"judge.tokens_per_pass is {tokens_per_pass}: 1 or more.")
        if minus is not None and (logit is None or logit == minus):
            raise ValueError(
                f"judge.logit={logit} and judge.minus={minus}: name two outputs; the second is subtracted."
            )
        self.spec, self.logit, self.minus = model, logit, minus
        self.tokens_per_pass = tokens_per_pass
        self.rule = ScoreRule(soft, beta, tie)
        self.name = folder_name(name, "reward-model", self.spec.name)

    def identity(self) -> dict[str, Any]:
        law = {"logit": self.logit, "minus": self.minus, "soft": self.rule.soft, "tie": self.rule.tie}
        beta = self.rule.beta if self.rule.soft else None
        return {"judge": "reward_model", "model": self.spec.identity(), **law, "beta": beta}

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)"""
        with _explained(self.spec):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            folder, _ = self.spec.source()
            where = {"revision": self.spec.revision, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            placed = {} if self.spec.device_map is None else {"device_map": self.spec.device_map}
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=self.spec.resolved_dtype(),
                use_safetensors=True,
                output_loading_info=True,
                **where,
                **placed,
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(
                    f"it lacks {len(missing)} weights, such as {missing[0]}: it was not trained to give scores"
                )
        if self.spec.device_map is None:
            model = model.to(self.spec.resolved_device())
        if (pad := _padding(model)) is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.padding_side = "right"
        return model.eval().requires_grad_(False), tokenizer

    def check(self) -> None:
        """Load the model, see that it has the outputs that are asked for, and let it go: sampling needs the memory.

        Raises:
            OSError: it cannot be loaded, is not in safetensors, or is no reward model.
            ValueError: outputs that it has not.
        """
        try:
            self._check_outputs()
        finally:
            self.close()

    def _check_outputs(self) -> None:
        outputs = int(self._loaded[0].config.num_labels)
        if self.logit is None and outputs != 1:
            labels = self._loaded[0].config.id2label
            listed = ", ".join(f"{number}: {labels[number]}" for number in sorted(labels)[:8])
            raise ValueError(
                f"{self.spec.name!r} has {outputs} outputs ({listed}): say which one is the score with judge.logit, and which "
                "one is subtracted with judge.minus."
            )
        for name, value in (("logit", self.logit), ("minus", self.minus)):
            if value is not None and not 0 <= value < outputs:
                raise ValueError(f"judge.{name} is {value}: {self.spec.name!r} has the outputs 0 to {outputs - 1}.")

    def close(self) -> None:
        """Let the model go; the next call loads it again."""
        self.__dict__.pop("_loaded", None)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, scores in its detail; what exceeds the model's context is "too_long"."""
        self._check_outputs()
        rows: dict[tuple[str, str], _Encoded] = {}
        for c in comparisons:
            for answer in c.shown:
                key = (repr(c.prompt), answer)
                if key not in rows:
                    rows[key] = self._encoded(c.task_id, c.prompt, answer)
        fitting = [key for key, row in rows.items() if len(row["input_ids"]) <= self._context]
        scores = dict(zip(fitting, self._scores([rows[key] for key in fitting]), strict=True))
        judgements = []
        for c in comparisons:
            first, second = (scores.get((repr(c.prompt), answer)) for answer in c.shown)
            if first is None or second is None:
                judgements.append(undecided("too_long"))
            else:
                judgements.append(self.rule.judgement(c, first, second))
        return judgements

    @property
    def _context(self) -> float:
        length = getattr(self._loaded[0].config.get_text_config(), "max_position_embeddings", None)
        # RoBERTa and models like it count positions from behind the padding token's id: their tokenizer says what is left.
        return float(min(length or math.inf, self._loaded[1].model_max_length))

    def _encoded(self, task_id: str, conversation: Conversation, answer: str) -> _Encoded:
        tokenizer = self._loaded[1]
        if not tokenizer.chat_template:
            return dict(tokenizer(written(conversation), answer))
        turns = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
        try:
            text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        except TemplateError as error:
            raise ValueError(f"The chat template of {self.spec.name!r} refuses {task_id} ({error}).") from error
        return dict(tokenizer(text, add_special_tokens=False))

    def _scores(self, rows: Sequence[_Encoded]) -> list[float]:
        """In the order of the rows; passes are made of rows of about one length, longest first."""
        most = 1 if _padding(self._loaded[0]) is None else len(rows)
        left = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]), reverse=True)
        scores: list[float] = [math.nan] * len(rows)
        while left:
            fit = min(most, max(1, self.tokens_per_pass // max(1, len(rows[left[0]]["input_ids"]))))
            places, left = left[:fit], left[fit:]
            for place, score in zip(places, self._pass([rows[place] for place in places]), strict=True):
                scores[place] = score
        return scores

    def _pass(self, rows: Sequence[_Encoded]) -> list[float]:
        model, tokenizer = self._loaded
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        # A model that knows no padding token gets rows one by one.
        inputs = columns if len(rows) == 1 else tokenizer.pad(columns)
        device = next(model.parameters()).device
        with torch.inference_mode():
            tensors = {name: torch.tensor(values, device=device) for name, values in inputs.items()}
            logits = model(**tensors).logits.float().cpu()
        scores = logits[:, self.logit or 0]
        if self.minus is not None:
            scores = scores - logits[:, self.minus]
        values: list[float] = scores.tolist()
        return values


def _padding(model: Any) -> int | None:
    """The token that a model knows as padding."""
    pad = model.config.get_text_config().pad_token_id
    return None if pad is None or pad < 0 else int(pad)


@contextlib.contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Loading fails in many ways; the user needs one sentence."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")
        raise OSError(
            f"The reward model {spec.name!r} could not be loaded ({first}): it must be a *ForSequenceClassification of "
            "transformers with weights in safetensors, on the hub or in a folder."
        ) from error
    finally:
        logging.set_verbosity(level)
