"""From the configuration's part `dataset` to pairs: read, cut to length, training and test kept apart; one set or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.cli import composition
from qprobe.embedding import Embedder
from qprobe.sampling import Sampler
from qprobe.settings import build, check_keys
from qprobe_preference.pairs import Found, Pair, PairSet, hh, oasst, rows, run_folder, shp, split, trl
from qprobe_preference.pairs.base import collect
from qprobe_preference.pairs.truncation import fitted

# How rows become pairs; `run` reads a run folder.
_READERS: dict[str, Callable[..., Iterator[Found | str]]] = {
    "hh": hh.pairs,
    "shp": shp.pairs,
    "oasst": oasst.pairs,
    "trl": trl.pairs,
}
_FORMATS = (*_READERS, "run")
# Keys where `dataset` is several sets as one (conf/dataset/paper.yaml).
_JOINED_KEYS = {"name", "sets", "limit", "train_share", "prompts"}


def load(
    config: Mapping[str, Any], seed: int, sampler: Sampler, embedder: Embedder, style: str
) -> tuple[PairSet | None, PairSet]:
    """The pairs of a configuration's part `dataset`: one set, or several as one.

    Args:
        seed: of the cut into training and test, and of the share of training pairs.
        sampler, embedder: whose tokens are counted, where there is a budget.
        style: of conversations, `chat` or `text`.

    Returns:
        Training pairs, or None where probes are cross-validated, and the pairs that are reported on.

    Raises:
        ValueError: an unknown key, a value that cannot be, or a set without training pairs among several.
        OSError: a file or a hub that gives no pairs.
    """
    if "sets" not in config:
        return build(Dataset, config, "dataset", seed=seed).load(sampler, embedder, style)
    check_keys(config, _JOINED_KEYS, "dataset")
    if not config["sets"]:
        raise ValueError("dataset.sets is empty: name at least one set.")
    training, tests = [], []
    for values in config["sets"].values():
        own = dict(values) | ({} if config["limit"] is None else {"limit": config["limit"]})
        train, test = build(Dataset, own, "dataset", seed=seed).load(sampler, embedder, style)
        if train is None:
            raise ValueError(
                f"{test.name} has no training pairs: set dataset.sets.{test.name}.test_share or name a training set."
            )
        training.append(train)
        tests.append(test)
    joined = _joined(config["name"], tests)
    apart = split.without_shared(_joined(f"{config['name']}-train", training), joined)
    return split.share_of(apart, config["train_share"], seed), joined


def _joined(name: str, sets: list[PairSet]) -> PairSet:
    """Several sets as one, in their order; its source holds each with its counts."""
    dropped = sum((Counter(one.dropped) for one in sets), Counter())
    pairs = (pair for one in sets for pair in one.pairs)
    return collect(name, pairs, {"sets": [one.identity() for one in sets]}, dropped)


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
        if self.format not in _FORMATS:
            raise ValueError(f"dataset.format is {self.format!r}: choose from {', '.join(_FORMATS)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"dataset.limit is {self.limit}: a number of pairs, at least 1, or null for all.")
        if self.path is None and (self.hub is None or self.format == "run"):
            where = "a run folder" if self.format == "run" else "a file"
            raise ValueError(f"There are no pairs to read: name {where} by dataset.path=...")
        if self.test_share is not None and (self.train_split or self.train_path):
            raise ValueError(
                "dataset.test_share cuts one set in two, but a training set is named too: set one to null."
            )
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ValueError(f"dataset.test_share is {self.test_share}: a share above 0 and below 1, or null.")
        if self.path is not None and self.train_split and not self.train_path:
            raise ValueError(
                "dataset.train_split is of the hub, dataset.path is a file: give dataset.train_path=FILE too."
            )

    def load(self, sampler: Sampler, embedder: Embedder, style: str) -> tuple[PairSet | None, PairSet]:
        """As the function `load` has it, for this set."""
        sampled_by = sampler.tokenizer_fingerprint()  # None: an API, which renders by itself

        def tokens(pair: Pair) -> int:
            # As `tokens_to_read` has it for completions without token ids; that asks for a fingerprint each time.
            prompt = pair.as_prompt(style)
            templated = bool(prompt.messages) and sampled_by is not None
            longest = max(len(embedder.encode_completion(text)) for text in pair.answers(style))
            return longest + len(embedder.encode_prompt(sampler.render(prompt)[0], templated))

        def pairs(name: str, path: str | None, hub_split: str) -> PairSet:
            found = self._read(name, path, hub_split, sampler)
            return found if self.max_tokens is None else fitted(found, self.max_tokens, tokens)

        test = pairs(self.name, self.path, self.split)
        if self.test_share is not None:
            return split.train_and_test(test, self.test_share, self.seed)
        if self.train_path is None and self.train_split is None:
            return None, test
        training = pairs(f"{self.name}-train", self.train_path, self.train_split or "train")
        return split.without_shared(training, test), test

    def _read(self, name: str, path: str | None, hub_split: str, sampler: Sampler) -> PairSet:
        source: dict[str, Any] = {"format": self.format, "options": self.options, "limit": self.limit}
        if self.format == "run":
            options = {"seed": self.seed, **self.options}
            file = Path(str(path)).expanduser()
            found = build(run_folder.pairs, options, "dataset.options", run=file, render=lambda p: sampler.render(p)[0])
            return collect(name, found, source | {"seed": self.seed}, limit=self.limit)
        if path is None:
            assert self.hub is not None  # __post_init__ saw to it
            read = rows.from_hub(self.hub, hub_split, self.data_dir, self.config)
            source |= {"hub": self.hub, "data_dir": self.data_dir, "config": self.config, "split": hub_split}
        else:
            read = rows.from_file(Path(path).expanduser())
        found = build(_READERS[self.format], self.options, "dataset.options", rows=read)
        return collect(name, found, source, limit=self.limit)


def prompt_style(config: Mapping[str, Any]) -> str:
    """How the model reads conversations, `chat` or `text`; auto asks whether it has a chat template."""
    style = config["dataset"]["prompts"]
    if style not in ("auto", "chat", "text"):
        raise ValueError(f"dataset.prompts is {style!r}: choose chat (a template), text (a transcript) or auto.")
    if style != "auto":
        return str(style)
    return "chat" if models.load_tokenizer(composition.model_spec(config)).has_chat_template else "text"
