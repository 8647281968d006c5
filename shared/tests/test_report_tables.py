"""Tables in four formats: what is printed is what was measured."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from qprobe.report.results import Results, Row
from qprobe.report.tables import counts_line, to_csv, to_latex, to_markdown, to_text, write_tables

SMALL = Results(
    title="A model & 100 % of its tasks",
    protocol="trained on mbpp-train, tested here",
    pool="human_eval",
    k=8,
    prompts=164,
    samples=1312,
    samples_per_prompt=8,
    mixed_prompts=31,
    seeds=10,
    rows=[
        Row(method="pass@1", value=0.123, low=0.087, high=0.16, prompts=164, samples_per_prompt=8, paper=0.3),
        Row(method="SFT"),
        Row(
            method="Q-probe L_PG",
            value=0.2,
            low=0.15,
            high=0.25,
            prompts=164,
            samples_per_prompt=8,
            seeds=10,
            seed_spread=0.0041,
            beta=0.1,
            auc=0.625,
            auc_low=0.55,
            auc_high=0.7,
            difference=0.077,
            difference_low=-0.01,
            difference_high=0.1641,
            over_greedy=0.05,
            over_greedy_low=-0.02,
            over_greedy_high=0.12,
            paper=0.3457,
        ),
    ],
    notes=["Layer 26 | last_token."],
)

TEXT = """\
A model & 100 % of its tasks
human_eval, k = 8, 10 seeds; trained on mbpp-train, tested here
164 prompts x 8 samples, 31 prompts have both good and bad completions (the only ones where choosing
matters)

method        reward                difference to pass@1     prompts  samples each  paper
------------  --------------------  -----------------------  -------  ------------  ------
pass@1        0.123 [0.087, 0.160]  -                            164             8  0.30
SFT           not run               not run                        -             -  -
Q-probe L_PG  0.200 [0.150, 0.250]  +0.077 [-0.010, +0.164]      164             8  0.3457

method        within-prompt AUC     difference to greedy     beta  seeds  seed spread
------------  --------------------  -----------------------  ----  -----  -----------
Q-probe L_PG  0.625 [0.550, 0.700]  +0.050 [-0.020, +0.120]   0.1     10        0.004

In brackets: 95 % interval by bootstrap over prompts; differences are paired against pass@1.
Seed spread: standard deviation of the reward over seeds.
Layer 26 | last_token.
"""

MARKDOWN = r"""### A model & 100 % of its tasks

human_eval, k = 8, 10 seeds; trained on mbpp-train, tested here__
164 prompts x 8 samples, 31 prompts have both good and bad completions (the only ones where choosing matters)

| method | reward | difference to pass@1 | prompts | samples each | paper |
| :--- | :--- | :--- | ---: | ---: | :--- |
| pass@1 | 0.123 [0.087, 0.160] | - | 164 | 8 | 0.30 |
| SFT | not run | not run | - | - | - |
| Q-probe L_PG | 0.200 [0.150, 0.250] | +0.077 [-0.010, +0.164] | 164 | 8 | 0.3457 |

| method | within-prompt AUC | difference to greedy | beta | seeds | seed spread |
| :--- | :--- | :--- | ---: | ---: | ---: |
| Q-probe L_PG | 0.625 [0.550, 0.700] | +0.050 [-0.020, +0.120] | 0.1 | 10 | 0.004 |

- In brackets: 95 % interval by bootstrap over prompts; differences are paired against pass@1.
- Seed spread: standard deviation of the reward over seeds.
- Layer 26 \| last_token.
""".replace("here__\n", "here  \n")  # Markdown's line break is two spaces, which editors strip.

LATEX = r"""% Needs \usepackage{booktabs} in the preamble.
\begin{table}[t]
\centering
\caption{A model \& 100 \% of its tasks. human\_eval, k = 8, 10 seeds; trained on mbpp-train, tested here. +++}
\label{tab:human-eval}
\small
\begin{tabular}{@{}lllrrl@{}}
\toprule
method & reward & difference to pass@1 & prompts & samples each & paper \\
\midrule
pass@1 & 0.123 [0.087, 0.160] & -- & 164 & 8 & 0.30 \\
SFT & not run & not run & -- & -- & -- \\
Q-probe $L_{\mathrm{PG}}$ & 0.200 [0.150, 0.250] & $+$0.077 [$-$0.010, $+$0.164] & 164 & 8 & 0.3457 \\
\bottomrule
\end{tabular}

