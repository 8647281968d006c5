"""Win rates of a policy from judged answers: with intervals, with lengths, and one policy against another.

A pool of judged candidates per prompt answers every question about selection. A *law* gives each candidate the
probability that a policy takes it (`choice_law` of the core): uniform for the base policy, over random subsets of k for a
Q-probe, by the labels themselves for the skyline. A win rate is the mean over prompts of the win that the law expects, so
its interval is over prompts. Selection sees neither labels nor whether there is a verdict: an undecided comparison
(unparsed, refused, too long) counts half, as a tie does, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qprobe.probe.columns import Floats, Integers
from qprobe.probe.intervals import Interval, bootstrap_mean, paired_difference, wilson
from qprobe.probe.metrics import choice_law
from qprobe.report import Band
from qprobe_preference.lengths import length_controlled

CATEGORIES = ("win", "tie", "loss")
# Why there is no verdict, in the words of the judges.
UNDECIDED = ("unparsed", "refused", "too_long")


class Judgements:
    """One judge's verdicts on N candidates, each against another answer to the same prompt; the arguments become arrays.

    The other answer is the data set's chosen one, or another policy's: the win rate is then of one policy over the other.

    Args:
        wins: (N,) float in [0, 1]: 1 a win, 0 a loss, 0.5 a tie, anything between from soft verdicts. Where there is no
            verdict any value, NaN too, is read as 0.5.
        groups: (N,) int, prompt ids.
        verdicts: (N,) "win", "tie" or "loss", or why there is none (UNDECIDED); None reads them from the wins.
        lengths: (N,) float >= 0, of the candidates, in tokens or characters; None where unknown.
        reference_lengths: (N,) float >= 0, of the answers that they were judged against; given where `lengths` is.
        itself: (N,) bool, whether a candidate is the very answer that it is judged against, a tie that no judge made.
            None: none is.
        clusters: (N,) int, what a candidate's prompt belongs to: resamples take a cluster whole. None: its prompt.

    Raises:
        ValueError: columns of different lengths, a win outside [0, 1], an unknown word, a win of 0 or a loss of 1.
    """

    def __init__(
        self,
        wins: ArrayLike,
        groups: ArrayLike,
        verdicts: Sequence[str] | None = None,
        lengths: ArrayLike | None = None,
        reference_lengths: ArrayLike | None = None,
        itself: ArrayLike | None = None,
        clusters: ArrayLike | None = None,
    ) -> None:
        self.wins: Floats = np.array(wins, dtype=np.float64)
        if self.wins.ndim != 1 or not len(self.wins):
            raise ValueError(f"wins has shape {self.wins.shape}: give one number for each of at least one candidate.")
        if not np.issubdtype(np.asarray(groups).dtype, np.integer):
            raise ValueError(f"groups is {np.asarray(groups).dtype}: give one integer prompt id a candidate.")
        if (lengths is None) != (reference_lengths is None):
            raise ValueError("Give lengths and reference_lengths both, or neither: one is measured against the other.")
        if verdicts is None:
            words = np.array(CATEGORIES)[1 - np.sign(np.nan_to_num(self.wins, nan=0.5) - 0.5).astype(int)]
        else:
            words = np.array(verdicts, dtype=np.str_)
        self.groups: Integers = self._column("groups", groups, np.int64)
        self.verdicts: NDArray[np.str_] = self._column("verdicts", words, np.str_)
        self.itself = self._column("itself", np.zeros(len(self.wins)) if itself is None else itself, np.bool_)
        self.clusters: Integers = self._column("clusters", groups if clusters is None else clusters, np.int64)
        self.lengths = self._lengths("lengths", lengths)
        self.reference_lengths = self._lengths("reference_lengths", reference_lengths)
        self.wins[np.isin(words, UNDECIDED)] = 0.5
        opposite = ((words == "win") & (self.wins == 0)) | ((words == "loss") & (self.wins == 1))
        for wrong, what in (
            (~np.isin(words, [*CATEGORIES, *UNDECIDED]), f"is none of {', '.join([*CATEGORIES, *UNDECIDED])}"),
            (~((self.wins >= 0) & (self.wins <= 1)), "has a win outside [0, 1]"),
            (opposite, "says the opposite of its win"),
        ):
            if wrong.any():
                row = int(wrong.argmax())
                raise ValueError(f"Row {row} (verdict {words[row]!s}, win {self.wins[row]:g}) {what}: judge it again.")

    def _column(self, name: str, values: ArrayLike, kind: type[np.generic]) -> NDArray[Any]:
        column = np.asarray(values, dtype=kind)
        if column.shape != self.wins.shape:
            raise ValueError(f"{name} has shape {column.shape}, wins {self.wins.shape}: give one for each candidate.")
        return column

    def _lengths(self, name: str, values: ArrayLike | None) -> Floats | None:
        if values is None:
            return None
        column = self._column(name, values, np.float64)
        if not (np.isfinite(column).all() and (column >= 0).all()):
            raise ValueError(f"{name} holds a value that is no length: give finite numbers of 0 or more.")
        return column

    @property
    def compared(self) -> NDArray[np.bool_]:
        """(N,) whether the judge gave a verdict on two different answers."""
        return np.asarray(np.isin(self.verdicts, CATEGORIES) & ~self.itself)

    @property
    def cluster_of_prompt(self) -> Integers:
        """(P,) the cluster of every prompt, by sorted id."""
        return self.clusters[np.unique(self.groups, return_index=True)[1]]

    def base_law(self) -> Floats:
        """The base policy: one candidate of each prompt, at random."""
        return self.probe_law(np.zeros(len(self.wins)), k=1, beta=0.0)

    def probe_law(self, scores: ArrayLike, k: int, beta: ArrayLike, *, draws: int = 200, seed: int = 0) -> Floats:
        """The policy of a Q-probe at (k, beta); of several probes, that of one at random.

        Args:
            scores: (N,) or (S, N) float, Q values of one probe or of S.
            k: candidates.
            beta: temperature; one, or (S, P) for every probe and prompt.
            draws: random subsets a prompt where there is no closed form (0 < beta, 1 < k < the pool).
            seed: of these subsets: one seed draws the same ones at every call.

        Returns:
            (N,) float64, sums to 1 within each prompt.

        Raises:
            ValueError: see `qprobe.probe.metrics.choice_law`.
        """
        each = np.atleast_2d(np.asarray(scores, dtype=np.float64))
        prompts = len(np.unique(self.groups))
        betas = np.broadcast_to(np.asarray(beta, dtype=np.float64), (len(each), prompts))
        laws = [
            choice_law(q, self.groups, k, b, draws=draws, rng=np.random.default_rng([seed, probe]))
            for probe, (q, b) in enumerate(zip(each, betas, strict=True))
        ]
        return np.asarray(np.mean(laws, axis=0))

    def skyline_law(self, k: int) -> Floats:
        """The bound: the best of k by the labels themselves."""
        return self.probe_law(self.wins, k, 0.0)


@dataclass(frozen=True)
class WinRate:
    """How often a policy wins.

    Args:
        rate: mean win over prompts, ties half, with its bootstrap interval over prompts or, where these make clusters, over
            clusters; infinite ends for one.
        wilson: the same mean with Wilson's interval, where every prompt has one judged answer and is its own cluster; else
            None.
        wins, ties, losses: prompts with that verdict; expected numbers where the policy chooses at random.
        undecided: reason -> prompts without a verdict, likewise.
        length, reference_length: mean lengths of what the policy takes and of what it is judged against; None if unknown.
        length_controlled: see `length_controlled`; None where the data do not say.
        prompts: (P,) int64, sorted ids.
        per_prompt: (P,) float64, the expected win of each.
        clusters: (P,) int64, what each belongs to.
    """

    rate: Interval
    wilson: Interval | None
    wins: float
    ties: float
    losses: float
    undecided: dict[str, float]
    length: float | None
    reference_length: float | None
    length_controlled: Interval | None
    prompts: Integers
    per_prompt: Floats
    clusters: Integers

    @property
    def undecided_range(self) -> tuple[float, float]:
        """The rate if all comparisons without a verdict were losses, and if all were wins."""
        half = sum(self.undecided.values()) / len(self.prompts) / 2
        return self.rate.value - half, self.rate.value + half


def win_rate(judgements: Judgements, law: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> WinRate:
    """The win rate of a policy over judged candidates.

    Wilson's interval takes a tie as half a success. Of all wins in [0, 1] with one mean, those of 0 and 1 vary most, so
    ties and soft verdicts make it wider than need be, never too narrow.

    Args:
        judgements: N judged candidates.
        law: (N,) probability that the policy takes each; sums to 1 within each prompt.
        draws: resamples of the bootstrap.
        seed: of the resamples; one seed takes the same prompts at every call.

    Raises:
        ValueError: the law is no law over each prompt's candidates.
    """
    weights = np.asarray(law, dtype=np.float64)
    prompts, place = np.unique(judgements.groups, return_inverse=True)
    if weights.shape != judgements.wins.shape:
        raise ValueError(f"The law has shape {weights.shape}, the candidates {judgements.wins.shape}: give one each.")
    if not np.all(weights >= 0) or not np.allclose(np.bincount(place, weights), 1):
        raise ValueError("The law does not sum to 1 over each prompt's candidates: it is a probability of taking each.")
    per_prompt = np.bincount(place, weights * judgements.wins)
    counts = {word: float(weights[judgements.verdicts == word].sum()) for word in (*CATEGORIES, *UNDECIDED)}
    clusters = judgements.cluster_of_prompt
    single = len(weights) == len(prompts) == len(np.unique(clusters))
    length = reference_length = controlled = None
    if judgements.lengths is not None and judgements.reference_lengths is not None:
        length = float(weights @ judgements.lengths) / len(prompts)
        reference_length = float(weights @ judgements.reference_lengths) / len(prompts)
        difference = judgements.lengths - judgements.reference_lengths
        controlled = length_controlled(judgements.wins, difference, judgements.clusters, weights)
    return WinRate(
        rate=bootstrap_mean(per_prompt, clusters, draws=draws, rng=_rng(seed, len(prompts))),
        # The mean of numbers in [0, 1] may exceed 1 by its last digit.
        wilson=wilson(min(float(per_prompt.sum()), len(prompts)), len(prompts)) if single else None,
        wins=counts["win"],
        ties=counts["tie"],
        losses=counts["loss"],
        undecided={word: counts[word] for word in UNDECIDED if counts[word] > 0},
        length=length,
        reference_length=reference_length,
        length_controlled=controlled,
        prompts=prompts,
        per_prompt=np.asarray(per_prompt, dtype=np.float64),
        clusters=clusters,
    )


def difference(a: WinRate, b: WinRate, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """Win rate of a minus that of b over the same prompts, with a paired bootstrap interval over prompts or clusters.

    Raises:
        ValueError: they are over other prompts or clusters.
    """
    if not (np.array_equal(a.prompts, b.prompts) and np.array_equal(a.clusters, b.clusters)):
        raise ValueError("The two win rates are over other prompts: a paired difference needs the same ones.")
    return paired_difference(a.per_prompt, b.per_prompt, a.clusters, draws=draws, rng=_rng(seed, len(a.prompts)))


def curve(judgements: Judgements, scores: ArrayLike, ks: Sequence[int], beta: ArrayLike, *, seed: int = 0) -> Band:
    """Win rate against the number of candidates (the paper's Fig. 5); with the wins as scores and beta 0, the skyline.

    Args:
        judgements: N judged candidates.
        scores, beta: see `Judgements.probe_law`.
        ks: numbers of candidates.
        seed: of subsets and resamples; with one seed, the same numbers as `win_rate` of that law.
    """
    laws = (judgements.probe_law(scores, k, beta, seed=seed) for k in ks)
    return band([win_rate(judgements, law, seed=seed).rate for law in laws])


def band(intervals: Sequence[Interval]) -> Band:
    """A line of a figure from its points; no band where an end is infinite."""
    ends = {
        name: [x if np.isfinite(x) else None for x in (float(getattr(interval, name)) for interval in intervals)]
        for name in ("value", "low", "high")
    }
    return Band(**ends)


def _rng(seed: int, prompts: int) -> np.random.Generator:
    """The same resamples for every rate over as many prompts, so that rates are compared on the same ones."""
    return np.random.default_rng([seed, prompts])
