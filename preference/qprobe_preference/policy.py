"""Policy experiments: probes of training pairs choose among K answers to each test prompt, and a judge says what that wins.

The prompts are those of the test pairs, each once; a candidate is judged against the data set's chosen answer, as the core's
reward stage. Probes learn from the training pairs and never see a judgement.

Candidates of a run folder that have labels (`dataset=run`) need no training pairs: probes learn from the labels, a good and a
bad completion of a prompt as a pair, by cross-validation over all prompts; the labels stand beside the judge.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.cli import composition
from qprobe.pipeline.pipeline import Pipeline
from qprobe.run.rewards import RecordedReward
from qprobe.run.stages import Split
from qprobe.sampling import Sampler
from qprobe.settings import build, check_keys
from qprobe_preference import judges, sets
from qprobe_preference.dataset import Dataset, prompt_style
from qprobe_preference.judges import AgainstReference
from qprobe_preference.judges.openai import OpenAIJudge
from qprobe_preference.pairs import PairSet, run_folder
from qprobe_preference.splits import PairLabel, pairs_split, prompts_split

# Where the assistant's turn ends in a transcript.
TRANSCRIPT_STOP = ("\n\nHuman:", "\n\nAssistant:")


@dataclass(frozen=True)
class PolicySettings:
    """What the configuration says of a policy experiment; its keys are described in conf/policy.

    Raises:
        ValueError: values that cannot be, or that contradict each other.
    """

    prompts: int | None = 512
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: list[dict[str, Any]] = field(default_factory=list)
    label_pairs: int = 0
    paper: dict[str, float] = field(default_factory=dict)
    paper_when: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"policy.prompts is {self.prompts}: at least 1, or null for all.")
        if self.label_pairs < 0:
            raise ValueError(f"policy.label_pairs is {self.label_pairs}: a number of pairs, 0 for none.")
        for policy in self.policies:
            check_keys(policy, {"name", "model"}, "policy.policies")
            if not {"name", "model"} <= set(policy):
                raise ValueError("An entry of policy.policies needs a name and a model: {name: KTO, model: HUB_ID}.")
        names = [policy["name"] for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"policy.policies has a name twice among {', '.join(names)}: give each its own.")


@dataclass(frozen=True)
class Truth:
    """What the candidates of a run folder earned there.

    Args:
        labels: task id -> of its candidates.
        references: task id -> of the answer that they are compared with.
        greedy: whether that is the run's greedy answer.
    """

    labels: dict[str, list[float]]
    references: dict[str, float]
    greedy: bool


@dataclass(frozen=True)
class Experiment:
    """A policy experiment, loaded.

    Args:
        config: it was composed from.
        settings: its part `policy`.
        pipeline: trains on pairs, and tests on judged candidates.
        pairs: the test pairs.
        style: of conversations, `chat` or `text`.
        reward: compares a candidate with its prompt's reference.
        against: what that is, in words.
        truth: labels of recorded candidates; None where candidates are drawn here.
    """

    config: dict[str, Any]
    settings: PolicySettings
    pipeline: Pipeline
    pairs: PairSet
    style: str
    reward: AgainstReference
    against: str
    truth: Truth | None = None

    @property
    def split(self) -> Split:
        return self.pipeline.tests[0]


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline of a policy experiment: what a cluster's workers make for themselves."""
    return load(config).pipeline


def load(config: dict[str, Any]) -> Experiment:
    """Read pairs and recorded candidates, and make the pipeline.

    Raises:
        ValueError: a value that cannot be; before any work.
        OSError: pairs that cannot be read, or had from the hub.
    """
    if "judge" not in config:
        raise ValueError("A policy experiment needs a judge: say judge=implicit, judge=openai or judge=reward_model.")
    settings = build(PolicySettings, config["policy"], "policy")
    style = prompt_style(config)
    stop = TRANSCRIPT_STOP if style == "text" else ()
    ends = composition.back_ends(config, stop=stop)
    run, limit = folder_of_run(config), config["dataset"]["limit"]
    judge = judges.configured(config["judge"], run / "judge")
    training, test = sets.load(config["dataset"], config["seed"], ends.sampler, ends.embedder, style)
    truth = None
    if training is None and config["dataset"].get("format") == "run":
        split, reward, truth = _of_run(Dataset.of(config["dataset"], config["seed"]), settings, judge, ends.sampler)
        against = "the run's greedy answer" if truth.greedy else "the prompt's first answer"
    elif training is None:
        raise ValueError(
            "A policy experiment trains on other prompts than it is tested on: name a training set, or cut the pairs in two by "
            "dataset.test_share=0.5."
        )
    else:
        asked = drawn_prompts(test, settings.prompts, config["seed"])
        split = prompts_split(asked, style)
        references = {pair.pair_id: pair.answers(style)[0] for pair in asked.pairs}
        reward, against = AgainstReference(judge, split.prompts, references), "the data set's chosen answer"
        split = dataclasses.replace(split, reward=reward)
    pipeline = composition.pipeline(
        config,
        run=run,
        title=config["title"] + ("" if limit is None else f", first {limit} pairs"),
        tests=[split],
        training_split=None if training is None else pairs_split(training, style),
        reward=PairLabel(),
        stop=stop,
        use={"prompts": style} | {name: config[name] for name in ("model", "sampler", "embedder")},
    )
    return Experiment(config, settings, pipeline, test, style, reward, against, truth)


