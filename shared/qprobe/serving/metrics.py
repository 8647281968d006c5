"""What a server counts, in Prometheus' form, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: Any = {"registry": self.registry}
        self.requests = Counter("qprobe_requests", "Requests by path and status.", ["path", "status"], **more)
        self.seconds = Histogram("qprobe_request_seconds", "Of answered requests.", ["path"], buckets=_SECONDS, **more)
        self.in_work = Gauge("qprobe_requests_in_work", "Requests that wait or are worked on.", **more)
        self.gone = Counter("qprobe_clients_gone", "Clients that left before their answer.", **more)
        self.candidates = Counter("qprobe_candidates", "Candidates: asked for, usable.", ["which"], **more)
        self.tokens = Counter("qprobe_tokens", "Tokens of all candidates.", ["kind"], **more)
        self.unscored = Counter("qprobe_unscored_answers", "Answers that the probe could not choose.", **more)
        self.feedback = Counter("qprobe_feedback", "Pieces of feedback.", **more)
        self.batches = Counter("qprobe_batches", "Batches by lane.", ["lane"], **more)
        self.jobs = Counter("qprobe_batched_requests", "Requests in batches, by lane.", ["lane"], **more)
        self.rows = Counter("qprobe_batched_candidates", "Candidates in batches, by lane.", ["lane"], **more)
        self.work = Counter("qprobe_work_seconds", "Seconds of computing, by lane.", ["lane"], **more)
        self.drawing = Histogram(
            "qprobe_drawing_seconds", "Drawing of a request's candidates.", buckets=_SECONDS, **more
        )
        self.probe = Info("qprobe_probe", "The probe in use.", **more)

    def done(self, lane: str, first: bool, rows: int, seconds: float) -> None:
        """Count a request that is done, as `Lane.done` is told."""
        self.batches.labels(lane).inc(first)
        self.jobs.labels(lane).inc()
        self.rows.labels(lane).inc(rows)
        self.work.labels(lane).inc(seconds)

    @contextmanager
    def timed(self, histogram: Histogram) -> Iterator[None]:
        began = time.monotonic()
        yield
        histogram.observe(time.monotonic() - began)

    def written(self) -> bytes:
        return generate_latest(self.registry)
