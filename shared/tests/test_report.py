"""Results as JSON and tables in four formats: what is printed is what was measured, and nothing is half written."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qprobe.report.results import (
    Band,
    Curve,
    PromptScore,
    PromptScores,
    Results,
    Row,
    TradeOff,
    TradeOffPoint,
)
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
auc_low,auc_high,difference,difference_low,difference_high,over_greedy,over_greedy_low,over_greedy_high,simulation_error,paper
human_eval,"trained on mbpp-train, tested here",8,run,pass@1,0.123,0.087,0.16,164,8,0,0,,,,,,,,,,,,,0.3
human_eval,"trained on mbpp-train, tested here",8,not run,SFT,,,,0,0,0,0,,,,,,,,,,,,,
human_eval,"trained on mbpp-train, tested here",8,run,Q-probe L_PG,0.2,0.15,0.25,164,8,0,10,0.0041,0.1,0.625,0.55,0.7,\
0.077,-0.01,0.1641,0.05,-0.02,0.12,,0.3457
"""


RICH = dataclasses.replace(
    SMALL,
    reward_against_k=Curve(
        k=[1, 2, 8],
        series={"Q-probe L_PG": Band(value=[0.1, None, 0.2], low=[0.05, None, 0.1], high=[0.15, None, 0.3])},
    ),
    reward_against_kl=TradeOff(series={"Q-probe L_PG": [TradeOffPoint(beta=0, kl=1.2, reward=0.2)]}),
    scores_per_prompt=PromptScores(series={"Q-probe L_PG": [PromptScore(task_id="HumanEval/0", base=0.5, score=-0.1)]}),
)
"""The small results with a line for every figure."""


# --- results


def test_results_come_back_from_json_as_they_were() -> None:
    results = RICH
    assert Results.from_json(results.to_json()) == results
    assert Results.from_json(SMALL.to_json()) == SMALL


def test_json_holds_null_and_plain_numbers_where_numpy_and_nan_were_given() -> None:
    row = Row(method="probe", value=float("nan"), auc=np.float32(0.5), prompts=np.int64(3))  # type: ignore[arg-type]
    curve = Curve(k=np.array([1, 2]), series={"probe": Band(value=[0.5, math.nan], low=np.zeros(2), high=np.ones(2))})  # type: ignore[arg-type]
    results = dataclasses.replace(SMALL, rows=[row], reward_against_k=curve)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(results.to_json(), parse_constant=refuse)
    assert (data["rows"][0]["value"], data["rows"][0]["auc"], data["rows"][0]["prompts"]) == (None, 0.5, 3)
    assert data["reward_against_k"] == {
        "k": [1, 2],
        "series": {"probe": {"value": [0.5, None], "low": [0.0, 0.0], "high": [1.0, 1.0]}},
    }
    assert Results.from_json(results.to_json()) == results


def edited(*path: str | int, value: Any) -> str:
    data = json.loads(RICH.to_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited("colour", value=1), r"results has the unknown key 'colour': it knows title, protocol.*evaluate again"),
        (edited("rows", 2, "aucc", value=1), r"results\.rows\[2\] has the unknown key 'aucc'"),
        (edited("rows", 1, "value", value="0.3"), r"results\.rows\[1\]\.value is '0\.3': it should be float"),
        (edited("k", value=True), r"results\.k is True: it should be int"),
        (edited("k", value=1.5), r"results\.k is 1\.5: it should be int"),
        (edited("rows", value={}), r"results\.rows is \{\}: it should be list"),
        (edited("rows", 0, "low", value=math.nan), r"the results hold NaN, which is not JSON"),
        (edited("rows", 0, "low", value=0.2), r"row 'pass@1': the interval of value is upside down, \[0\.2, 0\.16\]"),
        (edited("rows", 0, "seeds", value=-1), r"row 'pass@1': seeds is -1: it cannot be below 0"),
        (edited("mixed_prompts", value=165), r"165 prompts with both good and bad completions, of only 164"),
        (edited("reward_against_k", "k", value=[1, 4, 2]), r"k is \[1, 4, 2\]: give increasing numbers"),
        (edited("reward_against_k", "k", value=[1, 2]), r"'Q-probe L_PG': value, low and high have 3, 3 and 3 entries"),
        (
            edited("scores_per_prompt", "series", "Q-probe L_PG", 0, "base", value=1.5),
            r"base is 1\.5.*lies in \[0, 1\]",
        ),
        ("{}", r"results lacks the key 'title', 'protocol'"),
        ("{", r"the results are not JSON \(.*\): evaluate again"),
    ],
)
def test_json_that_does_not_fit_is_a_sentence_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Results.from_json(text)
    path = tmp_path / "humaneval.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Results.read(path)


