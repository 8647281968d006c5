"""Candidates of a request, whoever draws them: the form that they share, and drawing by a model in this process."""

from __future__ import annotations

import copy
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qprobe.models.keys import Key
from qprobe.models.language_model import EMBEDDED, EMBEDDED_FILE
from qprobe.models.loading import load
from qprobe.prompts import Prompt
from qprobe.sampling import Completion, SamplingSettings, sample_seeds
from qprobe.sampling.base import Batch
from qprobe.sampling.hf import HFSampler
from qprobe.serving.batching import Dispatcher, Job, TooLate
from qprobe.serving.protocol import Refused, refuse_law

DRAW = "draw"


@dataclass(frozen=True)
class Asked:
    """What a request asks of whoever draws.

    Args:
        chat: whether it is a conversation, else a text to be continued.
        given: the body.
        prompt: for whoever reads it.
        rendered: its text and token ids.
        law: how candidates are drawn, `law.n` of them.
        seed: of candidates and choice.
        seeded: whether the client gave it.
        key: of the model's server.
        until: of `time.monotonic`: what has not come then is left.
        give_up: of `time.monotonic`: the request gets no answer then.
    """

    chat: bool
    given: dict[str, Any]
    prompt: Prompt
    rendered: tuple[str, list[int]]
    law: SamplingSettings
    seed: int
    seeded: bool
    key: Key
    until: float
    give_up: float

    @property
    def seeds(self) -> list[int]:
        """Of the candidates, as the library has them."""
        return sample_seeds(self.seed, self.rendered[0], self.law.n)

    def left(self) -> float:
        """Seconds for drawing."""
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Candidate:
    """One candidate.

    Args:
        completion: what is embedded.
        choice: as a client gets it, without its index.
        origin: id, created and system_fingerprint of the answer that it came in, where there was one.
    """

    completion: Completion
    choice: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draws:
    """The usable candidates of a request, one at least.

    Args:
        usage: tokens of all calls together, as OpenAI counts them.
        model: what the one who drew calls it.
        faults: why there are fewer than were asked for.
    """

    candidates: list[Candidate]
    usage: dict[str, Any]
    model: str
    faults: list[str] = field(default_factory=list)


class Source(Protocol):
    """Whoever draws candidates."""

    name: str
    """Of the model, as clients name it."""

    async def draw(self, asked: Asked) -> Draws:
        """Candidates of a request.

        Raises:
            Refused: there are none, with the reason.
        """

    async def close(self) -> None:
        """Let connections go."""


class OwnModel:
    """Candidates by transformers in this process, in batches that the requests of one law share.

    Args:
        sampler: whose model draws.

    dispatcher: set by whoever serves, with a lane `DRAW` that does `work`.
    """

    def __init__(self, sampler: HFSampler) -> None:
        self._sampler = sampler
        self.name = model_name(sampler.model.name)
        self.dispatcher: Dispatcher | None = None

    def warm(self) -> None:
        """Load the model, and know how many rows it likes."""
        self._sampler.warm()

    def work(self, jobs: Sequence[Job], more: Callable[[], Job | None]) -> Iterator[tuple[Job, list[Completion]]]:
        """The finished completions of every job; its rows leave when nobody wants it any more, and others take their place."""
        sampler = self._with(jobs[0].key)
        begun: dict[int, Job] = {}

        def batches() -> Iterator[Batch | None]:
            first, number = deque(jobs), 0
            while True:
                job = first.popleft() if first else more()
                if job is None:
                    yield None
                else:
                    begun[number] = job
                    number += 1
                    yield [job.item[0]], [job.item[1]]

        for number, (drawn,) in sampler.sample_batches(batches(), lambda number, _: begun[number].wanted()):
            yield begun.pop(number), [completion for completion in drawn if completion.finish_reason]

    async def draw(self, asked: Asked) -> Draws:
        told = asked.chat and asked.given.get("logprobs") is True
        refuse_law({name: value for name, value in asked.given.items() if not (told and name == "logprobs")})
        assert self.dispatcher is not None  # set by the service
        law, ids = asked.law, asked.rendered[1]
        try:
            self._with(law).check_length([ids], load(self._sampler.model).context_length)
        except ValueError as error:
            raise Refused(400, str(error), code="context_length_exceeded") from None
        item = (ids, asked.seeds)
        completions = await self.dispatcher.submit(
            DRAW, item, key=law, size=law.n, until=asked.until, give_up=asked.give_up
        )
        if not completions:
            raise TooLate
        drawn = sum(len(completion.token_ids or []) for completion in completions)
        usage = {"prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn}
        late = law.n - len(completions)
        faults = [f"{late} candidates were not finished in time"] if late else []
        candidates = [_candidate(c, asked.chat, self._logprobs(c) if told else None) for c in completions]
        return Draws(candidates, usage, self.name, faults)

    def _logprobs(self, completion: Completion) -> dict[str, Any]:
        """As OpenAI has them, of the model's own law, and without the likeliest others."""
        decode, content = load(self._sampler.model).tokenizer.decode, list[dict[str, Any]]()
        for token, logprob in zip(completion.token_ids or [], completion.logprobs or [], strict=True):
            text = decode([token])
            content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": content, "refusal": None}

    async def close(self) -> None:
        """There are none."""

    @functools.lru_cache(maxsize=32)  # noqa: B019 - as long-lived as the process
    def _with(self, law: Any) -> HFSampler:
        """The sampler under another law; the model and what it is run by are shared."""
        sampler = copy.copy(self._sampler)
        sampler.settings = law
        return sampler


def _candidate(completion: Completion, chat: bool, logprobs: dict[str, Any] | None) -> Candidate:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
    said = said if chat else {"text": completion.text}
    return Candidate(completion, said | {"logprobs": logprobs, "finish_reason": completion.finish_reason})


def model_name(name: str) -> str:
    """A model's name for clients: no path of this machine."""
    if name == EMBEDDED:
        return EMBEDDED_FILE.partition(".Q")[0]
    return Path(name).name if Path(name).exists() else name
