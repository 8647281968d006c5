"""A Q-probe as a reward function of TRL's GRPOTrainer: pip install 'qprobe[trl]'.

GRPOTrainer(model, reward_funcs=ProbeReward(composition.policy(QProbe.from_pretrained("probe/"))), ...)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qprobe.prompts import Prompt
from qprobe.serving.policy import Policy

Said = str | list[dict[str, str]]


class ProbeReward:
    """Q of every completion, which GRPO reads relative to its group: the scale of Q does not matter to it.

    The probe reads its own frozen model, not the one that is trained: what GRPO finds far from that model's completions, the
    probe has not seen. Keep a reward that can be measured beside it.

    Args:
        policy: of the probe; its sampler draws nothing.
        name: in TRL's logs.
    """

    def __init__(self, policy: Policy, name: str = "qprobe") -> None:
        self.policy, self.__name__ = policy, name

    def __call__(self, prompts: Sequence[Said], completions: Sequence[Said], **_: Any) -> list[float]:
        """One reward a completion.

        Args:
            prompts: plain text, which is continued, or conversations; as many as completions, those of a group alike.
            completions: texts, or messages where the prompts are conversations.
        """
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(json.dumps(prompt), []).append(place)
        texts = [
            said if isinstance(said, str) else "".join(part["content"] or "" for part in said) for said in completions
        ]
        asked = [_prompt(prompts[own[0]]) for own in places.values()]
        found = self.policy.scores(asked, [[texts[place] for place in own] for own in places.values()])
        rewards = [0.0] * len(texts)
        for own, scores in zip(places.values(), found, strict=True):
            for place, score in zip(own, scores, strict=True):
                rewards[place] = score
        return rewards


def _prompt(said: Said) -> Prompt:
    return Prompt("grpo", text=said) if isinstance(said, str) else Prompt("grpo", messages=tuple(said))
