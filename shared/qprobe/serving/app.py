"""The server's routes: OpenAI's protocol for completions, and what is ours beside it.

POST /v1/chat/completions, /v1/completions   an answer chosen of k candidates
POST /v1/score                               scores and probabilities of given candidates
POST /v1/feedback                            what a user says of an answer
GET /v1/models, /health, /ready, /metrics
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qprobe.models.keys import Key
from qprobe.serving import replies
from qprobe.serving.answer import Answer
from qprobe.serving.feedback import FeedbackBody
from qprobe.serving.protocol import Body, ChatBody, Refused, ScoreBody, TextBody, parsed, prompt_of
from qprobe.serving.service import Service

# Seconds after which a stream says that it lives.
KEEP_ALIVE = 5.0
_LARGEST_BODY = 4 * 2**20
_LOG = logging.getLogger(__name__)
_OPEN = ("/health", "/ready", "/metrics")


def app(service: Service, upstream_key: Key | None = None, token: Key | None = None) -> FastAPI:
    """The application.

    Args:
        upstream_key: of the model's server; where it is empty or None, a request's own bearer token goes there.
        token: that a request must bear; None or empty takes all.
    """

    async def load() -> None:
        try:
            await service.start()
        except Exception as error:
            service.failure = error
            made.state.stop()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            await asyncio.gather(loading, return_exceptions=True)
            await service.close()

    made = FastAPI(title="Q-probe", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    made.state.service, made.state.stop = service, lambda: None  # whoever runs it says how it is stopped
    made.add_middleware(_Counted, service=service, token=token)

    @made.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)

    @made.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:  # while it sent its body
        service.metrics.gone.inc()
        return _refusal(Refused(499, "The client has gone."))

    @made.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"There is no {request.method} {request.url.path} here."
        return _refusal(Refused(error.status_code, said, code="unknown_url"))

    @made.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        said = f"This is a fault of the server: {type(error).__name__}. Its log says more."
        return _refusal(Refused(500, said))

    def key(request: Request) -> Key:
        if upstream_key is not None and upstream_key.value:
            return upstream_key
        return Key("", "" if token is not None and token.value else _bearer(request))

    def check_model(name: str) -> None:
        if name != service.source.name:
            said = f"There is no model {name!r:.80} here: ask for {service.source.name!r}."
            raise Refused(404, said, "model", "model_not_found")

    async def completion(request: Request, kind: type[Body]) -> Response:
        body, given = parsed(kind, await _content(request))
        check_model(body.model)
        work = asyncio.create_task(service.answers(body, given, key(request)))
        if not body.stream:
            answers = await _awaited(request, work, service)
            return JSONResponse(replies.whole(answers, body), headers=answers[0].headers)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        if (answers := await _awaited(request, work, service, KEEP_ALIVE)) is not None:  # a fault still has its status
            headers |= answers[0].headers
        return StreamingResponse(_stream(work, body, service), media_type="text/event-stream", headers=headers)

    @made.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await completion(request, ChatBody)

    @made.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await completion(request, TextBody)

    @made.post("/v1/score")
    async def score(request: Request) -> Response:
        body, _ = parsed(ScoreBody, await _content(request))
        if body.model is not None:
            check_model(body.model)
        work = asyncio.create_task(service.scores(prompt_of(body), body.candidates, body.beta))
        choice, loaded = await _awaited(request, work, service)
        rows = [
            {"index": place, "score": one.score, "probability": one.probability}
            for place, one in enumerate(choice.candidates)
        ]
        found = {"object": "list", "model": service.source.name, "probe": loaded.fingerprint, "data": rows}
        best = max(range(len(rows)), key=lambda place: rows[place]["score"])
        return JSONResponse(found | {"best": best})

    @made.post("/v1/feedback")
    async def feedback(request: Request) -> Any:
        if service.feedback is None:
            raise Refused(
                404, "This server keeps no feedback: it is started with --feedback FOLDER.", code="no_feedback"
            )
        body, _ = parsed(FeedbackBody, await _content(request))
        taken = service.feedback.take(body)
        service.metrics.feedback.inc()
        return {"object": "feedback", "id": body.id, "rewards": taken}

    @made.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @made.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        check_model(name)
        return _model(service)

    @made.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @made.get("/ready")
    async def ready() -> Any:
        if not service.ready or not service.dispatcher.alive:
            raise Refused(503, "The model is being loaded.", code="not_ready", wait=2)
        return {"status": "ready", "probe": service.loaded.fingerprint}

    @made.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.written(), media_type=service.metrics.content_type)

    return made


class _Counted:
    """Counts requests by path and status, and lets in who bears the token."""

    def __init__(self, inner: ASGIApp, service: Service, token: Key | None) -> None:
        self.inner, self.service = inner, service
        self.token = token.value.encode() if token is not None else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # where the client left before there was one

        async def noted(message: Message) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        borne = _bearer(HTTPConnection(scope)).encode()
        if self.token and scope["path"] not in _OPEN and not secrets.compare_digest(borne, self.token):
            said = "This server wants its token: send it as a bearer token."
            await _refusal(Refused(401, said, code="invalid_api_key"))(scope, receive, noted)
        else:
            await self.inner(scope, receive, noted)
        path = getattr(scope.get("route"), "path", "other")  # paths that clients make up are no labels
        metrics = self.service.metrics
        metrics.requests.labels(path, status).inc()
        if status == 200:
            metrics.seconds.labels(path).observe(time.monotonic() - began)


async def _content(request: Request) -> bytes:
    """The body, where it says that it is JSON (a web page cannot say so of another's server unasked)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send the header `content-type: application/json`, and one JSON object.")
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > _LARGEST_BODY:
            raise Refused(413, f"The body has more than {_LARGEST_BODY // 2**20} MiB: send less.")
    return b"".join(parts)


async def _awaited(request: Request, work: asyncio.Task[Any], service: Service, seconds: float | None = None) -> Any:
    """What the work gives, or None where it goes on after some seconds; a client that goes away ends it."""
    left = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({work, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if not left.done():
            return None
        service.metrics.gone.inc()
        await _ended(work)
        raise Refused(499, "The client has gone.")
    except asyncio.CancelledError:
        await _ended(work)
        raise
    finally:
        await _ended(left)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _stream(work: asyncio.Task[list[Answer]], body: Body, service: Service) -> AsyncIterator[bytes]:
    """Keep-alives until there is an answer, then the answer; the server closes it where the client goes away."""
    try:
        while not work.done():
            yield replies.KEEP_ALIVE
            await asyncio.wait({work}, timeout=KEEP_ALIVE)
        try:
            answers = work.result()
        except Refused as refused:
            yield replies.event(refused.body())
            return
        except Exception as error:
            _LOG.error("A stream ended by a fault of the server.", exc_info=error)
            yield replies.event(Refused(500, f"This is a fault of the server: {type(error).__name__}.").body())
            return
        for part in replies.streamed(answers, body):
            yield part
    finally:
        if not work.done():
            service.metrics.gone.inc()
            await _ended(work)


def _bearer(request: HTTPConnection) -> str:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _refusal(refused: Refused) -> Response:
    return JSONResponse(refused.body(), refused.status, refused.headers())


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.source.name, "object": "model", "created": 0, "owned_by": "qprobe"}
