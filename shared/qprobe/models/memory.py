"""Cutting a batch into passes that fit the memory, and halving what did not fit after all.

    passes = PromptPasses(language_model)
    passes.each(rows, owner, prompts, need, work)   # work(rows of one pass, their prompts, ...), pass after pass

A batch is the unit of storage; a pass is what is in memory at once. Every row has its own random numbers, so the cut
changes no completion beyond the rounding of batched products (none seen in float32).

Where it stops: the estimate counts what grows with prompts and rows. It does not count the weights, which are there already,
nor what an allocator holds back; hence only a share of the free memory is used.
"""

from __future__ import annotations

import bisect
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from qprobe.models.keeping import HELD
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.loading import is_out_of_memory, load
from qprobe.models.prefix import PrefixRun

# Share of the free memory that a pass may take. A CPU's memory is everybody's, and a CPU that runs out of it kills
# processes instead of raising an error.
_SHARE_OF_GPU, _SHARE_OF_CPU = 0.8, 0.5
GIB = 2**30
# Scores that are drawn from at once, by the kind of device; `sampling.hf` cuts its rows by it. On a CPU they stay near its cache;
# a GPU waits for every call.
SCORES_AT_ONCE = {"cpu": 2**21}
SCORES_AT_ONCE_ON_A_GPU = 2**25
# Bytes that a draw holds for a score: of the likeliest token, and at worst, where a flat law is sorted.
_BYTES_OF_GREEDY, _BYTES_OF_A_DRAW = 8, 60


def scores_at_once(device: torch.device) -> int:
    """How many scores are drawn from at once."""
    return SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ON_A_GPU)


