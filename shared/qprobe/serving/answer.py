"""What came of a request: its usable candidates with scores, the one that was chosen, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qprobe.serving.draws import Candidate, Draws
from qprobe.serving.policy import Choice

_TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Args:
        asked: candidates that were asked for.
        choice: scores and probabilities of the usable ones, and which was chosen; None where they could not be scored.
        order: places of the usable candidates that are returned: the chosen one, then the others by falling score.
    """

    id: str
    created: int
    asked: int
    draws: Draws
    choice: Choice | None
    order: list[int]
    beta: float
    seed: int
    probe: str

    def chosen(self) -> Candidate:
        return self.draws.candidates[self.order[0]]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all candidates; what this server adds is in `qprobe`."""
        counts = {"prompt_tokens": 0, "completion_tokens": 0} | self.draws.usage
        counts["total_tokens"] = counts["prompt_tokens"] + counts["completion_tokens"]
        found: dict[str, Any] = {
            "candidates": self.asked,
            "valid": len(self.draws.candidates),
            "index": self.order[0],
            "score": None,
            "probability": None,
            "beta": self.beta,
            "seed": self.seed,
            "probe": self.probe,
        }
        if self.choice is not None:
            best = self.choice.candidates[self.choice.chosen]
            found |= {"score": best.score, "probability": best.probability}
            found |= {} if best.right is None else {"right": best.right}
        if self.draws.faults:
            found["faults"] = sorted(set(self.draws.faults))
        return counts | {"qprobe": found}

    @property
    def headers(self) -> dict[str, str]:
        own = self.usage["qprobe"]
        found = {"x-qprobe-k": self.asked, "x-qprobe-valid": own["valid"], "x-qprobe-index": own["index"]}
        found["x-qprobe-score"] = "none" if self.choice is None else f"{own['score']:.6g}"
        return {name: str(value) for name, value in found.items()} | {"x-qprobe-probe": self.probe}

    def candidates(self) -> list[dict[str, Any]]:
        """All usable candidates, as `return_candidates` shows them."""
        shown = []
        for place, candidate in enumerate(self.draws.candidates):
            scored = None if self.choice is None else self.choice.candidates[place]
            shown.append(
                {
                    "index": place,
                    "text": candidate.completion.text,
                    "finish_reason": candidate.choice.get("finish_reason"),
                    "score": scored and scored.score,
                    "probability": scored and scored.probability,
                    "right": scored and scored.right,
                }
            )
        return shown


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """Usage of a request: of several prompts the tokens of all, and in `qprobe` a list of what each came to, with its own id."""
    if len(answers) == 1:
        return answers[0].usage
    each = [answer.usage for answer in answers]
    counts = {name: sum(usage.get(name, 0) for usage in each) for name in _TOKENS}
    own = [{"id": answer.id, **usage["qprobe"]} for answer, usage in zip(answers, each, strict=True)]
    return counts | {"qprobe": own}
