"""The command `qprobe-preference`: Hydra in, the core's pipeline out. This half brings pairs and their labels.

qprobe-preference experiment=hh_local dataset.path=hh.jsonl.gz dataset.limit=40
qprobe-preference experiment=trl dataset.path=pairs.jsonl probe=mlp stages=[train,evaluate,report]
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from qprobe import composition, needs
from qprobe.closing import closing_words
from qprobe.pipeline import SHARDED, Pipeline
from qprobe.settings import check_keys
from qprobe_preference import comparison, outcome, policy, sets
from qprobe_preference.dataset import prompt_style
from qprobe_preference.splits import PairLabel, pairs_split

KEYS = composition.KEYS | {"name", "title", "paths", "dataset", "compare", "policy", "judge"}


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline that a composed configuration describes.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
        OSError: pairs that cannot be read, or had from the hub.
    """
    check_keys(config, KEYS, "the configuration")
    ends = composition.back_ends(config, stop=())
    if ends.greedy is not None:
        raise ValueError(
            "sampler.greedy is true, but the answers of pairs are there already: say sampler.greedy=false."
        )
    style = prompt_style(config)
    training, test = sets.load(config["dataset"], config["seed"], ends.sampler, ends.embedder, style)
    for pairs in [test] if training is None else [training, test]:
        print(f"{pairs.name}: {pairs.counted_words()} {pairs.dropped_words()}")
    run, limit = Path(config["paths"]["run"]), config["dataset"]["limit"]
    return composition.pipeline(
        config,
        # A quick look at forty pairs is another result: it must not meet the tables of all of them.
        run=run if limit is None else run.with_name(f"{run.name}-limit{limit}"),
        title=config["title"] + ("" if limit is None else f", first {limit} pairs"),
        tests=[pairs_split(test, style)],
        training_split=None if training is None else pairs_split(training, style),
        reward=PairLabel(),
        stop=(),
        use={"prompts": style} | {name: config[name] for name in ("model", "sampler", "embedder")},
    )


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    names = config["stages"]
    if "policy" in config:
        run_policy(config)
        return
    variants = comparison.variants(config["compare"], config["layer"], config["probe"]["hidden"])
    if not variants:
        pipeline = composition.execute(functools.partial(make_pipeline, config), config)
        if "report" in names:
            print(closing_words(pipeline))
        return
    first = {**config, "stages": [name for name in names if name in SHARDED]}
    pipeline = composition.execute(functools.partial(make_pipeline, config), first)
    if pipeline.shard[1] == 1 and (later := [name for name in names if name not in SHARDED]):
        comparison.execute(pipeline, variants, later)
        if "report" in later:
            print(comparison.write(pipeline, variants))


def run_policy(config: dict[str, Any]) -> None:
    """Run a policy experiment: the core's stages, what other policies and judges add, the win rates."""
    check_keys(config, KEYS, "the configuration")
    names, variants = (
        config["stages"],
        comparison.variants(config["compare"], config["layer"], config["probe"]["hidden"]),
    )
    try:
        experiment = policy.load(config)
    except OSError as error:
        asked = config["policy"]["prompts"]
        raise OSError(f"{error} {needs.expected(asked, config['sampler'])}" if asked else str(error)) from error
    pipeline = experiment.pipeline
    first = {**config, "stages": [name for name in names if name in SHARDED]}
    # A cluster's workers make the pipeline anew; this process has it already.
    local = config["runner"]["backend"] == "local"
    make = (lambda: pipeline) if local else functools.partial(policy.make_pipeline, config)
    composition.execute(make, first, policy.needs(experiment))
    if pipeline.shard[1] > 1:
        return
    outcome.make(experiment, names)
    later = [name for name in names if name not in SHARDED]
    if variants:
        comparison.execute(pipeline, variants, later)
    else:
        pipeline.execute(later)
    if "report" in later:
        print(outcome.write(experiment, variants))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    composition.run_command("qprobe-preference", config, run)


if __name__ == "__main__":
    main()
