"""From a composed configuration to back ends, pipelines and policies: the one place where a name becomes a back end.

Configurations are composed by Hydra from the groups in `qprobe/conf`. Each part is filled into the dataclass or constructor that
it belongs to (`settings.build`), so that what is wrong in one is a sentence with the key's name, before any work.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qprobe.baselines import Baseline
from qprobe.baselines.consistency import Agreement, Remembered
from qprobe.cli import configuration, uses
from qprobe.embedding import Embedder, GivesLikelihoods
from qprobe.evaluation.sweep import EvaluationSettings, Procedure
from qprobe.models.language_model import ModelSpec
from qprobe.models.likelihood import Likelihood
from qprobe.pipeline import needs, ray_cluster
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.steps import SHARDED
from qprobe.probe.estimator import QProbe
from qprobe.probe.losses import AUTO
from qprobe.probe.training import TrainingSettings
from qprobe.registry import Registry
from qprobe.run import lengths
from qprobe.sampling import Sampler, SamplingSettings, StopRule
from qprobe.serving.policy import Policy
from qprobe.settings import accepted, build, check_keys, kinds_of

SAMPLERS, EMBEDDERS, BASELINES = (Registry(f"qprobe.{kind}") for kind in ("samplers", "embedders", "baselines"))
_RUNNERS: dict[str, set[str]] = {"local": set(), "ray": {"address", *SHARDED}}  # with the keys that each knows
# What every configuration of a run has; whoever composes one adds keys of its own.
KEYS = {"authors", "stages", "seed", "shard", "runner", "layer", "model", "sampler", "embedder", "probe", "evaluation"}
# What two procedures in one table share.
COMMON = ("losses", "k", "curve_shares", "curve_prompts", "controls", "bootstrap")


def composed(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration of `qprobe/conf` with a user's overrides; see `configuration.composed`."""
    return configuration.composed(configuration.CORE, name, overrides)


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a configuration."""
    return build(ModelSpec, config["model"], "model")


@dataclass(frozen=True)
class _Run:
    """Keys of a configuration that belong to no part."""

    stages: tuple[str, ...]
    seed: int
    shard: str | int | None
    layer: int | str | None


@dataclass(frozen=True)
class _Drawing:
    """Keys of a sampler's part that are neither the sampling law's nor the back end's own."""

    backend: str
    greedy: bool
    batch_rows: int


@dataclass(frozen=True)
class BackEnds:
    """What draws and embeds completions.

    Args:
        greedy: the sampler at temperature 0; None where the row of greedy decoding is not asked for.
        rival: the sampler at temperature 0, for baselines.
        under: makes the sampler under another law.
        batch_rows: completions in one part of a table.
    """

    sampler: Sampler
    greedy: Sampler | None
    rival: Sampler
    under: Callable[[SamplingSettings], Sampler]
    embedder: Embedder
    batch_rows: int


def back_ends(config: Mapping[str, Any], stop: Sequence[str] | None = None, rule: StopRule | None = None) -> BackEnds:
    """The back ends that a configuration's model, sampler and embedder describe.

    Args:
        stop: texts that end a completion; None takes the sampler's own key.
        rule: decides in their place where a completion ends.

    Raises:
        ValueError: an unknown back end or key, or a value that cannot be.
    """
    model, values, embedding = model_spec(config), dict(config["sampler"]), dict(config["embedder"])
    drawing = build(_Drawing, _part(values, accepted(_Drawing)), "sampler")
    sampler = SAMPLERS.find(drawing.backend, "sampler.backend")
    embedder = EMBEDDERS.find(embedding.pop("backend", None), "embedder.backend")
    own = _part(values, accepted(sampler) - {"model", "settings"})
    given: dict[str, Any] = {"rule": rule} if stop is None else {"stop": tuple(stop), "rule": rule}
    settings = build(SamplingSettings, values, "sampler", **given)
    at_zero = dataclasses.replace(settings, n=1, temperature=0.0, top_p=1.0, top_k=0)
    embeds = build(embedder, embedding, "embedder", model=model)

    def under(law: SamplingSettings) -> Sampler:
        made: Sampler = build(sampler, own, "sampler", model=model, settings=law)
        return made

    rival = under(at_zero)
    return BackEnds(under(settings), rival if drawing.greedy else None, rival, under, embeds, drawing.batch_rows)


