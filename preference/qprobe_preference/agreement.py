"""How far two judges agree on the same comparisons: Cohen's kappa, with an interval.

Its few lines are our own because they work out kappa for all resamples of the bootstrap at once; scikit-learn's
`cohen_kappa_score`, which the tests compare them with, takes one set of labels a call: for 4,096 comparisons
40 s where these take 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qprobe.probe.columns import BLOCK, Floats
from qprobe.probe.intervals import Interval, tails
from qprobe_preference.winrates import CATEGORIES, Judgements


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree.

    Args:
        kappa: Cohen's kappa with its bootstrap interval over prompts or clusters of them; None where both gave one and the same
            verdict throughout, which leaves nothing to agree on.
        agreed: share of comparisons with the same verdict.
        compared: comparisons that are counted.
        left_out: comparisons on which either gave no verdict; not counted.
        itself: comparisons of an answer with itself, ties of both judges by construction; not counted either.
    """

    kappa: Interval | None
    agreed: float
    compared: int
    left_out: int
    itself: int

    def sentence(self, first: str, second: str) -> str:
        """For the notes under a table, with the judges' names."""
        kappa = "undefined, both gave one verdict throughout"
        if self.kappa is not None:
            kappa = f"{self.kappa.value:.2f} [{self.kappa.low:.2f}, {self.kappa.high:.2f}]"
        left_out = f"; {self.left_out:,} left out, without a verdict" if self.left_out else ""
        if self.itself:
            left_out += f"; {self.itself:,} left out, of an answer with itself"
        agreed = f"{self.agreed:.1%} of {self.compared:,} comparisons"
        return f"{first} and {second} agree on {agreed}, Cohen's kappa {kappa}{left_out}."


def agreement(first: Judgements, second: Judgements, *, draws: int = 2_000, seed: int = 0) -> Agreement:
    """Cohen's kappa of two judges over win, tie and loss; candidates of one prompt or cluster are resampled together.

    Args:
        first, second: verdicts of the two judges on the same N comparisons, in the same order.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: the comparisons differ, or there is none of two answers with a verdict of both (`Judgements.compared`).

    Source: Cohen, Educational and Psychological Measurement 20 (1960).
    """
    if not np.array_equal(first.groups, second.groups):
        raise ValueError("The two judges saw other comparisons: give the same candidates in the same order.")
    itself, decided = first.itself | second.itself, first.compared & second.compared
    if not decided.any():
        raise ValueError("There is no comparison on which both judges gave a verdict: nothing to agree on.")
    clusters, place = np.unique(first.clusters[decided], return_inverse=True)
    row, column = (
        np.argmax(judge.verdicts[decided, None] == np.array(CATEGORIES), axis=1) for judge in (first, second)
    )
    tables = np.zeros((len(clusters), 9))
    np.add.at(tables, (place, 3 * row + column), 1)
    value, kappa = float(_kappa(tables.sum(axis=0))), None
    if np.isfinite(value):
        low, high = -np.inf, np.inf
        if len(clusters) > 1:
            # A resample of one verdict throughout has no kappa.
            low, high = np.nanquantile(_resampled_kappas(tables, draws, seed), tails(len(clusters)))
        kappa = Interval(value, float(low), float(high))
    left_out = int((~decided & ~itself).sum())
    return Agreement(kappa, float((row == column).mean()), len(row), left_out, int(itself.sum()))


def _kappa(tables: Floats) -> Floats:
    """(...) kappa of (..., 9) tables; NaN where chance alone agrees always."""
    shares = tables.reshape(*tables.shape[:-1], 3, 3) / tables.sum(axis=-1)[..., None, None]
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    agreed = np.trace(shares, axis1=-2, axis2=-1)
    return np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1.0), np.nan)


def _resampled_kappas(tables: Floats, draws: int, seed: int) -> Floats:
    """(draws,) kappa of resamples of (P, 9) tables, one a prompt or cluster, block by block."""
    count = len(tables)
    rng = np.random.default_rng([seed, count])
    step = max(1, BLOCK // count)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    taken = (rng.multinomial(count, np.full(count, 1 / count), size=size) for size in sizes)
    return np.concatenate([_kappa(times.astype(np.float64) @ tables) for times in taken])
