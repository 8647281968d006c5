"""The command `qprobe-preference`: Hydra in, the core's pipeline out. This half brings pairs and their labels.

qprobe-preference experiment=hh_local dataset.path=hh.jsonl.gz dataset.limit=40
qprobe-preference experiment=trl dataset.path=pairs.jsonl probe=mlp stages=[train,evaluate,report]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from qprobe.cli import composition
from qprobe.cli.command import Experiments
from qprobe.pipeline import needs
from qprobe.pipeline.closing import closing_words
from qprobe.pipeline.pipeline import SHARDED, Pipeline
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
    limit = config["dataset"]["limit"]
    return composition.pipeline(
        config,
        run=policy.folder_of_run(config),
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


COMMAND = Experiments(
    name="qprobe-preference",
    package="qprobe_preference.conf",
    does="Q-probes on preference pairs: probes of a language model's hidden states learn which of two answers is preferred,\n"
    "and are measured on pairs that they did not see. As a policy they choose among answers of the model, and a judge\n"
    "counts the wins.",
    examples=[
        (
            "qprobe-preference experiment=hh_local dataset.path=harmless-base-test.jsonl.gz dataset.limit=40",
            "a quick look at forty pairs of a file of HH-RLHF, with the embedded model",
        ),
        (
            "qprobe-preference experiment=trl dataset.path=pairs.jsonl model=hub model.name=NAME embedder.layers=[16]",
            "pairs of yours in one of TRL's formats, with a model of yours",
        ),
        (
            "qprobe-preference -m experiment=trl dataset.path=pairs.jsonl probe.learning_rate=1e-3,1e-2",
            "two runs that share the features, and one table of both",
        ),
    ],
    run=run,
    folder=policy.folder_of_run,
    check=composition.procedures,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment; returns the exit status."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
