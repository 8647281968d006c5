"""A batch of rows that is kept full: rows that finished are replaced by rows of the next prompts.

A batch of fixed rows runs its long tail almost empty, and a row costs three times as much in a step of 8 rows as in one of 64
(135M parameters, one core). Rows join in groups, once an eighth of the batch is free, so that their prompts are run together.
Every row has its own random numbers: a completion depends on its seed and not on who is in the batch with it.

Models whose keys and values are copied (`qprobe.models.prefix`) begin with the next rows when the batch is empty: their caches
hold rows of one length.

Where it stops: rows begin in the order of the batches, and a batch with a long row may be done after later ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qprobe.models.growing import Continuation, groups_of
from qprobe.models.keeping import HELD, NOTHING, Keep
from qprobe.models.likelihood_columns import token_law
from qprobe.models.loading import is_out_of_memory
from qprobe.models.memory import PromptPasses
from qprobe.models.prefix import Prefix
from qprobe.sampling.base import Batch, SamplingSettings
from qprobe.sampling.stopping import Growing

# Share of the batch that joins together.
REFILL = 1 / 8
# On a processor prompts that join as a group are at most so many times as long as its shortest: every step reads the padding too.
# HumanEval's, 64 x 8 completions at 512 rows (135M parameters, two cores): 594 and 637 tokens/s without, 777 to 870 with it.
PADDED = 1.25
Draw = Callable[[Tensor, Tensor, SamplingSettings], tuple[Tensor, Tensor]]


@dataclass
class _Row:
    """A completion in work.

    Args:
        batch: its number.
        prompt: its prompt's place in the batch.
        growing: the completion so far.
        uniforms: its random numbers, one a token.
        greedy: it takes the likeliest token at every step.
        opened: where states are kept, those of some prompts, layer -> (P, D), and its own prompt's place among them.
        dropped: nobody wants it any more.
        done: it has left the batch.
    """

    batch: int
    prompt: int
    growing: Growing
    uniforms: list[float]
    greedy: bool
    opened: tuple[dict[int, Tensor], int] = field(default_factory=lambda: ({}, 0))
    dropped: bool = False
    done: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Of its prompt."""
        return self.batch, self.prompt

    @property
    def width(self) -> int:
        return len(self.growing.prompt)

    @property
    def uniform(self) -> float:
        """Of its next token; any where it has its last one."""
        drawn = len(self.growing.tokens)
        return self.uniforms[drawn] if drawn < len(self.uniforms) else 0.0

    def begin_again(self) -> None:
        old = self.growing
        self.growing = Growing(old.prompt, old.seed, old.eos, old.stops, keep=old.keep)


