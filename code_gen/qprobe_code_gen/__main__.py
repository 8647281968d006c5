"""The command `qprobe-code-gen`: Hydra in, the core's pipeline out. This half brings problems and a reward, nothing else.

qprobe-code-gen experiment=demo limit=8
qprobe-code-gen experiment=demo stages=[report]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from qprobe import composition
from qprobe.baselines.few_shot import FewShotSettings, Shot, with_shots
from qprobe.closing import closing_words
from qprobe.pipeline import Pipeline
from qprobe.settings import accepted, build, check_keys
from qprobe.stages import Split
from qprobe_code_gen.agreement import OutputsAgree
from qprobe_code_gen.problems import Problem, ProblemSet, humaneval, mbpp
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits
from qprobe_code_gen.shots import shots_of

PROBLEM_SETS = ("humaneval", *mbpp.SPLITS)
KEYS = composition.KEYS | {"name", "title", "limit", "paths", "dataset", "sandbox", "paper", "paper_when", "baselines"}
DATASET_KEYS = {"test", "train", "limits", "prompt_style", "examples", "examples_from", "shots", "mbpp_file"}


def load_problems(name: str, dataset: dict[str, Any]) -> ProblemSet:
    """A problem set by its name."""
    if name not in PROBLEM_SETS:
        raise ValueError(f"dataset: there is no problem set {name!r}: choose from {', '.join(PROBLEM_SETS)}.")
    return humaneval.load() if name == "humaneval" else mbpp.load(name, dataset["mbpp_file"])


def without(problems: ProblemSet, examples: Sequence[str], limit: int | None) -> ProblemSet:
    """The set without its few-shot examples, cut to the first `limit`."""
    return dataclasses.replace(problems, problems=[p for p in problems.problems if p.task_id not in examples][:limit])


def prompt_style(dataset: dict[str, Any]) -> PromptStyle:
    """The style that a configuration asks for, with its few-shot examples looked up in `examples_from`."""
    wanted = list(dataset["examples"])
    known: dict[str, Problem] = {}
    if wanted:
        known = {p.task_id: p for p in load_problems(dataset["examples_from"], dataset).problems}
        if missing := [task_id for task_id in wanted if task_id not in known]:
            raise ValueError(f"dataset.examples: {dataset['examples_from']} has no problem {', '.join(missing)}.")
    return PromptStyle(dataset["prompt_style"], examples=[known[task_id] for task_id in wanted])


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline that a composed configuration describes.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
    """
    check_keys(config, KEYS, "the configuration")
    check_keys(config["dataset"], DATASET_KEYS, "dataset")
    dataset, style = config["dataset"], prompt_style(config["dataset"])
    train = [dataset["train"]] if dataset["train"] else []
    names = list(dict.fromkeys([*train, *dataset["test"]]))
    check_keys(dataset["limits"], set(names), "dataset.limits")
    limit = _limit(config["limit"], "limit")
    shots = _shots(config, style)
    left_out = [*dataset["examples"], *(shot.prompt.task_id for shot in shots)]
    sets = []
    for name in names:
        limits = [limit, _limit(dataset["limits"].get(name), f"dataset.limits.{name}")]
        fewest = min((x for x in limits if x is not None), default=None)
        sets.append(without(load_problems(name, dataset), left_out, fewest))
    problems = [problem for s in sets for problem in s.problems]
    shown = {"shots": [dataclasses.asdict(shot) for shot in shots]} if shots else {}
    splits = {
        s.name: Split(
            s.name,
            [with_shots(style.prompt(p), shots) for p in s.problems],
            {**s.identity(), "style": dataclasses.asdict(style), **shown},
        )
        for s in sets
    }
    sandbox = dict(config["sandbox"])
    check_keys(sandbox, accepted(Limits) | {"workers", "strict"}, "sandbox")
    workers, strict = sandbox.pop("workers"), sandbox.pop("strict")
    reward = UnitTestReward(problems, style, build(Limits, sandbox, "sandbox"), workers, strict)
    outputs = config["paths"]["outputs"]
    return composition.pipeline(
        config,
        run=_of_limit(config["paths"]["run"], limit),
        outputs=None if outputs is None else _of_limit(outputs, limit),
        title=config["title"] + ("" if limit is None else f", first {limit} problems"),
        tests=[splits[name] for name in dataset["test"]],
        training_split=splits[train[0]] if train else None,
        reward=reward,
        stop=style.stop(problems),
        paper=composition.published(config),
        agreement=OutputsAgree(reward),
    )


def _shots(config: dict[str, Any], style: PromptStyle) -> list[Shot]:
    """The successes of a finished run that stand before every prompt; none where none are asked for."""
    dataset = config["dataset"]
    if dataset["shots"] is None:
        return []
    if not dataset["train"]:
        raise ValueError("dataset.shots takes successes of a training set, and dataset.train names none.")
    settings = build(FewShotSettings, config["baselines"]["few_shot"], "baselines.few_shot", seed=config["seed"])
    return shots_of(Path(dataset["shots"]), load_problems(dataset["train"], dataset), style, settings)


def _of_limit(path: str, limit: int | None) -> Path:
    """A quick look at eight problems is another result: it must not meet the tables of all of them."""
    return Path(path) if limit is None else Path(f"{path}-limit{limit}")


def _limit(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{where} is {value!r}: a number of problems, at least 1, or null for all.")
    return value


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    pipeline = composition.execute(functools.partial(make_pipeline, config), config)
    if "report" in config["stages"]:
        print(closing_words(pipeline))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    composition.run_command("qprobe-code-gen", config, run)


if __name__ == "__main__":
    main()
