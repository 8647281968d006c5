"""What judged answers say of a policy: win rates with intervals, beside lengths; one policy against another; two judges.

A pool of judged candidates per prompt answers every question about selection. A *law* gives each candidate the
probability that a policy takes it, `choice_law` of the core: uniform for the base policy, over random subsets of k for a
Q-probe, by the labels themselves for the skyline. A win rate is the mean over prompts of the win that the law expects, so
its interval is over prompts. Selection never sees labels, nor whether there is a verdict: an undecided comparison (unparsed,
refused, too long) counts half, as a tie does, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qprobe.probe.metrics import (
    BLOCK,
    Floats,
    Integers,
    Interval,
    bootstrap_mean,
    choice_law,
    paired_difference,
    tails,
    wilson,
)
from qprobe.report import Band

CATEGORIES = ("win", "tie", "loss")
# Why there is no verdict, in the words of the judges.
UNDECIDED = ("unparsed", "refused", "too_long")

# Precision of the normal prior on the slope of length, standard deviation 5: without it wins decided by length alone have
# no finite slope. 5 logits from one end of tanh to its middle leave any slope that is seen in practice alone.
SLOPE_PRECISION = 1 / 5**2


@dataclass(frozen=True)
class Judgements:
    """One judge's verdicts on candidates, each against an answer to the same prompt. `of` makes them.

    That other answer is the data set's chosen one, or another policy's: the win rate is then of one policy over the other.

    Args:
        wins: (N,) float64 in [0, 1]: 1 a win, 0 a loss, 0.5 a tie or no verdict; anything between from soft verdicts.
        groups: (N,) int64, prompt ids.
        verdicts: (N,) "win", "tie" or "loss", or why there is none (UNDECIDED).
        lengths: (N,) float64, of the candidates, in tokens or characters; None where unknown.
        reference_lengths: (N,) float64, of the answers that they were judged against; None where unknown.
        itself: (N,) bool, whether a candidate is the very answer that it is judged against: a tie that no judge made.
        clusters: (N,) int64, what a candidate's prompt belongs to: resamples take a cluster whole. Without any, its prompt.
    """

    wins: Floats
    groups: Integers
    verdicts: NDArray[np.str_]
    lengths: Floats | None = None
    reference_lengths: Floats | None = None
    itself: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    clusters: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def of(
        cls,
        wins: ArrayLike,
        groups: ArrayLike,
        verdicts: Sequence[str] | None = None,
        lengths: ArrayLike | None = None,
        reference_lengths: ArrayLike | None = None,
        itself: ArrayLike | None = None,
        clusters: ArrayLike | None = None,
    ) -> Judgements:
        """Check and convert what a judge gave.

        Args:
            wins: (N,) in [0, 1]; where there is no verdict any value, NaN too, is read as 0.5.
            groups: (N,) integer prompt ids.
            verdicts: (N,) words; None reads them from the wins: above, at or below 0.5.
            lengths, reference_lengths: (N,) >= 0, both or none.
            itself: (N,) bool, whether a candidate is the answer that it is judged against; None: none is.
            clusters: (N,) integer ids of what its prompt belongs to; None: every prompt by itself.

        Raises:
            ValueError: lengths of the columns that differ, a win outside [0, 1], an unknown word, a win of 0 or a loss of 1.
        """
        values, ids = np.array(wins, dtype=np.float64), np.asarray(groups)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"wins has shape {values.shape}: give one number for each of at least one candidate.")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"groups is {ids.dtype}: give one integer prompt id a candidate.")
        if verdicts is None:
            words = np.array(CATEGORIES)[1 - np.sign(np.nan_to_num(values, nan=0.5) - 0.5).astype(int)]
        else:
            words = np.array(verdicts, dtype=np.str_)
        columns = {"groups": ids, "verdicts": words}
        columns["itself"] = np.zeros(values.shape, dtype=bool) if itself is None else np.asarray(itself, dtype=bool)
        columns["clusters"] = ids if clusters is None else np.asarray(clusters)
        if (lengths is None) != (reference_lengths is None):
            raise ValueError("Give lengths and reference_lengths both, or neither: one is measured against the other.")
        if lengths is not None:
            columns["lengths"] = np.asarray(lengths, dtype=np.float64)
            columns["reference_lengths"] = np.asarray(reference_lengths, dtype=np.float64)
        for name, column in columns.items():
            if column.shape != values.shape:
                raise ValueError(
                    f"{name} has shape {column.shape}, wins has {values.shape}: give one for each candidate."
                )
        values[np.isin(words, UNDECIDED)] = 0.5
        for wrong, what in (
            (~np.isin(words, [*CATEGORIES, *UNDECIDED]), f"is none of {', '.join([*CATEGORIES, *UNDECIDED])}"),
            (~((values >= 0) & (values <= 1)), "has a win outside [0, 1]"),
            (
                ((words == "win") & (values == 0)) | ((words == "loss") & (values == 1)),
                "says the opposite of its win",
            ),
        ):
            if wrong.any():
                row = int(wrong.argmax())
                raise ValueError(f"Row {row} (verdict {words[row]!s}, win {values[row]:g}) {what}: judge it again.")
        for name in ("lengths", "reference_lengths"):
            if name in columns and not (np.isfinite(columns[name]).all() and (columns[name] >= 0).all()):
                raise ValueError(f"{name} holds a value that is no length: give finite numbers of 0 or more.")
        return cls(
            values,
            ids.astype(np.int64),
            words,
            columns.get("lengths"),
            columns.get("reference_lengths"),
            columns["itself"],
            columns["clusters"].astype(np.int64),
        )

    @property
    def compared(self) -> NDArray[np.bool_]:
        """(N,) whether the judge gave a verdict on two different answers."""
        return np.isin(self.verdicts, CATEGORIES) & ~self.itself

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
        length_controlled: see `length_controlled`; None where it cannot be told.
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


def win_rate(
    judgements: Judgements, law: ArrayLike, *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> WinRate:
    """The win rate of a policy over judged candidates.

    Wilson's interval takes a tie as half a success. Of all wins in [0, 1] with one mean, those of 0 and 1 vary most, so
    ties and soft verdicts make it wider than need be, never too narrow.

    Args:
        judgements: N judged candidates.
        law: (N,) probability that the policy takes each; sums to 1 within each prompt.
        draws: resamples of the bootstrap.
        level: coverage, in (0, 1).
        seed: of the resamples; one seed takes the same prompts at every call.

    Raises:
        ValueError: the law is no law over each prompt's candidates.
    """
    weights = np.asarray(law, dtype=np.float64)
    prompts, place = np.unique(judgements.groups, return_inverse=True)
    if weights.shape != judgements.wins.shape:
        raise ValueError(
            f"The law has shape {weights.shape} for {len(judgements.wins)} candidates: give one number each."
        )
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
        controlled = length_controlled(judgements.wins, difference, judgements.clusters, weights, level=level)
    return WinRate(
        rate=bootstrap_mean(per_prompt, clusters, draws=draws, level=level, rng=_rng(seed, len(prompts))),
        # The mean of numbers in [0, 1] may exceed 1 by its last digit.
        wilson=wilson(min(float(per_prompt.sum()), len(prompts)), len(prompts), level) if single else None,
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


def difference(a: WinRate, b: WinRate, *, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Win rate of a minus that of b over the same prompts, with a paired bootstrap interval over prompts or clusters.

    Raises:
        ValueError: they are over other prompts or clusters.
    """
    if not (np.array_equal(a.prompts, b.prompts) and np.array_equal(a.clusters, b.clusters)):
        raise ValueError(
            "The two win rates are over other prompts: a paired difference needs the same ones, ids and all."
        )
    rng = _rng(seed, len(a.prompts))
    return paired_difference(a.per_prompt, b.per_prompt, a.clusters, draws=draws, level=level, rng=rng)


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


