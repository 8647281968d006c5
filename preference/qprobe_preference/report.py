"""Win rates as tables (Markdown, LaTeX, CSV, plain text) and figures, on the pages and in the style of the core's report.

The table has two blocks. The first holds what was reached, in per cent: the win rate, Wilson's interval where a prompt has
one judged answer, the paired difference to the base policy, the paper's value where the set-up is the paper's. The second
says what to think of it: wins, ties and losses, lengths, the length-controlled rate. The CSV has one line a method, as
fractions in full precision.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from qprobe.probe.intervals import Interval
from qprobe.report import Band
from qprobe.report.tables import NOT_RUN, Block, latex_page, markdown_page, text_page, write_formats
from qprobe_preference.winrates import WinRate

_DASH = "-"
# fmt: off
_CSV = [
    "method", "status", "k", "beta", "rate", "low", "high", "wilson_low", "wilson_high", "difference",
    "difference_low", "difference_high", "wins", "ties", "losses", "undecided", "prompts", "length",
    "reference_length", "length_controlled", "length_controlled_low", "length_controlled_high", "paper",
]
# fmt: on


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        name: such as "base", "Q-probe L_QP", "skyline".
        result: what it reached; None if it was not run.
        difference: its paired difference to the base policy, as a fraction.
        k: candidates a prompt that it chooses between.
        beta: temperature of its choice; None where it has none.
        paper: the published win rate in per cent, only where the set-up is the paper's.
    """

    name: str
    result: WinRate | None
    difference: Interval | None = None
    k: int = 1
    beta: float | None = None
    paper: float | None = None


@dataclass(frozen=True)
class WinTable:
    """One table of win rates: one judge, one set of answers judged against.

    Args:
        title: what was evaluated.
        setting: judge, what the answers were judged against, what was trained on what.
        name: of the files, and the label in LaTeX.
        methods: the rows, in the order of printing.
        notes: sentences that belong under the table.
    """

    title: str
    setting: str
    name: str
    methods: list[Method]
    notes: tuple[str, ...] = ()


def to_text(table: WinTable) -> str:
    """Set the table for a terminal, at most 100 columns wide."""
    return text_page(_head(table), _blocks(table), _foot(table))


def to_csv(table: WinTable) -> str:
    """Write one line a method: fractions in full precision (the paper's value in per cent, as printed), empty if unknown."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, lineterminator="\n")
    writer.writeheader()
    for method in table.methods:
        found: dict[str, object] = {"method": method.name, "k": method.k, "beta": method.beta, "paper": method.paper}
        result = method.result
        found["status"] = NOT_RUN if result is None else "run"
        if result is not None:
            found |= {name: getattr(result, name) for name in ("wins", "ties", "losses", "length", "reference_length")}
            found |= {"undecided": sum(result.undecided.values()), "prompts": len(result.prompts)}
            found |= {"rate": result.rate.value, **_ends("", result.rate), **_ends("wilson_", result.wilson)}
            for name, interval in (("difference", method.difference), ("length_controlled", result.length_controlled)):
                found |= {name: None if interval is None else interval.value, **_ends(f"{name}_", interval)}
        writer.writerow(found)
    return out.getvalue()


def write_tables(table: WinTable, folder: Path) -> list[Path]:
    """Write FOLDER/NAME.md, .tex (a `table` for the package booktabs, labelled `tab:NAME`), .csv and .txt; returns the paths.

    Raises:
        OSError: if a file cannot be written; that file is then as it was before.
    """
    page = _head(table), _blocks(table), _foot(table)
    texts = {"md": markdown_page(*page), "tex": latex_page(*page, table.name)}
    return write_formats(texts | {"csv": to_csv(table), "txt": text_page(*page)}, folder, table.name)


def write_figures(
    title: list[str],
    folder: Path,
    ks: list[int],
    against_k: dict[str, Band],
    shares: list[int],
    depths: dict[str, Band],
) -> list[Path]:
    """Draw win rate against the number of candidates (Fig. 5) and against the share of the pairs (Fig. 6).

    Args:
        title: lines above both.
        folder: where win_rate_against_k and win_rate_against_share go, as PNG and PDF.
        ks: increasing numbers of candidates; where the first is 1 its value is drawn across as the base.
        against_k: method -> its rates, as fractions, an entry a k; names that begin with "skyline" are drawn as a bound.
        shares: increasing whole per cents of the pairs that probes learned from.
        depths: probe, such as "linear" or "2 layers" -> its rates, an entry a share. A figure without lines is not drawn.

    Returns:
        The paths that were written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from qprobe.report.drawing import bands, write_figure  # matplotlib is heavy, and tables do without it

    firsts = [line.value[0] for line in against_k.values() if ks[0] == 1 and line.value[0] is not None]
    base = ("base", 100 * firsts[0]) if firsts else None
    paths = []
    by_k = ("win_rate_against_k", ks, against_k, "candidates $k$")
    by_share = ("win_rate_against_share", shares, depths, "share of the pairs (%)")
    for name, xs, series, xlabel in (by_k, by_share):
        if series:
            lines = {method: _per_cent(line) for method, line in series.items()}
            figure = bands(title, xs, lines, xlabel=xlabel, ylabel="win rate (%)", base=base)
            paths += write_figure(figure, folder, name)
    return paths


