"""The figures of an evaluation, sized for one column of a paper, as PNG and PDF.

    reward_against_k         expected reward against the number of candidates   (the paper's Fig. 3 and 5)
    reward_against_kl        expected reward against KL(pi_k || p0), in nats    (what a method gives for how far it goes)
    reward_against_prompts   expected reward against the training prompts       (would more of them help?)
    reward_against_layer     expected reward against the hidden layer           (Fig. 6)
    scores_per_prompt        a prompt's base reward against its mean score      (Fig. 4)

A method has the same colour and marker in all of them, and its name stands beside its line: no legend covers data.
Bands are 95 % intervals. The same results give the same bytes: no dates, no settings of the user's matplotlib. Figures
are built without pyplot, so nothing is opened, kept or changed in a notebook that calls this.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qprobe.files import write_whole
from qprobe.report.results import BASE_METHOD, Band, Results, TradeOff

try:
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("figures need matplotlib: pip install 'qprobe[report]'", name="matplotlib") from error

COLUMN_INCHES = 3.5
TEXT_INCHES = 7.0

# Okabe and Ito's palette for the colour-blind, without its yellow (too faint on white) and its black (the base).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#666666"
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.titlesize": 8,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # Journals refuse Type 3 fonts.
    "svg.hashsalt": "qprobe",  # Else names inside differ from run to run.
}
_NO_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draw every figure whose data the results hold.

    Args:
        results: one evaluation.
        folder: where NAME.png and NAME.pdf go; it is made if missing.

    Returns:
        The paths that were written, PNG before PDF; none if the results hold no curve.

    Raises:
        OSError: if a file cannot be written; that file is then as it was before.
    """
    figures = {name: draw(results) for name, draw in FIGURES.items()}
    return [
        path for name, figure in figures.items() if figure is not None for path in write_figure(figure, folder, name)
    ]


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME.png and NAME.pdf, the same bytes for the same figure; returns the two paths."""
    paths = []
    for suffix in ("png", "pdf"):
        path = folder / f"{name}.{suffix}"
        write_whole(path, _saved(figure, suffix))
        paths.append(path)
    return paths


def images(results: Results) -> Iterator[tuple[str, str, bytes]]:
    """Draw every figure whose data the results hold, for a page.

    Args:
        results: one evaluation.

    Yields:
        (name, media type, image): SVG, or PNG where that is smaller (clouds of many points).
    """
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is not None:
            vector, raster = _saved(figure, "svg"), _saved(figure, "png")
            small = len(vector) <= len(raster)
            yield name, *(("image/svg+xml", vector) if small else ("image/png", raster))


def _saved(figure: Figure, suffix: str) -> bytes:
    out = io.BytesIO()
    with _house_style():
        figure.savefig(out, format=suffix, metadata=_NO_METADATA[suffix])
    return out.getvalue()


def bands(
    title: list[str],
    xs: list[int],
    series: dict[str, Band],
    *,
    xlabel: str,
    ylabel: str,
    base: tuple[str, float] | None = None,
    order: list[str] | None = None,
) -> Figure:
    """Draw lines with their 95 % bands against counts or per cents, in the style of all figures.

    Args:
        title: lines above the panel.
        xs: increasing whole numbers; the axis is logarithmic (base 2) when they span more than a factor of 8.
        series: name -> one line, an entry for every x; names that begin with "skyline" are drawn as a bound.
        xlabel, ylabel: of the axes.
        base: name and height of a dotted line across.
        order: all names that colours are given to; None for those of this figure.

    Returns:
        The figure.
    """
    order = [name for name in series if not name.startswith("skyline")] if order is None else order
    with _house_style():
        figure, axes = _one_panel(title)
        ends = _draw_bands(axes, order, xs, series)
        _count_axis(axes, xs)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _finish(figure, axes, ends, base)
    return figure


def reward_against_k(results: Results) -> Figure | None:
    """Draw expected reward against the number of candidates, with 95 % bands.

    Args:
        results: one evaluation.

    Returns:
        The figure, or None without data. The axis is logarithmic (base 2) when k spans more than a factor of 8. The
        dotted base is the value at k=1, or that of the row pass@1 if k=1 was not measured.

    Source: Fig. 3 (rewards of code) and Fig. 5 (win rates).
    """
    curve = results.reward_against_k
    if curve is None or not curve.series:
        return None
    firsts = [band.value[0] for band in curve.series.values() if band.value[0] is not None]
    return bands(
        _title(results),
        curve.k,
        curve.series,
        xlabel="candidates $k$",
        ylabel="expected reward",
        base=_base(firsts[0]) if curve.k[0] == 1 and firsts else _base_reward(results),
        order=_order(results),
    )


def reward_against_prompts(results: Results) -> Figure | None:
    """Draw expected reward against the number of training prompts, with 95 % bands.

    Args:
        results: one evaluation.

    Returns:
        The figure, or None without data. The dotted base is the row pass@1.
    """
    curve = results.reward_against_prompts
    if curve is None or not curve.series:
        return None
    return bands(
        _title(results),
        curve.prompts,
        curve.series,
        xlabel="training prompts",
        ylabel="expected reward",
        base=_base_reward(results),
        order=_order(results),
    )


def reward_against_layer(results: Results) -> Figure | None:
    """Draw expected reward against the hidden layer that probes read, with 95 % bands.

    Args:
        results: one evaluation.

    Returns:
        The figure, or None without data. The dotted base is the row pass@1.

    Source: Fig. 6.
    """
    curve = results.reward_against_layer
    if curve is None or not curve.series:
        return None
    with _house_style():
        figure, axes = _one_panel(_title(results))
        ends = _draw_bands(axes, _order(results), curve.layers, curve.series)
        axes.xaxis.set_major_locator(FixedLocator(curve.layers if len(curve.layers) <= 8 else curve.layers[::-4]))
        axes.set_xlabel("hidden layer")
        axes.set_ylabel("expected reward")
        _finish(figure, axes, ends, _base_reward(results))
    return figure


def reward_against_kl(results: Results) -> Figure | None:
    """Draw what a method gives in reward for its distance from the base policy, one point a temperature.

    Args:
        results: one evaluation.

    Returns:
        The figure, or None without data. Each line ends at its smallest beta; the betas of the line that ends highest
        are written at its points.

    Source: the regularised objective E[Q] - beta KL(pi || p0), whose optimum the policy reaches as k grows.
    """
    trade_off = results.reward_against_kl
    if trade_off is None or not trade_off.series:
        return None
    with _house_style():
        figure, axes = _one_panel(_title(results))
        ends = []
        for method, series in trade_off.series.items():
            points = sorted((p for p in series if p.kl is not None and p.reward is not None), key=lambda p: -p.beta)
            if not points:
                continue
            look = _look(_order(results), method)
            kls = [point.kl for point in points]
            (line,) = axes.plot(kls, [point.reward for point in points], **look)
            _shade(axes, line, [point.low for point in points], [point.high for point in points])
            ends.append((method, float(line.get_ydata()[-1]), look["color"]))
        if ends:
            _write_betas(axes, max(ends, key=lambda end: end[1])[0], trade_off)
        axes.set_xlim(left=0)
        axes.set_xlabel(r"KL$(\pi_k\,\|\,p_0)$ (nats)")
        axes.set_ylabel("expected reward")
        _finish(figure, axes, ends, _base_reward(results))
    return figure


def scores_per_prompt(results: Results) -> Figure | None:
    """Draw where each probe puts easy and hard prompts, one panel a method, with the least-squares line.

    Args:
        results: one evaluation.

    Returns:
        The figure, or None without data. Panels share the axis of scores unless one method's scores span over five
        times another's.

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
    limits = low - margin, high + margin
    shared = not spans or max(spans) <= 5 * min(spans)
    columns = 2 if len(clouds) == 4 else min(len(clouds), 3)
    rows = math.ceil(len(clouds) / columns)
    width = COLUMN_INCHES if columns == 1 else TEXT_INCHES
    with _house_style():
        figure = Figure(figsize=(width, 0.45 + 2.1 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=shared, squeeze=False)
        panels = list(grid.flat)
        for panel, (method, cloud) in zip(panels, clouds.items(), strict=False):
            look = _look(_order(results), method)
            panel.scatter(
                [x for x, _ in cloud], [y for _, y in cloud], s=9, color=look["color"], alpha=0.45, linewidths=0
            )
            line = scores.line(method)
            if line is not None:
                slope, intercept = line
                ends = [min(x for x, _ in cloud), max(x for x, _ in cloud)]
                panel.plot(ends, [intercept + slope * x for x in ends], color="black", linewidth=1.2)
            name = method if line is None else f"{method}, slope {line[0]:.2f}"
            panel.set_title(_typeset(textwrap.fill(name, 40, break_on_hyphens=False)), loc="left")
            panel.set_xlim(*limits)
        for panel in panels[len(clouds) :]:
            panel.remove()
        # A column that ends a row early keeps its numbers: matplotlib left them to the panel that is gone.
        for panel in panels[max(0, len(clouds) - columns) : len(clouds)]:
            panel.tick_params(labelbottom=True)
        figure.supxlabel("expected reward of the prompt, base model", fontsize=8)
        figure.supylabel("mean centred score", fontsize=8)
        _set_title(figure, _title(results), width)
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "reward_against_k": reward_against_k,
    "reward_against_kl": reward_against_kl,
    "reward_against_prompts": reward_against_prompts,
    "reward_against_layer": reward_against_layer,
    "scores_per_prompt": scores_per_prompt,
}


