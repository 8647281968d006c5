"""Prompt RM: a language model is asked whether a candidate is right; its score is log p(Yes) - log p(No).

Every candidate is a prompt of its own, problem first: so both words are read off one pass and their difference is exact. With
the problem shared among its candidates, each of these would have to be read twice, once before either word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.baselines.base import Ranker, answer, question
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.prompts import Prompt
from qprobe.run.pools import Pool, RewardBatch, RewardRow

_PLACES = ("{problem}", "{candidate}")
_CUT = 8  # a problem that is too long loses an eighth of itself at a time


@dataclass(frozen=True)
class PromptRMSettings:
    """Who judges, and what is asked.

    Args:
        model: name of another judge than the run's own model; None is that one.
        template: holds {problem} and {candidate}, each once, the problem first.
        good, bad: the words whose probabilities are compared.
    """

    template: str
    model: str | None = None
    good: str = "Yes"
    bad: str = "No"

    def __post_init__(self) -> None:
        at = [self.template.find(place) for place in _PLACES]
        if not 0 <= at[0] < at[1] or any(self.template.count(place) != 1 for place in _PLACES):
            raise ValueError(
                "baselines.prompt_rm.template must hold {problem} and then {candidate}, each of them once."
            )
        if not self.good.strip() or not self.bad.strip() or self.good == self.bad:
            raise ValueError(
                f"baselines.prompt_rm compares the words {self.good!r} and {self.bad!r}: give two that differ, neither empty."
            )

    def asked(self, problem: str, candidate: str) -> str:
        before, _, rest = self.template.partition(_PLACES[0])
        between, _, after = rest.partition(_PLACES[1])
        return before + problem + between + candidate + after


class PromptRM(Ranker):
    """A language model as it stands, asked about every candidate.

    Args:
        model: the run's own, which judges where the settings name no other.
        settings: who judges, and what it is asked.
    """

    name = "prompt_rm"
    method = "Prompt RM"

    def __init__(self, model: ModelSpec, settings: PromptRMSettings) -> None:
        if settings.model is not None:
            model = dataclasses.replace(
                model, name=settings.model, revision=None, adapter=None
            )  # those of another model
        self.model, self.settings, self.likelihood = model, settings, Likelihood(model)

    def identity(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.settings), "model": self.model.identity()}

    def check(self) -> None:
        self.model.source()  # a file or package that is missing

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        prompts = {prompt.task_id: prompt for prompt in tested.split.prompts}
        for batch in batches:
            asked = [self.ask(prompts[task_id], completion) for task_id, _, completion in batch.rows]
            found = self.likelihood.log_likelihood(asked, [self.words] * len(asked))
            yield batch, [RewardRow(good - bad) for good, bad in found]

    @property
    def words(self) -> list[list[int]]:
        """The token ids of both words, as the judge's tokenizer cuts them where an answer begins."""
        tokenizer = models.load_tokenizer(self.model)
        space = "" if tokenizer.has_chat_template else " "
        return [tokenizer.encode_completion(space + word.strip()) for word in (self.settings.good, self.settings.bad)]

    def ask(self, prompt: Prompt, completion: str) -> list[int]:
        """The judge's prompt, token ids. A problem that is too long is cut from its beginning; a candidate never is.

        Raises:
            ValueError: the candidate alone does not fit the judge's context.
        """
        tokenizer, candidate, problem = models.load_tokenizer(self.model), answer(prompt, completion), question(prompt)
        context = models.outline(self.model).context_length
        longest = max(map(len, self.words))
        while True:
            text = self.settings.asked(problem, candidate)
            asked = (
                Prompt(prompt.task_id, messages=({"role": "user", "content": text},))
                if tokenizer.has_chat_template
                else Prompt(prompt.task_id, text=f"{text}\nReply:")
            )
            ids = tokenizer.render_prompt(asked)[1]
            if context is None or len(ids) + longest <= context:
                return ids
            if not problem:
                raise ValueError(
                    f"A candidate of {prompt.task_id} makes a prompt of {len(ids)} tokens for {self.model.name}, which reads "
                    f"{context}: name a judge with a longer context, or lower sampler.max_new_tokens."
                )
            problem = problem[len(problem) // _CUT + 1 :]
