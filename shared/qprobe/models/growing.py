"""Rows that grow from shared prompts, a token at a time, and are joined by others while they grow.

Rows that join in one call are a group: of equal age, so that their own keys lie in one buffer without padding. All groups run
through the model's layers as one batch; only the attention goes group by group, on numbers that stay in a processor's cache.
When there are more groups than `GROUPS`, two neighbours become one, the shorter rows padded on the left: a call costs time too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qprobe.models.attention import SharedPrompts, hiding, unmasked

if TYPE_CHECKING:  # of the module that uses this one
    from qprobe.models.prefix import Extension, Prefix, PrefixRun

# Groups at once, by the kind of device; a GPU waits for every call.
GROUPS = {"cpu": 8}
_GROUPS_OF_A_GPU = 1
# Tokens that a group's keys have place for ahead of time: fewer copies, and little memory beside what they hold.
TOKENS_OF_GROWTH = 16


def groups_of(device: torch.device) -> int:
    """Groups at once on a device."""
    return GROUPS.get(device.type, _GROUPS_OF_A_GPU)


class Group:
    """Rows of one attention call: their prompts, and the keys and values of their own tokens.

    Args:
        prompts: of R rows.
    """

    def __init__(self, prompts: SharedPrompts) -> None:
        self.prompts = prompts
        self.length = 0  # columns of the longest row
        self._starts = torch.zeros_like(prompts.owner)  # the column of every row's first token
        self._padded = False
        self._memory: list[Tensor] = []  # a layer (2, R, heads, columns and some ahead, d)

    @property
    def rows(self) -> int:
        return len(self.prompts.owner)

    @property
    def held(self) -> int:
        """Bytes of keys and values."""
        tensors = [*self._memory, *(tensor for layer in self.prompts.layers for tensor in layer)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def begin(self, width: int) -> None:
        """Before a pass of `width` tokens a row."""
        seen = self.length + width
        self._bias: Tensor | None = None
        if width == 1 and not self._padded:
            return  # a single token sees all before it
        device = self._starts.device
        causal = torch.ones(width, seen, dtype=torch.bool, device=device).tril(self.length)
        columns = torch.arange(seen, device=device) >= self._starts[:, None]
        self._bias = hiding(causal & columns[:, None, :])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(R, H, T, d) of the rows, whose new keys and values (R, H_kv, T, d) are written behind their others."""
        rows, heads, width, d = key.shape
        seen = self.length + width
        if layer == len(self._memory):
            self._memory.append(key.new_empty(2, rows, heads, width + TOKENS_OF_GROWTH, d))
        memory = self._memory[layer]
        if memory.shape[3] < seen:
            memory = key.new_empty(2, rows, heads, seen + TOKENS_OF_GROWTH, d)
            memory[:, :, :, : self.length] = self._memory[layer][:, :, :, : self.length]
            self._memory[layer] = memory
        memory[0, :, :, self.length : seen], memory[1, :, :, self.length : seen] = key, value
        keys, values = memory[:, :, :, :seen]
        return self.prompts.attend(layer, query, keys, values, self._bias, scaling)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only. (R',) int64, rising, at least one."""
        self.prompts = self.prompts.keep(rows)
        starts = self._starts[rows]
        unused = int(starts.min()) if self._padded else 0
        self._memory = [memory[:, rows, :, unused:] for memory in self._memory]
        self._shift(starts - unused)
        self.length -= unused

    def joined(self, other: Group) -> Group:
        """One group of both, its own rows first; neither may be used any more."""
        both = Group(self.prompts.joined(other.prompts))
        both.length = max(self.length, other.length)
        both._shift(torch.cat([one._starts + both.length - one.length for one in (self, other)]))
        while self._memory:  # layer by layer: never twice in memory
            parts = [(one._memory.pop(0), both.length - one.length) for one in (self, other) if one._memory]
            first = parts[0][0]
            memory = first.new_zeros(2, both.rows, first.shape[2], both.length + TOKENS_OF_GROWTH, first.shape[4])
            row = 0
            for part, ahead in parts:
                memory[:, row : row + part.shape[1], :, ahead : both.length] = part[:, :, :, : both.length - ahead]
                row += part.shape[1]
            both._memory.append(memory)
        return both

    def _shift(self, starts: Tensor) -> None:
        self._starts = starts
        self._padded = bool(starts.any())


class GrowingRows:
    """All rows of a batch, group behind group; what the model's attention calls."""

    def __init__(self) -> None:
        self._groups: list[Group] = []

    @property
    def held(self) -> int:
        """Bytes of keys and values."""
        return sum(group.held for group in self._groups)

    @property
    def prompts(self) -> int:
        """Prompts whose keys and values are held."""
        return sum(len(group.prompts.mask) for group in self._groups)

    def join(self, prompts: SharedPrompts) -> None:
        """Put rows behind those that are there."""
        self._groups.append(Group(prompts))
        while len(self._groups) > groups_of(prompts.owner.device):
            waste = [_waste(*pair) for pair in itertools.pairwise(self._groups)]
            place = waste.index(min(waste))
            self._groups[place : place + 2] = [self._groups[place].joined(self._groups[place + 1])]

    def begin(self, width: int) -> None:
        """Before a pass of `width` tokens a row."""
        for group in self._groups:
            group.begin(width)

    def end(self, width: int) -> None:
        """After it."""
        for group in self._groups:
            group.length += width

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """Softmax attention over the row's prompt and the row's own tokens together.

        Args:
            query: (R, H, T, d); key, value: (R, H_kv, T, d), of the new tokens; mask: not read.

        Returns: (R, H, T, d).
        """
        parts = [group.attend(layer, query[rows], key[rows], value[rows], scaling) for group, rows in self._with_rows()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only. (R',) int64, rising."""
        left = rows.tolist()
        groups = []
        for group, own in self._with_rows():
            kept = [row - own.start for row in left if own.start <= row < own.stop]
            if len(kept) < group.rows and kept:
                group.keep(torch.tensor(kept, device=rows.device))
            if kept:
                groups.append(group)
        self._groups = groups

    def _with_rows(self) -> Iterator[tuple[Group, slice]]:
        start = 0
        for group in self._groups:
            own = slice(start, start + group.rows)
            start = own.stop  # before the group may lose rows
            yield group, own


def _waste(one: Group, other: Group) -> float:
    """What padding costs at every step from now on, if two groups become one: empty columns of the rows and of their prompts."""
    own, prompts = other.length - one.length, other.prompts.width - one.prompts.width
    empty = sum(abs(columns) * (one if columns > 0 else other).rows for columns in (own, prompts))
    return empty + one.rows * other.rows / 1e6  # of equals, the small ones


class Continuation:
    """Rows that grow from shared prompts. `join` adds rows, `keep` drops finished ones, `extend` adds tokens to all."""

    def __init__(self, run: PrefixRun, prefix: Prefix, owner: Tensor) -> None:
        self.run = run
        self._positions = prefix.lengths[owner]
        if run.shared:
            self._growing = GrowingRows()
            self._growing.join(SharedPrompts(prefix.keys, prefix.mask, owner))
        else:
            self._mask = prefix.mask[owner].to(torch.int64)
            self._cache = copy.deepcopy(prefix.cache)
            self._cache.batch_select_indices(owner)

    @property
    def held(self) -> int:
        """Bytes of keys and values, where prompts are shared."""
        return self._growing.held

    @property
    def prompts(self) -> int:
        """Prompts whose keys and values are held, where they are shared."""
        return self._growing.prompts

    def join(self, prefix: Prefix, owner: Tensor) -> None:
        """Put rows that have no token yet behind those that are there; arguments as of `PrefixRun.continuation`.

        Only where prompts are shared: a copied cache has no place for rows of another length.
        """
        owner = owner.to(self.run.language_model.device)
        self._growing.join(SharedPrompts(prefix.keys, prefix.mask, owner))
        self._positions = torch.cat([self._positions, prefix.lengths[owner]])

    @torch.inference_mode()
    def extend(self, ids: Tensor, layers: Sequence[int] = (), logits: bool = False, scored: int = 1) -> Extension:
        """Add tokens to every row.

        Args:
            ids: (R, T) int64; shorter rows are padded on the right with any token (what is there reaches nothing
                before it).
            layers, logits: as in `PrefixRun.prefill`; logits are those after the T-th token.
            scored: last tokens that logits are made of, (R, scored, V); 1 makes (R, V), 0 is all of them.
        """
        width = ids.shape[1]
        positions = self._positions[:, None] + torch.arange(width, device=ids.device)
        if self.run.shared:
            self._growing.begin(width)
            output = self.run.forward(ids, positions, None, layers, logits, scored, **unmasked(ids, self._growing))
            self._growing.end(width)
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
            output = self.run.forward(ids, positions, self._cache, layers, logits, scored, attention_mask=self._mask)
        self._positions = self._positions + width
        return output

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only. (R',) int64, rising."""
        self._positions = self._positions[rows]
        if self.run.shared:
            self._growing.keep(rows)
        else:
            self._mask = self._mask[rows]
            self._cache.batch_select_indices(rows)
