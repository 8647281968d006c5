"""The probes of one procedure in a run: trained once, kept in its folder, read again where nothing has changed."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qprobe.embedding import LIKELIHOOD, GivesLikelihoods, columns_identity, tables_of
from qprobe.embedding.given import GivenEmbedder
from qprobe.evaluation import auto, layer_choice, sweep
from qprobe.evaluation.auto import Blocks
from qprobe.evaluation.layer_choice import At, Scores
from qprobe.evaluation.sweep import EvaluationSettings, Maker, SweepProbe
from qprobe.files import fingerprint
from qprobe.pipeline.setup import BEST, Setup
from qprobe.probe.card import CARD_FILE, EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.probe.losses import AUTO
from qprobe.probe.training import TrainedProbe, TrainingSettings
from qprobe.run.pools import Pool


@dataclass(frozen=True)
class Probes:
    """One procedure's probes.

    Args:
        setup: the run.
        training, settings: how probes are trained and measured.
        layer: as `Setup.layer`.
        folder: where they are kept, a folder a pool that they are trained on.
        final: whether a probe a loss is also trained on every prompt, for an application.
    """

    setup: Setup
    training: TrainingSettings
    settings: EvaluationSettings
    layer: int | str | None
    folder: Path
    final: bool

    def train(self, pool: Pool) -> None:
        """Train what is not there yet."""
        self.sweep(pool)
        if self.final:
            self._save_final(pool)

    def sweep(self, pool: Pool) -> list[SweepProbe]:
        """The sweep of probes trained on a pool: from the run folder where it was made from the same inputs."""
        folder, inputs = self.folder / pool.split.name, self.inputs(pool)
        if (found := sweep.load_sweep(folder, inputs)) is not None:
            return found
        setup = self.setup
        made = layer_choice.sweep_over(
            self._at(pool),
            self.layers,
            self.maker,
            self.training,
            self.settings,
            k=setup.k,
            seed=setup.seed,
            progress=setup.progress,
        )
        sweep.save_sweep(made, folder, inputs)
        return made

    def scores(self, pool: Pool, compare: bool = False) -> Scores:
        """What the probes say of a pool; those of smaller shares and of each layer only where rows are compared."""
        probes = self.sweep(self.setup.trained_on(pool))
        if not compare:
            probes = [probe for probe in probes if probe.share == 1 and not probe.plain]
        return layer_choice.score_over(
            probes, self._at(pool), self.layers, self.settings, self.setup.seed, compare=compare
        )

    @property
    def layers(self) -> list[int]:
        return self.setup.layers_of(self.layer)

    def final_folder(self, pool: Pool) -> Path:
        """Where the probes lie that are trained on all of a pool, each by the name of its loss."""
        return self.folder / pool.split.name

    def source(self, layer: int) -> EmbeddingSource:
        """What a probe that reads a layer reads."""
        embedder = self.setup.embedder
        return EmbeddingSource.of(embedder.identity(), layer, embedder.tokenizer_fingerprint())

    @property
    def maker(self) -> Maker:
        return sweep.cross_validate if self.setup.training_split is None else sweep.train_on_all

    def inputs(self, pool: Pool) -> dict[str, Any]:
        """What decides a sweep. Of the evaluation's settings those that only measure are left out."""
        settings, folded = dataclasses.asdict(self.settings), self.setup.training_split is None
        chosen = {name: settings[name] for name in ("losses", "seeds", "folds", "train_share", "curve_shares")}
        inputs = {
            "features": self.features_identity(pool),
            "rewards": pool.rewards(self.setup.reward_of(pool.split)).state,
            "training": dataclasses.asdict(self.training),
            "settings": chosen | ({} if folded else {"train_share": self.settings.drawn_share}),
            "protocol": "cross-validation" if folded else "training set",
            "drawn_by": sweep.DRAWN_BY,
            "k": self.setup.k,
            "seed": self.setup.seed,
        }
        plain: dict[str, Any] = json.loads(
            json.dumps(inputs | clusters_of(pool))
        )  # as a card says them: tuples are lists
        return plain

    def features_identity(self, pool: Pool) -> Any:
        of_layer = {layer: pool.features(self.setup.embedder, layer).identity for layer in self.layers}
        return of_layer if self.layer == BEST else of_layer[self.layers[0]]

    def _save_final(self, pool: Pool) -> None:
        """One probe a loss, trained on every prompt of the pool: what an application loads."""
        setup, folder, inputs = self.setup, self.final_folder(pool), self.inputs(pool)
        losses = self.settings.losses
        if all(_is_saved(folder / loss, inputs, setup.use) for loss in losses):
            return
        for loss, (layer, trained) in zip(losses, self.final_probes(pool), strict=True):
            probe = QProbe.of(
                trained, loss, self.source(layer), inputs, k=setup.k, seed=setup.seed, settings=self.training
            )
            probe.use = setup.use
            probe.save_pretrained(folder / loss)

    def final_probes(self, pool: Pool) -> list[tuple[int, TrainedProbe]]:
        """(layer, probe) of every loss, trained on every prompt of a pool."""
        return layer_choice.final_probes(
            self._at(pool), self.layers, self.settings.losses, self.training, k=self.setup.k, seed=self.setup.seed
        )

    def _at(self, pool: Pool) -> At:
        return functools.partial(self.setup.rows, pool)