def _head(table: WinTable) -> list[str]:
    counts = {len(m.result.prompts) for m in table.methods if m.result is not None}
    prompts = f"{' or '.join(f'{count:,}' for count in sorted(counts))} prompts" if counts else "nothing was run"
    return [" ".join(line.split()) for line in (table.title, f"{table.setting}; {prompts}")]


def _foot(table: WinTable) -> list[str]:
    results = [m.result for m in table.methods if m.result is not None]
    notes = [
        "Ties count half. In brackets: 95 % interval by bootstrap over prompts; differences are paired against the base."
    ]
    if any(r.wilson for r in results):
        notes.append("Wilson's interval takes a tie as half a win; with ties it is wider than need be.")
    if any(r.length is not None for r in results):
        notes.append(
            "Length-controlled: the rate that a logistic regression on tanh of the standardised difference in length predicts "
            "for answers of the same length; lengths are means in characters."
        )
    for m in table.methods:
        if m.result is not None and m.result.undecided:
            counts = ", ".join(f"{_count(n)} {why.replace('_', ' ')}" for why, n in m.result.undecided.items())
            low, high = (f"{100 * end:.1f}" for end in m.result.undecided_range)
            notes.append(f"{m.name}: {counts} count half; all lost or all won would give {low} or {high}.")
    return [*notes, *table.notes]


def _blocks(table: WinTable) -> list[Block]:
    methods, results = table.methods, [m.result for m in table.methods if m.result is not None]
    single = any(r.wilson is not None for r in results)
    published = any(m.paper is not None for m in methods)
    undecided = any(r.undecided for r in results)
    lengths = any(r.length is not None for r in results)
    reached = Block(
        header=["method", "k", "beta", "win rate %", "difference", *["Wilson"] * single, *["paper"] * published],
        right=[False, True, True, False, False, *[False] * single, *[True] * published],
        rows=[],
    )
    named = ["length", "judged against", "length-controlled %"]
    meaning = Block(
        header=["method", "wins / ties / losses", *["undecided"] * undecided, *named * lengths],
        right=[False, False, *[True] * undecided, *[True, True, False] * lengths],
        rows=[],
    )
    for m in methods:
        r = m.result
        row = [m.name, str(m.k), _DASH if m.beta is None else f"{m.beta:.3g}", _rate(r.rate if r else None)]
        row.append(_DASH if r is not None and m.difference is None else _rate(m.difference, signed=True))
        row += [_DASH if r is None or r.wilson is None else _brackets(r.wilson)] * single
        row += [_DASH if m.paper is None else f"{m.paper:.2f}"] * published
        reached.rows.append(row)
        if r is None:
            continue
        row = [m.name, " / ".join(_count(number) for number in (r.wins, r.ties, r.losses))]
        row += [_count(sum(r.undecided.values()))] * undecided
        if lengths:
            row += [_DASH if length is None else f"{length:.1f}" for length in (r.length, r.reference_length)]
            row.append(_DASH if r.length_controlled is None else _rate(r.length_controlled))
        meaning.rows.append(row)
    return [reached, meaning] if results else [reached]


def _rate(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return NOT_RUN
    value = f"{100 * interval.value:+.1f}" if signed else f"{100 * interval.value:.1f}"
    return f"{value} {_brackets(interval, signed)}" if math.isfinite(interval.low) else value


def _brackets(interval: Interval, signed: bool = False) -> str:
    low, high = (f"{100 * end:+.1f}" if signed else f"{100 * end:.1f}" for end in (interval.low, interval.high))
    return f"[{low}, {high}]"


def _count(number: float) -> str:
    """A whole number as it is; an expected one with its first decimal."""
    return f"{number:.0f}" if abs(number - round(number)) < 1e-6 else f"{number:.1f}"


def _ends(prefix: str, interval: Interval | None) -> dict[str, float]:
    ends = {} if interval is None else {f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    return {name: end for name, end in ends.items() if math.isfinite(end)}


def _per_cent(line: Band) -> Band:
    sides = ([None if x is None else 100 * x for x in side] for side in (line.value, line.low, line.high))
    value, low, high = sides
    return Band(value=value, low=low, high=high)
