"""Attention of many continuations to their shared prompts, whose keys and values are read where they lie.

It is registered with transformers' attention interface; `prefix` runs models with it, those whose attention is plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_NAME = "qprobe_shared_prefix"
# Tokens of one prompt's completions in one call of the attention: every call reads the prompt's keys, and every token is
# compared with all of its call. A GPU waits for every call.
TOKENS_PER_CALL, TOKENS_PER_CALL_OF_A_GPU = 128, 1024


@dataclass
class SharedPrompts:
    """Keys and values of the prompts in float32, and where each row finds its own among them."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    owner: Tensor
    slots: Tensor = field(init=False)
    rows_per_prompt: int = field(init=False)
    counts: list[int] = field(init=False)
    lengths: list[int] = field(init=False)
    _bias: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        counts = torch.bincount(self.owner, minlength=len(self.mask))
        self.rows_per_prompt = int(counts.max())
        self.counts, self.lengths = counts.tolist(), self.mask.sum(1).tolist()
        first = counts.cumsum(0) - counts
        within = torch.arange(len(self.owner), device=self.owner.device) - first[self.owner]
        self.slots = self.owner * self.rows_per_prompt + within
        # Once, and not at every step: the prompts' keys are few beside those of their rows.
        self.layers = [(key.float().contiguous(), value.float().contiguous()) for key, value in self.layers]
        self._bias = None if bool(self.mask.all()) else hiding(self.mask)[:, None, None]

    @property
    def width(self) -> int:
        """Columns of the longest prompt."""
        return self.mask.shape[1]

    def keep(self, rows: Tensor) -> SharedPrompts:
        """For fewer rows; prompts without rows are let go once they are half of all."""
        owner = self.owner[rows]
        used, renumbered = torch.unique(owner, return_inverse=True)
        if len(used) > len(self.mask) // 2:
            return SharedPrompts(self.layers, self.mask, owner)
        return SharedPrompts([(k[used], v[used]) for k, v in self.layers], self.mask[used], renumbered)

    def joined(self, other: SharedPrompts) -> SharedPrompts:
        """Those of both, these first; the shorter ones padded on the left. Neither may be used any more."""
        both, width = (self, other), max(self.mask.shape[1], other.mask.shape[1])

        def padded(tensors: tuple[Tensor, Tensor], after: tuple[int, ...] = ()) -> Tensor:
            ahead = [width - one.mask.shape[1] for one in both]
            pairs = zip(tensors, ahead, strict=True)
            return torch.cat([torch.nn.functional.pad(tensor, (*after, left, 0)) for tensor, left in pairs])

        layers = []
        while self.layers:  # layer by layer: never twice in memory
            (key, value), (key_too, value_too) = self.layers.pop(0), other.layers.pop(0)
            layers.append((padded((key, key_too), (0, 0)), padded((value, value_too), (0, 0))))
        owner = torch.cat([self.owner, other.owner + len(self.mask)])
        return SharedPrompts(layers, padded((self.mask, other.mask)), owner)

    def by_prompt(self, rows: Tensor) -> Tensor:
        """(R, heads, m, d) of the rows -> (P, heads, n*m, d) of the prompts, empty places filled with zeros."""
        count, heads, m, d = rows.shape
        prompts, n = len(self.mask), self.rows_per_prompt
        if count < prompts * n:
            rows = rows.new_zeros(prompts * n, heads, m, d).index_copy_(0, self.slots, rows)
        return rows.view(prompts, n, heads, m, d).transpose(1, 2).reshape(prompts, heads, n * m, d)

    def by_row(self, prompts: Tensor, m: int) -> Tensor:
        """(P, heads, n*m, s) of the prompts -> (R, heads, m, s) of the rows: the inverse of `by_prompt`."""
        count, heads, _, s = prompts.shape
        rows = prompts.view(count, heads, self.rows_per_prompt, m, s).transpose(1, 2).reshape(-1, heads, m, s)
        return rows if len(rows) == len(self.owner) else rows[self.slots]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        """Softmax attention over the row's prompt and the row's own tokens together.

        Scores, weights and sums are float32 whatever the model's type, as in the fused kernels of torch: key biases of real
        weights (Qwen2.5) make scores of 12,860, where bfloat16 steps by 64.

        Args:
            query: (R, H, T, d); key, value: (R, H_kv, seen, d); bias: (R, T, seen) float32, added to the scores of the row's own
                tokens; None adds nothing.

        Returns: (R, H, T, d), of the query's type.
        """
        prompt_key, prompt_value = self.layers[layer]
        rows, heads, width, d = query.shape
        shared = prompt_key.shape[1]
        grouped = query.reshape(rows, shared, heads // shared * width, d).float() * scaling
        m = grouped.shape[2]
        before = self.by_prompt(grouped) @ prompt_key.transpose(-1, -2)
        if self._bias is not None:
            before += self._bias
        own = grouped @ key.float().transpose(-1, -2)
        if bias is not None:
            own.view(rows, shared, -1, width, own.shape[-1]).add_(bias[:, None, None])
        weights = torch.cat([self.by_row(before, m), own], dim=-1).softmax(dim=-1)
        of_prompt, of_row = weights[..., : prompt_key.shape[2]], weights[..., prompt_key.shape[2] :]
        out = self.by_row(self.by_prompt(of_prompt) @ prompt_value, m) + of_row @ value.float()
        return out.to(query.dtype).reshape(rows, heads, width, d)


class PackedRows:
    """Whole completions of shared prompts, one behind the other in one sequence: no padding, and no cache."""

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], prompts: Tensor, owner: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self._layers = layers
        self._calls: list[tuple[slice, int, int, Tensor]] = []
        tokens = prompts.tolist()
        end = 0
        at_once = TOKENS_PER_CALL if prompts.device.type == "cpu" else TOKENS_PER_CALL_OF_A_GPU
        for prompt, rows in _calls(owner, lengths, at_once):
            own = torch.arange(len(rows), device=prompts.device).repeat_interleave(
                torch.tensor(rows, device=prompts.device)
            )
            seen = (own[:, None] == own).tril_()
            mask = torch.cat([seen.new_ones(len(own), tokens[prompt]), seen], dim=1)
            self._calls.append((slice(end, end + len(own)), prompt, tokens[prompt], mask))
            end += len(own)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """Softmax attention of every token over its prompt and what is before it in its own row.

        Args:
            query: (1, H, N, d); key, value: (1, H_kv, N, d); mask: not read.

        Returns: (1, H, N, d).
        """
        prompt_key, prompt_value = self._layers[layer]
        shared, d = key.shape[1], query.shape[3]
        groups = query.shape[1] // shared
        output = torch.empty_like(query)
        for own, prompt, length, seen in self._calls:
            keys = torch.cat([prompt_key[prompt, None, :, prompt_key.shape[2] - length :], key[:, :, own]], dim=2)
            values = torch.cat(
                [prompt_value[prompt, None, :, prompt_value.shape[2] - length :], value[:, :, own]], dim=2
            )
            # Queries that share a head of keys are under each other: no copies of keys, and fewer, larger blocks.
            with kernels_for_any_shape(query.device):
                mixed = torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, own].reshape(1, shared, -1, d),
                    keys,
                    values,
                    attn_mask=seen.repeat(groups, 1),
                    scale=scaling,
                )
            output[:, :, own] = mixed.reshape(1, query.shape[1], -1, d)  # some kernels return other strides
        return output


