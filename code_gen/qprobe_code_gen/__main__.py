"""The command `qprobe-code-gen`: Hydra in, the core's pipeline out. This half brings problems and a reward, nothing else.

qprobe-code-gen experiment=demo limit=8
qprobe-code-gen experiment=demo stages=[report]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.models import ModelSpec
from qprobe.pipeline import Pipeline
from qprobe.report import tables
from qprobe.sampling import SamplingSettings
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.vllm import VLLMSampler
from qprobe.settings import accepted, build, check_keys
from qprobe.stages import Split
from qprobe.sweep import EvaluationSettings
from qprobe.training import TrainingSettings
from qprobe_code_gen.problems import Problem, ProblemSet, humaneval, mbpp
from qprobe_code_gen.prompts import PromptStyle
from qprobe_code_gen.rewards import UnitTestReward
from qprobe_code_gen.sandbox import Limits

PROBLEM_SETS = ("humaneval", *mbpp.SPLITS)
SAMPLERS = {"hf": HFSampler, "vllm": VLLMSampler}
EMBEDDERS = {"hf": HFEmbedder, "vllm": VLLMEmbedder}
KEYS = {
    *("name", "title", "stages", "limit", "seed", "layer", "paths", "dataset", "model", "sampler", "embedder", "probe"),
    *("evaluation", "sandbox", "paper"),
}
DATASET_KEYS = {"test", "train", "limits", "prompt_style", "examples", "examples_from", "mbpp_file"}


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
    names = [*train, *dataset["test"]]
    check_keys(dataset["limits"], set(names), "dataset.limits")
    limit = _limit(config["limit"], "limit")
    sets = []
    for name in names:
        limits = [limit, _limit(dataset["limits"].get(name), f"dataset.limits.{name}")]
        fewest = min((x for x in limits if x is not None), default=None)
        sets.append(without(load_problems(name, dataset), dataset["examples"], fewest))
    problems = [problem for s in sets for problem in s.problems]
    splits = [
        Split(s.name, [style.prompt(p) for p in s.problems], {**s.identity(), "style": dataclasses.asdict(style)})
        for s in sets
    ]
    sampling, embedding = dict(config["sampler"]), dict(config["embedder"])
    backend, greedy, batch_rows = (sampling.pop(key) for key in ("backend", "greedy", "batch_rows"))
    model = build(ModelSpec, config["model"], "model")
    sampler = _back_end(SAMPLERS, backend, "sampler")
    embedder = _back_end(EMBEDDERS, embedding.pop("backend"), "embedder")
    # What the back end itself takes, such as how its engine is run, stands beside the sampling law.
    own = {key: sampling.pop(key) for key in accepted(sampler) - {"model", "settings"} if key in sampling}
    settings = build(SamplingSettings, sampling, "sampler", stop=style.stop(problems))
    at_zero = dataclasses.replace(settings, n=1, temperature=0.0, top_p=1.0, top_k=0)
    sandbox = dict(config["sandbox"])
    check_keys(sandbox, accepted(Limits) | {"workers", "strict"}, "sandbox")
    workers, strict = sandbox.pop("workers"), sandbox.pop("strict")
    run = Path(config["paths"]["run"])
    return Pipeline(
        # A quick look at eight problems is another result: it must not meet the tables of all of them.
        run=run if limit is None else run.with_name(f"{run.name}-limit{limit}"),
        title=config["title"] + ("" if limit is None else f", first {limit} problems"),
        tests=splits[len(train) :],
        training_split=splits[0] if train else None,
        reward=UnitTestReward(problems, style, build(Limits, sandbox, "sandbox"), workers, strict),
        sampler=build(sampler, own, "sampler", model=model, settings=settings),
        greedy=build(sampler, own, "sampler", model=model, settings=at_zero) if greedy else None,
        embedder=build(embedder, embedding, "embedder", model=model),
        layer=config["layer"],
        training=build(TrainingSettings, config["probe"], "probe"),
        settings=build(EvaluationSettings, config["evaluation"], "evaluation"),
        seed=config["seed"],
        batch_rows=batch_rows,
        paper=config["paper"],
    )


def _limit(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{where} is {value!r}: a number of problems, at least 1, or null for all.")
    return value


def _back_end(known: dict[str, Any], name: str, where: str) -> Any:
    if name not in known:
        raise ValueError(f"{where}.backend is {name!r}: choose from {', '.join(known)}.")
    return known[name]


def closing_words(pipeline: Pipeline, loss: str) -> str:
    """What a run prints at its end: tables, a pair of completions, and where everything lies."""
    parts = []
    for split in pipeline.tests:
        parts.append(tables.to_text(pipeline.results(split)))
        pair = pipeline.example(split, loss)
        if pair is not None:
            parts.append(
                f"{pair.task_id}: of its completions the {loss} probes prefer this one ({pair.preferred_verdict}):\n"
                f"{_indented(pair.preferred)}\nand like this one least ({pair.other_verdict}):\n{_indented(pair.other)}"
            )
    run = pipeline.run
    figures = sorted(str(path) for path in (run / "figures").rglob("*.png"))
    parts.append(
        "\n".join([f"tables:   {run / 'tables'}", *(f"figure:   {path}" for path in figures), f"run:      {run}"])
    )
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.strip("\n").splitlines()) or "    | (empty)"


def run(config: dict[str, Any]) -> None:
    """Make the pipeline of a configuration, execute its stages, print what came out."""
    pipeline = make_pipeline(config)
    if "reward" in config["stages"] and isinstance(pipeline.reward, UnitTestReward):
        pipeline.reward.check()
    pipeline.execute(config["stages"])
    if "report" in config["stages"]:
        losses = pipeline.settings.losses
        print(closing_words(pipeline, "policy_gradient" if "policy_gradient" in losses else losses[-1]))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)  # the root of a configuration is one
        run({str(key): value for key, value in plain.items()})
    except OmegaConfBaseException as error:
        sys.exit(f"qprobe-code-gen: the configuration is incomplete: {str(error).splitlines()[0]}.")
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"qprobe-code-gen: {error}")


if __name__ == "__main__":
    main()
