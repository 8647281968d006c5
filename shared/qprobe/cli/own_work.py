"""A user's own work to a pipeline: prompts and a reward function (`qprobe run`), or candidates with rewards (`qprobe import`)."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe import models
from qprobe.cli import composition
from qprobe.embedding.given import GivenEmbedder
from qprobe.files import fingerprint
from qprobe.pipeline.closing import closing_words
from qprobe.pipeline.pipeline import Pipeline
from qprobe.probe.losses import find_loss
from qprobe.run import additions, lengths
from qprobe.run.pools import Split
from qprobe.run.rewards import FunctionReward, RecordedReward
from qprobe.sampling.local import LocalSampler
from qprobe.settings import check_keys
from qprobe.store import jsonl
from qprobe.store.jsonl import Candidates, PromptRow
from qprobe.store.table import COMPLETIONS, found_table

# Fixed names: another file in the same run folder is then recognised as another.
_PROMPTS, _TEST = "prompts", "test"
KEYS = composition.KEYS | {"title", "prompts", "baselines", "too_long"}
# Share of completions cut at their longest from which it is said.
_CUT_SHARE = 0.1
_STDIN = Path("-")  # the standard input in the place of a file
_STYLES = {"chat": "messages of a user (prompts=chat)", "text": "text to be continued (prompts=text)"}


@dataclass(frozen=True)
class Work:
    """What a user's command runs.

    Args:
        pipeline, config: the run, and its configuration.
        again: makes the same pipeline in other processes.
        notes: what a user should know beforehand.
        begin: is done before the first stage; gives a sentence on it, or None.
    """

    pipeline: Pipeline
    config: dict[str, Any]
    again: Callable[[], Pipeline]
    notes: list[str] = field(default_factory=list)
    begin: Callable[[], str | None] = lambda: None

    def execute(self) -> None:
        if said := self.begin():
            print(said, file=sys.stderr)
        local = self.config["runner"]["backend"] == "local"
        composition.execute((lambda: self.pipeline) if local else self.again, self.config)

    def closing_words(self) -> str:
        """What is printed at the end, the next command last."""
        if self.pipeline.shard[1] > 1:
            return closing_words(self.pipeline)
        if "report" not in self.config["stages"]:
            return f"run:      {self.pipeline.run}"
        probe = self.pipeline.final_probe()
        parts = [closing_words(self.pipeline) + f"\nprobe:    {probe}", *self._cut()]
        if isinstance(self.pipeline.embedder, GivenEmbedder):
            return "\n\n".join(
                [*parts, f'Next:     QProbe.from_pretrained("{probe}").score(features), blocks beside each other']
            )
        return "\n\n".join([*parts, f'Next:     qprobe answer --probe {probe} "your prompt"'])

    def _cut(self) -> list[str]:
        """A sentence where many completions were cut, which hardly any reward likes."""
        table = found_table(self.pipeline.run / "completions" / f"{_PROMPTS}.sample", COMPLETIONS)
        reasons = table.read()["finish_reason"].to_pylist()
        share = reasons.count("length") / len(reasons)
        if share < _CUT_SHARE:
            return []
        longest = self.pipeline.sampler.settings.max_new_tokens
        return [f"{share:.0%} of the completions were cut at sampler.max_new_tokens={longest}."]


def run_folder(prompts: Path, folder: Path | None) -> Path:
    """The folder that was given, or runs/NAME after the file of prompts."""
    return Path("runs") / ("stdin" if prompts == _STDIN else prompts.stem) if folder is None else folder


def run(
    prompts: Path,
    reward: str,
    *,
    folder: Path | None = None,
    test: Path | None = None,
    batched: bool = False,
    overrides: Sequence[str] = (),
) -> Work:
    """The work on a user's own prompts and reward function.

    Args:
        prompts: JSON lines; cross-validated, or trained on where there are test prompts.
        reward: "module:function" or "file.py:function".
        folder: the run folder; None is runs/NAME after the file of prompts.
        test: JSON lines of prompts that are only tested on.
        batched: whether the function takes lists.
        overrides: KEY=VALUE each.

    Raises:
        FileNotFoundError, ValueError: a file, a line of it, a setting or the reward that cannot be used.
    """
    folder = run_folder(prompts, folder)
    if prompts == test == _STDIN:
        raise ValueError("PROMPTS and --test cannot both be the standard input: give one of them as a file.")
    config = _config([prompts, *([] if test is None else [test])], overrides, f", {reward}")
    rows = jsonl.read_prompts(prompts, _PROMPTS)
    test_rows = [] if test is None else jsonl.read_prompts(test, _TEST)
    jsonl.check_apart(rows, test_rows)
    function = FunctionReward(reward, [*rows, *test_rows], batched)
    function.check()
    style = _style(config, [*rows, *test_rows])
    notes = [f"{len(rows) + len(test_rows)} prompts, which the model reads as {_STYLES[style]}."]
    if (limits := _limits(config, drawn=True)) is not None:
        fitted = lengths.fit_prompts(prompts, rows, style, limits, config["too_long"])
        tested = lengths.fit_prompts(test or prompts, test_rows, style, limits, config["too_long"])
        rows, test_rows, notes = fitted.rows, tested.rows, [*notes, *fitted.notes, *tested.notes]
    splits = [_split(_PROMPTS, rows, style), *([_split(_TEST, test_rows, style)] if test_rows else [])]
    pipeline = composition.pipeline(
        config,
        run=folder,
        title=config["title"],
        tests=splits[-1:],
        training_split=splits[0] if test_rows else None,
        reward=function,
        use=_use(config, style),
    )
    words: dict[str, Any] = {"folder": folder, "test": test, "batched": batched, "overrides": overrides}
    return Work(pipeline, config, functools.partial(_pipeline_of, run, prompts, reward, **words), notes)


def import_candidates(
    candidates: Path, *, folder: Path, features: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> Work:
    """The work on candidates and rewards that are there already: it starts at embed.

    Args:
        candidates: JSON lines of prompt (or messages), completion, reward.
        folder: the run folder.
        features: files of the user's own features, in the place of a model's (`qprobe.embedding.given`).
        overrides: KEY=VALUE each.

    Raises:
        FileNotFoundError, ValueError: a file, a line of it or a setting that cannot be used.
    """
    config = _config([candidates], overrides)
    config["sampler"]["greedy"] = False  # nobody could reward it
    if features:
        config["embedder"] = {"backend": "given", "files": [str(file) for file in features]}
    found = jsonl.read_candidates(candidates, _PROMPTS)
    style = _style(config, found.prompts)
    if (limits := _limits(config, drawn=False)) is not None:
        found = lengths.fit_candidates(candidates, found, style, limits, config["too_long"])
    split = _split(_PROMPTS, found.prompts, style, found.completions)
    pipeline = composition.pipeline(
        config,
        run=folder,
        title=config["title"],
        tests=[split],
        reward=RecordedReward(found.rewards),
        use=_use(config, style),
    )
    _check_range(pipeline, found.rewards)
    if features:
        found.notes.extend(_take_features(pipeline, found))
    sizes = [len(texts) for texts in found.completions.values()]
    counted = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
    said = f"{len(sizes)} prompts with {counted} candidates each, {sum(sizes)} in all; the model reads them as {_STYLES[style]}."
    words: dict[str, Any] = {"folder": folder, "features": features, "overrides": overrides}
    again = functools.partial(_pipeline_of, import_candidates, candidates, **words)
    work = Work(pipeline, config, again, [said, *found.notes])
    if pipeline.shard[1] > 1:
        return work  # processes that share a run folder do not rearrange it
    begin = functools.partial(additions.take, pipeline.test_pools[0], pipeline.reward, found.rewards)
    return dataclasses.replace(work, begin=begin)


def _take_features(pipeline: Pipeline, found: Candidates) -> list[str]:
    """Let the embedder know whose its rows are; what there is to say of it."""
    assert isinstance(pipeline.embedder, GivenEmbedder)  # as configured
    (pool,) = pipeline.test_pools
    rendered = {prompt.task_id: pipeline.sampler.render(prompt)[0] for prompt in pool.split.prompts}
    keys = [(task_id, sample) for task_id in pool.task_ids for sample in range(pool.samples(task_id))]
    texts = {key: (rendered[key[0]], found.completions[key[0]][key[1]]) for key in keys}
    places = {key: found.places[found.lines[key[0]][key[1]]] for key in keys}
    said = pipeline.embedder.take(texts, places, len(found.places))
    return [said] if said else []


def _pipeline_of(work: Callable[..., Work], *arguments: Any, **named: Any) -> Pipeline:
    return work(*arguments, **named).pipeline


def _config(files: Sequence[Path], overrides: Sequence[str], of: str = "") -> dict[str, Any]:
    config = composition.composed("run", overrides)
    check_keys(config, KEYS, "the configuration")
    lengths.check_choice(config["too_long"])
    if _STDIN in files and config["runner"]["backend"] != "local":
        raise ValueError("The standard input cannot be read by several processes: give a file, or say runner=local.")
    if config["title"] is None:
        config["title"] = ("standard input" if files[0] == _STDIN else files[0].stem) + of
    return config


def _limits(config: dict[str, Any], drawn: bool) -> lengths.Room | None:
    """How long a prompt with its completion may be; None where the model cannot be had, which is said with what a run needs."""
    ends = composition.back_ends(config)
    try:
        return lengths.Room.of(ends.sampler, ends.embedder, drawn)
    except OSError:
        return None


def _style(config: dict[str, Any], rows: Sequence[PromptRow]) -> str:
    """What plain text is to the model; `auto` asks the model whether it was made for conversations."""
    style = str(config["prompts"])
    if style in _STYLES:
        return style
    if style != "auto":
        raise ValueError(f"prompts is {style!r}: choose chat (a user's message), text (to be continued) or auto.")
    if all(isinstance(row.prompt, list) for row in rows):
        return "chat"
    sampler = composition.back_ends(config).sampler
    if not isinstance(sampler, LocalSampler):
        return "chat"  # the models of APIs converse, and the configuration's model only embeds
    return "chat" if models.load_tokenizer(sampler.model).has_chat_template else "text"


def _split(name: str, rows: Sequence[PromptRow], style: str, recorded: dict[str, list[str]] | None = None) -> Split:
    content = fingerprint([[row.task_id, row.prompt] for row in rows])
    prompts = [row.as_prompt(style) for row in rows]
    source: dict[str, Any] = {"file": content, "prompts": style}
    if any(prompt.opening for prompt in prompts):
        source["continued"] = True  # the assistant's last words were closed by earlier versions
    return Split(name, prompts, source, recorded)


def _use(config: dict[str, Any], style: str) -> dict[str, Any]:
    return {"prompts": style} | {name: config[name] for name in ("model", "sampler", "embedder")}


def _check_range(pipeline: Pipeline, rewards: dict[str, list[float]]) -> None:
    """Some losses read rewards as probabilities; that is said before the embedding."""
    low = min(map(min, rewards.values()))
    high = max(map(max, rewards.values()))
    bounded = [name for name in pipeline.settings.losses if find_loss(name).unit_rewards]
    if bounded and not 0 <= low <= high <= 1:
        others = [name for name in pipeline.settings.losses if name not in bounded]
        raise ValueError(
            f"The rewards lie in [{low:g}, {high:g}], but {', '.join(bounded)} reads rewards in [0, 1]: scale them, or set "
            f"evaluation.losses=[{','.join(others) or 'policy_gradient'}]."
        )
