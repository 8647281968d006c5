"""The probes of `auto`: on all layers that were embedded and the likelihood columns, every choice by left-out scores.

A sweep of them is one seed: nothing in it is random but the folds. Every fold's probe is chosen and solved on the other folds
alone (`qprobe.probe.blocks.auto`). What was solved on blocks and an untrained score is one linear probe on all columns beside
each other, and is kept, scored and used as such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from qprobe.embedding import LIKELIHOOD
from qprobe.evaluation.layer_choice import At
from qprobe.evaluation.sweep import EvaluationSettings, SweepProbe, drawn_prompts, fold_of, probe_seed
from qprobe.models.likelihood_columns import COLUMNS, UNTRAINED
from qprobe.probe import blocks
from qprobe.probe.calibration import Calibration, calibrate
from qprobe.probe.losses import AUTO
from qprobe.probe.network import ProbeNetwork
from qprobe.probe.solved import MOST_COORDINATES
from qprobe.probe.solvers import NothingToLearn, Rows, Solution
from qprobe.probe.solvers.space import MOST_IN_FLOAT64
from qprobe.probe.training import TrainedProbe, TrainingSettings
from qprobe.run.joined import Joined

# What decides these probes besides their inputs: those that other code made are made anew.
MADE_BY = 2
# Values of a table (64 MB of float32) up to which several probes are solved at once: each holds copies of its rows.
MOST_BESIDE = 2**24


@dataclass(frozen=True)
class Blocks:
    """Which columns lie beside each other in the features of the joined rows.

    Args:
        layers: in order; the likelihood columns (`LIKELIHOOD`) last, where there are any.
        columns: the names of these.
        named: layer -> what its block is called and how many columns it has; those that are not in it are of one model, and of
            one width.
    """

    layers: tuple[int, ...]
    columns: tuple[str, ...] = COLUMNS
    named: Mapping[int, tuple[str, int]] = field(default_factory=dict)

    def joined(self, at: At) -> Joined:
        """The rows of a pool with all blocks beside each other, (N, D) float32.

        Args:
            at: the rows with the features of a layer.
        """
        parts = [at(layer) for layer in self.layers]
        features = [np.asarray(part.features, dtype=np.float32) for part in parts]
        return dataclasses.replace(parts[0], features=np.concatenate(features, axis=1))

    def slices(self, width: int) -> dict[str, slice]:
        """Name of every block -> its columns among `width`."""
        named = dict(self.named) | {LIKELIHOOD: ("likelihood", len(self.columns))}
        known = sum(named[layer][1] for layer in self.layers if layer in named)
        each = (width - known) // max(1, sum(layer not in named for layer in self.layers))
        found, start = {}, 0
        for layer in self.layers:
            name, own = named.get(layer, (f"layer {layer}", each))
            found[name], start = slice(start, start + own), start + own
        return found

    def rows(self, joined: Joined) -> Rows:
        """What is solved on: the blocks, and the untrained scores that the likelihood columns hold.

        Those columns lose the mean of their prompt, which moves no choice within a prompt and lets them be scaled by what differs
        there.
        """
        features = joined.features
        assert features is not None  # `joined` puts them there
        found = {name: features[:, own] for name, own in self.slices(features.shape[1]).items()}
        anchors = {}
        if "likelihood" in found:
            columns = found["likelihood"].astype(np.float64)
            known = {name: sign for name, sign in UNTRAINED.items() if name in self.columns}
            anchors = {name: sign * columns[:, self.columns.index(name)] for name, sign in known.items()}
            counts = np.bincount(joined.groups)
            means = np.stack([np.bincount(joined.groups, column) / counts for column in columns.T], axis=1)
            found["likelihood"] = columns - means[joined.groups]
        clusters = joined.cluster_of_prompt[joined.groups]
        return Rows(found, joined.rewards, joined.groups, clusters=clusters, anchors=anchors)

    def network(self, solution: Solution, width: int) -> ProbeNetwork:
        """The same scores from all columns beside each other, but for a constant of every prompt."""
        weights = np.zeros(width)
        slices = self.slices(width)
        for name, own in slices.items():
            weights[own] = solution.coefficients[name]
        if solution.anchor:
            column = slices["likelihood"].start + self.columns.index(solution.anchor)
            weights[column] += UNTRAINED[solution.anchor] * solution.anchor_weight
        network = ProbeNetwork(width)
        with torch.no_grad():
            network.weights[0].copy_(torch.from_numpy(weights)[None])
            network.biases[0].fill_(solution.bias)
        return network

    def calibration(self, joined: Joined, prompts: np.ndarray, solution: Solution) -> Calibration | None:
        """How likely the choices of a solution are right, from the rows that it was solved on.

        The level reads the hidden layers alone where there are any: likelihoods lie elsewhere on other prompts (trained on MBPP,
        tested on HumanEval: Brier score .51, .18 by layer 18).
        """
        assert joined.features is not None  # as above
        own, width = prompts[joined.groups], joined.features.shape[1]
        slices = self.slices(width)
        read = {name: at for name, at in slices.items() if name != "likelihood"} or slices
        found = {name: joined.features[own][:, at] for name, at in read.items()}
        clusters = joined.cluster_of_prompt[joined.groups]
        made = calibrate(
            Rows(found, joined.rewards[own], joined.groups[own], clusters=clusters[own]), solution.left_out
        )
        if made is None:
            return None
        weights = np.zeros(width)
        weights[np.r_[tuple(read.values())]] = made.weights
        return dataclasses.replace(made, weights=weights)

    def solved(self, joined: Joined, prompts: np.ndarray, seed: int) -> TrainedProbe:
        """The probe of some prompts' rows; one that scores all alike where there is nothing to learn.

        Args:
            joined: with all blocks.
            prompts: (P,) bool, those that are learned from.
        """
        assert joined.features is not None  # as above
        width, kept = joined.features.shape[1], _that_fit(joined, prompts, seed)
        said = ""
        if kept.sum() < prompts.sum():
            said = (
                f" Learned from {kept.sum()} of {prompts.sum()} prompts, by lot: a solver holds no more of this width."
            )
        rows = self.rows(joined).take(kept[joined.groups])
        try:
            solution = blocks.auto(rows, seed=seed)
        except NothingToLearn as error:
            return TrainedProbe(ProbeNetwork(width), 0.0, 0, False, 0, 0.0, str(error))
        choice = solution.choice
        return TrainedProbe(
            network=self.network(solution, width),
            beta=solution.beta,
            steps=0,
            chosen=choice is not None,
            held_out_mixed=0 if choice is None else choice.prompts,
            learning_rate=0.0,
            note=solution.sentence() + said,
            calibration=self.calibration(joined, kept, solution),
        )

    def sweep(
        self,
        joined: Joined,
        training: TrainingSettings,
        settings: EvaluationSettings,
        *,
        k: int,
        seed: int,
        progress: bool,
        folded: bool,
    ) -> list[SweepProbe]:
        """As `sweep.Maker`; a probe a fold and share, or one a share where the prompts are a training set."""
        prompts, own = len(joined.task_ids), probe_seed(seed, 0)
        every = np.ones(prompts, dtype=bool)
        of = fold_of(prompts, settings.folds, own, joined.clusters) if folded else None
        learned: Sequence[tuple[int | None, np.ndarray]] = (
            [(None, every)] if of is None else [(fold, of != fold) for fold in range(settings.folds)]
        )
        planned = [(share, fold, kept) for share in (1.0, *settings.curve_shares) for fold, kept in learned]

        def probe(planned: tuple[float, int | None, np.ndarray]) -> SweepProbe:
            share, fold, kept = planned
            drawn = drawn_prompts(np.flatnonzero(kept), joined.cluster_of_prompt, share, own)
            found = self.solved(joined, np.isin(np.arange(prompts), drawn), own)
            return SweepProbe(AUTO, 0, fold, found, share, len(drawn))

        with _side_by_side(joined, len(planned)) as pool:
            return list(tqdm(pool.map(probe, planned), "auto", len(planned), unit="probe", disable=not progress))


@contextlib.contextmanager
def _side_by_side(joined: Joined, probes: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that solves a probe a thread, in as many as torch has; one after the other where the tables are large.

    Two threads make one decomposition of 1,000 rows 1.4 times faster, and two such decompositions 1.9 times. Large ones use
    several threads well, and need the memory for themselves.
    """
    assert joined.features is not None  # as above
    small = joined.features.size <= MOST_BESIDE and min(joined.features.shape) <= MOST_IN_FLOAT64
    workers = min(probes, torch.get_num_threads()) if small else 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="qprobe-solve")
    with threadpool_limits(1, user_api="blas") if workers > 1 else contextlib.nullcontext():
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _that_fit(joined: Joined, prompts: np.ndarray, seed: int) -> np.ndarray:
    """(P,) bool, as many of the prompts as a solver holds the rows of; whole clusters, by lot."""
    assert joined.features is not None  # the callers join with them
    sizes, width = np.bincount(joined.groups), joined.features.shape[1]
    most = max(MOST_COORDINATES // width, math.isqrt(MOST_COORDINATES))  # rows x the smaller of rows and columns
    if sizes[prompts].sum() <= most:
        return prompts
    clusters = joined.cluster_of_prompt
    lot = np.random.default_rng(seed).permutation(np.unique(clusters[prompts]))
    place = np.empty(int(clusters.max()) + 1, dtype=np.int64)
    place[lot] = np.arange(len(lot))
    of_cluster = np.zeros(len(lot), dtype=np.int64)
    np.add.at(of_cluster, place[clusters[prompts]], sizes[prompts])
    fitting = int(np.searchsorted(of_cluster.cumsum(), most, side="right"))
    return prompts & np.isin(clusters, lot[: max(1, fitting)])


def settings_of(settings: EvaluationSettings) -> EvaluationSettings:
    """How the probes of `auto` are measured: as the table's, but one seed, which leaves no training prompt out."""
    return dataclasses.replace(settings, losses=(AUTO,), seeds=1, train_share=1.0)