def _draw_bands(axes: Any, order: list[str], xs: list[int], series: dict[str, Band]) -> list[tuple[str, float, str]]:
    """Draw a line with its band for every method; returns name, last value and colour of each, for the labels."""
    ends = []
    for method, band in series.items():
        look = _look(order, method)
        known = [i for i, value in enumerate(band.value) if value is not None]
        if not known:
            continue
        (line,) = axes.plot([xs[i] for i in known], [band.value[i] for i in known], **look)
        _shade(axes, line, [band.low[i] for i in known], [band.high[i] for i in known])
        ends.append((method, float(line.get_ydata()[-1]), look["color"]))
    return ends


def _count_axis(axes: Any, counts: list[int]) -> None:
    """An x axis of counts, logarithmic (base 2) when they span more than a factor of 8."""
    if counts[-1] > 8 * counts[0]:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_spaced(counts)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _shade(axes: Any, line: Any, low: list[float | None], high: list[float | None]) -> None:
    """Draw the 95 % band of a line: faint, with thin edges, so that bands which overlap can still be told apart."""
    ends = [[math.nan if value is None else value for value in side] for side in (low, high)]
    colour = line.get_color()
    axes.fill_between(line.get_xdata(), *ends, color=colour, alpha=0.1, linewidth=0)
    for end in ends:
        axes.plot(line.get_xdata(), end, color=colour, alpha=0.35, linewidth=0.6)


