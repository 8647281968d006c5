"""Is the law of samplers and embedders the model's? Small models of every family, with the outliers that real weights have.

    python shared/benchmarks/law.py [--seeds 5] [--device cuda] [--json FILE]
    python shared/benchmarks/law.py --real MODEL

For every family whose prompts are shared, each of them with copies too, and for families that always get copies: prompts of
unequal length, completions that grow step by step and leave at unequal lengths, the same where some join later than others, and
the same completions read at once. The
reference is the same model in float64. Printed is KL(reference || ours), pooled over positions and seeds, by that of a plain pass
over single rows in the same type: 1 is the rounding that the type costs anyway. Features of every layer: their mean relative
distance to the states in float64, by the plain pass's. Goals: at most 1.1 in bfloat16 and float16, wherever the plain pass is
finite; below 1e-9 nats in float32.

The outliers: key and query biases of 20 in the slowest rotary pair (Qwen2.5's scores reach 12,860), one residual dimension with
activations far above the others (massive activations), norm weights far from 1. Families without biases get large projections.

`--real` measures a real model in its own type instead: a folder, a .gguf file or "embedded", against float32.
It exits with status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from qprobe import models
from qprobe.models import growing
from qprobe.models.language_model import LanguageModel, ModelSpec
from qprobe.models.prefix import PrefixRun, plain_attention

TIMES_PLAIN, FLOAT32 = 1.1, 1e-9
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT = 256, 64, 4, 3, 256
BIAS = 20.0
# Prompts of a model, and how long each of their completions grows: rows leave on the way.
PROMPTS = (40, 61, 17, 2)
# Steps between two prompts' rows where they join one after the other.
JOINED_AFTER = 20
OWNER, LENGTHS = (0, 0, 0, 1, 1, 2, 2, 2, 3), (64, 9, 40, 64, 21, 64, 33, 64, 64)


# Log-probabilities (N, V) and states (N, L+1, D) of N positions.
Measured = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Args:
        config: its class of transformers.
        shared: whether prompts are shared; copies are made of it as well then.
        changes: settings beside the common ones.
    """

    config: str
    shared: bool
    changes: dict[str, Any]


_PHI = {"pad_token_id": 0}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
FAMILIES = {
    "llama": Family("LlamaConfig", True, {"attention_bias": True}),
    "qwen2": Family("Qwen2Config", True, {}),
    "qwen3": Family("Qwen3Config", True, {"attention_bias": True, "head_dim": 16}),
    "mistral": Family("MistralConfig", True, {"sliding_window": None}),
    "olmo": Family("OlmoConfig", True, {"attention_bias": True}),
    "olmo2": Family("Olmo2Config", True, {"attention_bias": True}),
    "phi3": Family("Phi3Config", True, _PHI),
    "starcoder2": Family("Starcoder2Config", True, {"sliding_window": None}),
    "smollm3": Family("SmolLM3Config", True, {"attention_bias": True, "pad_token_id": 0}),
    "granite": Family(
        "GraniteConfig", True, {"attention_bias": True, "attention_multiplier": 0.25, "logits_scaling": 1.0}
    ),
    "mistral, windows": Family("MistralConfig", False, {"sliding_window": 24}),
    "gemma2": Family("Gemma2Config", False, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}),
    "gemma3": Family("Gemma3TextConfig", False, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}),
    "gpt2": Family("GPT2Config", False, _GPT),
    "gpt_neox": Family("GPTNeoXConfig", False, {}),
    "bloom": Family("BloomConfig", False, {"n_layer": LAYERS, "n_head": HEADS}),
    "phi": Family("PhiConfig", False, {}),
}


