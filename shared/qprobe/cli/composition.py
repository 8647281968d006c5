"""From a composed configuration to back ends, pipelines and policies: the one place where a name becomes a back end.

Configurations are composed by Hydra from the groups in `qprobe/conf` (model, sampler, embedder, probe, evaluation). What is
wrong in one is a sentence before any work.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.baselines import Baseline
from qprobe.baselines.consistency import Agreement, SelfConsistency
from qprobe.baselines.few_shot import FewShot, FewShotSettings
from qprobe.baselines.finetune_rm import FinetuneRM
from qprobe.baselines.lora import LoRASettings
from qprobe.baselines.prompt_rm import PromptRM, PromptRMSettings
from qprobe.baselines.sft import SFT
from qprobe.cli import configuration
from qprobe.embedding import Embedder
from qprobe.embedding.hf import HFEmbedder
from qprobe.embedding.openai import OpenAIEmbedder
from qprobe.embedding.vllm import VLLMEmbedder
from qprobe.evaluation.sweep import EvaluationSettings, Procedure
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.pipeline import needs, ray_cluster
from qprobe.pipeline.pipeline import SHARDED, Pipeline
from qprobe.probe.estimator import QProbe
from qprobe.probe.training import TrainingSettings
from qprobe.run import lengths
from qprobe.run.recording import RecordedEmbedder, RecordedSampler
from qprobe.run.stages import Reward, Split
from qprobe.sampling import Sampler, SamplingSettings, StopRule
from qprobe.sampling.hf import HFSampler
from qprobe.sampling.openai import OpenAISampler
from qprobe.sampling.vllm import VLLMSampler
from qprobe.serving.policy import Policy
from qprobe.settings import UsageError, accepted, build, check_keys, meant

SAMPLERS = {"hf": HFSampler, "openai": OpenAISampler, "recorded": RecordedSampler, "vllm": VLLMSampler}
EMBEDDERS = {"hf": HFEmbedder, "openai": OpenAIEmbedder, "recorded": RecordedEmbedder, "vllm": VLLMEmbedder}
# What every configuration of a run has; whoever composes one adds keys of its own.
KEYS = {"authors", "stages", "seed", "shard", "runner", "layer", "model", "sampler", "embedder", "probe", "evaluation"}
# What two procedures in one table share.
COMMON = ("losses", "k", "curve_shares", "curve_prompts", "controls", "bootstrap")
# What an application needs besides a probe.
USE_KEYS = {"prompts", "model", "sampler", "embedder"}


def composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration of `qprobe/conf` with a user's overrides; see `configuration.composed`."""
    return configuration.composed(configuration.CORE, name, overrides)


@dataclass(frozen=True)
class BackEnds:
    """What draws and embeds completions.

    Args:
        greedy: the sampler at temperature 0; None where the row of greedy decoding is not asked for.
        rival: the sampler at temperature 0, for baselines.
        batch_rows: completions that are drawn together.
    """

    sampler: Sampler
    greedy: Sampler | None
    rival: Sampler
    embedder: Embedder
    batch_rows: int


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    return build(ModelSpec, config["model"], "model")


def back_ends(config: Mapping[str, Any], stop: Sequence[str] | None = None, rule: StopRule | None = None) -> BackEnds:
    """The back ends that a configuration's model, sampler and embedder describe.

    Args:
        stop: texts that end a completion; None takes the sampler's own key.
        rule: decides in their place where a completion ends.
    """
    sampling, embedding = dict(config["sampler"]), dict(config["embedder"])
    backend, greedy, batch_rows = (sampling.pop(key) for key in ("backend", "greedy", "batch_rows"))
    model = model_spec(config)
    sampler = _back_end(SAMPLERS, backend, "sampler")
    embedder = _back_end(EMBEDDERS, embedding.pop("backend"), "embedder")
    # What the back end itself takes, such as which server it asks, stands beside the sampling law.
    own = {key: sampling.pop(key) for key in accepted(sampler) - {"model", "settings"} if key in sampling}
    given: dict[str, Any] = {"rule": rule} if stop is None else {"stop": tuple(stop), "rule": rule}
    settings = build(SamplingSettings, sampling, "sampler", **given)
    at_zero = dataclasses.replace(settings, n=1, temperature=0.0, top_p=1.0, top_k=0)
    rival = build(sampler, own, "sampler", model=model, settings=at_zero)
    return BackEnds(
        build(sampler, own, "sampler", model=model, settings=settings),
        rival if greedy else None,
        rival,
        build(embedder, embedding, "embedder", model=model),
        batch_rows,
    )


