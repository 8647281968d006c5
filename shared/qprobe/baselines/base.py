"""What a baseline is: a rival policy or a ranker of candidates, and the rows it may be trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qprobe.prompts import Prompt
from qprobe.run.pools import KEY_COLUMNS, Pool, Reward, RewardBatch, RewardRow
from qprobe.store.table import StoreError, Table

_FENCE = "```"

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# (M, D) states and (M,) prompt ids of candidates -> (M,) scores.
Score = Callable[[Floats, Integers], Floats]


@dataclass(frozen=True)
class TrainingRow:
    """A rewarded completion of the training split.

    Args:
        prompt: as it was asked.
        rendered, prompt_token_ids: the prompt as the sampler's model read it.
        completion, token_ids: what the sampler drew; None where it gives no tokens.
        reward: what it earned.
        finish_reason: why it ended; "length" where it was cut off.
    """

    prompt: Prompt
    rendered: str
    prompt_token_ids: list[int]
    completion: str
    token_ids: list[int] | None
    reward: float
    finish_reason: str = "stop"


@dataclass(frozen=True)
class TrainingData:
    """What a baseline may be trained on: the training split's completions and what they earned.

    Args:
        pool: the training split's sample pool; its sampler's tokenizer made the tokens.
        reward: the stage that rewarded it.
    """

    pool: Pool
    reward: Reward

    def identity(self) -> dict[str, Any]:
        """Of the rows, for what is made from them."""
        return {"split": self.pool.split.name, "rewards": self.pool.rewards(self.reward).state}

    def read(self) -> list[TrainingRow]:
        """All rows, by task id, then sample.

        Raises:
            StoreError: a table is unfinished; the message says which stage is missing how much.
        """
        pool = self.pool
        check_whole(pool, pool.completions, "sample")
        check_whole(pool, pool.rewards(self.reward), "reward")
        rewards = pool.rewards(self.reward).read(pool.batches, [*KEY_COLUMNS, "reward"]).to_pylist()
        columns = [*KEY_COLUMNS, "completion", "token_ids", "finish_reason"]
        completions = pool.completions.read(pool.batches, columns).to_pylist()
        rendered = {row["task_id"]: row for row in pool.prompts.read([pool.task_ids]).to_pylist()}
        prompts = {prompt.task_id: prompt for prompt in pool.split.prompts}
        earned = {tuple(row[name] for name in KEY_COLUMNS): float(row["reward"]) for row in rewards}
        return [
            TrainingRow(
                prompts[row["task_id"]],
                rendered[row["task_id"]]["prompt"],
                rendered[row["task_id"]]["prompt_token_ids"],
                row["completion"],
                row["token_ids"],
                earned[row["task_id"], row["sample"]],
                row["finish_reason"],
            )
            for row in completions
        ]


def check_whole(pool: Pool, table: Table, stage: str) -> None:
    """Raise StoreError where a stage has not made all rows of a pool's table."""
    table.check_inputs()
    if missing := sum(pool.rows(keys) for keys in pool.batches if not table.has(keys)):
        raise StoreError(
            f"The stage {stage} is missing {missing} of {pool.rows(tuple(pool.task_ids))} rows of {pool.name}: run it first."
        )


class Baseline(ABC):
    """A row of the table that no probe made.

    A constructor's arguments are the keys of `baselines.<name>` in the configuration; or it has one, `settings`, a dataclass of
    them. By name it may also ask for `model` (the run's `ModelSpec`), `seed`, `sampler` (the run's, at temperature 0),
    `adapted` (the same of the model with an adapter's folder), `redrawn` (makes the run's sampler with other `SamplingSettings`,
    without a stop rule; where the run is recorded, it is `model` by transformers), `longest` (tokens that a prompt may have),
    `embedder` and `agreement`.

    Attributes:
        name: short, in the configuration and in paths; the one that it is registered by.
        method: of its row.
        trains: whether it needs a training split, for `train`.
        cannot_use: back ends of samplers that cannot draw what it asks; a recording holds answers to its own prompts alone.
        reads_likelihoods: whether it reads the likelihood columns, which are then embedded for it.
    """

    name: str
    method: str
    trains: bool = False
    cannot_use: tuple[str, ...] = ()
    reads_likelihoods: bool = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides it besides what it is trained on; cheap."""

    def check(self) -> None:
        """Raise, in a sentence, what can be known to fail before any work."""
        return

    def train(self, data: TrainingData, folder: Path) -> None:
        """Train, into a folder that is its own; not called again once it has returned. A killed one is begun again.

        Raises:
            ValueError: there is nothing to train on, such as no success.
        """
        raise NotImplementedError


class Rival(Baseline):
    """Another policy, whose one greedy completion a prompt is rewarded; its row follows that of greedy decoding."""

    @abstractmethod
    def pool(self, tested: Pool, folder: Path) -> Pool:
        """Its completions of a test pool's prompts, before they are drawn.

        Args:
            tested: the sample pool.
            folder: what it was trained to.

        Returns: a pool of the same task ids, of kind `name`, one completion a prompt.
        """


class Ranker(Baseline):
    """A score a candidate; its row is the best of k, as a control's. Scores rank and never train.

    Attributes:
        of_all: whether a score is read off all candidates of the prompt, those too that are not among the k.
    """

    of_all: bool = False

    @abstractmethod
    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        """Every batch with its candidates' scores as rewards, in any order of batches.

        Args:
            tested: the pool that the candidates are of.
            folder: what it was trained to.
            batches: whole prompts.
        """


class Fitted(Baseline):
    """A score a candidate, fitted on hidden states and rewards that a run holds anyway; its row is the best of k, as a ranker's.

    A fit sees what the table's probes see: of cross-validated prompts those outside the fold, else the training split. Nothing
    of it is kept: it is made again, in seconds, where results are.

    Attributes:
        every_layer: whether it reads all layers that were embedded, its score being the mean over them; else that of the probes.
        of_all: as of `Ranker`.
    """

    every_layer: bool = False
    of_all: bool = False

    @abstractmethod
    def fit(self, states: Floats, rewards: Floats, groups: Integers) -> Score:
        """What scores candidates of other prompts.

        Args:
            states: (N, D) of a layer, as the embedder gives them.
            rewards: (N,) what they earned.
            groups: (N,) the prompt of each; rows of a prompt stand together.

        Raises:
            NothingToLearn: these rows do not say what it needs; a sentence. Its row is then "not run".
        """


def answer(prompt: Prompt, completion: str) -> str:
    """What the model says to a prompt: with the opening that its answer was given, and a fence that is open closed."""
    text = prompt.opening + completion
    return text if text.count(_FENCE) % 2 == 0 else f"{text.rstrip()}\n{_FENCE}"


def question(prompt: Prompt) -> str:
    """A prompt as plain text: what is to be continued, or what was said so far."""
    if prompt.text is not None:
        return prompt.text
    return "\n\n".join(message["content"] for message in prompt.messages)
