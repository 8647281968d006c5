"""What a run has still to do, and what that takes: said before any work, and refused where it is plainly not there.

Counts come from the pipeline's own objects; finished work is not counted. Tokens are upper bounds (every completion as long as it
may be) or, where there is text and no tokenizer yet, estimates. Hours are those of one named GPU at a named share of its peak.
Probes and tables cost little beside completions and features, and are not counted.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qprobe import models
from qprobe.baselines import Baselines, Rival, TrainingData
from qprobe.embedding import tables_of
from qprobe.models import memory
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import Metered
from qprobe.pipeline.pipeline import Pipeline
from qprobe.prompts import Prompt
from qprobe.run import lengths
from qprobe.run.handing import can_hand
from qprobe.run.pools import Keys, Pool
from qprobe.run.recording import RecordedEmbedder, RecordedSampler
from qprobe.store.table import Table

CHARACTERS_PER_TOKEN = 4
# Bytes on disk of a token of a completion: its id and its text.
BYTES_PER_TOKEN = 8
GPU, PEAK = "A100", 312e12  # dense bfloat16 products, FLOP/s
# Share of the peak: drawing token by token, by back end, and reading whole texts. Rules of thumb, no measurements.
DRAWING = {"hf": 0.05, "vllm": 0.2}
READING = 0.3


@dataclass(frozen=True)
class Work:
    """What is left to do. Completions are rows; a prompt is read once for all its rows.

    Args:
        prompts: that completions are drawn for.
        drawn: completions to draw.
        drawn_tokens: at most so many are drawn.
        drawn_prompt_tokens: of the prompts, estimated.
        calls: prompts by sampling law, a call to an API each.
        rewarded: completions to reward.
        handed: completions whose embeddings come along while they are drawn.
        read: rows to embed, and those whose likelihood is to be read.
        read_tokens: at most so many, of completions.
        read_prompt_tokens: of their prompts, estimated.
        joined_tokens: both, where every row repeats its prompt, as for an API.
        features: embeddings to write, layers included.
    """

    prompts: int = 0
    drawn: int = 0
    drawn_tokens: int = 0
    drawn_prompt_tokens: int = 0
    calls: int = 0
    rewarded: int = 0
    handed: int = 0
    read: int = 0
    read_tokens: int = 0
    read_prompt_tokens: int = 0
    joined_tokens: int = 0
    features: int = 0


@dataclass(frozen=True)
class Needs:
    """What is said of a run.

    Args:
        lines: for the user; none where nothing is left to draw or to read.
        faults: sentences on what is plainly missing.
    """

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def hours(parameters: int, tokens: int, share: float, peak: float = PEAK) -> float:
    """GPU hours of so many tokens, at 2 floating point operations a parameter and token.

    Args:
        share: of the peak that is reached, in (0, 1].
        peak: FLOP/s.
    """
    return 2 * parameters * tokens / (share * peak) / 3600


def features_bytes(rows: int, width: int) -> int:
    """Bytes of embeddings on disk, as float16."""
    return rows * width * 2


def estimated_tokens(characters: int) -> int:
    """Tokens of a text of so many characters, rounded up."""
    return math.ceil(characters / CHARACTERS_PER_TOKEN)


def count(pipeline: Pipeline, names: Sequence[str]) -> Work:
    """What the named stages of a pipeline have left to do in its run folder, or in the shard."""
    found: dict[str, int] = dict.fromkeys(Work.__dataclass_fields__, 0)
    prompts: set[tuple[str, str]] = set()
    for pool in pipeline.pools:
        by_id = {prompt.task_id: _tokens_of(prompt) for prompt in pool.split.prompts}
        if "sample" in names and pool.split.recorded is None and not isinstance(pool.sampler, RecordedSampler):
            left = _left(pool, [pool.completions])
            choices = getattr(pool.sampler, "choices_per_call", pool.sampler.settings.n)
            rows = pool.rows(left)
            prompts |= {(pool.split.name, key) for key in left}
            found["drawn"] += rows
            found["drawn_tokens"] += rows * pool.sampler.settings.max_new_tokens
            found["drawn_prompt_tokens"] += sum(by_id[key] for key in left)
            found["calls"] += len(left) * math.ceil(pool.sampler.settings.n / choices)
        if "reward" in names:
            found["rewarded"] += pool.rows(_left(pool, [pool.rewards(pipeline.reward_of(pool.split))]))
        if "embed" in names and pool.kind == "sample" and not isinstance(pipeline.embedder, RecordedEmbedder):
            layers = tables_of(pipeline.embedder)
            left = _left(pool, [pool.features(pipeline.embedder, layer) for layer in layers])
            read = [left]
            if "sample" in names and pool.split.recorded is None and can_hand(pool.sampler, pipeline.embedder, layers):
                drawn = set(_left(pool, [pool.completions]))
                read = [tuple(key for key in left if key not in drawn)]
                found["handed"] += pool.rows(tuple(key for key in left if key in drawn))
            if pipeline.likelihood and pool.split.recorded is not None and pool.split in pipeline.tests:
                read.append(_left(pool, [pool.likelihoods(pipeline.likelihood)]))
            found["features"] += pool.rows(left) * len(pipeline.embedder.layers)  # beside them the columns are few
            for keys in read:
                own = sum(_completion_tokens(pool, key) for key in keys)
                found["read"] += pool.rows(keys)
                found["read_tokens"] += own
                found["read_prompt_tokens"] += sum(by_id[key] for key in keys)
                found["joined_tokens"] += own + sum(by_id[key] * pool.samples(key) for key in keys)
    return Work(**found | {"prompts": len(prompts)})


def of(pipeline: Pipeline, names: Sequence[str], here: bool = True) -> Needs:
    """What the named stages need.

    Args:
        here: whether this machine does the work; workers elsewhere have a memory of their own.
    """
    work = count(pipeline, names)
    baselines = _baselines(pipeline) if "baselines" in names else []
    if not work.drawn and not work.read and not work.rewarded and not baselines:
        return Needs()
    lines, faults = [f"This run needs: {counted(work) or 'only what its baselines do'}."], []
    sampler: Any = pipeline.sampler  # what a back end has besides its protocol is asked for by name
    embedder: Any = pipeline.embedder
    drawing, reading = isinstance(sampler, Metered), isinstance(embedder, Metered)
    if drawing and work.drawn:
        lines.append(
            f"API {sampler.api.model}: at least {work.calls:,} calls, about {work.drawn_prompt_tokens:,} tokens of "
            f"prompts, at most {work.drawn_tokens:,} of completions."
        )
    if reading and work.read:
        calls = math.ceil(work.read / embedder.inputs_per_call)
        lines.append(
            f"API {embedder.api.model}: at least {calls:,} calls, at most about {work.joined_tokens:,} tokens."
        )
    width = getattr(embedder, "dimensions", None)
    for spec in _specs(pipeline, work):
        try:
            size = Size.of(spec)
        except OSError as error:
            lines.append(f"{spec.name}: its size is unknown, for its config.json cannot be had.")
            faults.append(str(error))
            continue
        draws = spec == getattr(sampler, "model", None) and not drawing
        reads = spec == getattr(embedder, "model", None) and not reading
        width = size.width if reads else width
        back_end = getattr(sampler, "back_end", "hf")
        time = hours(size.parameters, work.drawn_tokens + work.drawn_prompt_tokens, DRAWING[back_end]) if draws else 0
        time += hours(size.parameters, work.read_tokens + work.read_prompt_tokens, READING) if reads else 0
        lines.append(f"{size.words(spec)}{_hours_in_words(spec, time, DRAWING[back_end])}.")
        if here and (fault := _memory_fault(spec, size, _devices(spec, pipeline))):
            faults.append(fault)
    lines += baselines
    disk = work.drawn_tokens * BYTES_PER_TOKEN + (features_bytes(work.features, width) if width else 0)
    free = shutil.disk_usage(_existing(pipeline.run)).free
    lines[0] += f" On disk: at most {_bytes(disk)}{'' if width or not work.features else ' and the features'}."
    if not faults:
        faults += filter(None, (_length_fault(pipeline, pool, names) for pool in pipeline.pools))
    if disk > free:
        faults.insert(
            0, f"{pipeline.run} may need {_bytes(disk)}, and {_bytes(free)} are free there: name another disk."
        )
    return Needs(lines, faults)


def _length_fault(pipeline: Pipeline, pool: Pool, names: Sequence[str]) -> str | None:
    """What of a pool is longer than the context of the model that draws or embeds it, where that is still to be done."""
    drawn = pool.split.recorded is None
    if drawn and not ("sample" in names and _left(pool, [pool.completions])):
        return None
    if not drawn:
        tables = [pool.features(pipeline.embedder, layer) for layer in tables_of(pipeline.embedder)]
        if not ("embed" in names and pool.kind == "sample" and _left(pool, tables)):
            return None
    room = lengths.Room.of(pool.sampler, pipeline.embedder, drawn)
    return lengths.fault(pool.name, pool.split.prompts, pool.split.recorded, room)


def tell(pipeline: Pipeline, names: Sequence[str], more: Iterable[str] = (), here: bool = True) -> None:
    """Print what the named stages need (to stderr), and end where a need is plainly not met.

    Args:
        more: further lines, of what an application needs besides, said where anything is left to do.
        here: as of `of`.

    Raises:
        RuntimeError: the model cannot be had or does not fit, or the disk is too small; one sentence.
    """
    needs = of(pipeline, names, here)
    for line in [*needs.lines, *more] if needs.lines else []:
        print(line, file=sys.stderr)
    if needs.faults:
        raise RuntimeError(needs.faults[0])


def counted(work: Work) -> str:
    """The counts in words, without what is nothing."""
    parts = []
    if work.drawn:
        parts.append(
            f"{work.drawn:,} completions of {work.prompts:,} prompts to draw (at most {work.drawn_tokens:,} tokens; about "
            f"{work.drawn_prompt_tokens:,} of prompts)"
        )
    parts += [f"{work.handed:,} of them read while they are drawn"] if work.handed else []
    parts += [f"{work.rewarded:,} to reward"] if work.rewarded else []
    parts += [f"{work.read:,} to read"] if work.read else []
    return ", ".join(parts)


def expected(prompts: int, sampler: Mapping[str, Any], greedy: int = 0) -> str:
    """What a run would need whose data set cannot be had: a clause for the message.

    Args:
        prompts: how many are known without the data.
        sampler: the configuration's.
        greedy: prompts with a greedy completion besides.
    """
    rows = prompts * sampler["n"] + greedy * sampler["greedy"]
    tokens = rows * sampler["max_new_tokens"]
    return f"(With it the run draws {rows:,} completions of {prompts:,} prompts, at most {tokens:,} tokens.)"


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Args:
        parameters: how many; one matrix that a file holds twice counts once.
        width: of its hidden states.
        weights: bytes, in the type that it is loaded in.
    """

    parameters: int
    width: int
    weights: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Size:
        """From the model's config.json alone.

        Raises:
            OSError: it cannot be had.
        """
        model = models.skeleton(spec)
        parameters = sum(p.numel() for p in model.parameters())
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        weights = parameters * spec.resolved_dtype().itemsize
        return cls(parameters - models.repeated_head(spec), width, weights)

    def words(self, spec: ModelSpec) -> str:
        where = "memory" if spec.resolved_device() == "cpu" else "GPU memory"
        dtype = str(spec.resolved_dtype()).removeprefix("torch.")
        return f"{spec.name}: {self.parameters / 1e9:.3g} B parameters, {_bytes(self.weights)} of {where} in {dtype}"


