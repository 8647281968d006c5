"""The figures of an evaluation.

    reward_against_k         expected reward against the number of candidates   (the paper's Fig. 3 and 5)
    reward_against_kl        expected reward against KL(pi_k || p0), in nats    (what a method gives for how far it goes)
    reward_against_prompts   expected reward against the training prompts       (would more of them help?)
    reward_against_layer     expected reward against the hidden layer           (Fig. 6)
    scores_per_prompt        a prompt's base reward against its mean score      (Fig. 4)
    certainty                is the chosen answer right as often as is said, and what do the surest choices earn?

Each is a function of `Results` that returns a figure, or None where the results hold no data of it. The dotted base is the row
pass@1. A method has the same colour and marker in all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprobe.files import fingerprint, write_whole
from qprobe.report import drawing
from qprobe.report.drawing import (
    COLUMN_INCHES,
    TEXT_INCHES,
    bands,
    draw_line,
    empty,
    image,
    look,
    own_style,
    panel,
    set_title,
    typeset,
    write_figure,
    write_names,
)
from qprobe.report.results import BASE_METHOD, Results, TradeOff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REWARD = "expected reward"


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw every figure whose data the results hold, unless they are there, drawn of these results by this code.

    Args:
        results: one evaluation.
        folder: where NAME.png and NAME.pdf go, and what they were drawn of (drawn.json); it is made if missing.

    Returns:
        The paths of the figures, PNG before PDF; none if the results hold no curve.

    Raises:
        OSError: if a file cannot be written; that file is then as it was before.
    """
    note, of = folder / "drawn.json", fingerprint([results.to_json(), *_code()])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # drawn anew
        known = json.loads(note.read_text(encoding="utf-8"))
        paths = [folder / name for name in known["figures"]]
        if known["of"] == of and all(path.is_file() for path in paths):
            return paths
    note.unlink(missing_ok=True)  # until all of them are these results'
    paths = [path for name, figure in _drawn(results) for path in write_figure(figure, folder, name)]
    if paths:
        write_whole(note, json.dumps({"of": of, "figures": [path.name for path in paths]}).encode())
    return paths


def _code() -> list[str]:
    """What decides how figures look, besides their data."""
    files = (Path(__file__), Path(drawing.__file__))
    return [
        importlib.metadata.version("matplotlib"),
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files),
    ]


def images(results: Results) -> Iterator[tuple[str, str, bytes]]:
    """Draw every figure whose data the results hold, for a page.

    Yields:
        (name, media type, image): SVG, or PNG where that is smaller (clouds of many points).
    """
    for name, figure in _drawn(results):
        vector, raster = image(figure, "svg"), image(figure, "png")
        small = len(vector) <= len(raster)
        yield name, *(("image/svg+xml", vector) if small else ("image/png", raster))


def _drawn(results: Results) -> Iterator[tuple[str, Figure]]:
    for name, draw in FIGURES.items():
        if (figure := draw(results)) is not None:
            yield name, figure


def reward_against_k(results: Results) -> Figure | None:
    """Expected reward against the number of candidates; the base is the value at k=1 where that was measured.

    Source: Fig. 3 (rewards of code) and Fig. 5 (win rates).
    """
    curve = results.reward_against_k
    at_one = [] if curve is None or curve.k[0] != 1 else [band.value[0] for band in curve.series.values()]
    measured = [_base(value) for value in at_one if value is not None]
    return _against(results, curve, "k", "candidates $k$", **({"base": measured[0]} if measured else {}))


def reward_against_prompts(results: Results) -> Figure | None:
    """Expected reward against the number of training prompts."""
    return _against(results, results.reward_against_prompts, "prompts", "training prompts")


def reward_against_layer(results: Results) -> Figure | None:
    """Expected reward against the hidden layer that probes read.

    Source: Fig. 6.
    """
    curve = results.reward_against_layer
    ticks = None if curve is None else curve.layers if len(curve.layers) <= 8 else curve.layers[::-4]
    return _against(results, curve, "layers", "hidden layer", ticks=ticks)


def _against(results: Results, curve: Any, xs: str, xlabel: str, **more: Any) -> Figure | None:
    """The lines of a curve against its field `xs`; the base is the row pass@1 where no other is given."""
    if curve is None or not curve.series:
        return None
    more = {"base": _base_reward(results), "order": _order(results), **more}
    return bands(_title(results), getattr(curve, xs), curve.series, xlabel=xlabel, ylabel=_REWARD, **more)


def reward_against_kl(results: Results) -> Figure | None:
    """What a method gives in reward for its distance from the base policy, one point a temperature.

    Each line ends at its smallest beta; the betas of the line that ends highest are written at its points.

    Source: the regularised objective E[Q] - beta KL(pi || p0), whose optimum the policy reaches as k grows.
    """
    trade_off = results.reward_against_kl
    if trade_off is None or not trade_off.series:
        return None
    with own_style():
        figure, axes = panel(_title(results), r"KL$(\pi_k\,\|\,p_0)$ (nats)", _REWARD)
        ends = []
        for method, series in trade_off.series.items():
            points = sorted((p for p in series if p.kl is not None and p.reward is not None), key=lambda p: -p.beta)
            if points:
                columns = ([getattr(point, name) for point in points] for name in ("kl", "reward", "low", "high"))
                ends.append(draw_line(axes, look(_order(results), method), method, *columns))
        if ends:
            _write_betas(axes, max(ends, key=lambda end: end[1])[0], trade_off)
        axes.set_xlim(left=0)
        write_names(figure, axes, ends, _base_reward(results))
    return figure