@dataclass
class Distances:
    """What was measured of one path in one type, against float64.

    Args:
        ours, plain: (N,) KL(reference || measured) a position, in nats.
        our_states, plain_states: (N, L+1) relative distances of the states of layers 0..L.
    """

    ours: Tensor
    plain: Tensor
    our_states: Tensor
    plain_states: Tensor

    @property
    def finite(self) -> bool:
        """Whether the plain pass is."""
        return bool(self.plain.isfinite().all())

    @property
    def ratio(self) -> float:
        """Mean KL of ours by that of the plain pass."""
        return float(self.ours.mean() / self.plain.mean())

    @property
    def typical_ratio(self) -> float:
        """The same without each one's largest hundredth: a real model has positions of 2 nats, which one rounding meets and
        another does not, and a mean over 2,000 positions is half made of ten of them.
        """
        ours, plain = (values.sort().values[: len(values) - len(values) // 100] for values in (self.ours, self.plain))
        return float(ours.mean() / plain.mean())

    @property
    def of_states(self) -> float:
        """The worst layer's mean relative distance of ours by that of the plain pass; layer 0 is looked up, not computed."""
        ours, plain = self.our_states.mean(0)[1:], self.plain_states.mean(0)[1:]
        return float((ours / plain).max())


def make(family: Family, seed: int) -> Any:
    """A model of random weights with outliers, in float32."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family.config in ("GPTNeoXConfig", "PhiConfig", "BloomConfig", "GPT2Config"):
        del common["num_key_value_heads"]
    config = getattr(transformers, family.config)(**common | family.changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            outliers(model)
    return model.eval()


def outliers(model: Any) -> None:
    """What real weights have and random ones lack: see above."""
    size = WIDTH // HEADS
    slow = [size // 2 - 1, size - 1]  # the two halves of the slowest rotary pair
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.1)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.zero_().view(-1, size)[:, slow] = BIAS
        elif name.endswith(("query_key_value.bias", "qkv_proj.bias")):
            parameter.zero_().view(HEADS, 3, size)[:, :2, slow] = BIAS
        elif name.endswith("c_attn.bias"):
            parameter.zero_()[: 2 * WIDTH].view(-1, size)[:, slow] = BIAS
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif parameter.ndim == 1:  # norms
            parameter.mul_(torch.empty_like(parameter).uniform_(0.3, 3.0))
    biased = any(
        name.endswith(("q_proj.bias", "query_key_value.bias", "c_attn.bias")) for name, _ in model.named_parameters()
    )
    for name, parameter in model.named_parameters():
        if not biased and name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
            parameter.mul_(3.0)
        if (
            name.endswith(("down_proj.weight", "dense_4h_to_h.weight", "fc2.weight", "c_proj.weight"))
            and parameter.ndim == 2
        ):
            # One dimension of the residual stream far above the others. Of a Conv1D it is a column, of a Linear a row.
            (parameter[:, 3] if parameter.shape[1] == WIDTH and "c_proj" in name else parameter[3]).mul_(20.0)


def sequences(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, completions) of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    return [draw(length) for length in PROMPTS], [draw(length) for length in LENGTHS]


@torch.inference_mode()
def joined(model: Any, prompts: list[list[int]], rows: list[list[int]], owner: tuple[int, ...]) -> Measured:
    """After every token of every row, a plain pass a row."""
    scores, states = [], []
    with plain_attention(model):
        for p, row in zip(owner, rows, strict=True):
            output = model(torch.tensor([prompts[p] + row], device=model.device), output_hidden_states=True)
            scores.append(output.logits[0, -len(row) :].double().log_softmax(-1))
            states.append(torch.stack([layer[0, -len(row) :].double() for layer in output.hidden_states], dim=1))
    return torch.cat(scores), torch.cat(states)


def stepped(run: PrefixRun, prompts: list[list[int]], rows: list[list[int]], owner: tuple[int, ...]) -> Measured:
    """The same, all rows together, a token at a time; rows leave as they end."""
    layers = tuple(range(run.language_model.layer_count + 1))
    device = run.language_model.device
    continuation = run.continuation(run.prefill(prompts), torch.tensor(owner))
    scores: list[list[Tensor]] = [[] for _ in rows]
    states: list[list[Tensor]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for step in range(max(map(len, rows))):
        going_on = [place for place, row in enumerate(alive) if len(rows[row]) > step]
        if len(going_on) < len(alive):
            continuation.keep(torch.tensor(going_on, device=device))
            alive = [alive[place] for place in going_on]
        found = continuation.extend(
            torch.tensor([[rows[row][step]] for row in alive], device=device), layers, logits=True
        )
        assert found.logits is not None
        for place, row in enumerate(alive):
            scores[row].append(found.logits[place].double().log_softmax(-1))
            states[row].append(torch.stack([found.states[layer][place, -1].double() for layer in layers]))
    return torch.cat([torch.stack(s) for s in scores]), torch.cat([torch.stack(s) for s in states])


def at_once(run: PrefixRun, prompts: list[list[int]], rows: list[list[int]], owner: tuple[int, ...]) -> Measured:
    """The same, whole rows in one pass: how features and likelihoods are read."""
    layers = tuple(range(run.language_model.layer_count + 1))
    found = run.read(run.prefill(prompts), rows, owner, layers, logits=True)
    assert found.logits is not None
    return found.logits.double().log_softmax(-1), torch.stack([found.states[layer].double() for layer in layers], dim=1)


def refilled(run: PrefixRun, prompts: list[list[int]], rows: list[list[int]], owner: tuple[int, ...]) -> Measured:
    """Step by step, where the rows of every later prompt join when those of the first have grown for a while; in one group, whose
    shorter rows are padded.
    """
    joins = sorted(set(owner))
    device = run.language_model.device
    scores: list[list[Tensor]] = [[] for _ in rows]
    states: list[list[Tensor]] = [[] for _ in rows]
    layers = tuple(range(run.language_model.layer_count + 1))
    alive: list[int] = []
    continuation = None
    step = 0
    with patch.dict(growing.GROUPS, {device.type: 1}):
        while joins or alive:
            if joins and (step % JOINED_AFTER == 0 or not alive):
                prompt = joins.pop(0)
                own = [row for row, p in enumerate(owner) if p == prompt]
                found, places = run.prefill([prompts[prompt]]), torch.zeros(len(own), dtype=torch.int64)
                if alive:
                    assert continuation is not None
                    continuation.join(found, places)
                else:
                    continuation = run.continuation(found, places)
                alive += own
            assert continuation is not None
            ids = [[rows[row][len(scores[row])]] for row in alive]
            output = continuation.extend(torch.tensor(ids, device=device), layers, logits=True)
            assert output.logits is not None
            for place, row in enumerate(alive):
                scores[row].append(output.logits[place].double().log_softmax(-1))
                states[row].append(torch.stack([output.states[layer][place, -1].double() for layer in layers]))
            left = [place for place, row in enumerate(alive) if len(scores[row]) < len(rows[row])]
            if left and len(left) < len(alive):
                continuation.keep(torch.tensor(left, device=device))
            alive = [alive[place] for place in left]
            step += 1
    return torch.cat([torch.stack(s) for s in scores]), torch.cat([torch.stack(s) for s in states])


PATHS: dict[str, Callable[..., Measured]] = {"step by step": stepped, "at once": at_once, "refilled": refilled}


def paths_of(run: PrefixRun) -> dict[str, Callable[..., Measured]]:
    """Rows join where prompts are shared."""
    return {name: path for name, path in PATHS.items() if run.shared or path is not refilled}


def divergence(reference: Tensor, measured: Tensor) -> Tensor:
    """KL(reference || measured) of log-probabilities (N, V), in nats, as a sum of terms that are never below 0."""
    difference = measured - reference
    # p (log p - log q) = p (e^d - 1 - d) + terms that sum to 0; exact near d = 0, where the plain sum is rounding.
    return (reference.exp() * (torch.expm1(difference) - difference)).sum(-1)


def relative(reference: Tensor, measured: Tensor) -> Tensor:
    """Distance of (N, L+1, D) states by the norm of the reference."""
    return (measured - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-12)


def apart(reference: Measured, ours: Measured, plain: Measured) -> tuple[Tensor, ...]:
    """What `Distances` is made of."""
    return (
        *(divergence(reference[0], found[0]).cpu() for found in (ours, plain)),
        *(relative(reference[1], found[1]).cpu() for found in (ours, plain)),
    )


def run_of(model: Any, attention: str) -> PrefixRun:
    """A run on a model that no file holds."""
    spec = ModelSpec("tiny", device=str(model.device))
    return PrefixRun(LanguageModel(model, SimpleNamespace(eos_token_id=1), spec), copied=attention == "copied")


def measure(
    family: Family, dtype: torch.dtype, attention: str, seeds: int, device: str = "cpu"
) -> Iterator[tuple[str, Distances]]:
    """(path, distances), pooled over seeds. Every position of every completion of every seed counts."""
    found: dict[str, list[tuple[Tensor, ...]]] = {path: [] for path in PATHS}
    for seed in range(seeds):
        exact = make(family, seed).to(device)
        prompts, rows = sequences(seed)
        low = copy.deepcopy(exact).to(dtype)
        # Rounding the weights is the type's doing, not the pass's: the reference has the rounded weights.
        reference = joined(copy.deepcopy(low).double(), prompts, rows, OWNER)
        plain = joined(low, prompts, rows, OWNER)
        run = run_of(low, attention)
        assert run.shared == (family.shared and attention == "auto")
        for path, work in paths_of(run).items():
            ours = work(run, prompts, rows, OWNER)
            found[path].append(apart(reference, ours, plain))
    for path, parts in found.items():
        if not parts:
            continue
        yield path, Distances(*(torch.cat(list(of_seed)) for of_seed in zip(*parts, strict=True)))


def holds(distances: Distances, dtype: str) -> bool:
    """Whether the goals are met; where the plain pass is not finite there is nothing to hold ours against."""
    if not distances.finite:
        return True
    if dtype == "float32":
        return float(distances.ours.mean()) < FLOAT32 and float(distances.plain.mean()) < FLOAT32
    return distances.ratio <= TIMES_PLAIN and distances.of_states <= TIMES_PLAIN


# Together more than 1,000 positions.
REAL_TASKS = ("sum", "largest element", "sorted list", "longest word")
REAL_LENGTHS = (64, 64, 56, 48, 33, 9)


def real(name: str) -> dict[str, Any]:
    """A real model in its own type against float32: prompts of code, its own completions of unequal length, both paths."""
    language_model = models.load(ModelSpec(name))
    low, tokenizer = language_model.model, models.load_tokenizer(language_model.spec)
    texts = [f"def {word}(xs):\n    '''Return the {word} of xs.'''\n" for word in REAL_TASKS]
    prompts = [tokenizer.encode_prompt(text, templated=False) for text in texts]
    rows, owner = [], [p for p in range(len(prompts)) for _ in REAL_LENGTHS]
    with plain_attention(low), torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        for prompt in prompts:
            ids = torch.tensor([prompt], device=language_model.device)
            law = {"do_sample": True, "top_k": 0, "num_return_sequences": len(REAL_LENGTHS), "pad_token_id": 0}
            made = low.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(REAL_LENGTHS), **law)
            rows += [made[row, ids.shape[1] :][:length].tolist() or [0] for row, length in enumerate(REAL_LENGTHS)]
    plain = joined(low, prompts, rows, owner)
    run = PrefixRun(language_model)
    ours = {path: work(run, prompts, rows, owner) for path, work in paths_of(run).items()}
    reference = joined(low.float(), prompts, rows, owner)  # in place: two copies would not fit everywhere
    models.load.cache_clear()
    found: dict[str, Any] = {
        "model": Path(name).name,
        "dtype": str(language_model.spec.resolved_dtype()),
        "positions": len(plain[0]),
    }
    for path, (scores, states) in ours.items():
        one = Distances(*apart(reference, (scores, states), plain))
        found[path] = {
            "ours": float(one.ours.mean()),
            "plain": float(one.plain.mean()),
            "ratio": one.ratio,
            "typical ratio": one.typical_ratio,
            "states": one.of_states,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--real", metavar="MODEL")
    parser.add_argument("--device", default="cpu", help="of the small models; a real one takes its own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.real:
        print(json.dumps(real(args.real), indent=1))
        return
    header = ("family", "prompts", "type", "path", "KL plain", "KL ours", "ratio", "states")
    print("{:<18}{:<8}{:<10}{:<14}{:>10}{:>10}{:>8}{:>8}".format(*header))
    rows, missed = [], []
    for name, family in FAMILIES.items():
        for attention in ("auto", "copied") if family.shared else ("auto",):
            way = "shared" if family.shared and attention == "auto" else "copied"
            for dtype, kind in TYPES.items():
                for path, one in measure(family, kind, attention, args.seeds, args.device):
                    values = (float(one.plain.mean()), float(one.ours.mean()), one.ratio, one.of_states)
                    said = "" if one.finite else "  plain pass not finite"
                    print(
                        f"{name:<18}{way:<8}{dtype:<10}{path:<14}{values[0]:>10.2e}{values[1]:>10.2e}{values[2]:>8.2f}{values[3]:>8.2f}{said}",
                        flush=True,
                    )
                    rows.append(
                        dict(zip(header, (name, way, dtype, path, *values), strict=True)) | {"positions": len(one.ours)}
                    )
                    if not holds(one, dtype):
                        missed.append(f"{name}, {way}, {dtype}, {path}")
    print(f"{len(rows)} rows of {min(row['positions'] for row in rows):,} positions each, {args.seeds} seeds.")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if missed:
        sys.exit(f"{len(missed)} goals missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