def _of_run(
    dataset: Dataset, settings: PolicySettings, judge: judges.Judge, sampler: Sampler
) -> tuple[Split, AgainstReference, Truth]:
    """All prompts of a run folder with their completions and labels; each is judged against the run's greedy answer to its
    prompt, or where the run has none against the prompt's first.
    """
    folder, pool = Path(str(dataset.path)).expanduser(), dataset.options["pool"]

    def read(kind: str, reward: str | None) -> dict[str, run_folder.Judged]:
        found = run_folder.judged(folder, f"{pool.rpartition('.')[0]}.{kind}", lambda p: sampler.render(p)[0], reward)
        return {task.prompt.task_id: task for task in found}

    tasks = read(pool.rpartition(".")[2], dataset.options.get("reward"))
    tasks = dict(list(tasks.items())[: settings.prompts])
    greedy = (folder / "completions" / f"{pool.rpartition('.')[0]}.greedy").is_dir()
    base = read("greedy", None) if greedy else tasks
    labels = {key: task.rewards for key, task in tasks.items()}
    split = Split(
        dataset.name,
        [task.prompt for task in tasks.values()],
        {"run": folder.name, "pool": pool, "prompts": settings.prompts},
        recorded={key: task.completions for key, task in tasks.items()},
        reward=RecordedReward(labels),
    )
    reward = AgainstReference(judge, split.prompts, {key: base[key].completions[0] for key in tasks})
    return split, reward, Truth(labels, {key: base[key].rewards[0] for key in tasks}, greedy)


def folder_of_run(config: dict[str, Any]) -> Path:
    """Where the run of a configuration lies: a quick look at forty pairs must not meet the tables of all of them."""
    run, limit = Path(config["paths"]["run"]), config["dataset"]["limit"]
    return run if limit is None else run.with_name(f"{run.name}-limit{limit}")


def drawn_prompts(pairs: PairSet, count: int | None, seed: int) -> PairSet:
    """One pair of every prompt, of so many prompts by lot: a lot over all, so that no source comes first."""
    first: dict[str, Any] = {}
    for pair in pairs.pairs:
        first.setdefault(pair.pair_id.rpartition(".")[0], pair)
    # Ids end in .000, as those of the first pair of a prompt.
    every = [dataclasses.replace(pair, pair_id=f"{number}.000") for number, pair in first.items()]
    if count is not None and count < len(every):
        places = sorted(random.Random(seed).sample(range(len(every)), count))
        every = [every[place] for place in places]
    return dataclasses.replace(pairs, pairs=every, source={**pairs.source, "asked": {"count": count, "seed": seed}})


def paper_values(experiment: Experiment) -> dict[str, float]:
    """The published win rates by row, where all of `policy.paper_when` holds; else none."""
    settings = experiment.settings
    return composition.published({**experiment.config, "paper": settings.paper, "paper_when": settings.paper_when})


def needs(experiment: Experiment) -> list[str]:
    """What a run asks for beside the core's stages (`pipeline.needs`): other policies' answers, and comparisons. At most: what an
    earlier run has judged is not asked again.
    """
    pipeline, settings = experiment.pipeline, experiment.settings
    prompts, pool = len(experiment.split.prompts), pipeline.test_pools[0]
    others = prompts * len(settings.policies)
    lines = []
    if others:
        longest = pipeline.sampler.settings.max_new_tokens
        names = ", ".join(policy["name"] for policy in settings.policies)
        lines.append(f"Other policies ({names}): {others:,} completions, at most {others * longest:,} tokens.")
    labels = min(settings.label_pairs, len(experiment.pairs.pairs))
    calls = pool.rows(tuple(pool.task_ids)) + prompts * (pipeline.greedy is not None) + others + labels
    for judge in (experiment.reward.judge, *more_judges(experiment).values()):
        asked = f"Judge {judge.name}: at most {calls:,} comparisons"
        if isinstance(judge, OpenAIJudge):
            asked += f" ({2 * calls:,} calls, both orders; {2 * calls * (1 + judge.retries):,} with retries)"
        lines.append(f"{asked}.")
    return lines


def more_judges(experiment: Experiment) -> dict[str, judges.Judge]:
    """The judges beside the one that decides, by their name in the configuration."""
    folder = experiment.pipeline.run / "judge"
    return {name: judges.configured(config, folder) for name, config in experiment.settings.judges.items()}
