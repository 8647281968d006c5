"""A trained probe in use: k completions of a prompt are drawn, embedded and scored, and one of them is the answer.

Policy(sampler, embedder, QProbe.from_pretrained("probe/")).answer("Describe the sea.")
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from qprobe.embedding import LIKELIHOOD, Embedder, columns_identity, tables_of, tokens_to_read
from qprobe.probe import selection
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.prompts import Prompt
from qprobe.run.handing import handing
from qprobe.sampling import Completion, Sampler, sample_seeds
from qprobe.store.jsonl import plain_prompt

OnePrompt = str | Sequence[dict[str, str]] | Prompt


class NotFinite(ValueError):
    """Embeddings that hold NaN or infinity: the model's fault, and not the prompt's."""


@dataclass(frozen=True)
class Candidate:
    """One completion that an answer was chosen from.

    Args:
        text: the completion.
        score: its Q.
        probability: that it was chosen with.
        right: probability that it is right as the chosen one, in [0, 1]; None where the probe is not calibrated.
    """

    text: str
    score: float
    probability: float
    right: float | None = None


@dataclass(frozen=True)
class Choice:
    """All candidates of a prompt, in the order in which they were drawn, and the place of the one that was chosen."""

    candidates: list[Candidate]
    chosen: int

    @property
    def answer(self) -> str:
        return self.candidates[self.chosen].text

    @property
    def right(self) -> float | None:
        """Probability that the answer is right; None where the probe is not calibrated. Where it is low, say none of these."""
        return self.candidates[self.chosen].right


@dataclass(frozen=True)
class Read:
    """What a probe reads of the k candidates of a prompt, in their order.

    Args:
        features: (k, D) float32, the blocks beside each other.
        scores: (k,) float32, Q values.
    """

    features: torch.Tensor
    scores: torch.Tensor


def choice_seed(seeds: Sequence[int]) -> int:
    """The seed behind those of a prompt's candidates: prompts of one call draw apart from each other."""
    return seeds[-1] + 1


def features_of(
    sampler: Sampler,
    embedder: Embedder,
    layers: Sequence[int],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[tuple[str, list[int] | None]]],
    rendered: Sequence[tuple[str, list[int]]] | None = None,
) -> torch.Tensor:
    """Embeddings of prompts with completions.

    Args:
        sampler: renders the prompts.
        layers: beside each other in what is returned.
        completions: text and token ids (None where there are none) of each prompt's.
        rendered: the prompts as `sampler.render` gives them, where that was asked before.

    Returns: (N, D) float32, completions of the first prompt first.
    """
    fingerprint = sampler.tokenizer_fingerprint()
    rendered = [sampler.render(prompt) for prompt in prompts] if rendered is None else rendered
    to_read = [
        tokens_to_read(embedder, fingerprint, as_read, own, templated=prompt.text is None)
        for prompt, as_read, own in zip(prompts, rendered, completions, strict=True)
    ]
    states = embedder.embed([ids for ids, _ in to_read], [ids for _, ids in to_read])
    return torch.cat([states[layer] for layer in layers], dim=1)


