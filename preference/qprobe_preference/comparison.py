"""Probes of several layers and shapes on one embedding of the pairs, side by side in one table, with the controls under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qprobe.evaluation import comparisons
from qprobe.files import write_whole
from qprobe.pipeline.pipeline import Pipeline
from qprobe.pipeline.setup import BEST
from qprobe.probe.intervals import Interval
from qprobe.report.results import Results, Row
from qprobe.settings import build

_HEAD = ("layer", "probe", "chosen by", "pair accuracy", "95 % interval", "pairs", "seeds")

_PROBE = "Q-probe "
# Rows that say nothing about pairs: of two answers one is chosen at random, or by its label.
_EMPTY = ("pass@1", "greedy", "skyline")


@dataclass(frozen=True)
class Variant:
    """A layer and a probe's hidden widths; None takes the configuration's own."""

    layer: int | None
    hidden: tuple[int, ...] | None

    def of(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this variant's probes, whose results have a folder of their own."""
        training = pipeline.training
        if self.hidden is not None:
            training = dataclasses.replace(training, hidden=self.hidden)
        one = dataclasses.replace(pipeline, training=training, layer=self.layer or pipeline.layer)
        one.layer = BEST if one.layer == BEST else one.probe_layer
        layer = one.layer if isinstance(one.layer, str) else f"{one.layer:02d}"
        shape = "-".join(map(str, training.hidden)) or "linear"
        one.outputs = pipeline.run / "compared" / f"layer={layer}.{shape}"
        return one


@dataclass(frozen=True)
class _Compare:
    """The configuration's part `compare`."""

    layers: list[int]
    hidden: list[list[int]]


def variants(config: Mapping[str, Any]) -> list[Variant]:
    """What a configuration's part `compare` asks for; none where it asks for nothing.

    Raises:
        ValueError: an unknown key, values that are no layers or widths, or a `layer` or `probe.hidden` of the configuration that
            would not be among those compared.
    """
    compare = build(_Compare, config["compare"], "compare")
    layer, hidden = config["layer"], config["probe"]["hidden"]
    for key, value, many, asked in (
        ("layer", layer, "compare.layers", compare.layers if layer is not None else []),
        ("probe.hidden", hidden, "compare.hidden", compare.hidden if hidden else []),
    ):
        if asked and value not in asked:
            raise ValueError(
                f"{key} is {value}, but {many} asks for {asked}: say {many}=[{value}], or {many}=[] for `{key}` alone."
            )
    if not compare.layers and not compare.hidden:
        return []
    layers: list[int | None] = [*compare.layers] or [None]
    shapes: list[tuple[int, ...] | None] = [tuple(widths) for widths in compare.hidden] or [None]
    return [Variant(own, shape) for own in layers for shape in shapes]


def execute(pipeline: Pipeline, wanted: Sequence[Variant], names: Sequence[str]) -> None:
    """Run stages for every variant on the tables that the pipeline has made."""
    made = [variant.of(pipeline) for variant in wanted]  # a layer that is not there is said before any is trained
    for number, one in enumerate(made, start=1):
        assert one.outputs is not None  # a variant has its own
        print(f"{number} of {len(made)}: {one.outputs.name}")
        one.execute(names)


def write(pipeline: Pipeline, wanted: Sequence[Variant]) -> str:
    """Write the table of all variants to tables/compared.md; returns it with the place of everything."""
    lines = [f"# {pipeline.title}: probes compared", ""]
    for split in pipeline.tests:
        lines += [
            f"{split.name}, share of the pairs whose chosen answer scores higher, ties half; a coin gives .5.",
            "",
            _row(_HEAD),
            _row(["---"] * len(_HEAD)),
        ]
        results = {}
        for variant in wanted:
            one = variant.of(pipeline)
            shape = f"MLP {list(one.training.hidden)}" if one.training.hidden else "linear"
            results[one.layer, shape] = one.results(split)
        for (layer, shape), found in results.items():
            lines += [_cells(layer, shape, row) for row in found.rows if row.method.startswith(_PROBE)]
        # Lengths and likelihoods are the same at every layer; random directions and shuffled labels are shown at the last.
        lines += [_cells("", "control", row) for row in found.rows if not row.method.startswith((_PROBE, *_EMPTY))]
        lines += ["", *_against_controls(results)]
        lines += ["", "The best of several rows is flattered by having been chosen among them.", ""]
    text = "\n".join(lines)
    path = pipeline.run / "tables" / "compared.md"
    write_whole(path, text.encode())
    return f"{text}\ntable:    {path}\neach:     {pipeline.run / 'compared'}\nrun:      {pipeline.run}"


def _cells(layer: object, shape: str, row: Row) -> str:
    # A pair is one good and one bad answer: the AUC within it is its accuracy, whatever the temperature.
    value, low, high = (f"{x:.3f}" if x is not None else "not run" for x in (row.auc, row.auc_low, row.auc_high))
    return _row([layer, shape, row.method.removeprefix(_PROBE), value, f"[{low}, {high}]", row.prompts, row.seeds])


def _against_controls(results: Mapping[tuple[Any, str], Results]) -> list[str]:
    """Which probes do not beat the best control, paired over prompts, and whether any control was run."""
    if not any(found.best_control for found in results.values()):
        return ["No control was run (evaluation.controls): nothing says whether a probe is worth its training."]
    lines = []
    for (layer, shape), found in results.items():
        for row in (row for row in found.rows if row.method.startswith(_PROBE)):
            where, control = f"- Layer {layer}, {shape}: {row.method}", f"the best control, {found.best_control}"
            if row.over_control is None or row.over_control_low is None or row.over_control_high is None:
                lines.append(f"{where} cannot be compared with {control}: there are too few pairs.")
                continue
            gain = Interval(row.over_control, row.over_control_low, row.over_control_high)
            if not comparisons.beaten(gain):
                lines.append(f"{where} does not beat {control}: it earns {comparisons.in_words(gain)} against it.")
    return lines or ["Every probe beats the best control: the paired interval of the difference lies above 0."]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
