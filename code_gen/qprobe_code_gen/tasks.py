"""What a configuration's data sets bring to the pipeline: prompts, what ends a completion, what rewards it, when two agree.

There are two kinds: programs, rewarded by unit tests (HumanEval, MBPP), and questions, rewarded by their final number (GSM-8K).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from qprobe.baselines.consistency import Agreement
from qprobe.baselines.few_shot import FewShotSettings, Shot, with_shots
from qprobe.pipeline import needs
from qprobe.prompts import Prompt
from qprobe.registry import Registry
from qprobe.run.pools import Reward, Split
from qprobe.sampling import StopRule
from qprobe.settings import accepted, build, check_keys, kinds_of
from qprobe_code_gen import gsm8k
from qprobe_code_gen.problem_sets import AnyProblem, ProblemSet
from qprobe_code_gen.programs import Problem, mbpp, overlap
from qprobe_code_gen.programs.agreement import OutputsAgree
from qprobe_code_gen.programs.prompts import PromptStyle
from qprobe_code_gen.programs.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits
from qprobe_code_gen.shots import shots_of

PROBLEMS = Registry("qprobe.problems")
# What a set of ours holds, known without it.
SIZES = {"humaneval": 164, **{name: len(ids) for name, ids in mbpp.SPLITS.items()}, **gsm8k.SIZES}
KEYS = {"test", "train", "limits", "samples", "prompt_style", "examples", "examples_from", "shots"}
AnyStyled = TypeVar("AnyStyled", contravariant=True)


class Style(Protocol[AnyStyled]):
    """How problems of one kind become prompts: a dataclass, whose fields are kept with the prompts."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def prompt(self, problem: AnyStyled, /) -> Prompt: ...


@dataclass(frozen=True)
class Task:
    """What the pipeline is given.

    Args:
        splits: by name, those of the configuration's `train` and `test`.
        stop: texts that end a completion.
        reward: what completions earn.
        agreement: when two completions say the same.
        apart: see `Pipeline.apart`.
        rule: decides in the place of the stop texts where a completion ends.
    """

    splits: dict[str, Split]
    stop: tuple[str, ...]
    reward: Reward
    agreement: Agreement
    apart: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    rule: StopRule | None = None


def make(config: Mapping[str, Any], limit: int | None) -> Task:
    """The task of a composed configuration.

    Args:
        limit: only the first so many problems of each set; None takes all.

    Raises:
        ValueError: an unknown key or set, or a value that cannot be; before any work.
    """
    names = _names(config["dataset"])
    if len({_of_questions(name, "a name of dataset.test or dataset.train") for name in names}) > 1:
        raise ValueError(
            f"dataset: {', '.join(names)} are not all rewarded in the same way: give each kind a run of its own."
        )
    sandbox = dict(config["sandbox"])
    check_keys(sandbox, accepted(Limits) | {"workers", "strict", "one_process"}, "sandbox")
    try:
        return _questions(config, limit) if _of_questions(names[0]) else _programs(config, limit, sandbox)
    except OSError as error:
        if unknown := set(names) - set(SIZES):
            raise OSError(f"{error} How large {', '.join(sorted(unknown))} is, is not known.") from error
        limits = config["dataset"]["limits"]
        sizes = {name: min(filter(None, (SIZES[name], limit, limits.get(name)))) for name in names}
        tested = sum(sizes[name] for name in config["dataset"]["test"])
        raise OSError(f"{error} {needs.expected(sum(sizes.values()), config['sampler'], tested)}") from error


def _programs(config: Mapping[str, Any], limit: int | None, sandbox: dict[str, Any]) -> Task:
    dataset = config["dataset"]
    load: Callable[[str], ProblemSet[Problem]] = _loader(dataset, {"mbpp_file"})
    style = PromptStyle(dataset["prompt_style"], examples=_examples(dataset, load))
    problems, splits = _splits(config, limit, load, style, UnitTestReward.name)
    workers, strict, one_process = (sandbox.pop(key) for key in ("workers", "strict", "one_process"))
    reward = UnitTestReward(problems, style, build(Limits, sandbox, "sandbox"), workers, strict, one_process)
    by_id = {problem.task_id: problem for problem in problems}
    own = {name: [by_id[prompt.task_id] for prompt in split.prompts] for name, split in splits.items()}
    apart: dict[str, dict[str, frozenset[str]]] = {}
    if (trained := dataset["train"]) is None:
        splits = {
            name: dataclasses.replace(split, clusters=overlap.clusters(own[name])) for name, split in splits.items()
        }
    else:
        apart = {name: overlap.shared_with(own[trained], own[name], trained) for name in own if name != trained}
    return Task(splits, style.stop(), reward, OutputsAgree(reward), apart, style.rule(problems))


def _questions(config: Mapping[str, Any], limit: int | None) -> Task:
    dataset = config["dataset"]
    load: Callable[[str], ProblemSet[gsm8k.Question]] = _loader(dataset, {"train_file", "test_file"})
    style = gsm8k.QuestionStyle(dataset["prompt_style"], examples=_examples(dataset, load))
    questions, splits = _splits(config, limit, load, style, gsm8k.FinalNumberReward.name)
    return Task(splits, style.stop(), gsm8k.FinalNumberReward(questions), gsm8k.SameNumber())


