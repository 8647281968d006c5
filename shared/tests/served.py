"""A probe of a tiny model, and a server that runs in a thread of the tests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from qprobe.cli import composition
from qprobe.embedding import LIKELIHOOD, columns_identity
from qprobe.embedding.hf import HFEmbedder
from qprobe.models import outline
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood_columns import COLUMNS
from qprobe.probe.card import EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.serving.policy import Policy


def save_probe(folder: Path, spec: ModelSpec, *overrides: str, seed: int = 0) -> Path:
    """A probe of two layers and the likelihood columns beside each other, as `auto` makes them, with a card to use it by."""
    blocks = (2, 4, LIKELIHOOD)
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(200, 2 * outline(spec).width + len(COLUMNS))).astype("float32")
    rewards = (features[:, 0] > 0).astype("float32")
    probe = QProbe(loss="reward_mse", steps=20, beta=0.2).fit(features, rewards, np.arange(200) // 5)
    embedder = HFEmbedder(spec, (2, 4), likelihood=True)
    source = EmbeddingSource.of(embedder.identity(), 4, embedder.tokenizer_fingerprint())
    probe.source = dataclasses.replace(source, blocks=blocks, likelihood=columns_identity(embedder, blocks))
    words = ["model=hub", f"model.name={spec.name}", "model.dtype=float32", "model.device=cpu"]
    words += ["sampler.n=4", "sampler.max_new_tokens=12", "sampler.temperature=1.0", *overrides]
    config = composition.composed("run", words)
    probe.use = {"prompts": "chat"} | {name: config[name] for name in ("model", "sampler", "embedder")}
    probe.save_pretrained(folder)
    return folder


def policy_of(folder: Path, *overrides: str, beta: float | None = None) -> Policy:
    return composition.policy(QProbe.from_pretrained(folder), overrides, beta)


class Served:
    """A server in a thread.

    Args:
        url: with the version path.
    """

    def __init__(self, application: Any, port: int, thread: threading.Thread) -> None:
        self.application, self.thread = application, thread
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def client(self, key: str = "none", **more: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **more)


@contextlib.contextmanager
def serving(application: Any) -> Iterator[Served]:
    """Run an application; its thread has ended behind."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(64)
        config = uvicorn.Config(application, log_level="error", access_log=False, timeout_graceful_shutdown=3)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([held],), daemon=True)
        thread.start()
        made = Served(application, held.getsockname()[1], thread)
        waited = time.monotonic() + 60
        while not server.started and time.monotonic() < waited:
            time.sleep(0.01)
        _wait_until_ready(made, waited)
        try:
            yield made
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def _wait_until_ready(made: Served, until: float) -> None:
    while (status := get(f"{made.root}/ready")[0]) != 200:
        assert status == 503
        assert time.monotonic() < until
        time.sleep(0.02)


def get(url: str) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a request by the standard library."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.loads(error.read())


def counted(served: Served, name: str) -> float:
    """A value of /metrics, summed over its labels."""
    lines = get(f"{served.root}/metrics")[1].splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)
