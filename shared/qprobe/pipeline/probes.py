"""The probes of one procedure in a run: trained once, kept in its folder, read again where nothing has changed."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.evaluation import layer_choice, sweep
from qprobe.evaluation.layer_choice import At, Scores
from qprobe.evaluation.sweep import EvaluationSettings, Maker, SweepProbe
from qprobe.files import fingerprint
from qprobe.pipeline.setup import BEST, Setup
from qprobe.probe.card import CARD_FILE, EmbeddingSource
from qprobe.probe.estimator import QProbe
from qprobe.probe.training import TrainingSettings
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
        setup, folder, inputs = self.setup, self.folder / pool.split.name, self.inputs(pool)
        losses = self.settings.losses
        if all(_is_saved(folder / loss, inputs, setup.use) for loss in losses):
            return
        made = layer_choice.final_probes(self._at(pool), self.layers, losses, self.training, k=setup.k, seed=setup.seed)
        for loss, (layer, trained) in zip(losses, made, strict=True):
            source = EmbeddingSource.of(setup.embedder.identity(), layer, setup.embedder.tokenizer_fingerprint())
            probe = QProbe.of(trained, loss, source, inputs, k=setup.k, seed=setup.seed, settings=self.training)
            probe.use = setup.use
            probe.save_pretrained(folder / loss)

    def _at(self, pool: Pool) -> At:
        return functools.partial(self.setup.rows, pool)


def procedures(setup: Setup) -> list[Probes]:
    """The probes of the table, and those of the paper's procedure where they are asked for."""
    ours = Probes(setup, setup.training, setup.settings, setup.layer, setup.outputs_at / "probes", final=True)
    if setup.authors is None:
        return [ours]
    paper, folder = setup.authors, setup.outputs_at / "authors" / "probes"
    layer = setup.probe_layer if paper.layer is None else paper.layer
    return [ours, Probes(setup, paper.training, paper.settings, layer, folder, final=False)]


def clusters_of(pool: Pool) -> dict[str, str]:
    """What the clusters of a pool add to an identity: nothing where there are none."""
    return {} if pool.clusters is None else {"clusters": fingerprint(pool.clusters.tolist())}


def _is_saved(folder: Path, inputs: dict[str, Any], use: dict[str, Any]) -> bool:
    """Whether a folder holds a probe that was trained on these inputs and is meant for this use."""
    if not (folder / CARD_FILE).exists():
        return False
    probe = QProbe.from_pretrained(folder)
    return probe.data_ == inputs and probe.use == use