class Policy:
    """The policy of a Q-probe: softmax(Q / beta) over k completions of the base model.

    Args:
        sampler: draws the k = `sampler.settings.n` candidates. Where the embedder reads the same model, the policy's own copy of
            the sampler keeps what the probe reads while it draws, and no completion is read again.
        embedder: embeds them; its model must be the one that the probe was trained on.
        probe: scores them.
        style: what plain text is to the model, `chat` (a user's message) or `text` (to be continued); None takes what the
            probe was trained with.
        beta: temperature, 0 takes the best; None is the probe's own.

    Raises:
        ValueError: an embedder of another model or without the probe's layer, a beta below 0.

    Source: the policy of Q-Probe (arXiv 2402.14688).
    """

    def __init__(
        self,
        sampler: Sampler,
        embedder: Embedder,
        probe: QProbe,
        *,
        style: str | None = None,
        beta: float | None = None,
    ) -> None:
        self.embedder = embedder
        self.probe = probe
        self.style = probe.use.get("prompts") if style is None else style
        self.beta = probe.beta_ if beta is None else beta
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}: a temperature is 0 (the best candidate) or more.")
        self.layer = self._layer()
        layers = self.blocks or (self.layer,)
        self.sampler = handing(sampler, embedder, layers)
        if probe.source is not None:
            source = EmbeddingSource.of(embedder.identity(), self.layer, embedder.tokenizer_fingerprint())
            columns = columns_identity(embedder, self.blocks)
            probe.check_source(dataclasses.replace(source, blocks=self.blocks, likelihood=columns))

    @overload
    def answer(self, prompt: OnePrompt, seed: int | None = None) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def answer(self, prompt: Sequence[OnePrompt], seed: int | None = None) -> list[str]: ...

    def answer(self, prompt: OnePrompt | Sequence[OnePrompt], seed: int | None = None) -> str | list[str]:
        """The completion that the policy chooses, or of a list of prompts a list of them; arguments as of `choose`."""
        found = self._chosen(prompt, seed)
        return [choice.answer for choice in found] if isinstance(found, list) else found.answer

    @overload
    def choose(self, prompt: OnePrompt, seed: int | None = None) -> Choice: ...  # type: ignore[overload-overlap]

    @overload
    def choose(self, prompt: Sequence[OnePrompt], seed: int | None = None) -> list[Choice]: ...

    def choose(self, prompt: OnePrompt | Sequence[OnePrompt], seed: int | None = None) -> Choice | list[Choice]:
        """Draw the candidates of a prompt and choose one; of a list of prompts a list of choices, drawn together.

        Args:
            prompt: plain text (see `style`), a conversation as [{"role": ..., "content": ...}, ...], or a Prompt; or a list of
                such prompts.
            seed: of candidates and choice; None takes a new one at every call.

        Raises:
            ValueError: plain text where no style is known, a prompt that is none, or one beyond the context of the model.
        """
        return self._chosen(prompt, seed)

    def _chosen(self, prompt: OnePrompt | Sequence[OnePrompt], seed: int | None) -> Choice | list[Choice]:
        if isinstance(prompt, str | Prompt):
            return self._choose([prompt], seed)[0]
        if not isinstance(prompt, Sequence):
            raise ValueError(
                f"The prompt is {prompt!r:.60}: give a text, a conversation as a list of messages, a Prompt, or a list of these."
            )
        one = bool(prompt) and all(isinstance(part, Mapping) for part in prompt)  # the messages of a conversation
        return self._choose([prompt], seed)[0] if one else self._choose(prompt, seed)

    def _choose(self, prompts: Sequence[Any], seed: int | None) -> list[Choice]:
        if not prompts:
            return []
        seed = secrets.randbits(60) if seed is None else seed
        asked = [self._prompt(prompt) for prompt in prompts]
        rendered = [self.sampler.render(prompt) for prompt in asked]
        seeds = [sample_seeds(seed, text, self.sampler.settings.n) for text, _ in rendered]
        drawn = self.sampler.sample([ids for _, ids in rendered], seeds)
        found = self.read(asked, rendered, drawn)
        return [
            self.choice(candidates, of, choice_seed(own))
            for candidates, of, own in zip(drawn, found, seeds, strict=True)
        ]

    def read(
        self,
        prompts: Sequence[Prompt],
        rendered: Sequence[tuple[str, list[int]]],
        drawn: Sequence[Sequence[Completion]],
    ) -> list[Read]:
        """Embed and score the candidates of several prompts together, whoever drew them.

        Args:
            rendered: of every prompt, as `sampler.render` gives it.
            drawn: of every prompt, one candidate at least.
        """
        if (known := self.known(drawn)) is not None:
            return known
        pairs = [[(completion.text, completion.token_ids) for completion in candidates] for candidates in drawn]
        return self._read(prompts, pairs, rendered)

    def known(self, drawn: Sequence[Sequence[Completion]]) -> list[Read] | None:
        """As `read`, of states that came with the candidates; None where one has none."""
        layers = self.blocks or (self.layer,)
        states = [completion.states or {} for candidates in drawn for completion in candidates]
        if not all(layer in of_one for of_one in states for layer in layers):
            return None
        features = torch.stack([torch.cat([of_one[layer] for layer in layers]) for of_one in states])
        return self._scored(features, list(map(len, drawn)))

    def scores(self, prompts: Sequence[OnePrompt], completions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Q of completions that something else has drawn; the sampler only renders the prompts.

        Args:
            prompts: as those of `choose`.
            completions: the texts of each prompt, one at least in all.

        Raises:
            ValueError: as `choose`; or not as many lists as prompts.
        """
        asked = [self._prompt(prompt) for prompt in prompts]
        return [
            read.scores.tolist() for read in self._read(asked, [[(text, None) for text in own] for own in completions])
        ]

    def _read(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[tuple[str, list[int] | None]]],
        rendered: Sequence[tuple[str, list[int]]] | None = None,
    ) -> list[Read]:
        """What the probe reads of texts and token ids (None where there are none) of each prompt's completions."""
        layers = self.blocks or (self.layer,)
        features = features_of(self.sampler, self.embedder, layers, prompts, completions, rendered)
        return self._scored(features, list(map(len, completions)))

    def _scored(self, features: torch.Tensor, sizes: list[int]) -> list[Read]:
        """Of so many candidates of each prompt."""
        if not bool(torch.isfinite(features).all()):
            raise NotFinite(
                "The embeddings hold NaN or infinity: the model overflows in its dtype; use bfloat16 or float32."
            )
        scores = torch.from_numpy(self.probe.score(features))
        return [Read(*found) for found in zip(features.split(sizes), scores.split(sizes), strict=True)]

    def choice(
        self, drawn: Sequence[Completion], read: Read, seed: int, beta: float | None = None, explore: float = 0.0
    ) -> Choice:
        """Choose one of a prompt's candidates by what was read of them.

        Args:
            beta: None is the policy's own.
            explore: share of choices that are made by lot, in [0, 1]; the probabilities are those of both ways together.
        """
        calibration = self.probe.calibration_
        right = [None] * len(drawn) if calibration is None else calibration.probabilities(read.features).tolist()
        beta, scores = self.beta if beta is None else beta, read.scores
        weights = selection.selection_weights(scores, beta)
        generator = torch.Generator().manual_seed(seed)
        chosen = selection.select(scores, beta, generator)
        if explore:
            weights = (1 - explore) * weights + explore / len(drawn)
            chosen = int(torch.multinomial(weights, 1, generator=generator))
        return Choice(
            [
                Candidate(completion.text, float(score), float(weight), sure)
                for completion, score, weight, sure in zip(drawn, scores, weights, right, strict=True)
            ],
            chosen,
        )

    def _prompt(self, prompt: Any) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            return Prompt("answer", messages=tuple(prompt))
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt of the list is {prompt!r:.60}: give a text, a conversation, or a Prompt.")
        if self.style is None:
            raise ValueError(
                "The probe does not say how plain text was rendered in training: give Policy a style (chat or text), or give it "
                "a conversation."
            )
        return plain_prompt("answer", prompt, self.style)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers beside each other that the probe reads; none where it reads one."""
        return () if self.probe.source is None else self.probe.source.blocks

    def _layer(self) -> int:
        layers = list(self.embedder.layers)
        if self.probe.source is None:
            if len(layers) != 1:
                raise ValueError(
                    f"The probe does not say which layer it reads, and the embedder makes {layers}: give one."
                )
            return layers[0]
        if lacking := [layer for layer in self.blocks if layer not in tables_of(self.embedder)]:
            said = ", ".join("likelihood columns" if layer == LIKELIHOOD else f"layer {layer}" for layer in lacking)
            raise ValueError(f"The probe reads {said}, which the embedder does not make: add them there.")
        if self.probe.source.layer not in layers:
            raise ValueError(
                f"The probe reads layer {self.probe.source.layer}, but the embedder makes {layers}: add it there."
            )
        return self.probe.source.layer