def _hours_in_words(spec: ModelSpec, time: float, share: float) -> str:
    on_cpu = spec.resolved_device() == "cpu"
    if time < 0.1:
        return ""
    return (
        f"; about {time:.2g} hours of one {GPU} (2 FLOP a parameter and token, at {share:.0%} of {PEAK / 1e12:.0f} TFLOP/s "
        f"to draw and {READING:.0%} to read){', and no GPU is here: some hundred times as long' if on_cpu else ''}"
    )


def _memory_fault(spec: ModelSpec, size: Size, devices: Sequence[torch.device]) -> str | None:
    """Why a model cannot be held here; None where it can."""
    name = f"Model {spec.name!r}"
    if any(device.type == "cuda" for device in devices) and not torch.cuda.is_available():
        return f"{name} is asked for on {devices[0]}, but torch finds no GPU: use model.device=auto or cpu."
    free = sum(memory.free_memory([device]) for device in devices)
    if size.weights <= free:
        return None
    gpu = "" if torch.cuda.is_available() else " and no GPU"
    return (
        f"{name} takes {_bytes(size.weights)} for its weights alone, and here are {_bytes(free)} of free memory{gpu}: use a "
        f"smaller model or a larger machine{', or spread it by model.device_map=auto' if spec.device_map is None else ''}."
    )


