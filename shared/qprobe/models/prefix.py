"""Running a causal language model over many continuations of few prompts, each prompt computed once.

    run = PrefixRun(language_model)
    prefix = run.prefill(prompts)                    # one pass over the prompts: keys, values
    continuation = run.continuation(prefix, owner)   # rows; row r continues prompt owner[r]
    outputs = continuation.extend(ids)               # (R, T) tokens more of every row
    continuation.join(other_prefix, other_owner)     # rows of further prompts, where prompts are shared
    states = run.read(prefix, rows, owner, (18,))    # or whole completions at once

Sampling extends by one token at a time; embedding reads whole completions. Both are exact: the same attention as
over the joined sequence, since a causal prompt does not see what follows it.

Two ways lead there, chosen by `shares_prefix(model)`:
- shared: an attention function, registered with transformers' own attention interface, reads the prompt's keys and values
  where they lie, once for all rows of a prompt. Measured on 2 CPU cores at 72 rows: several times faster than copies.
- copied: keys and values are repeated for every row and the model's own attention runs. For models whose attention is not
  the plain one (sliding windows, capped or sunk scores, ALiBi).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qprobe.models import threads
from qprobe.models.attention import ATTENTION_NAME, PackedRows, register, shares_prefix, unmasked
from qprobe.models.growing import Continuation
from qprobe.models.language_model import LanguageModel, ModelSpec

# Tokens, padding included, in one pass over prompts or completions, by the kind of device: enough to keep it busy. On a CPU
# few: intermediate results stay in its cache, and 512 tokens took 0.75 of the time of 2048 and more (135M, bfloat16).
TOKENS_PER_PASS = {"cpu": 512}
_TOKENS_PER_PASS_OF_A_GPU = 8192

# How attention is computed, in the words of whoever compares two versions: tables of another one are refused. Version 1 rounded
# the scores of shared prompts to the model's type, so completions in bfloat16 were not the model's.
LAW = "2: attention scores in float32"


def law_of(spec: ModelSpec) -> dict[str, str]:
    """What the identity of a table says of the attention that made it: nothing in float32, where all versions are one."""
    return {} if spec.resolved_dtype() == torch.float32 else {"law": LAW}


@dataclass
class Prefix:
    """Prompts after one pass: left-padded to a common length S.

    Args:
        cache: transformers' cache with keys and values (P, heads, S, d) a layer.
        mask: (P, S) bool, True where there is a token.
        lengths: (P,) int64, tokens of each prompt.
        logits: (P, V) float, scores of the token that follows each prompt; None where they were not asked for.
        states: layer -> (P, D), the hidden state at each prompt's last token.
    """

    cache: Any
    mask: Tensor
    lengths: Tensor
    logits: Tensor | None
    states: dict[int, Tensor]

    @property
    def keys(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the layers that were run."""
        return [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]

    def only(self, place: int) -> Prefix:
        """One of the prompts by itself, its padding cut off, in memory of its own; where prompts are shared."""
        from transformers import DynamicCache

        ahead = self.mask.shape[1] - int(self.lengths[place])
        one, cache = slice(place, place + 1), DynamicCache()
        for number, (key, value) in enumerate(self.keys):
            cache.update(key[one, :, ahead:].clone(), value[one, :, ahead:].clone(), number)
        logits = None if self.logits is None else self.logits[one].clone()
        states = {layer: state[one].clone() for layer, state in self.states.items()}
        return Prefix(cache, self.mask[one, ahead:].clone(), self.lengths[one].clone(), logits, states)

    def times(self, count: int) -> Prefix:
        """The keys and values of its only prompt as those of so many prompts."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (key, value) in enumerate(self.keys):
            cache.update(key.repeat(count, 1, 1, 1), value.repeat(count, 1, 1, 1), number)
        return Prefix(cache, self.mask.repeat(count, 1), self.lengths.repeat(count), None, {})


@dataclass
class Extension:
    """What one call of `extend` computed: `logits` (R, V) of the token that follows, `states` layer -> (R, T, D)."""

    logits: Tensor | None
    states: dict[int, Tensor]


class _EnoughLayers(Exception):
    """Raised by the deepest hook to leave the forward pass: the layers above it are never run."""


def plain_name(model: Any) -> str:
    """The attention of transformers that computes what the model is defined to."""
    # transformers' default (sdpa) leaves the cap on Gemma 2's scores away.
    capped = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not capped else "eager"


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """While inside, the model runs with transformers' own attention, and nothing of ours."""
    before = model.config._attn_implementation
    model.set_attn_implementation(plain_name(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class PrefixRun:
    """A language model made ready to continue shared prompts.

    Args:
        language_model: of it `model`, `device` and `layer_count` are read, and `alone` is held during a pass.
        copied: keys and values are copied for every row, also where they could be shared.
    """

    def __init__(self, language_model: LanguageModel, copied: bool = False) -> None:
        self.language_model = language_model
        self.model = language_model.model
        self.shared = not copied and shares_prefix(self.model)
        if self.shared:
            register()
        self._attention = ATTENTION_NAME if self.shared else plain_name(self.model)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens, padding included, that one pass over prompts or completions should hold, for speed."""
        return TOKENS_PER_PASS.get(self.language_model.device.type, _TOKENS_PER_PASS_OF_A_GPU)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], layers: Sequence[int] = (), logits: bool = False) -> Prefix:
        """One pass over the prompts.

        Args:
            prompts: P lists of token ids, none empty.
            layers: hidden layers whose state at the last prompt token is returned.
            logits: also score the next token. Without it only the layers up to the highest of `layers` run.

        Raises:
            ValueError: no prompts, or an empty one.
        """
        check_prompts(prompts)
        # A sliding window's cache holds only the last tokens: those of several passes cannot be joined.
        parts = _by_length(prompts, self.tokens_per_pass) if self.shared else []
        if len(parts) <= 1:
            return self._prefill_pass(prompts, layers, logits)
        passed = [self._prefill_pass([prompts[p] for p in part], layers, logits) for part in parts]
        return _joined(passed, parts)

    def _prefill_pass(self, prompts: Sequence[Sequence[int]], layers: Sequence[int], logits: bool) -> Prefix:
        from transformers import DynamicCache

        device = self.language_model.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask = torch.arange(width, device=device) >= (width - lengths)[:, None]
        cache = DynamicCache(config=self.model.config)
        output = self.forward(
            ids, (mask.cumsum(1) - 1).clamp(min=0), cache, layers, logits, attention_mask=mask.to(torch.int64)
        )
        return Prefix(cache, mask, lengths, output.logits, {k: v[:, -1] for k, v in output.states.items()})

    def continuation(self, prefix: Prefix, owner: Tensor) -> Continuation:
        """Rows that continue the prompts: row r continues prompt `owner[r]`. (R,) int64, prompts in rising order."""
        return Continuation(self, prefix, owner.to(self.language_model.device))

    @torch.inference_mode()
    def read(
        self,
        prefix: Prefix,
        rows: Sequence[Sequence[int]],
        owner: Sequence[int],
        layers: Sequence[int] = (),
        logits: bool = False,
    ) -> Extension:
        """One pass over whole completions.

        Args:
            prefix: the prompts, run as far up as these rows are.
            rows: R lists of token ids, none empty.
            owner: the prompt of every row, rising.
            layers, logits: as in `prefill`.

        Returns: what was computed at every token, row behind row: `states` layer -> (N, D), `logits` (N, V) of the token that
            follows each; N is the sum of the rows' lengths.
        """
        device = self.language_model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = torch.tensor([token for row in rows for token in row], device=device)
        if self.shared:
            within = torch.arange(len(ids), device=device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            before = prefix.lengths[torch.tensor(owner, device=device)].repeat_interleave(lengths)
            packed = PackedRows(prefix.keys, prefix.lengths, owner, lengths.tolist())
            extra = unmasked(ids, packed)
            found = self.forward(ids[None], (before + within)[None], None, layers, logits, scored=0, **extra)
            kept = torch.ones(1, len(ids), dtype=torch.bool)
        else:
            kept = torch.arange(int(lengths.max())) < lengths.cpu()[:, None]
            padded = ids.new_zeros(kept.shape)
            padded[kept.to(device)] = ids
            found = self.continuation(prefix, torch.tensor(owner)).extend(padded, layers, logits, scored=0)
        return Extension(
            found.logits if found.logits is None else found.logits[kept.to(found.logits.device)],
            {layer: values[kept.to(values.device)] for layer, values in found.states.items()},
        )

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Any,
        layers: Sequence[int],
        logits: bool,
        scored: int = 1,
        **arguments: Any,
    ) -> Extension:
        """One pass that keeps the asked layers' states and runs nothing above them unless logits are asked for.

        Args:
            scored: last tokens whose logits are made, (R, scored, V); 1 makes (R, V), 0 is all of them.
        """
        if ids.device.type == "cpu":
            threads.fit()
        last = self.language_model.layer_count
        states: dict[int, Tensor] = {}
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache, "use_cache": True} | arguments
        stop_at = None if logits or last in layers or not layers else max(layers)
        scores: Tensor | None = None
        with (
            self.language_model.alone,
            _recording(self.model, layers, last, states, stop_at),
            contextlib.suppress(_EnoughLayers),
        ):
            if self.model.config._attn_implementation != self._attention:  # another run of the same model
                self.model.set_attn_implementation(self._attention)
            if logits:
                # The whole model, so that scaled or capped logits are the model's own. The last tokens by their numbers: a slice
                # of a longer pass makes torch copy the head's weights once for every row (152,000 x 1,536 numbers: seconds).
                width = ids.shape[1]
                sliced = scored in (0, width)
                kept = scored if sliced else torch.arange(width - scored, width, device=ids.device)
                scores = self.model(**inputs, logits_to_keep=kept).logits
            else:
                self.model.base_model(**inputs)
        return Extension(scores[:, -1] if scores is not None and scored == 1 else scores, states)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where there are no prompts, or an empty one."""
    if not prompts:
        raise ValueError("No prompts were given: there is nothing to run the model on.")
    if not all(prompts):
        raise ValueError("A prompt has no tokens: an empty prompt cannot be continued; give it at least one token.")


def check_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> None:
    """Raise ValueError where prompts and completions do not belong together, or a prompt is empty."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but completions of {len(completions)}: give one list a prompt.")
    check_prompts(prompts)


def parts_of(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """Rows in order, each part within `tokens_per_pass` where it has more than one; empty rows need none."""
    part: list[int] = []
    tokens = 0
    for row, length in enumerate(lengths):
        if part and tokens + length > tokens_per_pass:
            yield part
            part, tokens = [], 0
        if length:
            part.append(row)
            tokens += length
    if part:
        yield part


def _by_length(prompts: Sequence[Sequence[int]], tokens_per_pass: int) -> list[list[int]]:
    """Places of the prompts in passes of similar length: padding costs as much as tokens do."""
    passes: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda p: len(prompts[p])):
        if not passes or (len(passes[-1]) + 1) * len(prompts[place]) > tokens_per_pass:
            passes.append([])
        passes[-1].append(place)
    return passes


def _joined(parts: Sequence[Prefix], places: Sequence[Sequence[int]]) -> Prefix:
    """One prefix of several passes, every prompt in its own place again, padded on the left to the longest."""
    from transformers import DynamicCache

    order = torch.tensor([place for of_part in places for place in of_part], device=parts[0].mask.device).argsort()
    width = max(part.mask.shape[1] for part in parts)

    def aligned(tensors: Sequence[Tensor], padded: bool) -> Tensor:
        """Rows of all parts in order; `padded` tensors have the tokens on their last axis but one (or last, if 2-D)."""
        if padded:
            after = (0, 0) if tensors[0].ndim == 4 else ()
            tensors = [
                torch.nn.functional.pad(t, (*after, width - part.mask.shape[1], 0))
                for t, part in zip(tensors, parts, strict=True)
            ]
        return torch.cat(list(tensors))[order]

    cache = DynamicCache()
    for layer in range(len(parts[0].cache.layers)):
        layers = [part.cache.layers[layer] for part in parts]
        if layers[0].is_initialized:  # those above the highest that was asked for did not run
            cache.update(aligned([x.keys for x in layers], True), aligned([x.values for x in layers], True), layer)
            for part in parts:  # never twice in memory, but for this layer
                part.cache.layers[layer].keys = part.cache.layers[layer].values = None
    logits = None if parts[0].logits is None else aligned([p.logits for p in parts if p.logits is not None], False)
    states = {layer: aligned([p.states[layer] for p in parts], False) for layer in parts[0].states}
    return Prefix(
        cache, aligned([p.mask for p in parts], True), aligned([p.lengths for p in parts], False), logits, states
    )


def decoder_layers(model: Any) -> Any:
    """The module list of the model's decoder layers, whatever the architecture calls it."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(model).__name__} keeps its {count} layers in no module list: its hidden states cannot be read."
    )


@contextmanager
def _recording(
    model: Any, layers: Sequence[int], last: int, states: dict[int, Tensor], stop_at: int | None
) -> Iterator[None]:
    """While inside, write the states of layers (`hidden_states` of transformers) into `states`; the last is normed."""
    modules = decoder_layers(model) if any(layer < last for layer in layers) else []

    def kept(layer: int, state: Tensor) -> None:
        states[layer] = state
        if layer == stop_at:
            raise _EnoughLayers

    def after(layer: int) -> Any:
        return lambda _module, _inputs, output: kept(layer, output[0] if isinstance(output, tuple) else output)

    handles = []
    try:
        for layer in layers:
            if layer == last:
                hook = model.base_model.register_forward_hook(
                    lambda _m, _i, output: kept(last, output.last_hidden_state)
                )
            elif layer == 0:
                hook = modules[0].register_forward_pre_hook(lambda _module, inputs: kept(0, inputs[0]))
            else:
                hook = modules[layer - 1].register_forward_hook(after(layer))
            handles.append(hook)
        yield
    finally:
        for handle in handles:
            handle.remove()
