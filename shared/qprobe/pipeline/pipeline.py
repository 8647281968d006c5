"""A whole run: prompts, a reward and back ends in; completions, rewards, features, probes, tables and figures out.

    sample -> reward -> embed -> baselines -> train -> evaluate -> report

Every stage reads its tables from the run folder and writes its own, does what is left to do and nothing twice, and can be
called alone. With one set of prompts the probes are cross-validated; with a training set they are trained there and tested
on the others. The pipeline knows no reward, sampler or embedder by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qprobe.evaluation.evaluate import Example, example
from qprobe.evaluation.sweep import SweepProbe
from qprobe.pipeline import evaluated, probes
from qprobe.pipeline.probes import Procedures
from qprobe.pipeline.setup import Setup
from qprobe.pipeline.steps import STAGES, STEPS, Stage
from qprobe.probe.losses import AUTO
from qprobe.report.results import Results
from qprobe.run import stages
from qprobe.run.pools import Pool, Split


@dataclass
class Pipeline(Setup):
    """A run and its stages; arguments as of `Setup`."""

    def execute(self, names: Sequence[str] = STAGES) -> None:
        """Run the named stages, in their order.

        Raises:
            ValueError: an unknown stage.
        """
        chosen = self.check(names)
        if self.shard[1] > 1:
            chosen = [stage for stage in chosen if stage.in_shards]
        self.chosen = [stage.name for stage in chosen]
        for stage in chosen:
            for back_end in stage.back_ends(self):
                stages.check(back_end)
        for stage in chosen:
            stage.run(self)
            self.give_back(stage.name)

    def check(self, names: Sequence[str] = STAGES) -> list[Stage]:
        """Say what can be known to fail before hours of work: an unknown stage, what is not installed, tables of other inputs.

        Returns: the stages of these names, in their order.

        Raises:
            ValueError: an unknown stage.
            StoreError: a table was made from other inputs.
        """
        if unknown := [name for name in names if name not in STAGES]:
            raise ValueError(f"There is no stage {', '.join(unknown)}: choose from {', '.join(STAGES)}.")
        chosen = [stage for stage in STEPS if stage.name in names]
        for stage in chosen:
            stage.check(self)
        return chosen

    @property
    def procedures(self) -> Procedures:
        """The probes of the table, and those of the paper's procedure where they are asked for."""
        return probes.procedures(self)

    def sweep(self, pool: Pool) -> list[SweepProbe]:
        """The table's probes that were trained on a pool; they are trained where they are not there yet."""
        return self.procedures.own[0].sweep(pool)

    def results(self, split: Split) -> Results:
        """What was evaluated on a split.

        Raises:
            FileNotFoundError: it was not evaluated yet, or with other settings than these.
        """
        return evaluated.read(self, self.pool(split, "sample", self.sampler))

    def example(self, split: Split, loss: str) -> Example | None:
        """A pair of completions to look at: the one that a loss's probes prefer, and one that they do not."""
        pool = self.pool(split, "sample", self.sampler)
        return example(self.rows(pool, self.probe_layer), self.procedures.of(loss).scores(pool).by_share[1.0], loss)

    @property
    def shown_loss(self) -> str:
        """The loss whose probe a run points to: `auto`, else the policy gradient, where there is one."""
        losses = self.settings.losses
        if AUTO in losses:
            return AUTO
        return "policy_gradient" if "policy_gradient" in losses else losses[-1]

    def final_probe(self) -> Path:
        """Where the probe lies that a run points to, trained on every prompt."""
        return self.procedures.of(self.shown_loss).final_folder(self.training_pools[0]) / self.shown_loss

    def give_back(self, name: str) -> None:
        """Give back what a stage's back ends hold, such as an engine's memory: it is the next stage's."""
        for stage in STEPS:
            for back_end in stage.back_ends(self) if stage.name == name else ():
                stages.give_back(back_end)