class RefilledBatch:
    """Rows in work.

    Args:
        passes: of the model.
        settings: the sampling law.
        start: a completion of a prompt (token ids) with a seed, without tokens.
        draw: a token for every row and its log-probability; of scores (R, V), uniforms (R,) float64 and the settings.
        at_once: how many rows the batch holds, at least 1, where so many are there; asked again whenever rows may join.
        wanted: whether somebody still wants the rows of a batch's number and a prompt's place in it; None: all are wanted.
        keep: what is kept of every row beside its tokens.
        greedy_too: every prompt has one row more, behind the others, at temperature 0.
    """

    def __init__(
        self,
        passes: PromptPasses,
        settings: SamplingSettings,
        start: Callable[[Sequence[int], int], Growing],
        draw: Draw,
        at_once: Callable[[int], int],
        wanted: Callable[[int, int], bool] | None = None,
        keep: Keep = NOTHING,
        greedy_too: bool = False,
    ) -> None:
        self._passes = passes
        self._run = passes.run
        self._settings = settings
        self._start = start
        self._draw = draw
        self._at_once = at_once
        self._wanted = wanted
        self._keep = keep
        self._greedy = dataclasses.replace(settings, n=1, temperature=0.0) if greedy_too else None
        self._waiting: deque[_Row] = deque()
        self._joining: list[_Row] = []
        self._alive: list[_Row] = []
        self._continuation: Continuation | None = None
        self._logits: Tensor | None = None
        # Of the last steps: a row's place by its identity, and the kept layers' states, layer -> (R, D).
        self._recent: deque[tuple[dict[int, int], dict[int, Tensor]]] = deque(maxlen=HELD)
        # The prompt of which some rows have joined and others wait: it is run once.
        self._begun: tuple[tuple[int, int], Prefix] | None = None

    def complete(self, batches: Iterable[Batch | None]) -> Iterator[tuple[int, list[Growing]]]:
        """Draw the completions of batches, each of which is asked for when rows of it can begin.

        Args:
            batches: None says that there is no more at the moment; it is asked again, but not when no row is left in work.

        Returns: (number of the batch, its completions, prompt by prompt), as they are done.

        Raises:
            RuntimeError: a single row does not fit the memory.
        """
        source, numbers = iter(batches), itertools.count()
        rows: dict[int, list[_Row]] = {}
        while True:
            while self._wants_more() and (batch := next(source, None)) is not None:
                number = next(numbers)
                rows[number] = self._rows(number, batch)
                if not rows[number]:
                    yield number, [row.growing for row in rows.pop(number)]
            if not self._waiting and not self._alive:
                return
            for number in self._worked():
                if all(row.done for row in rows[number]):
                    yield number, [row.growing for row in rows.pop(number)]

    def _rows(self, number: int, batch: Batch) -> list[_Row]:
        """A batch's rows, which are to join prompts of similar length together."""
        rows = []
        for place, (prompt, seeds) in enumerate(zip(*batch, strict=True)):
            for seed in seeds:
                own = torch.Generator().manual_seed(seed)
                uniforms = torch.rand(self._settings.max_new_tokens, generator=own, dtype=torch.float64)
                rows.append(_Row(number, place, self._start(prompt, seed), uniforms.tolist(), greedy=False))
            if self._greedy is not None:
                rows.append(_Row(number, place, self._start(prompt, seeds[0]), [], greedy=True))
        self._waiting.extend(sorted(rows, key=lambda row: (row.width, row.prompt)))
        return rows

    def _worked(self) -> set[int]:
        """Let rows join where there is place, and all grow by a token; the batches of those that finished."""
        before: list[_Row] = []
        try:
            self._fill()
            before = self._alive
            return self._grow()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = str(error).strip().split("\n")[0] or type(error).__name__
        # Behind the except clause: the error held the frames with the tensors. Rows that have had their last token are done.
        rows = [row for row in [*(before or self._alive), *self._joining] if not row.done]
        ended = {row.batch for row in before if row.done}
        self._clear()
        if not rows:
            return ended
        half = rows[: (len(rows) + 1) // 2]
        self._passes.lower(len(rows), len(half), self._need(rows), self._need(half), rows[0].width, failed)
        for row in reversed(rows):
            row.begin_again()
            self._waiting.appendleft(row)
        return ended

    def _clear(self) -> None:
        self._alive, self._joining = [], []
        self._continuation = self._logits = self._begun = None
        self._recent.clear()

    def _limit(self) -> int:
        """Rows that the batch may hold now."""
        there = len(self._waiting) + len(self._alive)
        return self._at_once(there) if self._run.shared else there

    def _wants_more(self) -> bool:
        """Whether another batch is asked for: where a row more than there is place for waits, it is known that there are more."""
        if not self._run.shared:
            return not self._waiting and not self._alive
        return len(self._waiting) <= self._limit() - len(self._alive)

    def _fill(self) -> None:
        """Let rows join where enough of them can."""
        if self._alive and not self._run.shared:
            return
        place = self._limit() - len(self._alive)
        if not self._enough(min(place, len(self._waiting))):
            return
        first = itertools.islice(self._waiting, max(0, place))
        # Copies are padded to one length, that of a batch's prompts as they come.
        offered = [row for row in first if self._run.shared or row.batch == self._waiting[0].batch]
        held = self._continuation.held if self._continuation else 0
        budget = self._passes.budget(held)
        count = bisect.bisect_right(range(1, len(offered) + 1), budget, key=lambda n: self._need(offered[:n]))
        count = max(count, not self._alive)
        if self._enough(count):
            taken = [self._waiting.popleft() for _ in range(count)]
            # Prompts of similar length beside each other, behind the one that is run already.
            begun = self._begun[0] if self._begun else None
            self._joining = sorted(taken, key=lambda row: (row.key != begun, row.width, row.key))
            self._join(self._joining, taken[-1].key)
            self._alive += self._joining
            self._joining = []

    def _enough(self, count: int) -> bool:
        """Whether so many rows are worth a pass over their prompts."""
        if not count or not self._alive:
            return count > 0
        return count == len(self._waiting) or count >= REFILL * (len(self._alive) + count)

    def _need(self, rows: Sequence[_Row]) -> int:
        """Estimated bytes of the batch when these rows have joined it."""
        new = {row.key for row in rows}
        held = self._continuation.prompts + (self._begun is not None) if self._continuation else 0
        return self._passes.footprint.sampling(
            held + len(new),
            max(row.width for row in [*self._alive, *rows]),
            len(self._alive) + len(rows),
            self._settings.max_new_tokens,
            self._settings.temperature == 0,
            joining=len(new) if held else 0,
            kept=len(self._keep.layers),
        )

    def _join(self, rows: Sequence[_Row], last: tuple[int, int]) -> None:
        """Run the rows' prompts, and put the rows behind the others.

        Args:
            last: the prompt of which some rows may still wait.
        """
        by_prompt = {key: list(own) for key, own in itertools.groupby(rows, key=lambda row: row.key)}
        parts: list[tuple[Prefix, list[int]]] = []
        if self._begun is not None and (more := by_prompt.pop(self._begun[0], None)):
            parts.append((self._begun[1], [0] * len(more)))
        waits = self._run.shared and bool(self._waiting) and self._waiting[0].key == last
        begun = self._begun if self._begun is not None and self._begun[0] == last else None
        for some in self._alike(list(by_prompt.values())):
            prefix = self._run.prefill([own[0].growing.prompt for own in some], self._keep.layers, logits=True)
            parts.append((prefix, [place for place, own in enumerate(some) for _ in own]))
            places_of = {own[0].key: place for place, own in enumerate(some)}
            if waits and last in places_of:
                begun = last, prefix.only(places_of[last])
        self._begun = begun if waits else None
        logits = [] if self._logits is None else [self._logits]
        for row, (prefix, place) in zip(rows, ((p, place) for p, own in parts for place in own), strict=True):
            row.opened = prefix.states, place
        for prefix, owner in parts:
            places = torch.tensor(owner)
            assert prefix.logits is not None  # asked for
            logits.append(prefix.logits[places.to(prefix.logits.device)])
            if self._continuation is None:
                self._continuation = self._run.continuation(prefix, places)
            else:
                self._continuation.join(prefix, places)
        self._logits = logits[0] if len(logits) == 1 else torch.cat(logits)

    def _alike(self, prompts: Sequence[Sequence[_Row]]) -> Iterator[Sequence[Sequence[_Row]]]:
        """Rows by prompt, shortest first, in the parts that become groups."""
        apart = self._run.shared and groups_of(self._run.language_model.device) > 1
        part: list[Sequence[_Row]] = []
        for own in prompts:
            if part and apart and own[0].width > PADDED * part[0][0].width:
                yield part
                part = []
            part.append(own)
        if part:
            yield part

    def _goes_on(self, row: _Row, token: int, logprob: float) -> bool:
        """Give a row its next token; whether it stays in the batch."""
        if row.growing.reason:  # it only waited for what is behind its last token
            row.done = True
        else:
            more = row.growing.take(token, logprob)
            row.dropped = self._wanted is not None and not self._wanted(row.batch, row.prompt)
            row.done = row.dropped or not (more or row.growing.lacks_a_step())
        if row.done and self._keep.layers and not row.dropped:
            row.growing.state = self._state(row)
        return not row.done

    def _state(self, row: _Row) -> dict[int, Tensor] | None:
        """Of the kept layers behind the row's last kept token; None where that is further back than what is held."""
        kept, back = row.growing.cut[1], row.growing.ran - row.growing.cut[1]
        if not kept:
            states, place = row.opened
        elif back < len(self._recent):
            places, states = self._recent[-1 - back]
            place = places[id(row)]
        else:
            return None
        return {layer: states[layer][place].float().cpu() for layer in self._keep.layers}

    def _grow(self) -> set[int]:
        """A token for every row; the batches of rows that finished."""
        assert self._logits is not None
        assert self._continuation is not None
        uniforms = torch.tensor([row.uniform for row in self._alive], dtype=torch.float64)
        uniforms = uniforms.to(self._logits.device)
        chosen, logprobs = self._draw(self._logits, uniforms, self._settings)
        if self._greedy is not None and (greedy := [place for place, row in enumerate(self._alive) if row.greedy]):
            chosen[greedy], logprobs[greedy] = self._draw(self._logits[greedy], uniforms[greedy], self._greedy)
        if (ending := self._keep.ending) is not None:
            law = token_law(self._logits, torch.stack([chosen, torch.full_like(chosen, ending)], dim=1))
            values = [law.logprob[:, 0], law.entropy, law.certainty, law.likeliest, law.logprob[:, 1]]
            for row, of_row in zip(self._alive, np.stack(values, axis=1), strict=True):
                row.growing.laws.append(of_row)
        drawn = enumerate(zip(self._alive, chosen.tolist(), logprobs.tolist(), strict=True))
        going_on = [place for place, (row, token, logprob) in drawn if self._goes_on(row, token, logprob)]
        ended = {row.batch for row in self._alive if row.done}
        if not going_on:
            begun = self._begun
            self._clear()
            self._begun = begun
            return ended
        if len(going_on) < len(self._alive):
            kept = torch.tensor(going_on, device=chosen.device)
            self._continuation.keep(kept)
            chosen = chosen[kept]
            self._alive = [self._alive[place] for place in going_on]
        found = self._continuation.extend(chosen[:, None], self._keep.layers, logits=True)
        self._logits = found.logits
        for row in self._alive if self._keep else ():
            row.growing.ran += 1
        if self._keep.layers:
            places = {id(row): place for place, row in enumerate(self._alive)}
            self._recent.append((places, {layer: state[:, -1] for layer, state in found.states.items()}))
        return ended
