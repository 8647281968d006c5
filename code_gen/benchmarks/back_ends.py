"""The same work by every back end: transformers, vLLM, and the API back ends against vLLM's own server on loopback.

    make bench-back-ends              # builds the environment of the vLLM tests; about ten minutes on two cores
    make bench-back-ends ARGS="--problems 4 --samples 2"

1. 40 HumanEval problems x 8 completions of the embedded SmolLM2, by the demo's recipe: every back end's pass rate lies inside
   the others' intervals (95 %, bootstrap over problems). Equal seeds are other numbers in each, so completions differ.
2. Greedy completions in float32: token for token, text for text against the server. Where two scores are within rounding of
   each other, back ends may part; such completions are counted.
3. Embeddings of prompt + completion, last layer: relative L2 to transformers, 1e-4 in float32, 3e-2 in bfloat16. A row may be
   further away in bfloat16, where batch shape alone moves a state; the distance of all rows together is judged.

It works in a run folder (--folder) and continues where it was ended. It exits with status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models import vllm_engine
from qprobe.models.language_model import ModelSpec
from qprobe.models.vllm_engine import EngineSettings
from qprobe.pipeline import ray_cluster
from qprobe.probe.intervals import bootstrap_mean
from qprobe.run.joined import join
from qprobe.sampling import Completion, Sampler, SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler
from qprobe.sampling.vllm import VLLMSampler
from qprobe_code_gen.__main__ import make_pipeline

sys.path.append(str(Path(__file__).parents[2] / "shared" / "tests"))

STATES = {"float32": 1e-4, "bfloat16": 3e-2}
CONTEXT, KV_CACHE_GIB = 2048, 0.5
ENGINE = EngineSettings(
    max_model_len=CONTEXT, enforce_eager=True, kv_cache_gib=KV_CACHE_GIB, gpu_memory_utilization=0.5
)
SPEC = ModelSpec("embedded")
GREEDY = SamplingSettings(n=1, temperature=0.0, top_p=1.0, max_new_tokens=32)
ROWS = 24  # of the embeddings
BACK_ENDS = ("hf", "vllm", "openai")


class Served:
    """A server while it is needed; `url` and its settings."""

    def __init__(self, spec: ModelSpec, pooling: bool = False) -> None:
        from vllm_server import VLLMServer  # type: ignore[import-not-found]

        self.server = VLLMServer(spec, pooling, KV_CACHE_GIB, CONTEXT)

    def __enter__(self) -> Any:
        return self.server

    def __exit__(self, *_: object) -> None:
        from qprobe.models import openai_client

        openai_client.close_clients()
        self.server.close()


def pipeline(back_end: str, folder: Path, problems: int, samples: int, url: str = "http://127.0.0.1:9/v1") -> Any:
    words = ["experiment=demo", f"limit={problems}", f"sampler={back_end}", f"sampler.n={samples}"]
    words += [f"paths.run={folder / back_end}", "sampler.greedy=false", "sampler.batch_rows=64", "evaluation.folds=2"]
    engine = {"max_model_len": CONTEXT, "enforce_eager": "true", "kv_cache_gib": KV_CACHE_GIB}
    if back_end == "vllm":
        words += [f"sampler.engine.{key}={value}" for key, value in engine.items()]
    if back_end == "openai":
        # The port is another one each time; the run folder knows the server by a name.
        words += [f"sampler.api.base_url={url}", "sampler.api.model=served", "sampler.api.server=loopback"]
        words += ["sampler.opening=continue_final_message"]
    with initialize_config_module("qprobe_code_gen.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("config", words), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return make_pipeline({str(key): value for key, value in config.items()})


def pass_rates(folder: Path, problems: int, samples: int) -> dict[str, Any]:
    """Pass rate with its interval, and the seconds of sampling, by back end."""
    found = {}
    for name in BACK_ENDS:
        made, seconds = pipeline(name, folder, problems, samples), 0.0
        if ray_cluster.batches_left(made, ["sample"]):
            start = time.perf_counter()
            if name == "openai":
                with Served(SPEC) as server:
                    start = time.perf_counter()
                    pipeline(name, folder, problems, samples, server.url).execute(["sample"])
                    seconds = time.perf_counter() - start
            else:
                made.execute(["sample"])
                seconds = time.perf_counter() - start
            gc.collect()
        made.execute(["reward"])
        joined = join(made.sample_pools[0], made.reward)
        rates = joined.rewards.reshape(problems, samples).mean(axis=1)
        interval = bootstrap_mean(rates, rng=np.random.default_rng(0))
        found[name] = {
            "pass rate": interval.value,
            "interval": [interval.low, interval.high],
            "problems solved": int((rates > 0).sum()),
            "mean characters": float(np.mean([len(text) for text in joined.completions])),
            "seconds of sampling (this call)": seconds,
        }
    return found


def greedy(folder: Path, problems: int) -> dict[str, int]:
    """Greedy completions that equal transformers', and that do not."""
    spec = ModelSpec("embedded", dtype="float32")
    prompts = pipeline("hf", folder, problems, 2).tests[0].prompts
    seeds = [[place] for place in range(len(prompts))]

    def draw(sampler: Sampler) -> list[Completion]:
        return [row[0] for row in sampler.sample([sampler.render(prompt)[1] for prompt in prompts], seeds)]

    hf, vllm = draw(HFSampler(spec, GREEDY)), draw(VLLMSampler(spec, GREEDY, ENGINE))
    vllm_engine.shut_down()
    with Served(spec) as server:
        told = draw(OpenAISampler(None, GREEDY, server.settings(), opening="continue_final_message"))
    return {
        "completions": len(hf),
        "vllm: equal tokens": sum(a.token_ids == b.token_ids for a, b in zip(vllm, hf, strict=True)),
        "openai: equal texts": sum(a.text == b.text for a, b in zip(told, hf, strict=True)),
    }