def _devices(spec: ModelSpec, pipeline: Pipeline) -> list[torch.device]:
    """Where a model's weights may lie: on one device, or on all where it is spread."""
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if spec.device_map is not None:
        return [*gpus, torch.device("cpu")]
    engines = [getattr(back_end, "engine", None) for back_end in (pipeline.sampler, pipeline.embedder)]
    spread = max((engine.tensor_parallel_size for engine in engines if engine is not None), default=1)
    return gpus[:spread] if spread > 1 and gpus else [torch.device(spec.resolved_device())]


def _baselines(pipeline: Pipeline) -> list[str]:
    """What is left of the baselines, in words. What they learn is counted in nobody's hours."""
    if not pipeline.baselines:
        return []
    split, tested = pipeline.training_split, pipeline.test_pools
    lessons = None if split is None else TrainingData(pipeline.training_pools[0], pipeline.reward_of(split))
    every = Baselines(pipeline.baselines, pipeline.run, lessons)
    found = [every.identity(pool, pipeline.reward_of(pool.split)) for pool in tested]
    parts = []
    for member in every.members:  # what is fitted costs no more than probes
        pools = [pool for pool, of_pool in zip(tested, found, strict=True) if of_pool[member.name] is None]
        if pools and isinstance(member, Rival):
            parts.append(f"{member.method} ({sum(len(pool.task_ids) for pool in pools):,} answers)")
        elif pools:
            parts.append(
                f"{member.method} ({sum(pool.rows(tuple(pool.task_ids)) for pool in pools):,} candidates to judge)"
            )
    return [f"Baselines, not in these hours: {', '.join(parts)}."] if parts else []


