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
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import SHARDED
from qprobe.settings import check_keys
from qprobe_preference import comparison, dataset, outcome, policy, splits
from qprobe_preference.comparison import Variant

_KEYS = composition.KEYS | {"name", "title", "paths", "dataset", "compare", "policy", "judge"}


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline that a composed configuration describes.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
        OSError: pairs that cannot be read, or that the hub does not give.
    """
    check_keys(config, _KEYS, "the configuration")
    ends = composition.back_ends(config, stop=())
    if ends.greedy is not None:
        raise ValueError("sampler.greedy is true, but the answers of pairs are recorded: say sampler.greedy=false.")
    style = dataset.prompt_style(config)
    training, test = dataset.load(config["dataset"], config["seed"], ends.sampler, ends.embedder, style)
    for pairs in [test] if training is None else [training, test]:
        print(f"{pairs.name}: {pairs.summary()}")
    return splits.pipeline(config, splits.pairs_split(test, style), training, style)


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    variants = comparison.variants(config)
    first, later = ([name for name in config["stages"] if (name in SHARDED) == sharded] for sharded in (True, False))
    if "policy" in config:
        _run_policy(config, variants, first, later)
        return
    make = functools.partial(make_pipeline, config)
    if not variants:
        pipeline = composition.execute(make, config)
        if "report" in later:
            print(closing_words(pipeline))
        return
    pipeline = composition.execute(make, {**config, "stages": first})
    if pipeline.shard[1] == 1 and later:
        comparison.execute(pipeline, variants, later)
        if "report" in later:
            print(comparison.write(pipeline, variants))


def _run_policy(config: dict[str, Any], variants: list[Variant], first: list[str], later: list[str]) -> None:
    """The stages of the core, what other policies and judges add, the win rates."""
    check_keys(config, _KEYS, "the configuration")
    try:
        experiment = policy.load(config)
    except OSError as error:
        asked = config["policy"]["prompts"]
        raise OSError(f"{error} {needs.expected(asked, config['sampler'])}" if asked else str(error)) from error
    pipeline = experiment.pipeline
    # A cluster's workers make the pipeline anew; this process has it already.
    local = config["runner"]["backend"] == "local"
    make = (lambda: pipeline) if local else functools.partial(policy.make_pipeline, config)
    composition.execute(make, {**config, "stages": first}, policy.needs(experiment))
    if pipeline.shard[1] > 1:
        return
    outcome.make(experiment, first)
    if variants:
        comparison.execute(pipeline, variants, later)
    else:
        pipeline.execute(later)
    if "report" in later:
        print(outcome.write(experiment, variants))


COMMAND = Experiments(
    name="qprobe-preference",
    package="qprobe_preference.conf",
    does="Q-probes on preference pairs: probes of a language model's hidden states are trained to say which of two answers is\n"
    "preferred, and measured on pairs that they did not see. As a policy they choose among answers of the model, and a\n"
    "judge counts the wins.",
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
    folder=splits.folder_of_run,
    check=composition.procedures,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment; returns the exit status."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
