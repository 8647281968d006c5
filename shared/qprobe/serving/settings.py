"""How a probe is served."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = ("error", "first")


@dataclass(frozen=True)
class ServeSettings:
    """How a probe is served.

    Args:
        k: candidates of a request that does not say; None is the sampler's own n.
        most_candidates: that a request may ask for.
        most_in_work: requests at once; more are told to come again.
        candidate_seconds: after which a candidate is left.
        request_seconds: after which a request is given up.
        batch_rows: candidates that are drawn or read together.
        explore: share of requests whose answer is taken by lot, in [0, 1): feedback on them is what a new probe learns from.
        when_scoring_fails: "error", or "first": the first candidate, and a header that says so.
    """

    k: int | None = None
    most_candidates: int = 64
    most_in_work: int = 128
    candidate_seconds: float = 120.0
    request_seconds: float = 180.0
    batch_rows: int = 128
    explore: float = 0.0
    when_scoring_fails: str = "error"

    def __post_init__(self) -> None:
        if self.when_scoring_fails not in FAILURES:
            raise ValueError(f"when_scoring_fails is {self.when_scoring_fails!r}: choose {' or '.join(FAILURES)}.")
        for name in ("most_candidates", "most_in_work", "batch_rows", "candidate_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0.")
        if not 0 <= self.explore < 1:
            raise ValueError(f"explore is {self.explore}: a share of requests, in [0, 1).")
        if self.k is not None and not 1 <= self.k <= self.most_candidates:
            raise ValueError(f"k is {self.k}: at least 1, and at most most_candidates={self.most_candidates}.")