@contextmanager
def _house_style() -> Iterator[None]:
    # Drawn and saved by matplotlib's defaults plus ours, whatever the user's matplotlibrc says; restored afterwards.
    with style.context(["default", _STYLE]):
        yield


def _one_panel(title: list[str]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(COLUMN_INCHES, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    _set_title(figure, title, COLUMN_INCHES)
    return figure, axes


def _title(results: Results) -> list[str]:
    each = "1 sample" if results.samples_per_prompt == 1 else f"{results.samples_per_prompt:,} samples"
    if results.samples != results.prompts * results.samples_per_prompt:
        each = f"at most {each}"
    return [results.title, f"{results.pool}: {results.prompts:,} prompts, {each} each"]


def _set_title(figure: Figure, title: list[str], width: float) -> None:
    columns = round(15 * width)
    lines = [line for part in title for line in textwrap.wrap(part, columns, break_on_hyphens=False)]
    figure.suptitle(_typeset("\n".join(lines)), x=0.01, ha="left")


def _typeset(text: str) -> str:
    """Show a text as it is, but for the paper's loss names: L_PG with a subscript."""
    return re.sub(r"\bL_([A-Z]+)\b", r"$L_{\\mathrm{\1}}$", text.replace("$", r"\$"))


def _order(results: Results) -> list[str]:
    """The methods of all figures together, so that each looks the same in every one."""
    order: list[str] = []
    every = (
        results.reward_against_k,
        results.reward_against_kl,
        results.reward_against_prompts,
        results.reward_against_layer,
        results.scores_per_prompt,
    )
    for data in every:
        for name in data.series if data is not None else ():
            if name not in order and name != BASE_METHOD and not name.startswith("skyline"):
                order.append(name)
    return order


def _look(order: list[str], method: str) -> dict[str, Any]:
    if method.startswith("skyline"):
        return {"color": _GREY, "linestyle": "--", "marker": "None"}
    if method == BASE_METHOD:
        return {"color": "black", "linestyle": ":", "marker": "None"}
    place = order.index(method)
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": "-", "marker": _MARKERS[place % len(_MARKERS)]}


def _base_reward(results: Results) -> tuple[str, float] | None:
    return next((_base(row.value) for row in results.rows if row.method == BASE_METHOD and row.value is not None), None)


def _base(value: float) -> tuple[str, float]:
    return f"base ({BASE_METHOD})", value


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


def _spaced(ks: list[int]) -> list[int]:
    """Choose the ticks: all values of k if they fit, else those that stand clear of each other."""
    logarithmic = ks[-1] > 8 * ks[0]
    place = [math.log2(k) if logarithmic else k for k in ks]
    clear = (place[-1] - place[0]) / 11
    chosen = [len(ks) - 1]
    for index in reversed(range(len(ks) - 1)):
        if place[chosen[-1]] - place[index] >= clear:
            chosen.append(index)
    return [ks[index] for index in reversed(chosen)]


def _finish(figure: Figure, axes: Any, ends: list[tuple[str, float, str]], base: tuple[str, float] | None) -> None:
    """Draw the base and write every name at the right of the axes, level with its line where there is room."""
    names = [(method, y, colour) for method, y, colour in ends]
    if base is not None and all(method != BASE_METHOD for method, _, _ in ends):
        axes.axhline(base[1], color="black", linestyle=":", linewidth=1)
        names.append((*base, "black"))
    if not names:
        return
    names.sort(key=lambda entry: entry[1])
    wrapped = [textwrap.wrap(method, 16, break_on_hyphens=False) for method, _, _ in names]
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    line_height = 9.5 / 72 * figure.dpi / axes.get_window_extent().height * (high - low)
    heights = [line_height * len(lines) for lines in wrapped]
    centres = _apart([y for _, y, _ in names], heights)
    axes.set_ylim(low, high)
    for lines, (_, y, colour), centre in zip(wrapped, names, centres, strict=True):
        axes.annotate(
            _typeset("\n".join(lines)),
            xy=(1, y),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.06, centre),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour,
            fontsize=7,
            linespacing=1.05,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )


def _apart(centres: list[float], heights: list[float]) -> list[float]:
    """Move boxes (sorted by centre) apart until none overlap, by as little as least squares allows."""
    # With each box's offset in a gapless stack taken off, "no overlap" reads "not decreasing": isotonic regression.
    offsets = [sum(heights[:i]) + heights[i] / 2 for i in range(len(heights))]
    pools: list[tuple[float, int]] = []
    for centre, offset in zip(centres, offsets, strict=True):
        mean, size = centre - offset, 1
        while pools and pools[-1][0] > mean:
            earlier, count = pools.pop()
            mean, size = (earlier * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    levels = [mean for mean, size in pools for _ in range(size)]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]