def _back_end(known: dict[str, Any], name: str, where: str) -> Any:
    if name not in known:
        raise ValueError(f"{where}.backend is {name!r}: choose from {', '.join(known)}.")
    return known[name]


def _few_shot(values: Mapping[str, Any], config: Mapping[str, Any], ends: BackEnds, _: Agreement | None) -> Baseline:
    _check_drawn(config, "few_shot")
    settings = build(FewShotSettings, values, "baselines.few_shot", seed=config["seed"])
    return FewShot(ends.rival, settings, functools.partial(_room, config, ends))


def _check_drawn(config: Mapping[str, Any], name: str) -> None:
    """A recording has answers to its own prompts, by the model as it was, whichever model is asked for."""
    if config["sampler"]["backend"] == "recorded":
        raise ValueError(
            f"baselines.names: a recording holds no answers of {name}: leave it out, or sample with another back end."
        )


def _room(config: Mapping[str, Any], ends: BackEnds) -> int | None:
    """How many tokens a prompt may have: what the context leaves beside the longest completion."""
    if config["sampler"]["backend"] == "openai":
        return None
    context = lengths.context_of(ends.sampler)
    return None if context is None else context - ends.sampler.settings.max_new_tokens


def _prompt_rm(values: Mapping[str, Any], config: Mapping[str, Any], ends: BackEnds, _: Agreement | None) -> Baseline:
    own, spec = dict(values), model_spec(config)
    name = own.pop("model")
    if name is not None:
        spec = dataclasses.replace(spec, name=name, revision=None, adapter=None)  # the adapter is of the other model
    return PromptRM(spec, build(PromptRMSettings, own, "baselines.prompt_rm"))


def _self_consistency(
    values: Mapping[str, Any], config: Mapping[str, Any], ends: BackEnds, agreement: Agreement | None
) -> Baseline:
    check_keys(values, set(), "baselines.self_consistency")
    if agreement is None:
        raise ValueError(
            "baselines.names: what it means that two completions agree is not known here: leave self_consistency out."
        )
    return SelfConsistency(agreement)


def _sft(values: Mapping[str, Any], config: Mapping[str, Any], ends: BackEnds, _: Agreement | None) -> Baseline:
    if config["sampler"]["backend"] == "openai":
        raise ValueError(
            "baselines.names: an API's model cannot be fine-tuned here: leave sft out, or sample with hf or vllm."
        )
    _check_drawn(config, "sft")
    own = dict(values)
    success, drawn = own.pop("success"), ends.rival.settings

    def adapted(folder: Path) -> Sampler:
        sampling = {key: value for key, value in config["sampler"].items() if key != "stop"}
        model = {**config["model"], "adapter": str(folder)}
        return back_ends({**config, "sampler": sampling, "model": model}, drawn.stop, drawn.rule).rival

    return SFT(model_spec(config), build(LoRASettings, own, "baselines.sft"), adapted, success, config["seed"])


def _finetune_rm(values: Mapping[str, Any], config: Mapping[str, Any], ends: BackEnds, _: Agreement | None) -> Baseline:
    return FinetuneRM(model_spec(config), build(LoRASettings, values, "baselines.finetune_rm"), config["seed"])


# What makes a baseline of its part of the configuration.
BASELINES = {
    "few_shot": _few_shot,
    "sft": _sft,
    "prompt_rm": _prompt_rm,
    "finetune_rm": _finetune_rm,
    "self_consistency": _self_consistency,
}


