"""What a run is made of, and what follows from it: pools, layers, candidates at use. Nothing here does work."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.baselines import Baseline, Baselines, TrainingData
from qprobe.embedding import Embedder
from qprobe.evaluation import sweep
from qprobe.evaluation.sweep import EvaluationSettings, Procedure
from qprobe.models.likelihood import Likelihood
from qprobe.probe.training import TrainingSettings
from qprobe.run.joined import Joined, join, with_layer
from qprobe.run.pools import Pool, Reward, Split
from qprobe.sampling import Sampler

BEST = "best"  # the layer of every probe by its held-out prompts


@dataclass
class Setup:
    """Everything that a run is made of.

    Args:
        run: the run folder.
        title: of the tables.
        tests: the splits that are reported on.
        training_split: the split that probes are trained on; None cross-validates each of `tests`. Where it is itself one of
            `tests`, its results say how the probes fit (the paper's Fig. 4), not what they earn.
        reward: the reward stage, of every split that brings none of its own.
        sampler: draws the candidates.
        greedy: the same model at temperature 0; None leaves the greedy row "not run".
        embedder: makes the features.
        baselines: rivals and rankers, rows of the table beside the probes.
        likelihood: the base model, which reads the completions that splits bring along; None leaves their likelihoods unknown.
        layer: which of the embedder's layers the probes read; None takes the highest; "best" trains at each of them, and every
            probe takes the one where its loss on held-out prompts is lowest.
        training, settings: how probes are trained and measured.
        seed: of everything random.
        batch_rows: completions in a batch.
        samples: split -> completions a prompt, where that is not the sampler's own number.
        paper: published values, pool -> method -> value, only where the set-up is the paper's.
        apart: pool -> what is wrong with some of its prompts, as the end of "Without the 3 of 9 prompts that ..." -> their task
            ids: what is reported of all is then also reported without them.
        shard: (number, count): make only the batches of one shard, up to their features; parts of all shards meet in the run
            folder. What needs all of them is left to a run without shards.
        outputs: where probes, results, tables and figures go, so that several settings can read one run's features; None: `run`.
        authors: the paper's procedure, whose probes are rows beside ours; None leaves them out.
        use: what an application needs besides a probe (sampler, style of the prompts, ...); saved in the probes' cards.
        progress: whether to show progress bars.
        chosen: names of the stages that are run now.

    Raises:
        ValueError: a k larger than the pool, a layer that is not embedded, greedy decoding of recorded completions, a
            baseline with nothing to learn from.
    """

    run: Path
    title: str
    tests: Sequence[Split]
    reward: Reward
    sampler: Sampler
    greedy: Sampler | None
    embedder: Embedder
    training_split: Split | None = None
    baselines: Sequence[Baseline] = ()
    likelihood: Likelihood | None = None
    layer: int | str | None = None
    training: TrainingSettings = field(default_factory=TrainingSettings)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    seed: int = 0
    batch_rows: int = 64
    samples: dict[str, int] = field(default_factory=dict)
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    apart: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    shard: tuple[int, int] = (1, 1)
    outputs: Path | None = None
    authors: Procedure | None = None
    use: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    chosen: Sequence[str] = field(default=(), init=False)
    _rows: dict[tuple[str, int], Joined] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [split.name for split in self.splits]
        if not self.tests or len(set(names)) < len(names):
            raise ValueError(
                f"The splits are {', '.join(names) or 'none'}: give at least one, each with a name of its own."
            )
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise ValueError(f"shard is {self.shard[0]}/{self.shard[1]}: say 1/4 to 4/4 for four shards.")
        for name, count in self.samples.items():
            if name not in names or count < 1:
                raise ValueError(f"samples of {name} is {count}: name one of {', '.join(names)}, and 1 or more.")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}: a batch has at least one completion.")
        for pool in self.test_pools:
            for settings in (self.settings, *([self.authors.settings] if self.authors else [])):
                pool.check_size(settings.k)
                if self.training_split is None:
                    sweep.fold_of(len(pool.task_ids), settings.folds, self.seed, pool.clusters)
            if pool.split.recorded is not None and self.greedy is not None:
                raise ValueError(
                    f"The completions of {pool.split.name} are there already: greedy decoding cannot join them."
                )
        self.every_baseline()  # raises where one has nothing to learn from
        trained = self.training_pools[0]
        self.settings = self.settings.counted(len(trained.task_ids), trained.clusters, self.training_split is None)
        for layer in (self.layer, self.authors and self.authors.layer):
            if layer not in (None, BEST, *self.embedder.layers):
                raise ValueError(
                    f"The probes read layer {layer}, but the embedder makes {list(self.embedder.layers)}: add it there, or "
                    f"say {BEST} to try them all."
                )

    @property
    def splits(self) -> list[Split]:
        """The training split, if there is one, and the tested ones."""
        own = [] if self.training_split is None else [self.training_split]
        return [*own, *(split for split in self.tests if split is not self.training_split)]

    def reward_of(self, split: Split) -> Reward:
        return self.reward if split.reward is None else split.reward

    def pool(self, split: Split, kind: str, sampler: Sampler) -> Pool:
        if kind == "sample" and split.recorded is None and split.name in self.samples:
            sampler = copy.copy(sampler)
            sampler.settings = dataclasses.replace(sampler.settings, n=self.samples[split.name])
        return Pool(self.run, split, kind, sampler, self.seed, self.batch_rows, self.shard)

    @property
    def sample_pools(self) -> list[Pool]:
        return [self.pool(split, "sample", self.sampler) for split in self.splits]

    @property
    def test_pools(self) -> list[Pool]:
        return [self.pool(split, "sample", self.sampler) for split in self.tests]

    @property
    def training_pools(self) -> list[Pool]:
        return self.test_pools if self.training_split is None else self.sample_pools[:1]

    def reader(self, pool: Pool) -> Embedder | None:
        """The embedder, where the stages that are run let it read what they draw of a pool."""
        return self.embedder if "embed" in self.chosen and pool.kind == "sample" else None

    def greedy_of(self, pool: Pool) -> Pool | None:
        """Greedy decoding of a pool's prompts, where the run has it."""
        if self.greedy is None or pool.kind != "sample" or pool.split not in self.tests:
            return None
        return self.pool(pool.split, "greedy", self.greedy)

    @property
    def pools(self) -> list[Pool]:
        """All pools of the run's own model, with those of greedy decoding."""
        greedy = [self.pool(split, "greedy", self.greedy) for split in self.tests if self.greedy]
        return [*self.sample_pools, *greedy]

    def trained_on(self, pool: Pool) -> Pool:
        """The pool whose completions the probes that are tested on a pool were trained on."""
        return pool if self.training_split is None else self.training_pools[0]

    def reads(self, pool: Pool) -> Likelihood | None:
        """The model that reads a pool's completions, where they are tested and were not drawn from it here."""
        recorded = pool.split.recorded is not None and pool.split in self.tests
        return self.likelihood if recorded else None

    def every_baseline(self) -> Baselines:
        """The baselines, with what they may learn from."""
        split = self.training_split
        training = None if split is None else TrainingData(self.training_pools[0], self.reward_of(split))
        return Baselines(self.baselines, self.run, training)

    @property
    def k(self) -> int:
        """Candidates at use: as asked for, else as many as every prompt has."""
        return min(map(self.k_of, self.test_pools))

    def k_of(self, pool: Pool) -> int:
        """Candidates at use of a tested pool."""
        return self.settings.k or pool.smallest

    @property
    def outputs_at(self) -> Path:
        return self.outputs or self.run

    @property
    def probe_layer(self) -> int:
        """The layer that probes read; the highest that they may, where they choose."""
        return self.layer if isinstance(self.layer, int) else max(self.embedder.layers)

    @property
    def probe_layers(self) -> list[int]:
        return self.layers_of(self.layer)

    def layers_of(self, layer: int | str | None) -> list[int]:
        """The layers that a procedure's probes may read, rising."""
        if layer == BEST:
            return sorted(self.embedder.layers)
        return [layer if isinstance(layer, int) else self.probe_layer]

    def rows(self, pool: Pool, layer: int) -> Joined:
        """A pool's completions and rewards with the features of a layer; those of the highest one asked for are kept."""
        kept = (pool.name, self.probe_layer)
        if kept not in self._rows:
            reward = self.reward_of(pool.split)
            self._rows[kept] = join(pool, reward, self.embedder, self.probe_layer, self.reads(pool))
        return (
            self._rows[kept] if layer == self.probe_layer else with_layer(self._rows[kept], pool, self.embedder, layer)
        )
