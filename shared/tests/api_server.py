"""A small OpenAI-compatible server in a thread: it answers with a tiny model, and fails as a test tells it to.

Tests reach it through the fixtures `server` and `make_server`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qprobe import models
from qprobe.embedding.hf import HFEmbedder
from qprobe.models.language_model import ModelSpec
from qprobe.models.openai_client import ApiSettings
from qprobe.prompts import Prompt
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler

KEY = "sk-test-THE-KEY-ITSELF"
MODEL = "tiny"
Json = dict[str, Any]


class Refusal(Exception):
    """An error as the server words it: status and body."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None} | more}


class Server:
    """The server of one test.

    Args:
        spec: the model that answers.

    faults: what is done to the next requests, one each, None for nothing: a Refusal; a float, seconds of delay; "drop"; "cut";
        a text that is sent as the body; a function of the answer.
    always: the same for every request that no fault is left for.
    requests: (path, headers by names in small letters, body) of what came.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.faults: deque[Any] = deque()
        self.always: Any = None
        self.max_n = 128
        self.max_stop = 4
        self.says_stop_reason = False
        self.requests: list[tuple[str, Json, Json]] = []
        self.busy = self.busiest = 0
        self.pause = 0.0  # seconds of every answer
        self._lock = threading.Lock()
        self._model = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else a small answer waits 40 ms for the header to be acknowledged
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with owner._lock:
                    owner.requests.append((self.path, headers, body))
                    fault = owner.faults.popleft() if owner.faults else owner.always
                    owner.busy += 1
                    owner.busiest = max(owner.busy, owner.busiest)
                try:
                    self._answer(body, fault)
                except (BrokenPipeError, ConnectionResetError):  # the client gave up
                    self.close_connection = True
                finally:
                    with owner._lock:
                        owner.busy -= 1

            def _answer(self, body: Json, fault: Any) -> None:
                time.sleep(fault if isinstance(fault, float) else owner.pause)
                if fault == "drop":
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                headers: dict[str, str] = {}
                try:
                    if isinstance(fault, tuple):
                        fault, headers = fault
                    if isinstance(fault, Refusal):
                        raise fault
                    if self.headers["Authorization"] != f"Bearer {KEY}":
                        raise Refusal(401, f"Incorrect API key provided: {self.headers['Authorization'][7:]}")
                    status, answer = 200, owner.answer(self.path, body)
                    answer = fault(answer) if callable(fault) else answer
                except Refusal as refusal:
                    status, answer = refusal.status, refusal.body
                content = (fault if isinstance(fault, str) and fault != "cut" else json.dumps(answer)).encode()
                self.send_response(status)
                page = content.startswith(b"<")
                self.send_header("Content-Type", "text/html" if page else "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if fault == "cut":
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Silent."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Silent too: clients break off here on purpose."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def settings(self, **changes: Any) -> ApiSettings:
        values = {"model": MODEL, "base_url": self.url, "timeout": 20.0, "concurrency": 4, "retries": 3}
        return ApiSettings(**values | changes)

    def divided(self, changes: Json) -> tuple[ApiSettings, Json]:
        """Settings of the API with those changes that are its own, and the other changes."""
        own = {name: value for name, value in changes.items() if name in ApiSettings.__dataclass_fields__}
        return self.settings(**own), {name: value for name, value in changes.items() if name not in own}

    def answer(self, path: str, body: Json) -> Json:
        if body["model"] != MODEL:
            raise Refusal(404, f"The model `{body['model']}` does not exist", code="model_not_found")
        with self._model:
            if path == "/v1/embeddings":
                return self._embeddings(body)
            return self._completions(body, chat=path == "/v1/chat/completions")

    def _completions(self, body: Json, chat: bool) -> Json:
        n, stop = body.get("n", 1), body.get("stop", [])
        if n > self.max_n:
            raise Refusal(400, f"'n' must be at most {self.max_n}", param="n")
        if len(stop) > self.max_stop:
            raise Refusal(400, f"'stop' holds {len(stop)} texts, {self.max_stop} are allowed", param="stop")
        tokenizer = models.load_tokenizer(self.spec)
        if chat:
            messages, opening = body["messages"], ""
            if body.get("continue_final_message"):
                *messages, last = messages
                opening = last["content"]
            prompt = Prompt("p", messages=tuple(messages), opening=opening)
        else:
            prompt = Prompt("p", text=body["prompt"])
        ids = tokenizer.render_prompt(prompt)[1]
        greedy = body["temperature"] == 0
        law = SamplingSettings(
            n=1 if greedy else n,
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            max_new_tokens=body["max_tokens"],
        )
        try:
            seeds = [body.get("seed", 0) + i for i in range(n)]
            sampler = HFSampler(self.spec, law)
            completions = sampler.sample([ids], [seeds])[0]
        except ValueError as error:
            raise Refusal(400, f"maximum context length exceeded: {error}", code="context_length_exceeded") from error
        choices: list[Json] = []
        for index, completion in enumerate(completions):
            # As real servers do, also inside the white space that begins a completion.
            at = min((p for w in stop if (p := completion.text.find(w)) >= 0), default=None)
            text = completion.text[:at]
            reason = completion.finish_reason if at is None else "stop"
            choice: Json = {"index": index, "finish_reason": reason}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if self.says_stop_reason:
                choice["stop_reason"] = None if at is None else next(w for w in stop if completion.text.find(w) == at)
            if body.get("logprobs"):
                choice["logprobs"] = self._logprobs(ids, sampler.drawn()[0][index].tokens, chat)
            choices.append(choice)
        usage = {"prompt_tokens": len(ids), "completion_tokens": sum(len(c.token_ids or []) for c in completions)}
        return {"model": f"{MODEL}-2026-11", "choices": choices, "usage": usage}

    def _logprobs(self, prompt: Sequence[int], ids: Sequence[int], chat: bool) -> Json:
        """Of every token that was drawn, the end of sequence among them, as vLLM gives them."""
        language_model = models.load(self.spec)
        with torch.inference_mode(), language_model.alone:
            scores = language_model.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        values = [float(scores[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)]
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        special = {1: list(b"<eos>"), 0: [], 2: [], 3: [], 4: []}  # only the end is spelled: it stands behind the text
        letters = language_model.tokenizer.convert_ids_to_tokens
        spelled = [special[i] if i in special else [byte_of[c] for c in letters(i)] for i in ids]
        if chat:
            return {
                "content": [
                    {"token": bytes(b).decode(errors="replace"), "bytes": b, "logprob": v}
                    for b, v in zip(spelled, values, strict=True)
                ]
            }
        return {"tokens": [bytes(b).decode(errors="replace") for b in spelled], "token_logprobs": values}

    def _embeddings(self, body: Json) -> Json:
        tokenizer = models.load_tokenizer(self.spec)
        rows = [tokenizer.encode_prompt(text, templated=False) for text in body["input"]]
        try:
            values = HFEmbedder(self.spec, (-1,)).embed(rows, [[[]] for _ in rows])[4]
        except ValueError as error:
            raise Refusal(400, f"maximum context length exceeded: {error}") from error
        if "dimensions" in body:
            values = values[:, : body["dimensions"]]
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(values)]
        return {"model": MODEL, "data": data[::-1], "usage": {"prompt_tokens": sum(map(len, rows))}}
