"""A filter of lm-evaluation-harness: of a task's `repeats`, the best by a probe is kept. pip install 'qprobe[lm-eval]'

filter_list:
  - name: best_by_probe
    filter:
      - function: !function qprobe.integrations.lm_eval.BestByProbe
        probe: runs/mine/probes/prompts/auto
        prompt: "Question: {{question}}\nAnswer:"
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.utils import apply_template

from qprobe import QProbe
from qprobe.cli import composition
from qprobe.serving.policy import Policy


class BestByProbe(Filter):  # type: ignore[misc]
    """The response of highest Q; of equal ones the first.

    Args:
        probe: a folder, or a name on the hub.
        prompt: template of what the model was asked, as the task's `doc_to_text`: filters are given documents, not prompts.
            Examples of few-shot prompts are not seen.
        settings: of the probe's card, KEY=VALUE each, such as model.device=cpu.
    """

    def __init__(self, probe: str, prompt: str, settings: Sequence[str] = ()) -> None:
        super().__init__()
        self.policy, self.prompt = _policy(probe, tuple(settings)), prompt

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
        """The best response of every document, as a list of one."""
        responses = [list(own) for own in resps]
        scores = self.policy.scores([apply_template(self.prompt, doc) for doc in docs], responses)
        return [[own[of.index(max(of))]] for own, of in zip(responses, scores, strict=True)]


@functools.cache
def _policy(probe: str, settings: tuple[str, ...]) -> Policy:
    """Loaded once: the harness makes a filter anew for every task."""
    return composition.policy(QProbe.from_pretrained(probe), settings)
