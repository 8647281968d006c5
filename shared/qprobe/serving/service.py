"""A probe at work for many clients: candidates from a source, embedded and scored in shared batches, one chosen.

No HTTP here: `app` translates.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qprobe.models.keys import Key
from qprobe.probe.card import CARD_FILE
from qprobe.probe.estimator import QProbe
from qprobe.prompts import Prompt
from qprobe.sampling import Completion
from qprobe.serving.answer import Answer
from qprobe.serving.batching import Dispatcher, Job, Lane, TooLate
from qprobe.serving.draws import DRAW, Asked, Draws, OwnModel, Source
from qprobe.serving.feedback import FeedbackLog, state, watch
from qprobe.serving.metrics import Metrics
from qprobe.serving.policy import Choice, NotFinite, Policy, Read, choice_seed, features_of
from qprobe.serving.protocol import Body, ChatBody, Refused, prompt_of
from qprobe.serving.settings import ServeSettings

_LOG = logging.getLogger(__name__)
SCORE = "score"
# Seeds that a service makes by itself.
_SEED_BITS = 60
LOOK = 2.0  # seconds between looks whether a new probe is there
_REMEMBERED = 64  # requests whose seconds say how long the next one will take


@dataclass
class Loaded:
    """A policy in use, and the name of its probe's content."""

    policy: Policy
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = probe_fingerprint(self.policy.probe)


