"""A server under many clients against one client at a time and against the library, with the embedded model on this machine.

    python shared/benchmarks/serving.py [--seconds 30] [--clients 32] [--k 4] [--tokens 24]

`qprobe serve` runs in a process of its own, in float32, with a probe of random weights on two layers and the likelihood columns,
as the loss `auto` reads them. Clients are OpenAI's own, asynchronous, each asking again as soon as it is answered, with a seed of
its own a request. In turns: one client (a third of the time), all clients (all of it), the library's `Policy.choose` on lists of
as many prompts (a third), in turns with the sampler alone on the same prompts and seeds. Said are errors, requests a second, the
server's memory (resident, by /proc, at a tenth of the time and at the end), what embedding and scoring cost: the seconds of
`choose` over those of the sampler alone, and how many of 32 replies are the library's own.

It exits with status 1 when a goal is missed: no error, all replies that are compared equal, embedding and scoring at most 15 % of
drawing, the server at most 5 % slower than the library, memory within 5 %. Five minutes: --seconds 300. On a machine with other
work, believe the ratios, not the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai

from qprobe.cli import composition
from qprobe.embedding import LIKELIHOOD, columns_identity
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import outline
from qprobe.models.keeping import NOTHING
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.prompts import Prompt
from qprobe.sampling import sample_seeds
from qprobe.sampling.hf import HFSampler

COMPARED = 32
ANIMALS = [
    "cat",
    "dog",
    "horse",
    "whale",
    "owl",
    "bee",
    "fox",
    "wolf",
    "bear",
    "frog",
    "goat",
    "crow",
    "hen",
    "ant",
    "seal",
    "mole",
]


def prompts() -> list[str]:
    return [f"Write one short sentence about a {a} in the {place}." for a in ANIMALS for place in ("sea", "rain")]


def save_probe(folder: Path, k: int, tokens: int) -> None:
    """A probe of random weights, with a card to serve it by."""
    spec = ModelSpec(dtype="float32")
    blocks = (20, outline(spec).layer_count, LIKELIHOOD)
    embedder = HFEmbedder(spec, blocks[:2], likelihood=True)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 2 * outline(spec).width + len(COLUMNS))).astype("float32")
    probe = QProbe(loss="reward_mse", steps=20, beta=0.1)
    probe.fit(features, (features[:, 0] > 0).astype("float32"), np.arange(400) // 4)
    source = EmbeddingSource.of(embedder.identity(), blocks[1], embedder.tokenizer_fingerprint())
    probe.source = dataclasses.replace(source, blocks=blocks, likelihood=columns_identity(embedder, blocks))
    words = ["model.dtype=float32", f"sampler.n={k}", f"sampler.max_new_tokens={tokens}"]
    config = composition.composed("run", words)
    probe.use = {"prompts": "chat"} | {name: config[name] for name in ("model", "sampler", "embedder")}
    probe.save_pretrained(folder)


@contextlib.contextmanager
def served(probe: Path) -> Iterator[tuple[str, int]]:
    """The server's address and process, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qprobe", "serve", "--probe", str(probe), "--port", str(port)]
    command += ["--candidate-seconds", "600", "--request-seconds", "600"]
    process = subprocess.Popen(command)
    try:
        root = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.HTTPError), urllib.request.urlopen(f"{root}/ready"):
                yield root, process.pid
                return
            time.sleep(0.2)
        raise RuntimeError("the server ended before it was ready")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def counted(root: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{root}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def resident(pid: int) -> float:
    """MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def asked(root: str, pid: int, clients: int, seconds: float, first_seed: int) -> dict[str, Any]:
    """Requests of several clients for some time."""
    texts, replies, errors = prompts(), dict[int, str](), list[str]()
    sizes: list[tuple[float, float]] = []
    seeds = iter(range(first_seed, first_seed + 10**6))
    async with openai.AsyncOpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        began = time.monotonic()

        async def one() -> None:
            while time.monotonic() - began < seconds:
                seed = next(seeds)
                message: Any = {"role": "user", "content": texts[seed % len(texts)]}
                try:
                    answer = await client.chat.completions.create(
                        model=model, messages=[message], extra_body={"qprobe": {"seed": seed}}
                    )
                    replies[seed] = answer.choices[0].message.content or ""
                except openai.OpenAIError as error:
                    errors.append(str(error))

        async def watch() -> None:
            while True:
                sizes.append((time.monotonic() - began, resident(pid)))
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one() for _ in range(clients)))
        watching.cancel()
        took = time.monotonic() - began
    return {"replies": replies, "errors": errors, "a second": len(replies) / took, "memory": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        save_probe(probe, words.k, words.tokens)
        with served(probe) as (root, pid):
            alone = asyncio.run(asked(root, pid, 1, words.seconds / 3, 0))
            asyncio.run(asked(root, pid, words.clients, 3, 10**7))  # the first large batches find their memory
            before = counted(root)
            many = asyncio.run(asked(root, pid, words.clients, words.seconds, 10**6))
            after = counted(root)
        policy = composition.policy(QProbe.from_pretrained(probe))
        assert isinstance(policy.sampler, HFSampler)
        texts = prompts()
        batch = [texts[place % len(texts)] for place in range(words.clients)]
        policy.choose(batch, 0)
        alone_sampler = copy.copy(policy.sampler)
        alone_sampler.keep = NOTHING
        chat = [Prompt("p", messages=({"role": "user", "content": text},)) for text in batch]
        rendered = [alone_sampler.render(prompt) for prompt in chat]
        spent, done = {"choose": 0.0, "sample": 0.0}, 0
        while spent["choose"] < words.seconds / 3:
            began = time.monotonic()
            policy.choose(batch, done)
            chosen = time.monotonic()
            alone_sampler.sample(
                [ids for _, ids in rendered], [sample_seeds(done, text, words.k) for text, _ in rendered]
            )
            spent["choose"] += chosen - began
            spent["sample"] += time.monotonic() - chosen
            done += len(batch)
        library, reading = done / spent["choose"], spent["choose"] / spent["sample"] - 1
        checked = list(many["replies"].items())[:: max(1, len(many["replies"]) // COMPARED)][:COMPARED]
        equal = sum(policy.choose(texts[seed % len(texts)], seed).answer == reply for seed, reply in checked)
    jobs = after['qprobe_batched_requests_total{lane="draw"}'] - before['qprobe_batched_requests_total{lane="draw"}']
    batches = after['qprobe_batches_total{lane="draw"}'] - before['qprobe_batches_total{lane="draw"}']
    early = next(size for at, size in many["memory"] if at >= words.seconds / 10)
    figures = {
        "requests": len(many["replies"]),
        "errors": many["errors"][:3],
        "requests a second, one client": round(alone["a second"], 2),
        f"requests a second, {words.clients} clients": round(many["a second"], 2),
        "requests a second, the library": round(library, 2),
        "many over one": round(many["a second"] / alone["a second"], 2),
        "server slower than the library": round(library / many["a second"] - 1, 3),
        "embedding and scoring over drawing": round(reading, 3),
        "requests a batch": round(jobs / batches, 1),
        "memory MiB": [round(early), round(many["memory"][-1][1])],
        "replies equal": [equal, len(checked)],
    }
    goals = {
        "no error": not many["errors"],
        "the library's own replies": equal == len(checked),
        "embedding and scoring at most 15 % of drawing": reading <= 0.15,
        "at most 5 % slower than the library": library <= 1.05 * many["a second"],
        "memory flat": many["memory"][-1][1] <= 1.05 * early,
    }
    print(json.dumps(figures, indent=2))
    missed = [goal for goal, met in goals.items() if not met]
    print(f"Missed: {', '.join(missed)}." if missed else "All goals are met.")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
