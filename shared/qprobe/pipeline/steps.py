"""The stages of a run, in their order: what each does, and what it can say before any work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qprobe.embedding import tables_of
from qprobe.pipeline import evaluated
from qprobe.pipeline.probes import procedures
from qprobe.pipeline.setup import Setup
from qprobe.report import tables
from qprobe.run import rewarding, stages


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name: in the configuration's `stages`.
        run: does what is left of it.
        check: raises what can be known to fail, before any work.
        back_ends: what it draws or reads with; they are checked before the first stage, and give back what they hold after it.
        in_shards: whether a shard can do its part by itself.
    """

    name: str
    run: Callable[[Setup], None]
    check: Callable[[Setup], None] = lambda setup: None
    back_ends: Callable[[Setup], Sequence[object]] = lambda setup: ()
    in_shards: bool = False


def _check_sample(setup: Setup) -> None:
    for pool in setup.pools:
        pool.prompts.check_inputs()
        pool.completions.check_inputs()


def _sample(setup: Setup) -> None:
    for pool in setup.pools:
        stages.sample(pool, setup.progress, setup.reader(pool), setup.greedy_of(pool))


def _check_reward(setup: Setup) -> None:
    for reward in {id(reward): reward for reward in map(setup.reward_of, setup.splits)}.values():
        reward.check()
    for pool in setup.pools:
        pool.rewards(setup.reward_of(pool.split)).check_inputs()


def _reward(setup: Setup) -> None:
    for pool in setup.pools:
        rewarding.reward(pool, setup.reward_of(pool.split), setup.progress)


def _check_embed(setup: Setup) -> None:
    for pool in setup.sample_pools:
        for layer in tables_of(setup.embedder):
            pool.features(setup.embedder, layer).check_inputs()
        if model := setup.reads(pool):
            pool.likelihoods(model).check_inputs()


def _embed(setup: Setup) -> None:
    for pool in setup.sample_pools:
        stages.embed(pool, setup.embedder, setup.progress)
        stages.compare_law(pool, setup.embedder)
    stages.give_back(setup.embedder)  # its memory is the base model's
    for pool in setup.test_pools:
        if model := setup.reads(pool):
            stages.likelihood(pool, model, setup.progress)


def _run_baselines(setup: Setup) -> None:
    setup.every_baseline().run([(pool, setup.reward_of(pool.split)) for pool in setup.test_pools], setup.progress)


def _train(setup: Setup) -> None:
    for pool in setup.training_pools:
        for probes in procedures(setup).all:
            probes.train(pool)


def _evaluate(setup: Setup) -> None:
    for pool in setup.test_pools:
        evaluated.make(setup, pool)


def _check_report(setup: Setup) -> None:
    importlib.import_module("qprobe.report.figures")


def _report(setup: Setup) -> None:
    from qprobe.report import figures

    for split in setup.tests:
        results = evaluated.read(setup, setup.pool(split, "sample", setup.sampler))
        tables.write_tables(results, setup.outputs_at / "tables")
        figures.write_figures(results, setup.outputs_at / "figures" / split.name)


STEPS = (
    Stage("sample", _sample, _check_sample, lambda setup: [setup.sampler, setup.greedy], in_shards=True),
    Stage("reward", _reward, _check_reward, in_shards=True),
    Stage("embed", _embed, _check_embed, lambda setup: [setup.embedder], in_shards=True),
    Stage("baselines", _run_baselines, lambda setup: setup.every_baseline().check()),
    Stage("train", _train),
    Stage("evaluate", _evaluate),
    Stage("report", _report, _check_report),
)
STAGES = tuple(stage.name for stage in STEPS)
SHARDED = tuple(stage.name for stage in STEPS if stage.in_shards)