def _specs(pipeline: Pipeline, work: Work) -> list[ModelSpec]:
    """The models that this process or its engines load, each once."""
    used: list[Any] = [pipeline.sampler] if work.drawn else []
    used += [pipeline.embedder, pipeline.likelihood] if work.read else []
    specs = [getattr(back_end, "model", None) for back_end in used if not isinstance(back_end, Metered)]
    return list(dict.fromkeys(spec for spec in specs if isinstance(spec, ModelSpec)))


def _left(pool: Pool, tables: Iterable[Table]) -> Keys:
    """The prompts of a pool whose part is missing in any of the tables."""
    every = list(tables)
    return tuple(key for keys in pool.own_batches if not all(t.has(keys) for t in every) for key in keys)


def _completion_tokens(pool: Pool, key: str) -> int:
    """At most so many tokens in all completions of a prompt; of recorded ones an estimate."""
    if pool.split.recorded is None:
        return pool.samples(key) * pool.sampler.settings.max_new_tokens
    return sum(estimated_tokens(len(text)) for text in pool.split.recorded[key])


def _tokens_of(prompt: Prompt) -> int:
    texts = [prompt.text or "", prompt.opening, *(message["content"] for message in prompt.messages or ())]
    return estimated_tokens(sum(map(len, texts)))


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.is_dir())


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1024 else f"{count / 1024:.3g} TiB"