class AutoProbes(Probes):
    """The probes of `auto`, which read all that was embedded."""

    @property
    def blocks(self) -> Blocks:
        embedder = self.setup.embedder
        layers = tuple(sorted(tables_of(embedder), key=lambda layer: (layer == LIKELIHOOD, layer)))
        if isinstance(embedder, GivenEmbedder):
            return Blocks(layers, named={n: (embedder.names[n], embedder.widths[n]) for n in layers})
        return Blocks(layers, embedder.column_names()) if isinstance(embedder, GivesLikelihoods) else Blocks(layers)

    @property
    def layers(self) -> list[int]:
        return [self.setup.probe_layer]  # there is one set of features

    def final_folder(self, pool: Pool) -> Path:
        return self.folder.parent / pool.split.name  # beside those of the other losses

    def source(self, layer: int) -> EmbeddingSource:
        layers = self.blocks.layers
        columns = columns_identity(self.setup.embedder, layers)
        return dataclasses.replace(super().source(layer), blocks=layers, likelihood=columns)

    @property
    def maker(self) -> Maker:
        return functools.partial(self.blocks.sweep, folded=self.setup.training_split is None)

    def inputs(self, pool: Pool) -> dict[str, Any]:
        return super().inputs(pool) | {"training": {}, "made_by": auto.MADE_BY}

    def features_identity(self, pool: Pool) -> Any:
        return {str(layer): pool.features(self.setup.embedder, layer).identity for layer in self.blocks.layers}

    def final_probes(self, pool: Pool) -> list[tuple[int, TrainedProbe]]:
        joined = self._at(pool)(self.layers[0])
        every = np.ones(len(joined.task_ids), dtype=bool)
        return [(self.layers[0], self.blocks.solved(joined, every, self.setup.seed))]

    def _at(self, pool: Pool) -> At:
        return lambda _: self.blocks.joined(functools.partial(self.setup.rows, pool))


@dataclass(frozen=True)
class Procedures:
    """The probes of a run.

    Args:
        ours: trained ones of the table; None where only `auto` is asked for.
        auto: those of `auto`; None where it is not among the losses.
        paper: those of the paper's procedure; None where they are not asked for.
    """

    ours: Probes | None
    auto: AutoProbes | None
    paper: Probes | None

    @property
    def own(self) -> list[Probes]:
        """Those of the table, in its order."""
        return [probes for probes in (self.ours, self.auto) if probes]

    @property
    def all(self) -> list[Probes]:
        return [*self.own, *([self.paper] if self.paper else [])]

    def of(self, loss: str) -> Probes:
        """Those whose row a loss is."""
        return next(probes for probes in self.own if loss in probes.settings.losses)

    def scores(self, pool: Pool) -> Scores:
        """What all of the table say of a pool."""
        first, *others = [probes.scores(pool, compare=True) for probes in self.own]
        for other in others:
            for share, scored in other.by_share.items():
                first.by_share[share].update(scored)
            if first.plain is not None:
                first.plain.update(other.by_share[1.0])
        return first


def procedures(setup: Setup) -> Procedures:
    """The probes of the table, and those of the paper's procedure where they are asked for."""
    losses, folder = trained_losses(setup.settings), setup.outputs_at / "probes"
    ours = auto_probes = paper = None
    if losses:
        settings = dataclasses.replace(setup.settings, losses=losses)
        ours = Probes(setup, setup.training, settings, setup.layer, folder, final=True)
    if AUTO in setup.settings.losses:
        settings = auto.settings_of(setup.settings)
        auto_probes = AutoProbes(setup, setup.training, settings, None, folder / AUTO, final=True)
    if setup.authors is not None and losses:
        authors = setup.authors
        settings = dataclasses.replace(authors.settings, losses=losses)
        layer = setup.probe_layer if authors.layer is None else authors.layer
        paper = Probes(setup, authors.training, settings, layer, setup.outputs_at / "authors" / "probes", final=False)
    return Procedures(ours, auto_probes, paper)


def trained_losses(settings: EvaluationSettings) -> tuple[str, ...]:
    """The losses that probes are trained by, step by step."""
    return tuple(loss for loss in settings.losses if loss != AUTO)


def clusters_of(pool: Pool) -> dict[str, str]:
    """What the clusters of a pool add to an identity: nothing where there are none."""
    return {} if pool.clusters is None else {"clusters": fingerprint(pool.clusters.tolist())}


def _is_saved(folder: Path, inputs: dict[str, Any], use: dict[str, Any]) -> bool:
    """Whether a folder holds a probe that was trained on these inputs and is meant for this use."""
    if not (folder / CARD_FILE).exists():
        return False
    probe = QProbe.from_pretrained(folder)
    return probe.data_ == inputs and probe.use == use