def band(intervals: Sequence[Interval | None]) -> Band:
    """A line of a figure from its points; None where nothing was measured, no band where an end is infinite."""

    def ends(name: str) -> list[float | None]:
        values = [None if i is None else float(getattr(i, name)) for i in intervals]
        return [None if value is None or not np.isfinite(value) else value for value in values]

    return Band(value=ends("value"), low=ends("low"), high=ends("high"))


def length_controlled(
    wins: ArrayLike,
    differences: ArrayLike,
    groups: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> Interval | None:
    """The win rate that a logistic regression predicts for answers as long as those they are judged against.

    P(win) = sigmoid(a + b tanh(d / s)), d the difference in length, s its standard deviation; the rate is sigmoid(a). Wins
    may be soft. b has a weak normal prior (SLOPE_PRECISION), a has none, so that without an effect of length the rate is the
    plain one. Its interval is the sandwich estimate over groups. It is a model's answer: where nearly all
    candidates are longer (or shorter) it is an extrapolation, and a judge that takes the longer answer by however little is
    no such curve: the rate then stays off one half, towards the side that has more answers.

    Args:
        wins: (N,) float in [0, 1].
        differences: (N,) float, length of the candidate minus that of its reference.
        groups: (N,) int, ids of what is independent: prompts, or clusters of them.
        weights: (N,) float >= 0, such as a policy's law; None weighs all alike.
        level: coverage, in (0, 1).

    Returns:
        The rate; None where it cannot be told: no win or no loss at all, one difference other than 0 throughout, fewer than
        3 groups.

    Source: "length_controlled_minimal" of AlpacaEval 2 (arXiv 2404.04475), with the prior in place of none. Its published
        leaderboard also has a difficulty of each instruction, fitted over many models, which two policies do not give.
    """
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    taken = w > 0
    y, d, w = y[taken], d[taken], w[taken]
    clusters = np.unique(np.asarray(groups)[taken], return_inverse=True)[1]
    spread = float(np.sqrt(np.cov(d, aweights=w, ddof=0))) if len(d) > 1 else 0.0
    if clusters.max() < 2 or y.max() == 0 or y.min() == 1 or (spread == 0 and d.any()):
        return None
    x = np.stack([np.ones(len(y)), np.tanh(d / (spread or 1.0))], axis=1)
    prior = np.diag([0.0, SLOPE_PRECISION])

    def loss(at: Floats) -> float:
        logits = x @ at
        return float(w @ (np.logaddexp(0, logits) - y * logits) + at @ prior @ at / 2)

    found = np.zeros(2)
    for _ in range(100):
        p = _sigmoid(x @ found)
        curvature = (x.T * (w * p * (1 - p))) @ x + prior
        step = np.linalg.solve(curvature, x.T @ (w * (y - p)) - prior @ found)
        # Newton's step may overshoot far from the optimum; halved often enough, it always goes down.
        while loss(found + step) > loss(found) and np.abs(step).max() > 1e-10:
            step = step / 2
        found = found + step
        if np.abs(step).max() <= 1e-10:
            break
    p = _sigmoid(x @ found)
    scores = np.zeros((clusters.max() + 1, 2))
    np.add.at(scores, clusters, x * (w * (y - p))[:, None])
    inverse = np.linalg.inv((x.T * (w * p * (1 - p))) @ x + prior)
    error = float(np.sqrt((inverse @ scores.T @ scores @ inverse)[0, 0]))
    z = NormalDist().inv_cdf((1 + level) / 2)
    value, low, high = _sigmoid(found[0] + np.array([0.0, -z, z]) * error)
    return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same comparisons.

    Args:
        kappa: Cohen's kappa with its bootstrap interval over prompts or clusters of them; None where both gave one and the same
            verdict throughout, which leaves nothing to agree on.
        agreed: share of comparisons with the same verdict.
        table: (3, 3) int64, comparisons by verdict of the first (rows) and second judge (columns): win, tie, loss.
        left_out: comparisons that either gave no verdict on; in none of the above.
        itself: comparisons of an answer with itself, ties of both judges by construction; in none of the above either.
    """

    kappa: Interval | None
    agreed: float
    table: Integers
    left_out: int
    itself: int = 0


def agreement(
    first: Judgements, second: Judgements, *, draws: int = 2_000, level: float = 0.95, seed: int = 0
) -> Agreement:
    """Cohen's kappa of two judges over win, tie and loss; candidates of one prompt or cluster are resampled together.

    Args:
        first, second: verdicts of the two judges on the same N comparisons, in the same order.
        draws: resamples.
        level: coverage, in (0, 1).
        seed: of the resamples.

    Raises:
        ValueError: the comparisons differ, or there is none of two answers with a verdict of both (`Judgements.compared`).

    Source: Cohen, Educational and Psychological Measurement 20 (1960).
    """
    if not np.array_equal(first.groups, second.groups):
        raise ValueError("The two judges saw other comparisons: give the same candidates in the same order.")
    itself = first.itself | second.itself
    decided = first.compared & second.compared
    if not decided.any():
        raise ValueError("There is no comparison on which both judges gave a verdict: nothing to agree on.")
    prompts, place = np.unique(first.clusters[decided], return_inverse=True)
    numbers = {word: number for number, word in enumerate(CATEGORIES)}
    cells = [
        3 * numbers[a] + numbers[b] for a, b in zip(first.verdicts[decided], second.verdicts[decided], strict=True)
    ]
    tables = np.zeros((len(prompts), 9))
    np.add.at(tables, (place, np.array(cells)), 1)
    total = tables.sum(axis=0)
    value = float(_kappa(total))
    kappa = None
    if np.isfinite(value):
        resampled = np.concatenate(
            [_kappa(w @ tables) for w in _resamples(len(prompts), draws, _rng(seed, len(prompts)))]
        )
        # A resample of one verdict throughout has no kappa.
        kappa = Interval(value, -np.inf, np.inf)
        if len(prompts) > 1:
            low, high = np.nanquantile(resampled, tails(len(prompts), level))
            kappa = Interval(value, float(low), float(high))
    table = total.reshape(3, 3).astype(np.int64)
    agreed, left_out = float(np.trace(table) / total.sum()), int((~decided & ~itself).sum())
    return Agreement(kappa, agreed, table, left_out, int(itself.sum()))


def _kappa(tables: Floats) -> Floats:
    """(...) kappa of (..., 9) tables; NaN where chance alone agrees always."""
    shares = tables.reshape(*tables.shape[:-1], 3, 3) / tables.sum(axis=-1)[..., None, None]
    chance = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    agreed = np.trace(shares, axis1=-2, axis2=-1)
    return np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1.0), np.nan)


def _resamples(count: int, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """(b, count) times that each prompt is in a resample, block by block."""
    step = max(1, BLOCK // count)
    for start in range(0, draws, step):
        yield rng.multinomial(count, np.full(count, 1 / count), size=min(step, draws - start)).astype(np.float64)


def _rng(seed: int, prompts: int) -> np.random.Generator:
    """The same resamples for every rate over as many prompts, so that rates are compared on the same ones."""
    return np.random.default_rng([seed, prompts])


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(logits / 2)))