def embeddings(folder: Path, problems: int, samples: int, dtype: str) -> dict[str, float]:
    """Relative L2 to transformers: of all rows together, and of the worst."""
    spec = ModelSpec("embedded", dtype=dtype)
    made = pipeline("hf", folder, problems, samples)
    pool = made.sample_pools[0]
    known = {row["task_id"]: row for row in pool.prompts.read([pool.task_ids]).to_pylist()}
    rows = pool.completions.read(pool.batches).slice(0, ROWS).to_pylist()
    prompts = [known[row["task_id"]]["prompt_token_ids"] for row in rows]
    completions = [[row["token_ids"]] for row in rows]
    (expected,) = HFEmbedder(spec).embed(prompts, completions).values()
    (found,) = VLLMEmbedder(spec, engine=ENGINE).embed(prompts, completions).values()
    vllm_engine.shut_down()
    # A server takes text, which it tokenises: it is compared where the joined text has the same tokens.
    tokenizer = models.load_tokenizer(spec)
    texts = [known[row["task_id"]]["prompt"] + row["completion"] for row in rows]
    joined = [[*prompt, *ids] for prompt, (ids,) in zip(prompts, completions, strict=True)]
    same = [place for place, text in enumerate(texts) if tokenizer.encode_prompt(text, False) == joined[place]]
    with Served(spec, pooling=True) as server:
        embedder = OpenAIEmbedder(None, server.settings())
        (told,) = embedder.embed(
            [embedder.encode_prompt(texts[place], False) for place in same], [[[]]] * len(same)
        ).values()
    return {
        **{f"vllm: {name}": value for name, value in distance(found, expected).items()},
        "openai: rows of equal tokens": len(same),
        **{f"openai: {name}": value for name, value in distance(told, expected[same]).items()},
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    away = (found.double() - expected.double()).norm(dim=-1)
    size = expected.double().norm(dim=-1)
    return {"together": float(away.norm() / size.norm()), "worst row": float((away / size).max())}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What is in a file, made where it is not there."""
    if not path.exists():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2))
    return json.loads(path.read_text())


def judged(figures: dict[str, Any]) -> list[tuple[bool, str]]:
    """Every goal: whether it is met, and a sentence."""
    goals = []
    for one, other in permutations(BACK_ENDS, 2):
        rate, (low, high) = figures["pass rates"][one]["pass rate"], figures["pass rates"][other]["interval"]
        goals.append((low <= rate <= high, f"{one} passes {rate:.3f}, {other}'s interval is {low:.3f} to {high:.3f}"))
    counts = figures["greedy, float32"]
    for name in ("vllm: equal tokens", "openai: equal texts"):
        goals.append(
            (counts[name] == counts["completions"], f"greedy, {name}: {counts[name]} of {counts['completions']}")
        )
    for dtype, bound in STATES.items():
        for name in ("vllm", "openai"):
            error = figures[f"embeddings, {dtype}"][f"{name}: together"]
            goals.append((error <= bound, f"embeddings, {name}, {dtype}: {error:.1e} (goal {bound:g})"))
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=40, help="HumanEval problems (default 40)")
    parser.add_argument("--samples", type=int, default=8, help="completions a problem (default 8)")
    parser.add_argument("--folder", type=Path, default=Path("runs/back_ends"), help="default runs/back_ends")
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("Not run: vLLM is not installed here. `make bench-back-ends` builds an environment with it.")
        return 0
    problems, samples = arguments.problems, arguments.samples
    folder = arguments.folder.absolute() / f"{problems}x{samples}"
    figures: dict[str, Any] = {
        "pass rates": kept(folder / "pass_rates.json", lambda: pass_rates(folder, problems, samples)),
        "greedy, float32": kept(folder / "greedy.json", lambda: greedy(folder, min(problems, 16))),
    }
    for dtype in STATES:
        path = folder / f"embeddings-{dtype}.json"
        figures[f"embeddings, {dtype}"] = kept(path, lambda: embeddings(folder, problems, samples, dtype))  # noqa: B023
    figures["load average of the last minute"] = os.getloadavg()[0]
    print(json.dumps(figures, indent=2))
    goals = judged(figures)
    for met, sentence in goals:
        print(f"{'met' if met else 'MISSED'}: {sentence}")
    return 0 if all(met for met, _ in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