def test_an_infinite_number_is_refused_when_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"Row\.value is inf: give a finite number"):
        Row(method="probe", value=math.inf)


def test_the_line_through_prompt_scores_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.random(30), rng.standard_normal(30)
    points = [PromptScore(task_id=str(i), base=float(base[i]), score=float(2 * base[i] + noise[i])) for i in range(30)]
    points.append(PromptScore(task_id="not scored", base=0.9, score=None))
    scores = PromptScores(series={"probe": points, "one": points[:1], "equal": [points[0], points[0]]})
    assert scores.line("probe") == pytest.approx(tuple(np.polyfit(base, 2 * base + noise, 1)))
    assert scores.line("one") is None
    assert scores.line("equal") is None


class HalfADisk:
    """A file that takes half of what it is given, then the disk is full."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfADisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    SMALL.write(old)
    before = old.read_bytes()
    really_open = Path.open
    opened: list[Path] = []

    def open_on_a_full_disk(path: Path, *arguments: Any, **options: Any) -> HalfADisk:
        opened.append(path)
        return HalfADisk(really_open(path, *arguments, **options))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_a_full_disk)
        for path in (old, new):
            with pytest.raises(OSError, match=rf"{path} could not be written \(No space left on device\)"):
                RICH.write(path)
        with pytest.raises(OSError, match=r"human_eval\.md could not be written"):
            write_tables(SMALL, tmp_path)
    assert len(opened) == 3
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == before
    RICH.write(old)
    assert Results.read(old) == RICH


# --- tables


def test_the_small_table_as_text() -> None:
    assert to_text(SMALL) == TEXT


def test_the_small_table_as_markdown() -> None:
    assert to_markdown(SMALL) == MARKDOWN


def test_the_small_table_as_latex() -> None:
    assert to_latex(SMALL) == LATEX


def test_the_small_table_as_csv() -> None:
    assert to_csv(SMALL) == CSV


def test_csv_keeps_every_digit() -> None:
    row = Row(method='a, "b"', value=1 / 3, low=0.1 + 0.2)
    (line,) = csv.DictReader(io.StringIO(to_csv(dataclasses.replace(SMALL, rows=[row]))))
    assert (line["method"], float(line["value"]), float(line["low"])) == (row.method, row.value, row.low)
    assert (line["high"], line["status"]) == ("", "run")


def test_tables_of_several_pools_share_a_folder(tmp_path: Path) -> None:
    first = write_tables(SMALL, tmp_path / "tables")
    second = write_tables(dataclasses.replace(SMALL, pool="mbpp/test"), tmp_path / "tables")
    assert [path.name for path in first] == [f"human_eval.{suffix}" for suffix in ("md", "tex", "csv", "txt")]
    assert [path.name for path in second] == [f"mbpp-test.{suffix}" for suffix in ("md", "tex", "csv", "txt")]
    assert [path.read_text(encoding="utf-8") for path in first] == [MARKDOWN, LATEX, CSV, TEXT]


def test_the_paper_column_appears_only_with_a_published_value() -> None:
    rows = [dataclasses.replace(row, paper=None) for row in SMALL.rows]
    results = dataclasses.replace(SMALL, rows=rows)
    for render in (to_text, to_markdown, to_latex):
        assert "paper" in render(SMALL)
        assert "paper" not in render(results)


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
    ("changes", "line"),
    [
        (
            {},
            "164 prompts x 8 samples, 31 prompts have both good and bad completions (the only ones where choosing matters)",
        ),
        (
            {"mixed_prompts": 1, "samples_per_prompt": 1, "samples": 164},
            "164 prompts x 1 sample, 1 prompt has both good and bad completions (the only ones where choosing matters)",
        ),
        (
            {"mixed_prompts": 0, "samples": 1300},
            "164 prompts, 1,300 samples (at most 8 of a prompt), no prompt has both good and bad completions: "
            "there is nothing to choose between",
        ),
    ],
)
def test_the_counts_line_says_where_choosing_matters(changes: dict[str, int], line: str) -> None:
    assert counts_line(dataclasses.replace(SMALL, **changes)) == line  # type: ignore[arg-type]


def test_text_stays_within_100_columns_and_loses_no_word() -> None:
    name = "a reward model fine-tuned with LoRA on the same completions, argmax of 48"
    long = dataclasses.replace(
        RICH,
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
