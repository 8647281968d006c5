"""Policy experiments: probes of training pairs choose among K answers to each test prompt, and a judge says what that wins.

The prompts are those of the test pairs, each once; the core's reward stage judges each candidate against the data set's chosen
answer. Probes are trained on the labels of pairs, never on a judgement.

Candidates of a run folder that have labels (`dataset=run`) need no training pairs: probes are trained on the labels, a good
and a bad completion of a prompt as a pair, by cross-validation over all prompts; the labels are reported too.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprobe.cli import composition
from qprobe.pipeline.pipeline import Pipeline
from qprobe.run.pools import Split
from qprobe.run.rewards import RecordedReward
from qprobe.sampling import Sampler
from qprobe.settings import build, check_keys
from qprobe_preference import dataset, judges, splits
from qprobe_preference.dataset import Dataset
from qprobe_preference.judges import AgainstReference
from qprobe_preference.judges.openai import OpenAIJudge
from qprobe_preference.pairs import Pair, PairSet, run_folder

# Where the assistant's turn ends in a transcript.
_TRANSCRIPT_STOP = ("\n\nHuman:", "\n\nAssistant:")


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
    """Rewards of the candidates in the run folder that they are from.

    Args:
        labels: task id -> of its candidates.
        references: task id -> of the answer that they are compared with.
    """

    labels: dict[str, list[float]]
    references: dict[str, float]


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
        against: what the reference is, in words.
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
        """The prompts that are tested on."""
        return self.pipeline.tests[0]

    def further_rewards(self) -> list[AgainstReference]:
        """The same comparisons by the judges of `policy.judges`."""
        folder = self.pipeline.run / "judge"
        further = (judges.configured(config, folder) for config in self.settings.judges.values())
        return [AgainstReference(judge, self.split.prompts, self.reward.references) for judge in further]


def make_pipeline(config: dict[str, Any]) -> Pipeline:
    """The pipeline of a policy experiment: what a cluster's workers make for themselves."""
    return load(config).pipeline


def load(config: dict[str, Any]) -> Experiment:
    """Read pairs and recorded candidates, and make the pipeline.

    Raises:
        ValueError: a value that cannot be; before any work.
        OSError: pairs that cannot be read, or that the hub does not give.
    """
    if "judge" not in config:
        raise ValueError("A policy experiment needs a judge: say judge=implicit, judge=openai or judge=reward_model.")
    settings = build(PolicySettings, config["policy"], "policy")
    style = dataset.prompt_style(config)
    stop = _TRANSCRIPT_STOP if style == "text" else ()
    ends = composition.back_ends(config, stop=stop)
    judge = judges.configured(config["judge"], splits.folder_of_run(config) / "judge")
    training, test = dataset.load(config["dataset"], config["seed"], ends.sampler, ends.embedder, style)
    truth = None
    if training is not None:
        asked = drawn_prompts(test, settings.prompts, config["seed"])
        tested = splits.prompts_split(asked, style)
        references = {pair.pair_id: pair.answers(style)[0] for pair in asked.pairs}
        reward, against = AgainstReference(judge, tested.prompts, references), "the data set's chosen answer"
        tested = dataclasses.replace(tested, reward=reward)
    elif config["dataset"].get("format") == "run":
        own = build(Dataset, config["dataset"], "dataset", seed=config["seed"])
        tested, references, against, truth = _of_run(own, settings, ends.sampler)
        reward = AgainstReference(judge, tested.prompts, references)
    else:
        raise ValueError(
            "A policy experiment trains on other prompts than it is tested on: name a training set, or cut the pairs in two by "
            "dataset.test_share=0.5."
        )
    pipeline = splits.pipeline(config, tested, training, style, stop)
    return Experiment(config, settings, pipeline, test, style, reward, against, truth)


def _of_run(own: Dataset, settings: PolicySettings, sampler: Sampler) -> tuple[Split, dict[str, str], str, Truth]:
    """The prompts of a run folder with their completions and labels; and what each is judged against, which is the run's greedy
    answer to its prompt, or the prompt's first where the run has none.
    """
    folder, pool = Path(str(own.path)).expanduser(), own.options["pool"]
    name = pool.rpartition(".")[0]

    def read(pool: str, reward: str | None) -> dict[str, run_folder.Judged]:
        found = run_folder.judged(folder, pool, lambda p: sampler.render(p)[0], reward)
        return {task.prompt.task_id: task for task in found}

    tasks = dict(list(read(pool, own.options.get("reward")).items())[: settings.prompts])
    greedy = (folder / "completions" / f"{name}.greedy").is_dir()
    base = read(f"{name}.greedy", None) if greedy else tasks
    labels = {key: task.rewards for key, task in tasks.items()}
    split = Split(
        own.name,
        [task.prompt for task in tasks.values()],
        {"run": folder.name, "pool": pool, "prompts": settings.prompts},
        recorded={key: task.completions for key, task in tasks.items()},
        reward=RecordedReward(labels),
    )
    references = {key: base[key].completions[0] for key in tasks}
    against = "the run's greedy answer" if greedy else "the prompt's first answer"
    return split, references, against, Truth(labels, {key: base[key].rewards[0] for key in tasks})


def drawn_prompts(pairs: PairSet, count: int | None, seed: int) -> PairSet:
    """One pair of every prompt, of `count` prompts drawn over all sources, or of all."""
    first: dict[str, Pair] = {}
    for pair in pairs.pairs:
        first.setdefault(pair.prompt_id, pair)
    # Ids end in .000, as those of the first pair of a prompt.
    every = [dataclasses.replace(pair, pair_id=f"{number}.000") for number, pair in first.items()]
    if count is not None and count < len(every):
        every = [every[place] for place in sorted(random.Random(seed).sample(range(len(every)), count))]
    return dataclasses.replace(pairs, pairs=every, source={**pairs.source, "asked": {"count": count, "seed": seed}})


def paper_values(experiment: Experiment) -> dict[str, float]:
    """The published win rates by row, where all of `policy.paper_when` holds; else none."""
    settings = experiment.settings
    return composition.published({**experiment.config, "paper": settings.paper, "paper_when": settings.paper_when})


def needs(experiment: Experiment) -> list[str]:
    """What a run needs besides the core's stages (`pipeline.needs`): other policies' answers, and comparisons. At most: what
    was judged before is not asked again.
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
    for judge in (reward.judge for reward in (experiment.reward, *experiment.further_rewards())):
        asked = f"Judge {judge.name}: at most {calls:,} comparisons"
        if isinstance(judge, OpenAIJudge):
            asked += f" ({2 * calls:,} calls, both orders; {2 * calls * (1 + judge.retries):,} with retries)"
        lines.append(f"{asked}.")
    return lines
