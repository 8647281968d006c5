"""vLLM's own OpenAI-compatible server on loopback, and a proxy before it that does to requests what networks do.

Tests reach it through the fixture `vllm_server`; `benchmarks/back_ends.py` loads it by its path. A server ends with the
process that started it, also where that is killed.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qprobe import models
from qprobe.models.child_processes import Guard
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiSettings
from qprobe.models.vllm_engine import ENVIRONMENT

MODEL = "served"
PATIENCE = 180.0  # seconds for a server to start


class VLLMServer:
    """A server that generates or pools with one model.

    Args:
        spec: the model; its dtype is the server's.
        pooling: whether it embeds.
        kv_cache_gib: for keys and values.
        max_model_len: longest prompt with its completion, in tokens; None is the model's context.
        more: further words of the command.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pooling: bool = False,
        kv_cache_gib: float = 0.0625,
        max_model_len: int | None = None,
        more: Sequence[str] = (),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        context = max_model_len or models.outline(spec).context_length or 2048
        words = ["--model", models.safetensors(spec)[0], "--served-model-name", MODEL, "--generation-config", "vllm"]
        words += ["--dtype", str(spec.resolved_dtype()).removeprefix("torch."), "--enforce-eager"]
        words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context)]
        # With chunked prefill, a seed ends a server on a CPU.
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(context, 2048))]
        words += ["--kv-cache-memory-bytes", str(int(kv_cache_gib * 2**30)), "--logprobs-mode", "raw_logprobs"]
        if pooling:
            pooler = '{"seq_pooling_type": "LAST", "use_activation": false}'
            words += ["--runner", "pooling", "--convert", "embed", "--pooler-config", pooler]
        words += more
        self._guard = Guard()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the server runs
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            env=os.environ | ENVIRONMENT | self._guard.environment | {"TORCHDYNAMO_DISABLE": "1"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait(f"http://127.0.0.1:{port}/health")
        except BaseException:
            self.close()
            raise

    def _wait(self, address: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(address, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        raise RuntimeError(f"vLLM's server did not start:\n{self._log.read()[-5000:]}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._guard.dismiss()
        self._log.close()

    def settings(self, **changes: Any) -> ApiSettings:
        values = {"model": MODEL, "base_url": self.url, "timeout": 60.0, "concurrency": 4, "retries": 3}
        return ApiSettings(**values | changes)


class Proxy:
    """Hands requests on to a server, except where a random draw says otherwise.

    Args:
        url: of the server.
        share: of the requests that meet a fault, in [0, 1].
        seed: of the draws.
        delay: seconds of the fault "delay"; longer than the client waits.

    met: how often each fault was met.
    """

    FAULTS = ("drop", "delay", "429 with Retry-After", "429", "500", "cut")

    def __init__(self, url: str, share: float, seed: int = 0, delay: float = 2.0) -> None:
        self.met: Counter[str] = Counter()
        self.passed = 0
        draws, lock, behind, owner = random.Random(seed), threading.Lock(), url.split("/")[2], self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else a small answer waits 40 ms for the header to be acknowledged
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    fault = draws.choice(owner.FAULTS) if draws.random() < share else ""
                    owner.met[fault] += bool(fault)
                try:
                    self._answer(fault, body)
                except (BrokenPipeError, ConnectionResetError):  # the client gave up
                    self.close_connection = True

            def _answer(self, fault: str, body: bytes) -> None:
                if fault == "drop":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault.startswith(("429", "500")):
                    headers = {"Retry-After": "0.1"} if "Retry-After" in fault else {}
                    self._send(int(fault[:3]), b'{"error": {"message": "not now"}}', headers=headers)
                    return
                if fault == "delay":
                    time.sleep(delay)
                connection = http.client.HTTPConnection(behind, timeout=60)
                connection.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                with lock:
                    owner.passed += not fault
                self._send(answer.status, content, cut=fault == "cut")

            def _send(
                self, status: int, content: bytes, cut: bool = False, headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                given = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
                for name, value in given.items():
                    self.send_header(name, value)
                self.end_headers()
                if cut:
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Silent."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                """Silent too: clients break off here on purpose."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