def _baselines(config: Mapping[str, Any], ends: BackEnds, agreement: Agreement | None) -> list[Baseline]:
    values = dict(config.get("baselines", {}))
    names = values.pop("names", [])
    check_keys(values, set(BASELINES), "baselines")
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"baselines.names has {', '.join(map(str, unknown))}: choose from {', '.join(BASELINES)}.")
    return [BASELINES[name](values.get(name, {}), config, ends, agreement) for name in names]


def pipeline(
    config: Mapping[str, Any],
    *,
    run: Path,
    title: str,
    tests: Sequence[Split],
    reward: Reward,
    training_split: Split | None = None,
    stop: Sequence[str] | None = None,
    rule: StopRule | None = None,
    paper: dict[str, dict[str, float]] | None = None,
    use: dict[str, Any] | None = None,
    agreement: Agreement | None = None,
    apart: dict[str, dict[str, frozenset[str]]] | None = None,
    outputs: Path | None = None,
) -> Pipeline:
    """The pipeline of a configuration, with what the configuration does not hold: prompts and a reward.

    Args:
        stop: texts that end a completion; None takes the sampler's own key.
        rule: decides in their place where a completion ends.
        agreement: when two completions say the same, for self-consistency.
        apart: see `Pipeline.apart`.
        outputs: where probes, results, tables and figures go; None: the run folder.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
    """
    ends = back_ends(config, stop, rule)
    procedure, authors = procedures(config)
    return Pipeline(
        run=run,
        title=title,
        tests=tests,
        training_split=training_split,
        reward=reward,
        sampler=ends.sampler,
        greedy=ends.greedy,
        embedder=ends.embedder,
        baselines=_baselines(config, ends, agreement),
        likelihood=Likelihood(model_spec(config)) if "likelihood" in procedure.settings.controls else None,
        layer=procedure.layer,
        training=procedure.training,
        settings=procedure.settings,
        seed=config["seed"],
        batch_rows=ends.batch_rows,
        shard=_shard(config["shard"]),
        paper=paper or {},
        apart=apart or {},
        use=use or {},
        outputs=outputs,
        authors=authors,
    )


def procedures(config: Mapping[str, Any]) -> tuple[Procedure, Procedure | None]:
    """The procedure of the table's rows, and the paper's where it stands beside it (`authors`, on top of the configuration's).

    Raises:
        ValueError: a key that is none, or a value that cannot be.
    """
    ours = Procedure(
        build(TrainingSettings, config["probe"], "probe"),
        build(EvaluationSettings, config["evaluation"], "evaluation"),
        config["layer"],
    )
    changes = dict(config.get("authors") or {})
    layer = changes.pop("layer", None)
    if not changes:  # an experiment may say which layer the paper's probes would read
        return ours, None
    check_keys(changes, {"probe", "evaluation"}, "authors")
    if len(changes) < 2:
        raise ValueError(
            "authors are the paper's probes beside ours: say procedure=both, which knows the rest of their keys."
        )
    check_keys(changes["evaluation"], set(config["evaluation"]), "authors.evaluation")
    if common := [
        key for key in COMMON if changes["evaluation"].get(key, config["evaluation"][key]) != config["evaluation"][key]
    ]:
        raise ValueError(
            f"authors.evaluation.{common[0]} is not evaluation.{common[0]}: the paper's rows stand in our table, loss beside "
            f"loss; say evaluation.{common[0]}, or procedure=paper for a table of their own."
        )
    # Rows of the table are all that is asked of it.
    evaluation = {**config["evaluation"], **changes["evaluation"], "curve_shares": [], "curve_prompts": []}
    theirs = Procedure(
        build(TrainingSettings, {**config["probe"], **changes["probe"]}, "authors.probe"),
        build(EvaluationSettings, evaluation, "authors.evaluation"),
        layer,
    )
    return ours, theirs


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published values of a configuration (`paper`), where all of `paper_when` holds: key, with dots -> value; else none.

    Keys that begin with `procedure.` (probe, evaluation, layer) are those of the probes that the values stand beside: under
    procedure=both the paper's.

    Raises:
        ValueError: published values without a condition.
    """
    if not config["paper"]:
        return {}
    if not config["paper_when"]:
        raise ValueError("paper has values, but paper_when does not say of which set-up: name model.name at least.")
    ours, beside = procedures(config)
    theirs = beside or ours
    # An API has one layer, and what the configuration says of others is not used.
    layers = [] if config["embedder"]["backend"] == "openai" else config["embedder"].get("layers") or []
    layer = theirs.layer if theirs.layer is not None else max(layers, default=None)
    procedure = {"probe": _plain(theirs.training), "evaluation": _plain(theirs.settings), "layer": layer}
    found = {key: _value_at({**config, "procedure": procedure}, key) for key in config["paper_when"]}
    return dict(config["paper"]) if found == dict(config["paper_when"]) else {}


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as a configuration has them: tuples are lists."""
    values = dataclasses.asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _value_at(config: Mapping[str, Any], key: str) -> Any:
    """A value by its key with dots; None where a back end or the configuration has no such key."""
    at: Any = config
    for part in key.split("."):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at