def _calls(owner: Sequence[int], lengths: Sequence[int], at_once: int) -> Iterator[tuple[int, list[int]]]:
    """(prompt, lengths of some of its rows) for every call of the attention, rows in order."""
    rows: list[int] = []
    for place, (prompt, length) in enumerate(zip(owner, lengths, strict=True)):
        if rows and (owner[place - 1] != prompt or sum(rows) + length > at_once):
            yield owner[place - 1], rows
            rows = []
        rows.append(length)
    yield owner[-1], rows


def kernels_for_any_shape(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """While inside, a GPU takes no kernel of cuDNN, which plans anew for every shape: here nearly every call has one of its own
    (on an H100 35 shapes took 1.7 s of 2.7 s that 384 completions were read in).
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return sdpa_kernel(list(backends))


def hiding(mask: Tensor) -> Tensor:
    """What is added to scores: float32 of the mask's shape, 0 where it is True and -inf elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def unmasked(ids: Tensor, prompts: object) -> dict[str, Any]:
    """Arguments of a pass with an attention of ours: it reads no mask, and keeps what it needs of the keys itself.

    A four-dimensional mask is what transformers passes on as it is.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return {"attention_mask": mask, "shared_prompts": prompts, "use_cache": False}


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        prompts: Any = kwargs.pop("shared_prompts", None)
        if prompts is None:
            output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
            return output
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mixed = prompts.attend(module.layer_idx, query, key, value, attention_mask, scaling)
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


# Plain causal attention with rotary positions, passed through transformers' attention interface, nothing added to the scores.
PLAIN_ATTENTION = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "phi3", "starcoder2", "smollm3", "granite"}
)


def shares_prefix(model: Any) -> bool:
    """Whether the model's attention is the plain one that `SharedPrompts.attend` computes."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    full = all(kind == "full_attention" for kind in (getattr(config, "layer_types", None) or ["full_attention"]))
    return config.model_type in PLAIN_ATTENTION and full and window is None and model._supports_attention_backend