def _write_betas(axes: Any, method: str, trade_off: TradeOff) -> None:
    """Write beta at the points of one line, leaving out those that would touch the one before."""
    points = [point for point in trade_off.series[method] if point.kl is not None and point.reward is not None]
    points.sort(key=lambda point: point.kl or 0.0, reverse=True)
    furthest = points[0].kl or 0.0
    written = math.inf
    for point in points:
        if written - (point.kl or 0.0) < 0.11 * furthest:
            continue
        written = point.kl or 0.0
        text = rf"$\beta$={point.beta:.3g}" if point is points[0] else f"{point.beta:.3g}"
        axes.annotate(
            text, (point.kl, point.reward), (0, 4), textcoords="offset points", ha="center", fontsize=6, color="#333333"
        )


def scores_per_prompt(results: Results) -> Figure | None:
    """Where each probe puts easy and hard prompts, one panel a method, with the least-squares line.

    Panels share the axis of scores unless one method's scores span over five times another's.

    Source: Fig. 4.
    """
    scores = results.scores_per_prompt
    if scores is None or not scores.series:
        return None
    clouds = {
        method: [(point.base, point.score) for point in points if point.score is not None]
        for method, points in scores.series.items()
    }
    spans = [max(y for _, y in cloud) - min(y for _, y in cloud) for cloud in clouds.values() if cloud]
    bases = [x for cloud in clouds.values() for x, _ in cloud] or [0.0]
    # Rewards of a right answer lie in [0, 1]; imported ones may lie anywhere.
    low, high = (0.0, 1.0) if min(bases) >= 0 and max(bases) <= 1 else (min(bases), max(bases))
    margin = 0.04 * ((high - low) or 1.0)
    shared = not spans or max(spans) <= 5 * min(spans)
    columns = 2 if len(clouds) == 4 else min(len(clouds), 3)
    rows = math.ceil(len(clouds) / columns)
    width = COLUMN_INCHES if columns == 1 else TEXT_INCHES
    with own_style():
        figure = empty(width, 0.45 + 2.1 * rows)
        panels = list(figure.subplots(rows, columns, sharex=True, sharey=shared, squeeze=False).flat)
        for axes, (method, cloud) in zip(panels, clouds.items(), strict=False):
            xs, ys = [x for x, _ in cloud], [y for _, y in cloud]
            axes.scatter(xs, ys, s=9, color=look(_order(results), method)["color"], alpha=0.45, linewidths=0)
            name = method
            if (line := scores.line(method)) is not None:
                slope, intercept = line
                name = f"{method}, slope {slope:.2f}"
                ends = [min(xs), max(xs)]
                axes.plot(ends, [intercept + slope * x for x in ends], color="black", linewidth=1.2)
            axes.set_title(typeset(textwrap.fill(name, 40, break_on_hyphens=False)), loc="left")
            axes.set_xlim(low - margin, high + margin)
        for axes in panels[len(clouds) :]:
            axes.remove()
        # A column that ends a row early keeps its numbers: matplotlib left them to the panel that is gone.
        for axes in panels[max(0, len(clouds) - columns) : len(clouds)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("expected reward of the prompt, base model", fontsize=8)
        figure.supylabel("mean centred score", fontsize=8)
        set_title(figure, _title(results), width)
    return figure


def certainty(results: Results) -> Figure | None:
    """Left: how often choices are right against how likely that was said to be; the diagonal is where both agree. Right: what the
    choices earn of the prompts that a method is surest of: what an application gets that answers these and no others.
    """
    known = results.certainty
    if known is None or not known.series:
        return None
    with own_style():
        figure = empty(TEXT_INCHES, 2.6)
        said, kept = figure.subplots(1, 2)
        said.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        for method, own in known.series.items():
            style = look(_order(results), method)
            for axes, xs, band in ((said, own.predicted, own.observed), (kept, own.shares, own.surest)):
                draw_line(axes, style, method, xs, band.value, band.low, band.high)
        said.set_xlabel("predicted probability of being right")
        said.set_ylabel("share right")
        kept.set_xlabel("share of prompts answered, surest first")
        kept.set_ylabel("share right")
        for axes in (said, kept):
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
        set_title(figure, _title(results), TEXT_INCHES)
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    draw.__name__: draw
    for draw in (
        reward_against_k,
        reward_against_kl,
        reward_against_prompts,
        reward_against_layer,
        scores_per_prompt,
        certainty,
    )
}


def _title(results: Results) -> list[str]:
    each = "1 sample" if results.samples_per_prompt == 1 else f"{results.samples_per_prompt:,} samples"
    if results.samples != results.prompts * results.samples_per_prompt:
        each = f"at most {each}"
    return [results.title, f"{results.pool}: {results.prompts:,} prompts, {each} each"]


def _order(results: Results) -> list[str]:
    """The methods of all figures together, so that each looks the same in every one."""
    data = [getattr(results, name) for name in FIGURES]
    names = dict.fromkeys(name for held in data if held is not None for name in held.series)
    return [name for name in names if name != BASE_METHOD and not name.startswith("skyline")]


def _base_reward(results: Results) -> tuple[str, float] | None:
    return next((_base(row.value) for row in results.rows if row.method == BASE_METHOD and row.value is not None), None)


def _base(value: float) -> tuple[str, float]:
    return f"base ({BASE_METHOD})", value
