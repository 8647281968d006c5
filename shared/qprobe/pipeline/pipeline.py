"""The one-screen main: prompts, a reward and back ends in; completions, rewards, features, probes, tables, figures out.

    sample -> reward -> embed -> baselines -> train -> evaluate -> report

Every stage reads its tables from the run folder and writes its own, does what is left to do and nothing twice, and can be
called alone. With one set of prompts the probes are cross-validated; with a training set they train there and are tested
on the others. The pipeline knows no reward, sampler or embedder by name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qprobe.baselines import Baseline, Baselines, Lessons
from qprobe.embedding import Embedder
from qprobe.evaluation import candidates, controls, layer_choice, measure, sweep
from qprobe.evaluation.measure import Authors, Example
from qprobe.evaluation.sweep import EvaluationSettings, Maker, Procedure, SweepProbe
from qprobe.files import fingerprint
from qprobe.models.likelihood import Likelihood
from qprobe.probe.estimator import EmbeddingSource, QProbe, is_saved
from qprobe.probe.training import TrainingSettings
from qprobe.report import tables
from qprobe.report.results import Results
from qprobe.run import stages
from qprobe.run.joined import Joined, join, with_layer
from qprobe.run.stages import Pool, Reward, Split
from qprobe.sampling import Sampler

STAGES = ("sample", "reward", "embed", "baselines", "train", "evaluate", "report")
BEST = "best"  # the layer of every probe by its held-out prompts
SHARDED = STAGES[:3]  # what a shard can make by itself


@dataclass
class Pipeline:
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
        paper: published values, pool -> method -> value, only where the set-up is the paper's.
        apart: pool -> what is wrong with some of its prompts, as the end of "Without the 3 of 9 prompts that ..." -> their task
            ids: what is reported of all is then also reported without them.
        shard: (number, count): make only the batches of one shard, up to their features; parts of all shards meet in the run
            folder. What needs all of them is left to a run without shards.
        outputs: where probes, results, tables and figures go, so that several settings can read one run's features; None: `run`.
        authors: the paper's procedure, whose probes are rows beside ours; None leaves them out.
        use: what an application needs besides a probe (sampler, style of the prompts, ...); saved in the probes' cards.
        progress: whether to show progress bars.

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
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    apart: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    shard: tuple[int, int] = (1, 1)
    outputs: Path | None = None
    authors: Procedure | None = None
    use: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    _joined: dict[str, Joined] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [split.name for split in self.splits]
        if not self.tests or len(set(names)) < len(names):
            raise ValueError(
                f"The splits are {', '.join(names) or 'none'}: give at least one, each with a name of its own."
            )
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise ValueError(f"shard is {self.shard[0]}/{self.shard[1]}: say 1/4 to 4/4 for four shards.")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}: a batch has at least one completion.")
        for pool in self.test_pools:
            pool.check_size(self.settings.k)
            if pool.split.recorded is not None and self.greedy is not None:
                raise ValueError(
                    f"The completions of {pool.split.name} are there already: greedy decoding cannot join them."
                )
            if self.training_split is None:
                sweep.fold_of(len(pool.task_ids), self.settings.folds, self.seed, pool.clusters)
        self._beside()
        learnt = self.training_pools[0]
        self.settings = self.settings.counted(len(learnt.task_ids), learnt.clusters, self.training_split is None)
        if self.layer not in (None, BEST, *self.embedder.layers):
            raise ValueError(
                f"The probes read layer {self.layer}, but the embedder makes {list(self.embedder.layers)}: add it there, or "
                f"say {BEST} to try them all."
            )
        self._by_authors()

    def execute(self, names: Sequence[str] = STAGES) -> None:
        """Run the named stages, in their order.

        Raises:
            ValueError: an unknown stage.
        """
        self.check(names)
        if self.shard[1] > 1:
            names = [name for name in names if name in SHARDED]
        work = {
            "sample": self.sample,
            "reward": self.reward_completions,
            "embed": self.embed,
            "baselines": self.run_baselines,
            "train": self.train,
            "evaluate": self.evaluate,
            "report": self.write_report,
        }
        for name, back_end in (("sample", self.sampler), ("embed", self.embedder)):
            if name in names:
                stages.check(back_end)
        for name in STAGES:
            if name in names:
                work[name]()

    def check(self, names: Sequence[str]) -> None:
        """Say what can be known to fail before hours of work: an unknown stage, what is not installed, tables of other inputs.

        Raises:
            ValueError: an unknown stage.
            StoreError: a table was made from other inputs.
        """
        if unknown := [name for name in names if name not in STAGES]:
            raise ValueError(f"There is no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}.")
        if "report" in names:
            importlib.import_module("qprobe.report.figures")
        if "reward" in names:
            for reward in {id(reward): reward for reward in map(self.reward_of, self.splits)}.values():
                reward.check()
        if "baselines" in names:
            self._beside().check()
        for pool in self.pools if "sample" in names else []:
            pool.prompts.check_inputs()
            pool.completions.check_inputs()
        for pool in self.pools if "reward" in names else []:
            pool.rewards(self.reward_of(pool.split)).check_inputs()
        for pool in self.sample_pools if "embed" in names else []:
            for layer in self.embedder.layers:
                pool.features(self.embedder, layer).check_inputs()
            if model := self.reads(pool):
                pool.likelihoods(model).check_inputs()

    def sample(self) -> None:
        for pool in self.pools:
            stages.sample(pool, self.progress)
        self.give_back("sample")

    def reward_completions(self) -> None:
        for pool in self.pools:
            stages.reward(pool, self.reward_of(pool.split), self.progress)

    def embed(self) -> None:
        for pool in self.sample_pools:
            stages.embed(pool, self.embedder, self.progress)
            stages.compare_law(pool, self.embedder)
        self.give_back("embed")
        for pool in self.test_pools:
            if model := self.reads(pool):
                stages.likelihood(pool, model, self.progress)

    def give_back(self, name: str) -> None:
        """Give back what a stage's back end holds, such as an engine's memory: it is the next stage's."""
        holders: dict[str, list[object]] = {"sample": [self.sampler, self.greedy], "embed": [self.embedder]}
        for back_end in holders.get(name, []):
            stages.give_back(back_end)

    def run_baselines(self) -> None:
        self._beside().run([(pool, self.reward_of(pool.split)) for pool in self.test_pools], self.progress)

    def train(self) -> None:
        theirs = self._by_authors()
        for pool in self.training_pools:
            self.sweep(pool)
            self.save_final_probes(pool)
            if theirs:
                theirs.sweep(pool)

    def evaluate(self) -> None:
        for pool in self.test_pools:
            path, reward = self._results_path(pool.split), self.reward_of(pool.split)
            if self._found_results(pool) is not None and candidates.path_of(path).exists():
                continue
            joined, scores = self._join(pool), self._scored(pool, compare=True)
            theirs = self._by_authors()
            results = measure.evaluate(
                self.title,
                self._protocol(pool.split),
                pool.split.name,
                joined,
                self._greedy_rewards(pool.split, joined.task_ids),
                scores.by_share,
                self.settings,
                k=self.k,
                seed=self.seed,
                plain=scores.plain,
                rivals=self._beside().rivals(pool, reward),
                controls=self._controls(pool) | self._beside().rankings(pool),
                by_layer=scores.by_layer,
                authors=Authors(theirs._scored(pool).by_share[1.0], theirs.settings) if theirs else None,
                apart=self.apart.get(pool.split.name),
                paper=self.paper.get(pool.split.name),
                made_from=self._results_identity(pool),
            )
            results = dataclasses.replace(results, notes=[*results.notes, *self._beside().notes(pool, self.k)])
            candidates.write(pool, reward, joined, scores.by_share[1.0], results, path)
            results.write(path)

    def write_report(self) -> None:
        from qprobe.report import figures

        for split in self.tests:
            results = self.results(split)
            tables.write_tables(results, self.outputs_at / "tables")
            figures.write_figures(results, self.outputs_at / "figures" / split.name)

    def results(self, split: Split) -> Results:
        """What was evaluated on a split.

        Raises:
            FileNotFoundError: it was not evaluated yet, or with other settings than these.
        """
        found = self._found_results(self._pool(split, "sample", self.sampler))
        if found is None:
            path = self._results_path(split)
            why = "was made with other settings or other tables" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {why}: run the stage evaluate first.")
        return found

    def example(self, split: Split, loss: str) -> Example | None:
        """A pair of completions to look at: the one that a loss's probes prefer, and one that they do not."""
        pool = self._pool(split, "sample", self.sampler)
        return measure.example(self._join(pool), self._scored(pool).by_share[1.0], loss)

    @property
    def shown_loss(self) -> str:
        """The loss whose probe a run points to: the policy gradient where it was trained."""
        losses = self.settings.losses
        return "policy_gradient" if "policy_gradient" in losses else losses[-1]

    def final_probe(self) -> Path:
        """Where the probe lies that a run points to, trained on every prompt."""
        return self.outputs_at / "probes" / self.training_pools[0].split.name / self.shown_loss

    @property
    def k(self) -> int:
        """Candidates at use: as asked for, else as many as every prompt has."""
        return self.settings.k or min(pool.smallest for pool in self.test_pools)

    @property
    def outputs_at(self) -> Path:
        return self.outputs or self.run

    @property
    def probe_layer(self) -> int:
        """The layer that probes read; the highest that they may, where they choose."""
        return self.layer if isinstance(self.layer, int) else max(self.embedder.layers)

    @property
    def probe_layers(self) -> list[int]:
        return sorted(self.embedder.layers) if self.layer == BEST else [self.probe_layer]

    @property
    def splits(self) -> list[Split]:
        learnt = self.training_split
        return list(self.tests) if learnt is None else [learnt, *(split for split in self.tests if split is not learnt)]

    def reward_of(self, split: Split) -> Reward:
        return self.reward if split.reward is None else split.reward

    @property
    def sample_pools(self) -> list[Pool]:
        return [self._pool(split, "sample", self.sampler) for split in self.splits]

    @property
    def test_pools(self) -> list[Pool]:
        return [self._pool(split, "sample", self.sampler) for split in self.tests]

    @property
    def training_pools(self) -> list[Pool]:
        return self.test_pools if self.training_split is None else self.sample_pools[:1]

    @property
    def pools(self) -> list[Pool]:
        greedy = [self._pool(split, "greedy", self.greedy) for split in self.tests if self.greedy]
        return [*self.sample_pools, *greedy]

    def _pool(self, split: Split, kind: str, sampler: Sampler) -> Pool:
        return Pool(self.run, split, kind, sampler, self.seed, self.batch_rows, self.shard)

    def sweep(self, pool: Pool) -> list[SweepProbe]:
        """The sweep of probes trained on a pool: from the run folder where it was made from the same inputs."""
        folder = self.outputs_at / "probes" / pool.split.name
        inputs = self._sweep_inputs(pool)
        if (found := sweep.load_sweep(folder, inputs)) is not None:
            return found
        made = layer_choice.sweep_over(
            functools.partial(self._at, pool),
            self.probe_layers,
            self._make_sweep,
            self.training,
            self.settings,
            k=self.k,
            seed=self.seed,
            progress=self.progress,
        )
        sweep.save_sweep(made, folder, inputs)
        return made

    def save_final_probes(self, pool: Pool) -> None:
        """One probe a loss, trained on every prompt of the pool: what an application loads."""
        folder = self.outputs_at / "probes" / pool.split.name
        inputs = self._sweep_inputs(pool)
        losses = self.settings.losses
        if all(is_saved(folder / loss, inputs, self.use) for loss in losses):
            return
        at = functools.partial(self._at, pool)
        made = layer_choice.final_probes(at, self.probe_layers, losses, self.training, k=self.k, seed=self.seed)
        options: dict[str, Any] = {"k": self.k, "seed": self.seed, "settings": self.training}
        for loss, (layer, trained) in zip(losses, made, strict=True):
            source = EmbeddingSource.of(self.embedder.identity(), layer, self.embedder.tokenizer_fingerprint())
            probe = QProbe.of(trained, loss, source, inputs, **options)
            probe.use = self.use
            probe.save_pretrained(folder / loss)

    def _by_authors(self) -> Pipeline | None:
        """The same run by the paper's procedure, with a fixed layer; it keeps its probes in a folder of its own."""
        if self.authors is None:
            return None
        layer = self.probe_layer if self.authors.layer is None else self.authors.layer
        changes = {**vars(self.authors), "layer": layer, "authors": None}
        theirs = dataclasses.replace(self, **changes, outputs=self.outputs_at / "authors", baselines=())
        if theirs.probe_layer == self.probe_layer:
            theirs._joined = self._joined  # the same rows with the same features, read once
        return theirs

    def _beside(self) -> Baselines:
        """The baselines, with what they may learn from."""
        split = self.training_split
        lessons = None if split is None else Lessons(self.training_pools[0], self.reward_of(split))
        return Baselines(self.baselines, self.run, lessons)

    @property
    def _make_sweep(self) -> Maker:
        return sweep.cross_validate if self.training_split is None else sweep.train_on_all

    def _controls(self, pool: Pool) -> dict[str, np.ndarray | None]:
        """Scores of the pool's rows that no probe made; those that read features read the highest layer."""
        made = controls.scores(self._join(pool), self.settings, self.seed)
        if "shuffled_labels" in self.settings.controls:
            learnt = self._join(self._trained_on(pool))
            made |= controls.shuffled_labels(
                learnt, self._join(pool), self._make_sweep, self.training, self.settings, k=self.k, seed=self.seed
            )
        return made

    def _sweep_inputs(self, pool: Pool) -> dict[str, Any]:
        """What decides a sweep. Of the evaluation's settings those that only measure are left out."""
        settings = dataclasses.asdict(self.settings)
        chosen = {name: settings[name] for name in ("losses", "seeds", "folds", "train_share", "curve_shares")}
        inputs = {
            "features": self._features_identity(pool),
            "rewards": pool.rewards(self.reward_of(pool.split)).state,
            "training": dataclasses.asdict(self.training),
            "settings": chosen | ({} if self.training_split is None else {"train_share": self.settings.drawn_share}),
            "protocol": "cross-validation" if self.training_split is None else "training set",
            "drawn_by": sweep.DRAWN_BY,
            "k": self.k,
            "seed": self.seed,
        }
        inputs |= _clusters_of(pool)
        plain: dict[str, Any] = json.loads(json.dumps(inputs))  # as a card gives them back: tuples are lists
        return plain

    def reads(self, pool: Pool) -> Likelihood | None:
        """The model that reads a pool's completions, where they are tested and were not drawn from it here."""
        recorded = pool.split.recorded is not None and pool.split in self.tests
        return self.likelihood if recorded else None

    def _join(self, pool: Pool) -> Joined:
        if pool.name not in self._joined:
            self._joined[pool.name] = join(
                pool, self.reward_of(pool.split), self.embedder, self.probe_layer, self.reads(pool)
            )
        return self._joined[pool.name]

    def _at(self, pool: Pool, layer: int) -> Joined:
        """The pool's rows with the features of a layer; of the layers only the highest is kept."""
        joined = self._join(pool)
        return joined if layer == self.probe_layer else with_layer(joined, pool, self.embedder, layer)

    def _features_identity(self, pool: Pool) -> Any:
        of_layer = {layer: pool.features(self.embedder, layer).identity for layer in self.probe_layers}
        return of_layer if self.layer == BEST else of_layer[self.probe_layer]

    def _greedy_rewards(self, split: Split, task_ids: list[str]) -> np.ndarray | None:
        """(P,) rewards of greedy decoding; None where it is not part of the run."""
        if self.greedy is None:
            return None
        joined = join(self._pool(split, "greedy", self.greedy), self.reward_of(split))
        assert joined.task_ids == task_ids  # both pools are cut from the same split
        return joined.rewards

    def _protocol(self, split: Split) -> str:
        if self.training_split is None:
            return f"{self.settings.folds}-fold cross-validation over prompts"
        if split is self.training_split:
            return f"trained on {split.name} itself: how the probes fit, not what they earn"
        return f"trained on {self.training_split.name}, tested here"

    def _results_path(self, split: Split) -> Path:
        return self.outputs_at / "results" / f"{split.name}.json"

    def _found_results(self, pool: Pool) -> Results | None:
        """The results of a pool, where they were made from the same inputs."""
        path = self._results_path(pool.split)
        if not path.exists():
            return None
        found = Results.read(path)
        return found if found.made_from == self._results_identity(pool) else None

    def _results_identity(self, pool: Pool) -> str:
        greedy = self._pool(pool.split, "greedy", self.greedy) if self.greedy else None
        inputs = {
            "title": self.title,
            "sweep": self._sweep_inputs(self._trained_on(pool)),
            "features": self._features_identity(pool),
            "rewards": pool.rewards(self.reward_of(pool.split)).state,
            "greedy": greedy.rewards(self.reward_of(pool.split)).state if greedy else None,
            "settings": dataclasses.asdict(self.settings),
            "paper": self.paper.get(pool.split.name),
            "apart": {why: sorted(ids) for why, ids in self.apart.get(pool.split.name, {}).items()},
            "version": importlib.metadata.version("qprobe"),
        }
        if model := self.reads(pool):
            inputs["likelihoods"] = pool.likelihoods(model).identity
        if theirs := self._by_authors():
            inputs["authors"] = [theirs._sweep_inputs(self._trained_on(pool)), dataclasses.asdict(theirs.settings)]
        if self.baselines:
            inputs["baselines"] = self._beside().identity(pool, self.reward_of(pool.split))
        return fingerprint(inputs | _clusters_of(pool))

    def _trained_on(self, pool: Pool) -> Pool:
        return pool if self.training_split is None else self.training_pools[0]

    def _scored(self, pool: Pool, compare: bool = False) -> layer_choice.Scores:
        """What the sweep's probes say of a pool; those of smaller shares and of each layer only where rows are compared."""
        probes = self.sweep(self._trained_on(pool))
        if not compare:
            probes = [probe for probe in probes if probe.share == 1 and not probe.plain]
        at = functools.partial(self._at, pool)
        return layer_choice.score_over(probes, at, self.probe_layers, self.settings, self.seed, compare=compare)


def _clusters_of(pool: Pool) -> dict[str, str]:
    """What the clusters of a pool add to an identity: nothing where there are none."""
    return {} if pool.clusters is None else {"clusters": fingerprint(pool.clusters.tolist())}