class Footprint:
    """Bytes that a language model needs beside its weights, estimated from its configuration.

    Args:
        language_model: whose configuration.
        shared: whether the rows of a prompt share its keys and values (see `qprobe.models.prefix`).
        tokens_per_pass: of `qprobe.models.prefix`, what one forward pass over prompts or completions holds.
    """

    def __init__(self, language_model: LanguageModel, shared: bool, tokens_per_pass: int) -> None:
        config = language_model.config
        self.shared = shared
        self.tokens_per_pass = tokens_per_pass
        self.device = language_model.device
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.bytes = int(next(language_model.model.parameters()).element_size())
        self.heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or self.width // self.heads)
        heads_of_keys = int(getattr(config, "num_key_value_heads", None) or self.heads)
        inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.width)
        self.vocabulary = int(config.vocab_size)
        # Keys and values of a token in one layer; a row's copies of them for one fused attention call.
        self.keys_a_layer = 2 * heads_of_keys * size * self.bytes
        # Residual and normed states (one of them in float32), queries with keys, gate, up and their product.
        self.activation = self.bytes * (4 * self.width + 3 * inner + 3 * self.heads * size) + 8 * self.width

    def prompts(self, count: int, width: int, layers: int | None = None) -> int:
        """Keys and values of `count` prompts padded to `width` tokens, the first `layers` layers (all by default)."""
        return count * width * self.keys_a_layer * (self.layers if layers is None else layers)

    def forward(self, rows: int, width: int, before: int = 0) -> int:
        """Intermediate results of one pass of (rows, width) tokens that follow `before` others."""
        seen = before + width
        attention = 2 * rows * seen * self.keys_a_layer + width * seen * (self.bytes + 1) * (1 if before else rows)
        if not self.shared:  # eager attention holds the scores, in float32 too
            attention += rows * self.heads * width * seen * (self.bytes + 4)
        return rows * width * self.activation + attention

    def prefill(self, count: int, width: int) -> int:
        """What a pass over prompts holds while it runs, their keys and values included."""
        rows = min(count, max(1, self.tokens_per_pass // width)) if self.shared else count
        # Those of one layer are there twice while several passes are put together.
        return self.prompts(count, width) + self.prompts(count, width, 1) + self.forward(rows, width)

    def sampling(
        self, count: int, width: int, rows: int, new_tokens: int, greedy: bool, joining: int = 0, kept: int = 0
    ) -> int:
        """A batch that draws `new_tokens` tokens for `rows` rows of `count` prompts padded to `width` tokens.

        Args:
            joining: of these prompts are run while the others' rows are in work; 0 where all are run at its beginning.
            kept: layers whose states are kept, of the last tokens.
        """
        scores = rows * self.vocabulary * self.bytes * 2  # of this step and of the last one
        at_once = min(rows * self.vocabulary, max(scores_at_once(self.device), self.vocabulary))
        scores += at_once * (_BYTES_OF_GREEDY if greedy else _BYTES_OF_A_DRAW)
        seen = width + new_tokens
        if self.shared:
            # The prompts' keys and values as the model computed them, and narrower ones in float32 too.
            widened = 4 // self.bytes if self.bytes < 4 else 0
            held = self.prompts(count, width) * (1 + widened) + self.prompts(rows, new_tokens)
            # Scores in float32, masked, joined and as weights; one layer's own keys widened, or on their way to a larger place.
            step = rows * self.heads * seen * 16 + self.prompts(rows, new_tokens, 1) * (1 + widened)
        else:
            # The prompts' own, a copy of them, and every row's.
            held = 2 * self.prompts(count, width) + self.prompts(rows, seen)
            step = self.forward(rows, 1, seen) + self.prompts(rows, seen, 1)
        held += kept * (rows * min(new_tokens, HELD) + count) * self.width * self.bytes
        first = joining or count
        prefill = self.prefill(first, width) + first * self.vocabulary * self.bytes
        return max(prefill + (held + scores if joining else 0), held + scores + step)

    def reading(self, count: int, width: int, rows: Sequence[int], layers: Sequence[int]) -> int:
        """A pass that runs whole completions of `count` prompts padded to `width` tokens.

        Args:
            rows: tokens of each completion.
            layers: those whose states are read.
        """
        deepest, longest = max(layers), max(rows)
        held = self.prompts(count, width, deepest)
        if self.shared:  # packed; the attention's calls are together smaller than one over all the tokens
            together, tokens = 1, min(sum(rows), max(longest, self.tokens_per_pass))
        else:
            together, tokens = min(len(rows), max(1, self.tokens_per_pass // max(1, longest))), longest
            held += self.prompts(together, longest, deepest) + self.prompts(together + count, width, deepest)
        states = len(layers) * together * tokens * self.width * self.bytes
        return max(self.prefill(count, width), held + states + self.forward(together, tokens, width))


def free_memory(devices: Sequence[torch.device]) -> int:
    """Bytes that may still be taken on the devices of a model, what torch holds in reserve included.

    CUDA: the driver's answer. MPS: what the system recommends. CPU: what the system calls available, or less where a control
    group of Linux (a container) allows less.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        unused = sum(torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d) for d in gpus)
        return unused + sum(int(torch.cuda.mem_get_info(d)[0]) for d in gpus)
    if any(device.type == "mps" for device in devices):
        return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory()))
    import psutil

    return min(
        [int(psutil.virtual_memory().available), *_group_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    )


def _group_memory(root: Path, membership: Path) -> Iterator[int]:
    """What this process's control group, and every group around it, leaves; both versions of Linux's interface."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(top):
                break
            allowed, used = _number(folder / f"memory.{limit}"), _number(folder / f"memory.{usage}")
            if allowed is not None and used is not None:
                yield max(0, allowed - used + _reclaimable(folder / "memory.stat"))


def _number(path: Path) -> int | None:
    """A file's number; None where there is no file, or it says "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Cached files count as used, but give way."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(("total_inactive_file ", "inactive_file "))]
    return max(found, default=0)


class Passes:
    """Runs a batch in passes that fit, and remembers what did not fit.

    Args:
        language_model: on whose devices the memory is.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.name = language_model.spec.name
        self.memory_gib = language_model.spec.memory_gib
        self.devices = list(dict.fromkeys(p.device for p in language_model.model.parameters()))
        self.ceiling: int | None = None
        self._said = False

    def budget(self, held: int = 0) -> int:
        """Bytes that the estimate of a pass may reach now, of which it holds some already."""
        if self.memory_gib is not None:
            budget = int(self.memory_gib * GIB)
        else:
            on_gpu = any(device.type != "cpu" for device in self.devices)
            budget = int((free_memory(self.devices) + held) * (_SHARE_OF_GPU if on_gpu else _SHARE_OF_CPU))
        return budget if self.ceiling is None else min(budget, self.ceiling)

    def run(
        self,
        rows: Sequence[int],
        owner: Sequence[int],
        lengths: Sequence[int],
        need: Callable[[Sequence[int]], int],
        work: Callable[[list[int]], None],
    ) -> None:
        """Call `work` on passes of rows until all are done; one that runs out of memory is done again in halves.

        Args:
            rows: R numbers of rows.
            owner: row -> its prompt.
            lengths: prompt -> tokens.
            need: estimated bytes of a pass of rows.
            work: does a pass; what it stores for a row may be stored again.

        Raises:
            RuntimeError: a single row does not fit.
        """
        waiting = cut(rows, owner, lengths, need, self.budget())
        while waiting:
            chosen = waiting.pop(0)
            try:
                work(chosen)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error).strip().split("\n")[0] or type(error).__name__
            # Behind the except clause: the error held the frames with the pass's tensors.
            halves = halve(chosen, owner) if len(chosen) > 1 else [chosen]
            # Of equal halves either may be the larger.
            largest = max(need(half) for half in halves)
            self.lower(len(chosen), len(halves[0]), need(chosen), largest, lengths[owner[chosen[0]]], failed)
            left = [row for later in waiting for row in later]
            waiting = [*halves, *cut(left, owner, lengths, need, self.budget())]

    def lower(self, rows: int, fewer: int, need: int, of_fewer: int, width: int, failed: str) -> None:
        """Remember that a pass ran out of memory, and free what can be.

        Args:
            rows, need: of it, and what was estimated for it.
            fewer, of_fewer: the same of what is tried next.
            width: tokens of its first row's prompt.
            failed: what the error said.

        Raises:
            RuntimeError: it was a single row.
        """
        if rows == 1:
            raise RuntimeError(
                f"Model {self.name!r}: a single row with a prompt of {width} tokens does not fit the "
                f"memory of {self._places()} beside the weights (about {need / GIB:.2g} GiB; "
                f"{failed.rstrip('.')}): use a smaller model, a narrower dtype (model.dtype=bfloat16), shorter prompts, a "
                "lower max_new_tokens, or another device."
            )
        self._release()
        self.ceiling = min(of_fewer, need - 1)  # at least the pass that failed shall not come again
        if not self._said:
            self._said = True
            tqdm.write(
                f"{self.name}: {rows} rows at once ran out of memory on {self._places()}; going on with "
                f"{fewer} or fewer. Set model.memory_gib to begin with less."
            )

    def _release(self) -> None:
        gc.collect()
        for kind in {device.type for device in self.devices} & {"cuda", "mps"}:
            getattr(torch, kind).empty_cache()

    def _places(self) -> str:
        return ", ".join(map(str, self.devices))


class PromptPasses:
    """Passes of a model over rows that continue prompts.

    Args:
        language_model: whose `run` (`qprobe.models.prefix`) and `footprint` it has.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.run = PrefixRun(language_model, copied=language_model.spec.attention == "copied")
        self.footprint = Footprint(language_model, self.run.shared, self.run.tokens_per_pass)
        self._passes = Passes(language_model)
        self.budget, self.lower = self._passes.budget, self._passes.lower

    def each(
        self,
        rows: Sequence[int],
        owner: Sequence[int],
        prompts: Sequence[Sequence[int]],
        need: Callable[[int, int, Sequence[int]], int],
        work: Callable[[list[int], list[Sequence[int]], list[int]], None],
    ) -> None:
        """As `Passes.run`, pass after pass.

        Args:
            prompts: token ids.
            need: of the number of a pass's prompts, the tokens of the longest, and its rows.
            work: given a pass's rows, the prompts that they continue, and for every row the place of its own among these.
        """
        lengths = [len(prompt) for prompt in prompts]

        def needed(chosen: Sequence[int]) -> int:
            used = {owner[row] for row in chosen}
            return need(len(used), max(lengths[p] for p in used), chosen)

        def worked(chosen: list[int]) -> None:
            used = list(dict.fromkeys(owner[row] for row in chosen))
            places = {p: place for place, p in enumerate(used)}
            work(chosen, [prompts[p] for p in used], [places[owner[row]] for row in chosen])

        self._passes.run(rows, owner, lengths, needed, worked)


class UsesModel:
    """What back ends share that run a model of transformers in this process; it is loaded at the first use."""

    model: ModelSpec

    @functools.cached_property
    def passes(self) -> PromptPasses:
        return PromptPasses(load(self.model))


def cut(
    rows: Sequence[int],
    owner: Sequence[int],
    lengths: Sequence[int],
    need: Callable[[Sequence[int]], int],
    budget: int,
) -> list[list[int]]:
    """Passes of rows, prompts of similar length together: whole prompts where they fit, else some of a prompt's rows.

    Args: as of `Passes.run`; `need` shall not fall when rows are added. A row that does not fit alone is a pass.
    """
    of_prompt: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda r: (lengths[owner[r]], owner[r], r)):
        of_prompt.setdefault(owner[row], []).append(row)
    passes: list[list[int]] = []
    open_pass: list[int] = []
    for own in of_prompt.values():
        if need([*open_pass, *own]) <= budget:
            open_pass += own
            continue
        if open_pass:
            passes.append(open_pass)
        open_pass = own
        while len(open_pass) > 1 and need(open_pass) > budget:
            fitting = bisect.bisect_right(range(1, len(open_pass)), budget, key=lambda n, own=open_pass: need(own[:n]))  # type: ignore[misc]
            size = max(1, fitting)
            passes.append(open_pass[:size])
            open_pass = open_pass[size:]
    return [*passes, open_pass] if open_pass else passes


def halve(rows: Sequence[int], owner: Sequence[int]) -> list[list[int]]:
    """Two parts of a pass, between prompts where there are several."""
    prompts = list(dict.fromkeys(owner[row] for row in rows))
    if len(prompts) == 1:
        middle = (len(rows) + 1) // 2
        return [list(rows[:middle]), list(rows[middle:])]
    first = set(prompts[: (len(prompts) + 1) // 2])
    return [[r for r in rows if owner[r] in first], [r for r in rows if owner[r] not in first]]
