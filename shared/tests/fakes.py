"""A language model, an embedder and a reward in a few lines of arithmetic: whole pipelines in milliseconds.

Task `t-042` is as hard as its number says; a completion says how good it is ("answer 73"); it passes when it is better than its
task is hard. The embedding holds goodness (to be found by a probe), hardness, and noise, all read off the token ids alone.
Tests reach these classes through the fixture `fakes`; the process that is killed imports this file by its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprobe import baselines
from qprobe.embedding import LIKELIHOOD
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.pipeline.pipeline import Pipeline
from qprobe.prompts import Prompt
from qprobe.run import rewarding, stages
from qprobe.run.joined import Joined, join
from qprobe.run.pools import Pool, RewardBatch, RewardRow, Split
from qprobe.sampling import Completion, SamplingSettings

WIDTH = 6
PROMPT_MARK = 1  # what the embedder's own encoding puts before a prompt, as a tokenizer puts BOS


def prompts(count: int, start: int = 0) -> list[Prompt]:
    return [Prompt(f"t-{number:03d}", text=f"task {number:03d}: ") for number in range(start, start + count)]


def split(name: str = "train", count: int = 10, start: int = 0) -> Split:
    return Split(name, prompts(count, start), {"data": "numbers", "start": start})


def hardness(number: int) -> int:
    """0..99, spread over the tasks."""
    return number * 37 % 100


def passes(task_id: str, completion: str) -> bool:
    return int(completion.removeprefix("answer ")) > hardness(int(task_id.removeprefix("t-")))


class Sampler:
    """Completion i of a prompt is a function of its seed."""

    def __init__(
        self,
        n: int = 4,
        *,
        temperature: float = 0.8,
        tokens: bool = True,
        tokenizer: str = "bytes",
        seconds: float = 0.0,
    ) -> None:
        self.settings = SamplingSettings(n=n, temperature=temperature, stop=("\n",))
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.seconds = seconds
        self.calls: list[int] = []  # prompts in each call
        self.rendered = 0

    def identity(self) -> dict[str, Any]:
        return {"sampler": "fake", "model": {"name": "numbers"}, **dataclasses.asdict(self.settings)}

    def prompt_identity(self) -> dict[str, Any]:
        return {"name": "numbers"}

    def tokenizer_fingerprint(self) -> str:
        return self.tokenizer

    def render(self, prompt: Prompt) -> tuple[str, list[int]]:
        self.rendered += 1
        text = prompt.text if prompt.text is not None else "".join(m["content"] for m in prompt.messages)
        return text, list(text.encode())

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[Completion]]:
        self.calls.append(len(prompts))
        time.sleep(self.seconds)
        return [[self._completion(seed) for seed in of_prompt] for of_prompt in seeds]

    def _completion(self, seed: int) -> Completion:
        text = f"answer {int(hashlib.sha256(str(seed).encode()).hexdigest(), 16) % 100:02d}"
        return Completion(text, list(text.encode()) if self.tokens else None, "stop", -float(seed % 7), seed)


class Embedder:
    """Goodness, hardness and noise at layer 1; the same times ten at layer 2, and so on; `values` overwrites a place."""

    def __init__(
        self,
        layers: Sequence[int] = (1,),
        *,
        tokenizer: str = "bytes",
        seconds: float = 0.0,
        width: int = WIDTH,
        values: dict[int, float] | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self.tokenizer = tokenizer
        self.seconds = seconds
        self.width = width
        self.values = values or {}  # call -> what the first number of its first row becomes
        self.calls: list[int] = []
        self.seen: list[tuple[list[int], list[int]]] = []  # (prompt ids, completion ids) of every row

    def identity(self) -> dict[str, Any]:
        return {"embedder": "fake", "model": {"name": "numbers", "dtype": "float32"}, "token": "last"}

    @property
    def layers(self) -> Sequence[int]:
        return self._layers

    def folder_name(self) -> str:
        return "fake-numbers"

    def tokenizer_fingerprint(self) -> str:
        return self.tokenizer

    def encode_prompt(self, text: str, templated: bool) -> list[int]:
        return list(text.encode()) if templated else [PROMPT_MARK, *text.encode()]

    def encode_completion(self, text: str) -> list[int]:
        return list(text.encode())

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        self.calls.append(len(prompts))
        time.sleep(self.seconds)
        rows = [(list(p), list(c)) for p, of_prompt in zip(prompts, completions, strict=True) for c in of_prompt]
        self.seen += rows
        states = torch.stack([self._state(p, c) for p, c in rows])
        states[0, 0] = self.values.get(len(self.calls) - 1, float(states[0, 0]))
        return {layer: states * 10.0 ** (layer - 1) for layer in self._layers}

    def _state(self, prompt: list[int], completion: list[int]) -> Tensor:
        goodness = int(bytes(completion).decode().removeprefix("answer ")) / 100
        number = int(bytes(prompt).decode().lstrip(chr(PROMPT_MARK)).removeprefix("task ").removesuffix(": "))
        digest = hashlib.sha256(bytes(prompt + completion)).digest()
        noise = [byte / 255 - 0.5 for byte in digest[: self.width - 2]]
        return torch.tensor([goodness, hardness(number) / 100, *noise])


class PlantedSampler(Sampler):
    """As a configuration names one: of twenty answers, so that some are drawn twice."""

    def __init__(self, model: Any, settings: SamplingSettings, rows_at_once: int | None = None) -> None:
        super().__init__()
        self.settings = settings

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"sampler": "planted"}

    def _completion(self, seed: int) -> Completion:
        text = f"answer {5 * (int(hashlib.sha256(str(seed).encode()).hexdigest(), 16) % 20):02d}"
        return Completion(text, list(text.encode()), "stop", -1.0, seed)


class EmbedderWithColumns(Embedder):
    """With likelihood columns: every row of them is the sum of its completion's token ids, and so on upwards."""

    likelihood = True

    def column_names(self) -> tuple[str, ...]:
        return COLUMNS

    def likelihood_identity(self) -> dict[str, Any]:
        return {"columns": "fake"}

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        sums = torch.tensor([[float(sum(row))] for of_prompt in completions for row in of_prompt])
        columns = 1000.25 + sums + torch.arange(len(COLUMNS))  # more digits than float16 has
        return super().embed(prompts, completions) | {LIKELIHOOD: columns}


