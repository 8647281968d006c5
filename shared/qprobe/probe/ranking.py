"""How scores rank the samples of a prompt, and what there is to rank: AUC within prompts, good and bad, copies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qprobe.probe.columns import Floats, Integers, _columns, _rows_by_prompt

# Of the largest reward: what two rewards may differ by and be one.
ROUNDING = 1e-6


def within_prompt_auc(scores: ArrayLike, rewards: ArrayLike, groups: ArrayLike) -> Floats:
    """Probability that a random pair of one prompt's samples with r_i > r_j is scored in that order, ties half.

    For rewards of 0 and 1 this is the area under the ROC curve within the prompt. Rewards that differ by a millionth of the
    largest, which is the rounding of arithmetic, are equal. Memory is n^2 for a prompt of n.

    Args:
        scores: (N,) float.
        rewards: (N,) float.
        groups: (N,) int, prompt ids.

    Returns:
        (P,) float64 by sorted prompt id; NaN where all rewards of the prompt are equal.

    Raises:
        ValueError: the lengths differ or a value is NaN.
    """
    scores, rewards = _columns(scores=scores, rewards=rewards)
    prompts, rows = _rows_by_prompt(groups, len(scores))
    auc, least = np.full(len(prompts), np.nan), ROUNDING * np.abs(rewards).max()
    for p, row in enumerate(rows):
        s, r = scores[row], rewards[row]
        ordered = r[:, None] - r[None, :] > least
        if ordered.any():
            auc[p] = 0.5 + 0.5 * np.sign(s[:, None] - s[None, :])[ordered].mean()
    return auc


def mixed_prompts(rewards: ArrayLike, groups: ArrayLike) -> NDArray[np.bool_]:
    """Which prompts have good and bad samples: where there is something to choose.

    Args:
        rewards: (N,) float, of all prompts: they say what a difference is (`least_difference`).
        groups: (N,) int, prompt ids.

    Returns:
        (P,) bool by sorted prompt id.

    Raises:
        ValueError: the lengths differ or a reward is NaN.
    """
    (rewards,) = _columns(rewards=rewards)
    _, rows = _rows_by_prompt(groups, len(rewards))
    least = least_difference(rewards)
    return np.array([np.ptp(rewards[row]) > least for row in rows])


def least_difference(rewards: ArrayLike) -> float:
    """What two rewards must differ by, more than that, for one to be good and the other bad.

    A soft judge hardly ever gives the same number twice: .5003 and .5004 are one verdict, and the rounding of a model's
    arithmetic is none. So a difference is more than a hundredth of the range that the rewards have, and more than a
    ten-thousandth of the largest.

    Args:
        rewards: (N,) float, of all prompts together.

    Raises:
        ValueError: there is none, or one is NaN.
    """
    (rewards,) = _columns(rewards=rewards)
    return max(0.01 * float(np.ptp(rewards)), 1e-4 * float(np.abs(rewards).max()))


@dataclass(frozen=True)
class Distinct:
    """The different completions of every prompt: copies of one are no pair and no choice.

    Args:
        row: (N,) int64, the completion that a sample is a copy of, numbered from 0 as they are first met.
        groups: (M,) int64, the prompt of each completion.
    """

    row: Integers
    groups: Integers

    @classmethod
    def of(cls, completions: Sequence[str], groups: ArrayLike) -> "Distinct":
        """Find the copies.

        Args:
            completions: N texts.
            groups: (N,) int, prompt ids.
        """
        numbers: dict[tuple[int, str], int] = {}
        own = zip(np.asarray(groups).tolist(), completions, strict=True)
        row = np.array([numbers.setdefault(key, len(numbers)) for key in own], dtype=np.int64)
        return cls(row, np.array([group for group, _ in numbers], dtype=np.int64))

    def mean(self, values: ArrayLike) -> Floats:
        """(M,) the mean of (N,) values over the copies of each completion: a judge may give two copies two rewards."""
        return np.asarray(np.bincount(self.row, np.asarray(values, dtype=np.float64)) / np.bincount(self.row))