class Service:
    """Answers requests by a policy.

    Args:
        policy: whose probe chooses, whose embedder reads, and whose sampler's law holds where a request says nothing.
        source: draws the candidates.
        feedback: takes replies and what users say of them; None: nothing is kept.
        probe: the folder of the policy's probe; when a new one is written there it is taken.
    """

    def __init__(
        self,
        policy: Policy,
        source: Source,
        settings: ServeSettings,
        metrics: Metrics,
        feedback: FeedbackLog | None = None,
        probe: Path | None = None,
    ) -> None:
        self.feedback = feedback
        self._probe = probe
        self._seen = None if probe is None else state(probe / CARD_FILE)
        self._background: list[asyncio.Task[None]] = []
        self.loaded = Loaded(policy)
        self.source = source
        self.settings = settings
        self.metrics = metrics
        self.ready = False
        self.failure: Exception | None = None  # of loading
        self._in_work = 0
        self._took: deque[float] = deque([1.0], maxlen=_REMEMBERED)
        rows, told = settings.batch_rows, metrics.done
        lanes = [Lane(SCORE, self._score, rows, done=told)]
        if isinstance(source, OwnModel):
            lanes.append(Lane(DRAW, source.work, rows, gather=0.01, done=told))
        self.dispatcher = Dispatcher(lanes)
        if isinstance(source, OwnModel):
            source.dispatcher = self.dispatcher
        self._tell()

    async def start(self) -> None:
        """Begin to serve, and load the models."""
        self.dispatcher.start()
        await self.dispatcher.run(self._warm)
        if self.feedback is not None:
            self._background.append(asyncio.create_task(self.feedback.keep_flushing()))
        if self._probe is not None:
            self._background.append(asyncio.create_task(watch(self._probe / CARD_FILE, LOOK, self.reload, self._seen)))
        self.ready = True

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.dispatcher.close()
        await self.source.close()

    async def answers(self, body: Body, given: dict[str, Any], key: Key) -> list[Answer]:
        """Draw, score and choose, of every prompt of a request; several are as many requests that come at once.

        Raises:
            Refused: one of them has no answer, with the reason; the others are left then.
        """
        bodies = body.alone()
        async with self._admitted(len(bodies)):
            loaded = self.loaded  # the same one to the end, whatever comes to be loaded
            works = [asyncio.create_task(self._answer(one, given, key, loaded)) for one in bodies]
            try:
                return await asyncio.gather(*works)
            finally:
                for work in works:
                    work.cancel()
                await asyncio.gather(*works, return_exceptions=True)

    async def _answer(self, body: Body, given: dict[str, Any], key: Key, loaded: Loaded) -> Answer:
        asked = self._asked(body, given, key, loaded.policy)
        try:
            with self.metrics.timed(self.metrics.drawing):
                draws = await self.source.draw(asked)
            return await self._chosen(body, asked, draws, loaded)
        except TooLate:
            raise Refused(
                504,
                f"No candidate came in {min(self.settings.candidate_seconds, self.settings.request_seconds):g} s: ask for "
                "fewer or shorter ones, or try again when there is less to do.",
                code="timeout",
            ) from None

    async def scores(self, prompt: Prompt, texts: Sequence[str], beta: float | None) -> tuple[Choice, Loaded]:
        """Scores and probabilities of candidates that are there already."""
        async with self._admitted():
            loaded = self.loaded
            completions = [Completion(text, None, "stop", math.nan, 0) for text in texts]
            rendered = self._rendered(prompt, loaded.policy)
            give_up = time.monotonic() + self.settings.request_seconds
            try:
                read = await self._read(loaded, prompt, rendered, completions, give_up)
            except TooLate:
                raise Refused(504, "The candidates were not scored in time: try again.", code="timeout") from None
            return loaded.policy.choice(completions, read, 0, beta), loaded

    async def reload(self) -> None:
        """Take the probe that lies in the folder now; requests in work end with the one that they began with."""
        before = self.loaded.policy
        try:
            assert self._probe is not None  # watched
            probe = await asyncio.to_thread(QProbe.from_pretrained, self._probe)
            beta = None if before.beta == before.probe.beta_ else before.beta
            self.loaded = Loaded(Policy(before.sampler, before.embedder, probe, style=before.style, beta=beta))
        except (OSError, ValueError) as error:  # half written, or another model's
            tqdm.write(f"The probe in {self._probe} is not taken: {error}", file=sys.stderr)
            return
        self._tell()
        tqdm.write(f"The probe in {self._probe} is in use ({self.loaded.fingerprint}).", file=sys.stderr)

    def _tell(self) -> None:
        self.metrics.probe.info({"fingerprint": self.loaded.fingerprint, "loss": self.loaded.policy.probe.loss})

    @asynccontextmanager
    async def _admitted(self, prompts: int = 1) -> AsyncIterator[None]:
        if self.failure is not None:
            raise Refused(503, f"The model cannot be loaded: {self.failure}", code="not_ready")
        if not self.ready:
            raise Refused(503, "The model is being loaded: try again in a moment.", code="not_ready", wait=2)
        most = self.settings.most_in_work
        if prompts > most:
            said = f"prompt is a list of {prompts} texts, and {most} are the most here: send them in several requests."
            raise Refused(400, said, "prompt")
        if self._in_work + prompts > most:
            raise Refused(
                429, f"This server takes {most} requests at once, and has too many: try again later.", wait=self._wait()
            )
        self._in_work += prompts
        self.metrics.in_work.set(self._in_work)
        began = time.monotonic()
        try:
            yield
            self._took.append(time.monotonic() - began)
        finally:
            self._in_work -= prompts
            self.metrics.in_work.set(self._in_work)

    def _wait(self) -> float:
        return min(60.0, sum(self._took) / len(self._took))

    def _asked(self, body: Body, given: dict[str, Any], key: Key, policy: Policy) -> Asked:
        own, law = body.qprobe, policy.sampler.settings
        n = body.n or 1
        k = max(self.settings.k or law.n, n) if own.k is None else own.k
        if n > k:
            raise Refused(400, f"n is {n}, but qprobe.k only {k}: choices are candidates, so k is at least n.", "n")
        if k > self.settings.most_candidates:
            said = f"{k} candidates are asked for, and {self.settings.most_candidates} are the most here."
            raise Refused(400, said, "n" if own.k is None else "qprobe.k")
        seed = next((s for s in (own.seed, body.seed) if s is not None), None)
        changes: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p, "max_new_tokens": body.length}
        changes |= {"stop": body.stops}
        changes = {name: value for name, value in changes.items() if value is not None}
        if "stop" in changes:
            changes["rule"] = None
        greedy = changes.get("temperature", law.temperature) == 0  # all candidates would be the same
        try:
            asked_law = replace(law, **changes, n=1 if greedy else k)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        prompt = prompt_of(body)
        now = time.monotonic()
        give_up = now + self.settings.request_seconds
        return Asked(
            chat=isinstance(body, ChatBody),
            given=given,
            prompt=prompt,
            rendered=self._rendered(prompt, policy),
            law=asked_law,
            seed=secrets.randbits(_SEED_BITS) if seed is None else seed % 2**62,
            seeded=seed is not None,
            key=key,
            until=min(give_up, now + self.settings.candidate_seconds),
            give_up=give_up,
        )

    @staticmethod
    def _rendered(prompt: Prompt, policy: Policy) -> tuple[str, list[int]]:
        try:
            return policy.sampler.render(prompt)
        except Exception as error:  # chat templates raise errors of their own
            raise Refused(400, f"The prompt cannot be read: {error}", "messages") from None

    async def _chosen(self, body: Body, asked: Asked, draws: Draws, loaded: Loaded) -> Answer:
        beta = loaded.policy.beta if body.qprobe.beta is None else body.qprobe.beta
        completions = [candidate.completion for candidate in draws.candidates]
        choice, read, places = None, None, list(range(len(completions)))
        plain = body.qprobe.beta is None and not asked.seeded and (body.n or 1) == 1
        explore = self.settings.explore if plain and self.feedback is not None else 0.0
        try:
            read = await self._read(loaded, asked.prompt, asked.rendered, completions, asked.give_up)
            choice = loaded.policy.choice(completions, read, choice_seed(asked.seeds), beta, explore)
            places.sort(key=lambda place: (place != choice.chosen, -choice.candidates[place].score))
        except Exception as error:
            if isinstance(error, TooLate):
                error = Refused(504, "The candidates were not scored in time: try again.", code="timeout")
            if isinstance(error, Refused) and self.settings.when_scoring_fails == "error":
                raise error from None
            self.metrics.unscored.inc()
            _LOG.warning("The candidates of a request could not be scored: %s: %s", type(error).__name__, error)
            if self.settings.when_scoring_fails == "error":
                raise Refused(500, f"The candidates could not be scored: {error}", code="scoring_failed") from error
        self.metrics.candidates.labels("asked").inc(asked.law.n)
        self.metrics.candidates.labels("usable").inc(len(completions))
        for kind in ("prompt_tokens", "completion_tokens"):
            self.metrics.tokens.labels(kind).inc(draws.usage.get(kind) or 0)
        origin = draws.candidates[places[0]].origin
        made = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        created, id = origin.get("created"), origin.get("id")
        if not (isinstance(id, str) and id) or self.feedback is not None:
            id = made  # some servers draw theirs out of a thousand, and feedback is kept by it
        if self.feedback is not None and choice is not None and read is not None:
            self.feedback.record(id, asked.rendered[0], loaded.fingerprint, beta, choice, read)
        return Answer(
            id=id,
            created=created if isinstance(created, int) else int(time.time()),
            asked=asked.law.n,
            draws=draws,
            choice=choice,
            order=places[: body.n or 1],
            beta=beta,
            seed=asked.seed,
            probe=loaded.fingerprint,
        )

    async def _read(
        self,
        loaded: Loaded,
        prompt: Prompt,
        rendered: tuple[str, list[int]],
        completions: Sequence[Completion],
        give_up: float,
    ) -> Read:
        if (known := loaded.policy.known([completions])) is not None:  # a dot product: not worth a queue
            return known[0]
        item = (prompt, rendered, completions)
        try:
            found: Read = await self.dispatcher.submit(
                SCORE,
                (loaded.policy, item),
                key=loaded.fingerprint,
                size=len(completions),
                until=give_up,
                give_up=give_up,
            )
            return found
        except NotFinite:
            raise
        except ValueError as error:  # what is too long for the embedder, in its own sentence
            raise Refused(400, str(error), code="context_length_exceeded") from None

    def _score(self, jobs: Sequence[Job], more: object) -> Iterator[tuple[Job, Read]]:
        policy: Policy = jobs[0].item[0]
        prompts, rendered, drawn = zip(*(job.item[1] for job in jobs), strict=True)
        return zip(jobs, policy.read(prompts, rendered, drawn), strict=True)

    def _warm(self) -> None:
        if isinstance(self.source, OwnModel):
            self.source.warm()
        policy = self.loaded.policy
        if self.feedback is not None or hasattr(policy.embedder, "passes"):
            prompt, said = Prompt("warm", text="The"), Completion(" sea", None, "stop", math.nan, 0)
            policy.read([prompt], [policy.sampler.render(prompt)], [[said]])
            if self.feedback is not None:
                ends, text = (policy.sampler, policy.embedder), [[(said.text, None)]]
                layers = policy.blocks or (policy.layer,)
                widths = [features_of(*ends, [layer], [prompt], text).shape[1] for layer in layers]
                self.feedback.open(policy.probe.source, widths, self._probe)


def probe_fingerprint(probe: QProbe) -> str:
    """Of what decides its choices: weights and temperature."""
    digest = hashlib.sha256(repr(probe.beta_).encode())
    for name, value in sorted(probe.network_.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]