def _part(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """Take some keys out of a part of a configuration."""
    return {key: values.pop(key) for key in sorted(keys & set(values))}


def _baselines(config: Mapping[str, Any], ends: BackEnds, agreement: Agreement | None) -> list[Baseline]:
    values = dict(config.get("baselines", {}))
    names = values.pop("names", [])
    check_keys(values, {*BASELINES.names(), *names}, "baselines")

    def longest() -> int | None:
        context = lengths.context_of(ends.sampler)
        return None if context is None else context - ends.sampler.settings.max_new_tokens

    def adapted(folder: Path) -> Sampler:
        drawn = ends.rival.settings
        sampling = {key: value for key, value in config["sampler"].items() if key != "stop"}
        model = {**config["model"], "adapter": str(folder)}
        return back_ends({**config, "sampler": sampling, "model": model}, drawn.stop, drawn.rule).rival

    def redrawn(**changes: Any) -> Sampler:
        law = dataclasses.replace(ends.sampler.settings, rule=None, **changes)
        if config["sampler"]["backend"] != "recorded":
            return ends.under(law)
        # A recording holds no other completions.
        made: Sampler = SAMPLERS.find("hf", "sampler.backend")(model_spec(config), law)
        return made

    # What a constructor may ask for by name: see `baselines.Baseline`.
    offered = {
        "sampler": ends.rival,
        "longest": longest,
        "adapted": adapted,
        "embedder": ends.embedder,
        "redrawn": redrawn,
    }
    offered |= {"agreement": None if agreement is None else Remembered(agreement)}
    offered |= {"model": model_spec(config), "seed": config["seed"]}
    found: list[Baseline] = []
    for name in names:
        make, own = BASELINES.find(name, "a name of baselines.names"), values.get(name, {})
        if (backend := config["sampler"]["backend"]) in make.cannot_use:
            raise ValueError(
                f"baselines.names has {name}, which sampler={backend} cannot draw: leave it out, or take another sampler."
            )
        given = {key: value for key, value in offered.items() if key in accepted(make)}
        if "settings" in accepted(make):
            kind = kinds_of(make)["settings"]
            seed = {"seed": config["seed"]} if "seed" in accepted(kind) else {}
            given["settings"], own = build(kind, own, f"baselines.{name}", **seed), {}
        found.append(build(make, own, f"baselines.{name}", **given))
    return found


def pipeline(
    config: Mapping[str, Any],
    *,
    stop: Sequence[str] | None = None,
    rule: StopRule | None = None,
    agreement: Agreement | None = None,
    **more: Any,
) -> Pipeline:
    """The pipeline of a configuration, with what the configuration does not hold: prompts and a reward.

    Args:
        stop: texts that end a completion; None takes the sampler's own key.
        rule: decides in their place where a completion ends.
        agreement: when two completions say the same, for self-consistency.
        more: of the arguments of `Pipeline`: run, title, tests, reward, training_split, paper, use, apart, outputs.

    Raises:
        ValueError: an unknown key, or a value that cannot be; before any work.
    """
    run = build(_Run, {key: config[key] for key in accepted(_Run)}, "the configuration")
    ends = back_ends(config, stop, rule)
    procedure, papers = procedures(config)
    settings = procedure.settings
    baselines = _baselines(config, ends, agreement)
    read = AUTO in settings.losses or "likelihood_columns" in settings.controls
    if isinstance(ends.embedder, GivesLikelihoods) and not (
        read or any(baseline.reads_likelihoods for baseline in baselines)
    ):
        ends.embedder.likelihood = False  # nobody reads them, and they cost a pass over the output head
    if getattr(ends.embedder, "question", None) and not getattr(ends.embedder, "likelihood", False):
        raise ValueError(
            "embedder.question is asked for nobody: its columns lie beside the likelihood columns, which the loss auto or the "
            "controls likelihood_columns read (and embedder.likelihood must be true). Add one of these, or say null."
        )
    return Pipeline(
        sampler=ends.sampler,
        greedy=ends.greedy,
        embedder=ends.embedder,
        baselines=baselines,
        likelihood=Likelihood(model_spec(config)) if "likelihood" in procedure.settings.controls else None,
        layer=procedure.layer,
        training=procedure.training,
        settings=procedure.settings,
        seed=run.seed,
        batch_rows=ends.batch_rows,
        shard=_shard(run.shard),
        authors=papers,
        **more,
    )


def _shard(value: str | int | None) -> tuple[int, int]:
    """The shard that a text such as "3/16" names; (1, 1), the whole, for None."""
    found = re.fullmatch(r"(\d+)/(\d+)", "1/1" if value is None else str(value))
    if found is None:
        raise ValueError(f"shard is {value!r}: say 3/16 for the third of sixteen, or null for all.")
    return int(found[1]), int(found[2])


def procedures(config: Mapping[str, Any]) -> tuple[Procedure, Procedure | None]:
    """The procedure of the table's rows, and the paper's where its rows are asked for too (`authors`, changes of the former).

    Raises:
        ValueError: an unknown key, or a value that cannot be.
    """
    ours = _procedure(config["probe"], config["evaluation"], config["layer"])
    changes = dict(config.get("authors") or {})
    layer = changes.pop("layer", None)
    if not changes:  # an experiment may say which layer the paper's probes would read
        return ours, None
    check_keys(changes, {"probe", "evaluation"}, "authors")
    if len(changes) < 2:
        raise ValueError("authors has keys of the paper's procedure, but not all: say procedure=both.")
    evaluation = config["evaluation"]
    check_keys(changes["evaluation"], set(evaluation), "authors.evaluation")
    for key in COMMON:
        if changes["evaluation"].get(key, evaluation[key]) != evaluation[key]:
            raise ValueError(
                f"authors.evaluation.{key} is not evaluation.{key}, and rows of one table share it: say evaluation.{key}, or "
                "procedure=paper for a table of its own."
            )
    # Rows of the table are all that is asked of it.
    evaluation = {**evaluation, **changes["evaluation"], "curve_shares": [], "curve_prompts": []}
    return ours, _procedure({**config["probe"], **changes["probe"]}, evaluation, layer, "authors.")


def _procedure(probe: Mapping[str, Any], evaluation: Mapping[str, Any], layer: Any, where: str = "") -> Procedure:
    training = build(TrainingSettings, probe, f"{where}probe")
    return Procedure(training, build(EvaluationSettings, evaluation, f"{where}evaluation"), layer)


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published values of a configuration (`paper`), where all of `paper_when` holds: key, with dots -> value; else none.

    Keys that begin with `procedure.` (probe, evaluation, layer) are those of the probes that the values belong to: under
    procedure=both the paper's.

    Raises:
        ValueError: published values without a condition.
    """
    if not config["paper"]:
        return {}
    if not config["paper_when"]:
        raise ValueError("paper has values, but paper_when does not say of which set-up: name model.name at least.")
    ours, papers = procedures(config)
    used = papers or ours
    # An API has one layer, and what the configuration says of others is not used.
    layers = [] if config["embedder"]["backend"] == "openai" else config["embedder"].get("layers") or []
    layer = used.layer if used.layer is not None else max(layers, default=None)
    procedure = {"probe": _plain(used.training), "evaluation": _plain(used.settings), "layer": layer}
    found = {key: _value_at({**config, "procedure": procedure}, key) for key in config["paper_when"]}
    return dict(config["paper"]) if found == dict(config["paper_when"]) else {}


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as a configuration has them: tuples are lists."""
    values = dataclasses.asdict(settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _value_at(config: Any, key: str) -> Any:
    """A value by its key with dots; None where a back end or the configuration has no such key."""
    return functools.reduce(lambda at, part: at.get(part) if isinstance(at, Mapping) else None, key.split("."), config)


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
    backend = runner.pop("backend", None)
    if backend not in _RUNNERS:
        raise ValueError(f"runner.backend is {backend!r}: choose from {', '.join(_RUNNERS)}.")
    check_keys(runner, _RUNNERS[backend], "runner")
    if backend == "ray":
        return ray_cluster.execute(make, names, runner, more)
    made = make()
    needs.tell(made, names, more)
    made.execute(names)
    return made


def policy(probe: QProbe, overrides: Sequence[str] = (), beta: float | None = None) -> Policy:
    """The policy of a saved probe, with the sampler, model and style that its card names.

    Args:
        overrides: KEY=VALUE each, such as `sampler.temperature=0.7` or `model.device=cpu`.

    Raises:
        ValueError: a card that names none, or an override that cannot be.
    """
    config = uses.used(probe, overrides)
    ends = back_ends(config)
    return Policy(ends.sampler, ends.embedder, probe, style=config["prompts"], beta=beta)