def _of_questions(name: str, where: str = "dataset") -> bool:
    """Whether a set holds questions, by what its function says that it gives, and not programs."""
    return kinds_of(PROBLEMS.find(name, where)).get("return") == ProblemSet[gsm8k.Question]


def _loader(dataset: Mapping[str, Any], files: set[str]) -> Callable[[str], ProblemSet[Any]]:
    """What loads a set by its name.

    Args:
        files: keys of our own sets of this kind; a set of another package may have others.
    """
    found = {name: PROBLEMS.find(name, "dataset") for name in _names(dataset)}
    check_keys(dataset, KEYS | files | set().union(*map(accepted, found.values())) - {"split"}, "dataset")

    def load(name: str) -> ProblemSet[Any]:
        make = PROBLEMS.find(name, "dataset")
        takes = accepted(make)
        own = {key: dataset[key] for key in takes - {"split"} if key in dataset}
        made: ProblemSet[Any] = build(make, own, "dataset", **({"split": name} if "split" in takes else {}))
        return made

    return load


def _names(dataset: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*([dataset["train"]] if dataset["train"] else []), *dataset["test"]]))


def _examples(dataset: Mapping[str, Any], load: Callable[[str], ProblemSet[AnyProblem]]) -> list[AnyProblem]:
    """The worked examples of the prompts, looked up in `examples_from`: by their ids, or the first so many."""
    wanted, source = dataset["examples"], dataset["examples_from"]
    if not wanted:
        return []
    if _of_questions(source, "dataset.examples_from") != _of_questions(dataset["test"][0]):
        raise ValueError(
            f"dataset.examples_from is {source!r}, whose problems are of another kind than those of {dataset['test'][0]}: name "
            "a set of the same kind."
        )
    known = {problem.task_id: problem for problem in load(source).problems}
    if type(wanted) is int:
        if not 0 < wanted <= len(known):
            raise ValueError(f"dataset.examples is {wanted}: {source} has 1 to {len(known)} to show.")
        return list(known.values())[:wanted]
    if missing := [task_id for task_id in wanted if task_id not in known]:
        raise ValueError(f"dataset.examples: {source} has no problem {', '.join(missing)}.")
    return [known[task_id] for task_id in wanted]


def samples(dataset: Mapping[str, Any]) -> dict[str, int]:
    """Completions a problem of the sets in use that have a number of their own."""
    check_keys(dataset["samples"], set(PROBLEMS.names()), "dataset.samples")
    asked = {name: checked_limit(count, f"dataset.samples.{name}") for name, count in dataset["samples"].items()}
    used = {*dataset["test"], dataset["train"]}
    return {name: count for name, count in asked.items() if count is not None and name in used}


def _splits(
    config: Mapping[str, Any],
    limit: int | None,
    load: Callable[[str], ProblemSet[AnyProblem]],
    style: Style[AnyProblem],
    reward: str,
) -> tuple[list[AnyProblem], dict[str, Split]]:
    """The problems without those that the prompts show, and their splits."""
    dataset = config["dataset"]
    names = _names(dataset)
    check_keys(dataset["limits"], set(names), "dataset.limits")
    shots = _shots(config, load, style, reward)
    fields = dataclasses.asdict(style)
    shown = {"shots": [dataclasses.asdict(shot) for shot in shots]} if shots else {}
    left_out = {*(example["task_id"] for example in fields["examples"]), *(shot.prompt.task_id for shot in shots)}
    problems: list[AnyProblem] = []
    splits = {}
    for name in names:
        limits = [limit, checked_limit(dataset["limits"].get(name), f"dataset.limits.{name}")]
        fewest = min((x for x in limits if x is not None), default=None)
        whole = load(name)
        kept = [problem for problem in whole.problems if problem.task_id not in left_out][:fewest]
        source = {**dataclasses.replace(whole, problems=kept).identity(), "style": fields, **shown}
        splits[name] = Split(name, [with_shots(style.prompt(problem), shots) for problem in kept], source)
        problems += kept
    return problems, splits


def _shots(
    config: Mapping[str, Any],
    load: Callable[[str], ProblemSet[AnyProblem]],
    style: Style[AnyProblem],
    reward: str,
) -> list[Shot]:
    """The successes of a finished run that every prompt shows; none where dataset.shots is null."""
    dataset = config["dataset"]
    if dataset["shots"] is None:
        return []
    if not dataset["train"]:
        raise ValueError("dataset.shots takes successes of a training set, and dataset.train names none.")
    settings = build(FewShotSettings, config["baselines"]["few_shot"], "baselines.few_shot", seed=config["seed"])
    prompts = [style.prompt(problem) for problem in load(dataset["train"]).problems]
    return shots_of(Path(dataset["shots"]), dataset["train"], prompts, dataclasses.asdict(style), reward, settings)


def checked_limit(value: Any, where: str) -> int | None:
    """A number of problems, at least 1, or None for all."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{where} is {value!r}: a number of problems, at least 1, or null for all.")
    return value
