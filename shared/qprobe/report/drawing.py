"""How figures look and are written: one column of a paper, as PNG and PDF, lines with bands and their names at the right.

A method's name is level with its line: no legend covers data. Bands are 95 % intervals. The same results give the same
bytes: no dates, no settings of the user's matplotlib. Figures are built without pyplot, so nothing is opened, kept or changed
in a notebook that calls this.
"""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy.optimize import isotonic_regression

from qprobe.files import write_whole
from qprobe.report.results import BASE_METHOD, Band

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


@contextmanager
def own_style() -> Iterator[None]:
    """Matplotlib's defaults plus ours, whatever the user's matplotlibrc says; restored afterwards."""
    with style.context(["default", _STYLE]):
        yield


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME.png and NAME.pdf, the same bytes for the same figure; returns the two paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        write_whole(path, image(figure, path.suffix[1:]))
    return paths


def image(figure: Figure, suffix: str) -> bytes:
    """A figure as png, pdf or svg."""
    out = io.BytesIO()
    with own_style():
        figure.savefig(out, format=suffix, metadata=_NO_METADATA[suffix])
        # Half of the time is the layout, and what stands where is settled now: the next format takes it as it is.
        figure.set_layout_engine("none")
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
    ticks: list[int] | None = None,
) -> Figure:
    """Draw lines with their 95 % bands against counts or per cents, in the style of all figures.

    Args:
        title: lines above the panel.
        xs: increasing whole numbers; the axis is logarithmic (base 2) when they span more than a factor of 8.
        series: name -> one line, an entry for every x; names that begin with "skyline" are drawn as a bound.
        xlabel, ylabel: of the axes.
        base: name and height of a dotted line across.
        order: all names that colours are given to; None for those of this figure.
        ticks: of a linear axis, whatever xs span; None chooses axis and ticks by xs.
    """
    order = [name for name in series if not name.startswith("skyline")] if order is None else order
    with own_style():
        figure, axes = panel(title, xlabel, ylabel)
        ends = []
        for method, band in series.items():
            known = [i for i, value in enumerate(band.value) if value is not None]
            if known:
                value, low, high = ([side[i] for i in known] for side in (band.value, band.low, band.high))
                ends.append(draw_line(axes, look(order, method), method, [xs[i] for i in known], value, low, high))
        if ticks is None:
            if xs[-1] > 8 * xs[0]:
                axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_major_locator(FixedLocator(_spaced(xs) if ticks is None else ticks))
        write_names(figure, axes, ends, base)
    return figure


def panel(title: list[str], xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """A figure of one column with empty axes."""
    figure = empty(COLUMN_INCHES, 2.6)
    axes = figure.subplots()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    set_title(figure, title, COLUMN_INCHES)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def empty(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def set_title(figure: Figure, title: list[str], width: float) -> None:
    """Lines above a figure of so many inches."""
    lines = [line for part in title for line in textwrap.wrap(part, round(15 * width), break_on_hyphens=False)]
    figure.suptitle(typeset("\n".join(lines)), x=0.01, ha="left")


def typeset(text: str) -> str:
    """Show a text as it is, but for the paper's loss names: L_PG with a subscript."""
    return re.sub(r"\bL_([A-Z]+)\b", r"$L_{\\mathrm{\1}}$", text.replace("$", r"\$"))


def look(order: list[str], method: str) -> dict[str, Any]:
    """Colour, line and marker of a method, by its place among all."""
    if method.startswith("skyline"):
        return {"color": _GREY, "linestyle": "--", "marker": "None"}
    if method == BASE_METHOD:
        return {"color": "black", "linestyle": ":", "marker": "None"}
    place = order.index(method)
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": "-", "marker": _MARKERS[place % len(_MARKERS)]}


def draw_line(
    axes: Any,
    looks: dict[str, Any],
    name: str,
    xs: Sequence[float | None],
    ys: Sequence[float | None],
    low: Sequence[float | None],
    high: Sequence[float | None],
) -> tuple[str, float, str]:
    """Draw a line with its band: faint, with thin edges, so that bands which overlap can be told apart.

    Returns: name, last value and colour, for `write_names`.
    """
    (line,) = axes.plot(xs, ys, **looks)
    sides = [[math.nan if value is None else value for value in side] for side in (low, high)]
    axes.fill_between(line.get_xdata(), *sides, color=looks["color"], alpha=0.1, linewidth=0)
    for side in sides:
        axes.plot(line.get_xdata(), side, color=looks["color"], alpha=0.35, linewidth=0.6)
    return name, float(line.get_ydata()[-1]), looks["color"]


def _spaced(xs: list[int]) -> list[int]:
    """The ticks: all xs if they fit, else those that do not touch each other."""
    place = [math.log2(x) if xs[-1] > 8 * xs[0] else x for x in xs]
    clear = (place[-1] - place[0]) / 11
    chosen = [len(xs) - 1]
    for index in reversed(range(len(xs) - 1)):
        if place[chosen[-1]] - place[index] >= clear:
            chosen.append(index)
    return [xs[index] for index in reversed(chosen)]


def write_names(figure: Figure, axes: Any, ends: list[tuple[str, float, str]], base: tuple[str, float] | None) -> None:
    """Draw the base and write every name at the right of the axes, level with its line where there is space."""
    names = list(ends)
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
    centres = _apart([y for _, y, _ in names], [line_height * len(lines) for lines in wrapped])
    axes.set_ylim(low, high)
    for lines, (_, y, colour), centre in zip(wrapped, names, centres, strict=True):
        axes.annotate(
            typeset("\n".join(lines)),
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
    # With each box's offset in a gapless stack taken off, "no overlap" reads "not decreasing".
    offsets = [sum(heights[:i]) + heights[i] / 2 for i in range(len(heights))]
    levels = isotonic_regression([centre - offset for centre, offset in zip(centres, offsets, strict=True)]).x
    return [float(level) + offset for level, offset in zip(levels, offsets, strict=True)]
