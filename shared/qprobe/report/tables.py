"""The tables of an evaluation as Markdown, LaTeX, HTML, CSV and plain text.

The first holds what was reached: reward, paired difference, counts, and the paper's value where one belongs. The second is for
the rows that score completions: within-prompt AUC, temperature, seeds and their spread, which is another thing than the
interval. Where probes chose among layers a third one compares these. A cell says "not run" where a number could have been and
is not; a dash where none could be.
"""

import csv
import html
import io
import re
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from qprobe.files import write_whole
from qprobe.report.results import BASE_METHOD, LayerCurve, Results, Row

NOT_RUN = "not run"
_TEXT_WIDTH = 100

_DASH = "-"
# Columns that hold bare numbers, set to the right; those of published values are read by their points.
_NUMBERS = {"prompts", "samples each", "beta", "seeds", "seed spread", "layer", "taken by probes"}
_INTERVALS = f"In brackets: 95 % interval by bootstrap over prompts; differences are paired against {BASE_METHOD}."
_SPREAD = "Seed spread: standard deviation of the reward over seeds."


@dataclass(frozen=True)
class Block:
    """One table of a page, its cells ready to be set.

    Args:
        header: names of the columns.
        right: of each column, whether it holds bare numbers and is set to the right.
        rows: cells; the first of a row is text of the user, and may be long.
    """

    header: list[str]
    right: list[bool]
    rows: list[list[str]]


def to_text(results: Results) -> str:
    """Results for a terminal, at most 100 columns wide: title, protocol, counts, the tables and the notes."""
    return text_page(_head(results), _blocks(results), _foot(results))


def text_page(head: list[str], blocks: list[Block], foot: list[str]) -> str:
    """Set tables for a terminal: lines above, the tables, notes below."""
    lines = [line for part in head for line in textwrap.wrap(part, _TEXT_WIDTH, break_on_hyphens=False)]
    for block in blocks:
        lines += ["", *_aligned(block)]
    lines.append("")
    for note in foot:
        lines += textwrap.wrap(note, _TEXT_WIDTH, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def to_markdown(results: Results) -> str:
    """Results as Markdown (GitHub's tables)."""
    return markdown_page(_head(results), _blocks(results), _foot(results))


def markdown_page(head: list[str], blocks: list[Block], foot: list[str]) -> str:
    """Set tables as Markdown: a heading with lines under it, the tables, a list of notes; first columns are escaped."""
    title, *rest = (_escape_markdown(part) for part in head)
    parts = [f"### {title}", "  \n".join(rest)]
    for block in blocks:
        rule = ["---:" if right else ":---" for right in block.right]
        body = [[_escape_markdown(row[0]), *row[1:]] for row in block.rows]
        parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in [block.header, rule, *body]))
    parts.append("\n".join(f"- {_escape_markdown(note)}" for note in foot))
    return "\n\n".join(part for part in parts if part) + "\n"


def to_latex(results: Results) -> str:
    r"""Results as a LaTeX `table` to `\input`, for the package booktabs, labelled `tab:<pool>`; everything escaped."""
    return latex_page(_head(results), _blocks(results), _foot(results), results.pool)


