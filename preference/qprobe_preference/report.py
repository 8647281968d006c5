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

from qprobe.probe.metrics import Interval
from qprobe.report import Band
from qprobe.report.tables import NOT_RUN, Block, latex_page, markdown_page, text_page, write_formats
from qprobe_preference.winrates import Agreement, WinRate

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
        unit: of lengths, such as "tokens".
        notes: sentences that belong under the table.
    """

    title: str
    setting: str
    name: str
    methods: list[Method]
    unit: str = "tokens"
    notes: tuple[str, ...] = ()


def to_text(table: WinTable) -> str:
    """Set the table for a terminal, at most 100 columns wide."""
    return text_page(_head(table), _blocks(table), _foot(table))


def to_markdown(table: WinTable) -> str:
    """Set the table as Markdown (GitHub's tables)."""
    return markdown_page(_head(table), _blocks(table), _foot(table))


def to_latex(table: WinTable) -> str:
    """Set the table as a LaTeX `table` for the package booktabs, labelled `tab:<name>`."""
    return latex_page(_head(table), _blocks(table), _foot(table), table.name)


def to_csv(table: WinTable) -> str:
    """Write one line a method: fractions in full precision (the paper's value in per cent, as printed), empty if unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for m in table.methods:
        r = m.result
        numbers: list[float | int | None] = [m.k, m.beta]
        if r is None:
            numbers += [None] * (len(_CSV) - 5)
        else:
            numbers += [r.rate.value, *_ends(r.rate), *_ends(r.wilson)]
            numbers += [m.difference.value if m.difference else None, *_ends(m.difference)]
            numbers += [
                r.wins,
                r.ties,
                r.losses,
                sum(r.undecided.values()),
                len(r.prompts),
                r.length,
                r.reference_length,
            ]
            numbers += [r.length_controlled.value if r.length_controlled else None, *_ends(r.length_controlled)]
        numbers.append(m.paper)
        status = NOT_RUN if r is None else "run"
        writer.writerow([m.name, status, *("" if number is None else number for number in numbers)])
    return out.getvalue()


def write_tables(table: WinTable, folder: Path) -> list[Path]:
    """Write FOLDER/NAME.md, .tex, .csv and .txt; returns the four paths.

    Raises:
        OSError: if a file cannot be written; that file is then as it was before.
    """
    texts = {"md": to_markdown(table), "tex": to_latex(table), "csv": to_csv(table), "txt": to_text(table)}
    return write_formats(texts, folder, table.name)


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
    from qprobe.report.figures import bands, write_figure  # matplotlib is heavy, and tables do without it

    firsts = [line.value[0] for line in against_k.values() if ks[0] == 1 and line.value[0] is not None]
    base = ("base", 100 * firsts[0]) if firsts else None
    paths = []
    for name, xs, series, xlabel in (
        ("win_rate_against_k", ks, against_k, "candidates $k$"),
        ("win_rate_against_share", shares, depths, "share of the pairs (%)"),
    ):
        if series:
            lines = {method: _per_cent(line) for method, line in series.items()}
            figure = bands(title, xs, lines, xlabel=xlabel, ylabel="win rate (%)", base=base)
            paths += write_figure(figure, folder, name)
    return paths


def agreement_note(first: str, second: str, found: Agreement) -> str:
    """One sentence on how far two judges agree, for the notes under a table.

    Args:
        first, second: the judges' names.
        found: of their verdicts.
    """
    kappa = "undefined, both gave one verdict throughout"
    if found.kappa is not None:
        ends = [f"{end:.2f}" for end in (found.kappa.low, found.kappa.high)]
        kappa = f"{found.kappa.value:.2f} [{ends[0]}, {ends[1]}]"
    left_out = f"; {found.left_out:,} left out, without a verdict" if found.left_out else ""
    if found.itself:
        left_out += f"; {found.itself:,} left out, of an answer with itself"
    agreed = f"{found.agreed:.1%} of {found.table.sum():,} comparisons"
    return f"{first} and {second} agree on {agreed}, Cohen's kappa {kappa}{left_out}."


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
            f"for answers of the same length; lengths are means in {table.unit}."
        )
    for m in table.methods:
        if m.result is not None and m.result.undecided:
            low, high = m.result.undecided_range
            notes.append(
                f"{m.name}: {_reasons(m.result)} count half; all lost or all won would give "
                f"{100 * low:.1f} or {100 * high:.1f}."
            )
    return [*notes, *table.notes]


def _blocks(table: WinTable) -> list[Block]:
    methods = table.methods
    single = any(m.result is not None and m.result.wilson is not None for m in methods)
    published = any(m.paper is not None for m in methods)
    reached = Block(
        header=["method", "k", "beta", "win rate %", "difference", *["Wilson"] * single, *["paper"] * published],
        right=[False, True, True, False, False, *[False] * single, *[True] * published],
        rows=[],
    )
    meaning = Block(["method", "wins / ties / losses"], [False, False], [])
    undecided = any(m.result is not None and m.result.undecided for m in methods)
    lengths = any(m.result is not None and m.result.length is not None for m in methods)
    meaning.header.extend(["undecided"] * undecided + ["length", "judged against", "length-controlled %"] * lengths)
    meaning.right.extend([True] * undecided + [True, True, False] * lengths)
    for m in methods:
        r = m.result
        row = [m.name, str(m.k), _DASH if m.beta is None else f"{m.beta:.3g}", _rate(r.rate if r else None)]
        row.append(_DASH if r is not None and m.difference is None else _rate(m.difference, signed=True))
        if single:
            row.append(_DASH if r is None or r.wilson is None else _brackets(r.wilson))
        if published:
            row.append(_DASH if m.paper is None else f"{m.paper:.2f}")
        reached.rows.append(row)
        if r is None:
            continue
        row = [m.name, " / ".join(_count(number) for number in (r.wins, r.ties, r.losses))]
        row += [_count(sum(r.undecided.values()))] * undecided
        if lengths:
            row += [_DASH if length is None else f"{length:.1f}" for length in (r.length, r.reference_length)]
            row.append(_DASH if r.length_controlled is None else _rate(r.length_controlled))
        meaning.rows.append(row)
    return [reached, meaning] if meaning.rows else [reached]


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


def _reasons(result: WinRate) -> str:
    return ", ".join(f"{_count(number)} {reason.replace('_', ' ')}" for reason, number in result.undecided.items())


def _ends(interval: Interval | None) -> list[float | None]:
    if interval is None:
        return [None, None]
    return [end if math.isfinite(end) else None for end in (interval.low, interval.high)]


def _per_cent(line: Band) -> Band:
    value, low, high = (
        [None if entry is None else 100 * entry for entry in side] for side in (line.value, line.low, line.high)
    )
    return Band(value=value, low=low, high=high)