def execute(make: Callable[[], Pipeline], config: Mapping[str, Any], more: Sequence[str] = ()) -> Pipeline:
    """Say what a configuration's stages need, and run them by its runner.

    Args:
        make: makes the pipeline; for Ray it is sent to other processes, so it must be picklable.
        more: lines on what the application needs besides.

    Raises:
        ValueError: an unknown runner, or a key that it does not know.
        RuntimeError: a need that is plainly not met.
    """
    runner, names = dict(config["runner"]), config["stages"]
    backend = runner.pop("backend")
    if backend == "ray":
        check_keys(runner, {"address", *SHARDED}, "runner")
        return ray_cluster.execute(make, names, runner, more)
    if backend != "local":
        raise ValueError(f"runner.backend is {backend!r}: choose from local, ray.")
    check_keys(runner, set(), "runner")
    pipeline = make()
    needs.tell(pipeline, names, more)
    pipeline.execute(names)
    return pipeline


def _shard(value: Any) -> tuple[int, int]:
    """The shard that a text such as "3/16" names; (1, 1), the whole, for None."""
    if value is None:
        return 1, 1
    number, slash, count = str(value).partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard is {value!r}: say 3/16 for the third of sixteen, or null for all.")
    return int(number), int(count)


def policy(probe: QProbe, overrides: Sequence[str] = (), beta: float | None = None) -> Policy:
    """The policy of a saved probe, with the sampler, model and style that its card names.

    Args:
        overrides: KEY=VALUE each, such as `sampler.temperature=0.7` or `model.device=cpu`.

    Raises:
        ValueError: a card that names none, or an override that cannot be.
    """
    if missing := sorted(USE_KEYS - set(probe.use)):
        raise ValueError(
            f"The probe's card does not say {', '.join(missing)}: it was not made by `qprobe run` or `qprobe import`. In "
            "Python, Policy(sampler, embedder, probe) takes any."
        )
    config = _overridden(probe.use, overrides)
    if probe.source is not None:
        config["embedder"]["layers"] = [probe.source.layer]
    config["sampler"]["greedy"] = False
    ends = back_ends(config)
    return Policy(ends.sampler, ends.embedder, probe, style=config["prompts"], beta=beta)


def _overridden(use: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with some values changed; no key is added."""
    config = copy.deepcopy(use)
    for name, value in configuration.values(overrides):
        *parents, key = name.split(".")
        at: Any = config
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
        if not isinstance(at, dict) or key not in at or isinstance(at[key], dict):
            known = {k if not isinstance(v, dict) else f"{k}.{inner}" for k, v in use.items() for inner in (v or ["-"])}
            raise UsageError(
                f"{name} is nothing that an answer is made with{meant(name, known)}: choose from {', '.join(sorted(known))}."
            )
        at[key] = value
    return config
