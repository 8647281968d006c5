"""A Q-probe in inspect_ai, as a choice among epochs: pip install 'qprobe[inspect]'.

Task(dataset, scorer=with_probe(match(), policy), epochs=Epochs(8, best_by_probe()))

The scorer writes Q beside what another scorer finds, and the reducer takes the epoch of highest Q: the metric is then that of
the best of 8 by the probe.
"""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from inspect_ai.scorer import Score, Scorer, ScoreReducer, Target, accuracy, score_reducer, scorer, stderr
from inspect_ai.solver import TaskState

from qprobe.prompts import Prompt
from qprobe.serving.policy import Policy

Q = "qprobe"


@scorer(metrics=[accuracy(), stderr()])  # type: ignore[untyped-decorator]
def with_probe(graded: Scorer, policy: Policy) -> Scorer:
    """Grade by another scorer, with the answer's Q in the metadata of its score.

    Args:
        graded: any scorer that gives one value a sample.
        policy: of the probe; its sampler draws nothing.
    """
    one_at_a_time = anyio.Lock()

    async def score(state: TaskState, target: Target) -> Score | None:
        found = await graded(state, target)
        if found is None:
            return None
        said: list[Any] = [part.model_dump() for part in state.messages if part.role in ("system", "user", "assistant")]
        asked = tuple({"role": part["role"], "content": part["content"]} for part in said[:-1])
        async with one_at_a_time:  # the embedder is one, and samples are scored side by side
            ((q,),) = await anyio.to_thread.run_sync(
                policy.scores, [Prompt("sample", messages=asked)], [[state.output.completion]]
            )
        return found.model_copy(update={"metadata": {**(found.metadata or {}), Q: q}})

    return score


@score_reducer  # type: ignore[untyped-decorator]
def best_by_probe() -> ScoreReducer:
    """The score of the epoch with the highest Q; of equal ones the first."""

    def reduce(scores: list[Score]) -> Score:
        if lacking := sum(Q not in (score.metadata or {}) for score in scores):
            raise ValueError(f"{lacking} of {len(scores)} epochs have no Q: score them by with_probe(scorer, policy).")
        return max(scores, key=lambda score: score.metadata[Q])

    return reduce