class PlantedEmbedder(Embedder):
    """As a configuration names one: layer 1 says how good an answer is, and nothing else; the layers above are noise."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[int] = (1, 2),
        likelihood: bool = False,
        ending: str | None = None,
        question: str | None = None,
    ) -> None:
        super().__init__(layers)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"embedder": "planted"}

    def embed(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> dict[int, Tensor]:
        rows = [(bytes(p), bytes(c)) for p, of_prompt in zip(prompts, completions, strict=True) for c in of_prompt]
        good = torch.tensor([[self.goodness(p.decode(), c.decode())] for p, c in rows])
        noise = torch.tensor([[hashlib.sha256(p + c).digest()[0] / 255] for p, c in rows])
        return {layer: good if layer == 1 else noise for layer in self._layers}

    def goodness(self, prompt: str, completion: str) -> float:
        return int(completion.split()[-1]) / 100


class Reward:
    """1 where a completion passes. It may give its batches in reverse, and fail at one batch."""

    name = "passes"

    def __init__(self, *, reverse: bool = False, fail_at: int | None = None, seconds: float = 0.0) -> None:
        self.reverse = reverse
        self.fail_at = fail_at
        self.seconds = seconds
        self.calls: list[int] = []  # prompts in each batch
        self.checked = 0

    def identity(self) -> dict[str, Any]:
        return {"reward": "passes"}

    def check(self) -> None:
        self.checked += 1

    def rows(self, batch: RewardBatch) -> list[RewardRow]:
        passed = [passes(task_id, completion) for task_id, _, completion in batch.rows]
        return [RewardRow(float(p), "passed" if p else "failed", 0.5, "") for p in passed]

    def __call__(self, batches: Iterable[RewardBatch]) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        for batch in reversed(list(batches)) if self.reverse else batches:
            if len(self.calls) == self.fail_at:
                raise RuntimeError("the judge does not answer")
            self.calls.append(len(batch.keys))
            time.sleep(self.seconds)
            yield batch, self.rows(batch)


class Ranker(baselines.Ranker):
    """Scores a candidate by its goodness times what it was trained to, the best reward. Training may fail half-way."""

    name = "goodness"
    method = "Goodness"

    def __init__(self, *, trains: bool = True, fails: bool = False, seconds: float = 0.0) -> None:
        self.trains = trains
        self.fails = fails
        self.seconds = seconds
        self.trained = 0
        self.checked = 0
        self.calls: list[int] = []  # prompts in each batch

    def identity(self) -> dict[str, Any]:
        return {"ranker": "goodness"}

    def check(self) -> None:
        self.checked += 1

    def train(self, data: baselines.TrainingData, folder: Path) -> None:
        self.trained += 1
        (folder / "weight").write_text(str(max(row.reward for row in data.read())))
        if self.fails:
            raise RuntimeError("out of memory")

    def scores(
        self, tested: Pool, folder: Path, batches: Iterable[RewardBatch]
    ) -> Iterator[tuple[RewardBatch, list[RewardRow]]]:
        weight = float((folder / "weight").read_text()) if self.trains else 1.0
        for batch in batches:
            self.calls.append(len(batch.keys))
            time.sleep(self.seconds)
            texts = [completion for _, _, completion in batch.rows]
            yield batch, [RewardRow(weight * int(text.removeprefix("answer "))) for text in texts]


def pipeline(run: Path, **changes: Any) -> Pipeline:
    """A pipeline of fresh fakes, cross-validated over 12 prompts with 4 samples and a greedy one each."""
    values: dict[str, Any] = {
        "run": run,
        "title": "Numbers",
        "tests": [split("numbers", 12)],
        "reward": Reward(),
        "sampler": Sampler(),
        "greedy": Sampler(1, temperature=0.0),
        "embedder": Embedder(),
        "batch_rows": 12,
        "progress": False,
    }
    return Pipeline(**values | changes)


def maker(run: Path, **settled: Any) -> Callable[..., Pipeline]:
    """Makes pipelines over one run folder, with fresh fakes each, and with these changes before a test's own."""
    return lambda **changes: pipeline(**{"run": run} | settled | changes)


def pool(run: Path, **changes: Any) -> Pool:
    """Ten prompts x 4 samples in batches of 3, 3, 3 and 1 prompts; nothing is made yet."""
    values: dict[str, Any] = {"split": split(), "kind": "sample", "sampler": Sampler(), "seed": 5, "batch_rows": 12}
    return Pool(run, **values | changes)


def complete(pool: Pool, embedder: Embedder | None = None) -> Joined:
    """Sample, reward and embed what a pool has not yet, and join its tables with the first of the embedder's layers."""
    embedder = embedder or Embedder()
    stages.sample(pool, progress=False)
    rewarding.reward(pool, Reward(), progress=False)
    stages.embed(pool, embedder, progress=False)
    return join(pool, Reward(), embedder, embedder.layers[0])