\medskip
\begin{tabular}{@{}lllrrr@{}}
\toprule
method & within-prompt AUC & difference to greedy & beta & seeds & seed spread \\
\midrule
Q-probe $L_{\mathrm{PG}}$ & 0.625 [0.550, 0.700] & $+$0.050 [$-$0.020, $+$0.120] & 0.1 & 10 & 0.004 \\
\bottomrule
\end{tabular}

\smallskip
\parbox{\linewidth}{\footnotesize In brackets: 95 \% interval by bootstrap over prompts; ++ +}
\end{table}
""".replace(
    "+++}",
    "164 prompts x 8 samples, 31 prompts have both good and bad completions (the only ones where choosing matters).}",
).replace(
    "++ +}",
    "differences are paired against pass@1. Seed spread: standard deviation of the reward over seeds. "
    r"Layer 26 \textbar{} last\_token.}",
)

CSV = """\
pool,protocol,k,status,method,value,low,high,prompts,samples_per_prompt,fewest_samples,seeds,seed_spread,beta,auc,\
auc_low,auc_high,difference,difference_low,difference_high,over_greedy,over_greedy_low,over_greedy_high,\
over_control,over_control_low,over_control_high,simulation_error,paper
human_eval,"trained on mbpp-train, tested here",8,run,pass@1,0.123,0.087,0.16,164,8,0,0,,,,,,,,,,,,,,,,0.3
human_eval,"trained on mbpp-train, tested here",8,not run,SFT,,,,0,0,0,0,,,,,,,,,,,,,,,,
human_eval,"trained on mbpp-train, tested here",8,run,Q-probe L_PG,0.2,0.15,0.25,164,8,0,10,0.0041,0.1,0.625,0.55,0.7,\
0.077,-0.01,0.1641,0.05,-0.02,0.12,,,,,0.3457
"""


FORMATS = {"md": (to_markdown, MARKDOWN), "tex": (to_latex, LATEX), "csv": (to_csv, CSV), "txt": (to_text, TEXT)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_small_table(suffix: str) -> None:
    render, expected = FORMATS[suffix]
    assert render(SMALL) == expected


def test_csv_keeps_every_digit() -> None:
    row = Row(method='a, "b"', value=1 / 3, low=0.1 + 0.2)
    (line,) = csv.DictReader(io.StringIO(to_csv(dataclasses.replace(SMALL, rows=[row]))))
    assert (line["method"], float(line["value"]), float(line["low"])) == (row.method, row.value, row.low)
    assert (line["high"], line["status"]) == ("", "run")


def test_tables_of_several_pools_share_a_folder(tmp_path: Path) -> None:
    for pool, stem in (("human_eval", "human_eval"), ("mbpp/test", "mbpp-test")):
        written = write_tables(dataclasses.replace(SMALL, pool=pool), tmp_path / "tables")
        assert [path.name for path in written] == [f"{stem}.{suffix}" for suffix in FORMATS]
    found = [(tmp_path / "tables" / f"human_eval.{suffix}").read_text(encoding="utf-8") for suffix in FORMATS]
    assert found == [expected for _, expected in FORMATS.values()]


@pytest.mark.parametrize("render", [to_text, to_markdown, to_latex])
def test_the_paper_column_appears_only_with_a_published_value(render: Callable[[Results], str]) -> None:
    assert "paper" in render(SMALL)
    rows = [dataclasses.replace(row, paper=None) for row in SMALL.rows]
    assert "paper" not in render(dataclasses.replace(SMALL, rows=rows))


def test_without_probes_there_is_one_block_and_no_word_on_seeds() -> None:
    text = to_text(dataclasses.replace(SMALL, rows=SMALL.rows[:2]))
    assert text.count("method ") == 1
    assert "AUC" not in text
    assert "Seed spread" not in text


@pytest.mark.parametrize(
    ("row", "mixed", "cells"),
    [
        # A probe that was not run says so everywhere; its planned temperature is still its temperature.
        (Row(method="probe", beta=0.1), 31, ["not run", "0.1", "-", "not run"]),
        # One seed has no spread, ten have: theirs was not computed.
        (Row(method="probe", value=0.2, auc=0.6, seeds=1), 31, ["0.600", "-", "1", "-"]),
        (Row(method="probe", value=0.2, auc=0.6, seeds=10), 31, ["0.600", "-", "10", "not run"]),
        # Where no prompt is mixed there is no AUC to run.
        (Row(method="probe", value=0.2, seeds=1), 0, ["-", "-", "1", "-"]),
        (Row(method="probe", value=0.2, seeds=1), 31, ["not run", "-", "1", "-"]),
    ],
)
def test_a_cell_tells_what_was_not_run_from_what_cannot_be(row: Row, mixed: int, cells: list[str]) -> None:
    markdown = to_markdown(dataclasses.replace(SMALL, rows=[row], mixed_prompts=mixed))
    assert "| " + " | ".join(["probe", *cells]) + " |" in markdown.splitlines()


@pytest.mark.parametrize(
    ("difference", "cell"),
    [(0.0004, "0.000"), (-0.0004, "0.000"), (0.0006, "+0.001"), (-0.25, "-0.250"), (None, "not run")],
)
def test_a_difference_has_a_sign_unless_it_rounds_to_nothing(difference: float | None, cell: str) -> None:
    row = Row(method="greedy", value=0.5, prompts=9, samples_per_prompt=1, difference=difference)
    assert f"| greedy | 0.500 | {cell} | 9 | 1 |" in to_markdown(dataclasses.replace(SMALL, rows=[row]))


@pytest.mark.parametrize(
    ("changes", "size", "mixed"),
    [
        ({}, "164 prompts x 8 samples", "31 prompts have both"),
        ({"mixed_prompts": 1, "samples_per_prompt": 1, "samples": 164}, "164 prompts x 1 sample", "1 prompt has both"),
        (
            {"mixed_prompts": 0, "samples": 1300},
            "164 prompts, 1,300 samples (at most 8 of a prompt)",
            "no prompt has both",
        ),
    ],
)
def test_the_counts_line_says_where_choosing_matters(changes: dict[str, int], size: str, mixed: str) -> None:
    line = counts_line(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    assert line.startswith(f"{size}, {mixed} good and bad completions")


def test_text_stays_within_100_columns_and_loses_no_word() -> None:
    name = "a reward model fine-tuned with LoRA on the same completions, argmax of 48"
    long = dataclasses.replace(
        SMALL,
        title="word " * 40,
        rows=[dataclasses.replace(row, method=f"{name} {i}") for i, row in enumerate(SMALL.rows)],
        notes=["note " * 40],
    )
    text = to_text(long)
    assert max(map(len, text.splitlines())) <= 100
    assert text.split().count("fine-tuned") == 4  # three rows, and the probe's second block
    assert text.split().count("note") == text.split().count("word") == 40


def test_latex_escapes_every_special_character() -> None:
    name = r"[*] 5% of $x_1 & #2 {a} ~b ^c \d <e> |f| β"
    expected = (
        r"{[}{*}{]} 5\% of \$x\_1 \& \#2 \{a\} \textasciitilde{}b \textasciicircum{}c \textbackslash{}d "
        r"\textless{}e\textgreater{} \textbar{}f\textbar{} $\beta$"
    )
    latex = to_latex(dataclasses.replace(SMALL, title=name, rows=[Row(method=name)], notes=[name]))
    assert f"\\midrule\n{expected} & not run" in latex
    assert rf"\caption{{{expected}. " in latex
    assert latex.endswith(f" {expected}.}}\n\\end{{table}}\n")


def test_latex_sets_only_loss_names_as_mathematics() -> None:
    latex = to_latex(dataclasses.replace(SMALL, rows=[Row(method="L_CE and XL_CE and L_ce and L_QP")]))
    assert r"$L_{\mathrm{CE}}$ and XL\_CE and L\_ce and $L_{\mathrm{QP}}$ & not run" in latex


def test_markdown_cells_cannot_break_the_table() -> None:
    markdown = to_markdown(dataclasses.replace(SMALL, rows=[Row(method="a|b *c* <d>\n_e_ f_g `h`")]))
    assert r"| a\|b \*c\* \<d\> \_e\_ f_g \`h\` | not run |" in markdown
