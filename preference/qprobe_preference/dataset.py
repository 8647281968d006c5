"""From the configuration's part `dataset` to pairs: read, cut to length, and training kept apart from test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.cli import composition
from qprobe.embedding import Embedder
from qprobe.sampling import Sampler
from qprobe.settings import build
from qprobe_preference.pairs import Found, Pair, PairSet, hh, oasst, rows, run_folder, shp, split, trl
from qprobe_preference.pairs.base import collect
from qprobe_preference.pairs.truncation import fitted

READERS: dict[str, Callable[..., Iterator[Found | str]]] = {
    "hh": hh.pairs,
    "shp": shp.pairs,
    "oasst": oasst.pairs,
    "trl": trl.pairs,
}
FORMATS = (*READERS, "run")


@dataclass(frozen=True)
class Dataset:
    """What the configuration says of the pairs; its keys are described in conf/dataset.

    Raises:
        ValueError: values that cannot be, or that contradict each other.
    """

    format: str
    name: str
    seed: int
    hub: str | None = None
    data_dir: str | None = None
    config: str | None = None
    split: str = "test"
    path: str | None = None
    train_split: str | None = None
    train_path: str | None = None
    test_share: float | None = None
    limit: int | None = None
    max_tokens: int | None = None
    prompts: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"dataset.format is {self.format!r}: choose from {', '.join(FORMATS)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"dataset.limit is {self.limit}: a number of pairs, at least 1, or null for all.")
        if self.path is None and (self.hub is None or self.format == "run"):
            where = "a run folder" if self.format == "run" else "a file"
            raise ValueError(f"There are no pairs to read: name {where} by dataset.path=...")
        if self.test_share is not None and (self.train_split or self.train_path):
            raise ValueError(
                "dataset.test_share cuts one set in two, but a training set is named too: set one of them to null."
            )
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ValueError(f"dataset.test_share is {self.test_share}: a share above 0 and below 1, or null.")
        if self.path is not None and self.train_split and not self.train_path:
            raise ValueError(
                "dataset.train_split is of the hub, but dataset.path is a file: give dataset.train_path=FILE too."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any], seed: int) -> Dataset:
        return build(cls, values, "dataset", seed=seed)

    def load(self, sampler: Sampler, embedder: Embedder, style: str) -> tuple[PairSet | None, PairSet]:
        """Training pairs, or None where probes are cross-validated, and the pairs that are reported on.

        Raises:
            ValueError, OSError: a file, a row or a hub that gives no pairs.
        """

        sampled_by = sampler.tokenizer_fingerprint()  # None: an API, which renders by itself

        def tokens(pair: Pair) -> int:
            # As `tokens_to_read` has it for completions without token ids; that asks for a fingerprint each time.
            prompt = pair.as_prompt(style)
            templated = bool(prompt.messages) and sampled_by is not None
            longest = max(len(embedder.encode_completion(text)) for text in pair.answers(style))
            return len(embedder.encode_prompt(sampler.render(prompt)[0], templated)) + longest

        def pairs(name: str, path: str | None, hub_split: str) -> PairSet:
            found = self._read(name, path, hub_split, sampler)
            found = dataclasses.replace(found, source={**found.source, "limit": self.limit})
            return found if self.max_tokens is None else fitted(found, self.max_tokens, tokens)

        test = pairs(self.name, self.path, self.split)
        if self.test_share is not None:
            return split.train_and_test(test, self.test_share, self.seed)
        if self.train_path is None and self.train_split is None:
            return None, test
        training = pairs(f"{self.name}-train", self.train_path, self.train_split or "train")
        return split.without_shared(training, test), test

    def _read(self, name: str, path: str | None, hub_split: str, sampler: Sampler) -> PairSet:
        source: dict[str, Any] = {"format": self.format, "options": self.options}
        if self.format == "run":
            options = {"seed": self.seed, **self.options}
            file = Path(str(path)).expanduser()
            found = build(run_folder.pairs, options, "dataset.options", run=file, render=lambda p: sampler.render(p)[0])
            return collect(name, found, {**source, "seed": self.seed}, limit=self.limit)
        if path is None:
            assert self.hub is not None  # __post_init__ saw to it
            read = rows.from_hub(self.hub, hub_split, self.data_dir, self.config)
            source |= {"hub": self.hub, "data_dir": self.data_dir, "config": self.config, "split": hub_split}
        else:
            read = rows.from_file(Path(path).expanduser())
        found = build(READERS[self.format], self.options, "dataset.options", rows=read)
        return collect(name, found, source, limit=self.limit)


def prompt_style(config: Mapping[str, Any]) -> str:
    """How conversations are put to the model, `chat` or `text`; auto asks whether the model has a chat template."""
    style = config["dataset"]["prompts"]
    if style not in ("auto", "chat", "text"):
        raise ValueError(
            f"dataset.prompts is {style!r}: choose chat (the model's template), text (a transcript) or auto."
        )
    if style != "auto":
        return str(style)
    return "chat" if models.load_tokenizer(composition.model_spec(config)).has_chat_template else "text"