def latex_page(head: list[str], blocks: list[Block], foot: list[str], name: str) -> str:
    r"""Set tables as one LaTeX `table`: the lines above become its caption, `name` its label."""
    label = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    caption = " ".join(_sentence(_escape_latex(part)) for part in head)
    lines = [
        r"% Needs \usepackage{booktabs} in the preamble.",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{label}}}",
        r"\small",
    ]
    for position, block in enumerate(blocks):
        if position:
            lines += ["", r"\medskip"]
        lines.append(rf"\begin{{tabular}}{{@{{}}{''.join('r' if right else 'l' for right in block.right)}@{{}}}}")
        header = " & ".join(map(_escape_latex, block.header)) + r" \\"
        lines += [r"\toprule", header, r"\midrule", *map(_latex_row, block.rows), r"\bottomrule"]
        lines.append(r"\end{tabular}")
    notes = " ".join(_sentence(_escape_latex(note)) for note in foot)
    lines += ["", r"\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {notes}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_html(results: Results) -> str:
    """Results as HTML, everything escaped, for a page that says their title and pool: tables have captions and scoped headers."""
    _, setting, counts = _head(results)
    own = setting.removeprefix(f"{_one_line(results.pool)}, ")
    parts = [f"<p>{html.escape(_sentence(line))}</p>" for line in (own, counts)]
    captions = "What each method earns", "How well the probes score", "What each layer earns"
    for block, caption in zip(_blocks(results), captions, strict=False):
        kinds = [' class="number"' if right else "" for right in block.right]
        cells = "".join(f'<th scope="col"{k}>{_escape_html(c)}</th>' for k, c in zip(kinds, block.header, strict=True))
        lines = [f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
        for name, *row in block.rows:
            cells = "".join(f"<td{k}>{html.escape(c)}</td>" for k, c in zip(kinds[1:], row, strict=True))
            lines.append(f'<tr><th scope="row">{_escape_html(name)}</th>{cells}</tr>')
        table = "\n".join([f"<table><caption>{caption}</caption>", *lines, "</tbody></table>"])
        parts.append(f'<div class="wide" role="region" aria-label="{caption}" tabindex="0">{table}</div>')
    notes = "\n".join(f"<li>{_escape_html(note)}</li>" for note in _foot(results))
    return "\n".join([*parts, f'<ul class="notes">\n{notes}\n</ul>'])


def to_csv(results: Results) -> str:
    """The rows for programs, in full precision: pool, protocol, k, status ("run" or "not run"), and the fields of `Row`.

    An empty cell is a number that is not there. Files of several evaluations can be joined end to end.
    """
    names = [entry.name for entry in fields(Row)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["pool", "protocol", "k", "status", *names])
    for row in results.rows:
        status = NOT_RUN if row.value is None else "run"
        values = (getattr(row, name) for name in names)
        writer.writerow([results.pool, results.protocol, results.k, status, *("" if v is None else v for v in values)])
    return out.getvalue()


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write POOL.md, POOL.tex, POOL.csv and POOL.txt into a folder that several pools can share; returns the four paths.

    Raises:
        OSError: a file cannot be written; it is then as it was before.
    """
    formats = {"md": to_markdown, "tex": to_latex, "csv": to_csv, "txt": to_text}
    return write_formats({suffix: render(results) for suffix, render in formats.items()}, folder, results.pool)


def write_formats(texts: dict[str, str], folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME.SUFFIX for every suffix and text, each whole or not at all; returns the paths."""
    stem = re.sub(r"[^\w.-]+", "-", name)
    paths = {folder / f"{stem}.{suffix}": text for suffix, text in texts.items()}
    for path, text in paths.items():
        write_whole(path, text.encode())
    return list(paths)


def counts_line(results: Results) -> str:
    """How much was evaluated, and on how much of it a choice could matter: "164 prompts x 8 samples, 31 prompts have ..."."""
    prompts = _count(results.prompts, "prompt")
    if results.samples == results.prompts * results.samples_per_prompt:
        size = f"{prompts} x {_count(results.samples_per_prompt, 'sample')}"
    else:
        size = f"{prompts}, {_count(results.samples, 'sample')} (at most {results.samples_per_prompt:,} of a prompt)"
    if results.mixed_prompts == 0:
        return f"{size}, no prompt has both good and bad completions: there is nothing to choose between"
    verb = "has" if results.mixed_prompts == 1 else "have"
    mixed = _count(results.mixed_prompts, "prompt")
    return f"{size}, {mixed} {verb} both good and bad completions (the only ones where choosing matters)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _head(results: Results) -> list[str]:
    seeds = f", {_count(results.seeds, 'seed')}" if results.seeds else ""
    setting = f"{results.pool}, k = {results.k}{seeds}; {results.protocol}"
    return [_one_line(part) for part in (results.title, setting, counts_line(results))]


def _foot(results: Results) -> list[str]:
    explained = [_INTERVALS, _SPREAD] if any(_is_probe(row) for row in results.rows) else [_INTERVALS]
    return [*explained, *(_one_line(note) for note in (*results.notes, *results.advice))]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _blocks(results: Results) -> list[Block]:
    paper = any(row.paper is not None for row in results.rows)
    greedy = any(row.over_greedy is not None for row in results.rows)
    probes = [row for row in results.rows if _is_probe(row)]
    tables = (
        [_reward_cells(row, paper) for row in results.rows],
        [_probe_cells(row, greedy, results.mixed_prompts) for row in probes],
        _layer_cells(results.reward_against_layer),
    )
    return [
        Block(list(cells[0]), [name in _NUMBERS for name in cells[0]], [list(row.values()) for row in cells])
        for cells in tables
        if cells
    ]


def _reward_cells(row: Row, paper: bool) -> dict[str, str]:
    difference = _interval(row.difference, row.difference_low, row.difference_high, signed=True)
    cells = {
        "method": _one_line(row.method),
        "reward": _interval(row.value, row.low, row.high),
        f"difference to {BASE_METHOD}": _DASH if row.method == BASE_METHOD and row.value is not None else difference,
        "prompts": str(row.prompts or _DASH),
        "samples each": (f"{row.fewest_samples} to " if row.fewest_samples else "")
        + str(row.samples_per_prompt or _DASH),
    }
    return cells | ({"paper": _DASH if row.paper is None else _published(row.paper)} if paper else {})


def _is_probe(row: Row) -> bool:
    return row.seeds > 0 or row.beta is not None or row.auc is not None or row.seed_spread is not None


def _probe_cells(row: Row, greedy: bool, mixed_prompts: int) -> dict[str, str]:
    # Without a prompt that has both good and bad completions there is no AUC, and one seed has no spread.
    auc = _interval(row.auc, row.auc_low, row.auc_high) if row.auc is not None or mixed_prompts else _DASH
    spread = _DASH if row.value is not None and row.seeds <= 1 else NOT_RUN
    over_greedy = _interval(row.over_greedy, row.over_greedy_low, row.over_greedy_high, signed=True)
    return {
        "method": _one_line(row.method),
        "within-prompt AUC": auc,
        **({"difference to greedy": over_greedy} if greedy else {}),
        "beta": _DASH if row.beta is None else f"{row.beta:.3g}",
        "seeds": str(row.seeds or _DASH),
        "seed spread": spread if row.seed_spread is None else f"{row.seed_spread:.3f}",
    }


def _layer_cells(curve: LayerCurve | None) -> list[dict[str, str]]:
    if curve is None:
        return []
    return [
        {
            "method": _one_line(method),
            "layer": str(layer),
            "reward": _interval(band.value[place], band.low[place], band.high[place]),
            "taken by probes": f"{curve.taken[method][place]} of {sum(curve.taken[method])}",
        }
        for method, band in curve.series.items()
        for place, layer in enumerate(curve.layers)
    ]


def _interval(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    if value is None:
        return NOT_RUN
    if low is None or high is None:
        return _decimals(value, signed)
    return f"{_decimals(value, signed)} [{_decimals(low, signed)}, {_decimals(high, signed)}]"


def _decimals(value: float, signed: bool) -> str:
    rounded = round(value, 3) + 0.0  # Adding 0.0 turns -0.0 into 0.0.
    return f"{rounded:+.3f}" if signed and rounded else f"{rounded:.3f}"


def _published(value: float) -> str:
    """Keep the digits that were printed, at least two: .3 was printed as .30."""
    digits = repr(value)
    return digits if len(digits.partition(".")[2]) >= 2 else f"{value:.2f}"


def _aligned(block: Block) -> list[str]:
    gap = "  "
    table = [block.header, *block.rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(block.header))]
    # Only a method's name may be long: it takes what the numbers leave, and goes on below.
    left = _TEXT_WIDTH - sum(widths[1:]) - len(gap) * (len(widths) - 1)
    widths[0] = min(widths[0], max(left, 12))
    lines = []
    for cells in table:
        names = textwrap.wrap(cells[0], widths[0], break_on_hyphens=False) or [""]
        first = [names[0], *cells[1:]]
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(first, widths, block.right, strict=True)
        ]
        lines += [gap.join(padded).rstrip(), *names[1:]]
    lines.insert(1, gap.join("-" * width for width in widths))
    return lines


def _escape_markdown(text: str) -> str:
    # An underscore inside a word is plain text in GitHub's Markdown, so L_PG stays readable.
    return re.sub(r"[\\`*|<>\[\]#~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a row these would be read as an argument of the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "β": r"$\beta$",
    "π": r"$\pi$",
}


def _escape_latex(text: str) -> str:
    """Escape a text, and set the paper's loss names as it does: L_PG with a subscript."""
    pieces = re.split(r"\bL_([A-Z]+)\b", text)
    escaped = ["".join(_LATEX.get(character, character) for character in piece) for piece in pieces[::2]]
    names = [rf"$L_{{\mathrm{{{name}}}}}$" for name in pieces[1::2]]
    return "".join(text for pair in zip(escaped, [*names, ""], strict=True) for text in pair)


def _escape_html(text: str) -> str:
    """Escape a text, and set the paper's loss names with a subscript."""
    return re.sub(r"\bL_([A-Z]+)\b", r"<i>L</i><sub>\1</sub>", html.escape(text))


def _latex_row(cells: list[str]) -> str:
    numbers = ("--" if cell == _DASH else re.sub(r"[+-](?=\d)", r"$\g<0>$", cell) for cell in cells[1:])
    return " & ".join([_escape_latex(cells[0]), *numbers]) + r" \\"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
