"""Tables and figures of win rates: every number that was measured is in them, once rounded as it should be."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from qprobe.probe.intervals import wilson
from qprobe_preference.report import Method, WinTable, to_csv, to_text, write_figures, write_tables
from qprobe_preference.winrates import Judgements, band, curve, difference, win_rate


def judged(prompts: int = 60, each: int = 4) -> Judgements:
    rng = np.random.default_rng(0)
    count = prompts * each
    words = rng.choice(["win", "tie", "loss", "unparsed", "too_long"], p=[0.4, 0.1, 0.4, 0.05, 0.05], size=count)
    wins = [{"win": 1.0, "loss": 0.0}.get(w, 0.5) for w in words]
    lengths, references = rng.integers(20, 300, (2, count))
    return Judgements(wins, np.repeat(np.arange(prompts), each), list(words), lengths, references)


def table() -> WinTable:
    pool = judged()
    single = Judgements([1, 0.5, 0, 1], range(4))
    base, skyline = (win_rate(pool, law) for law in (pool.base_law(), pool.skyline_law(4)))
    methods = [
        Method("base", base, paper=37.86),
        Method("Q-probe L_QP & friends", skyline, difference(skyline, base), k=4, beta=0.1, paper=50.10),
        Method("DPO (published)", win_rate(single, np.ones(4))),
        Method("KTO", None, paper=51.46),
    ]
    return WinTable("HH-RLHF, help_ful", "judge m/x against the chosen answer", "hh test", methods, notes=("A note.",))


def test_the_text_has_every_rate_and_fits_a_terminal() -> None:
    text = to_text(table())
    base = win_rate(judged(), judged().base_law())
    rate = f"{100 * base.rate.value:.1f} [{100 * base.rate.low:.1f}, {100 * base.rate.high:.1f}]"
    (line,) = (line for line in text.splitlines() if line.startswith("base") and rate in line)
    assert line.endswith("37.86")
    (counts,) = (line for line in text.splitlines() if line.startswith("base") and " / " in line)
    assert f"{base.wins:.1f} / {base.ties:.1f} / {base.losses:.1f}" in counts
    assert f"{base.length:.1f}" in counts
    assert base.length_controlled is not None
    assert f"{100 * base.length_controlled.value:.1f} [" in counts
    assert "4 or 60 prompts" in text
    low, high = (100 * end for end in base.undecided_range)
    assert (
        f"base: {base.undecided['unparsed']:.1f} unparsed, {base.undecided['too_long']:.1f} too long count half" in text
    )
    assert f"{low:.1f} or {high:.1f}." in text
    assert all(len(row) <= 100 for row in text.splitlines())


def test_one_answer_a_prompt_has_whole_counts_and_wilson_s_interval() -> None:
    text = to_text(table())
    expected = wilson(2.5, 4)
    row, counts = (line for line in text.splitlines() if line.startswith("DPO"))
    assert f"[{100 * expected.low:.1f}, {100 * expected.high:.1f}]" in row
    assert "62.5 [" in row
    assert "2 / 1 / 1" in counts
    assert "Wilson" not in to_text(WinTable("t", "s", "n", table().methods[:2]))


def test_not_run_is_said_and_the_paper_s_column_is_there_only_where_it_has_a_value(tmp_path: Path) -> None:
    write_tables(table(), tmp_path)
    (row,) = (line for line in (tmp_path / "hh-test.md").read_text().splitlines() if line.startswith("| KTO"))
    assert row.split("|")[4].strip() == "not run"
    assert "51.46" in row
    ours = [Method(m.name, m.result) for m in table().methods]
    assert "paper" not in to_text(WinTable("t", "s", "n", ours))


def test_csv_gives_back_every_number() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table()))))
    methods = table().methods
    assert [row["method"] for row in rows] == [m.name for m in methods]
    for row, method in zip(rows, methods, strict=True):
        if method.result is None:
            assert (row["status"], row["rate"], row["paper"]) == ("not run", "", "51.46")
            continue
        r = method.result
        assert [float(row[c]) for c in ("rate", "low", "high")] == [r.rate.value, r.rate.low, r.rate.high]
        assert [float(row[c]) for c in ("wins", "ties", "losses")] == [r.wins, r.ties, r.losses]
        assert float(row["undecided"]) == sum(r.undecided.values())
        assert int(row["prompts"]) == len(r.prompts)
        for name, interval in (("difference", method.difference), ("length_controlled", r.length_controlled)):
            expected = (
                ["", "", ""] if interval is None else [str(v) for v in (interval.value, interval.low, interval.high)]
            )
            assert [row[name], row[f"{name}_low"], row[f"{name}_high"]] == expected
        assert row["wilson_low"] == ("" if r.wilson is None else str(r.wilson.low))
    assert rows[1]["beta"] == "0.1"
    assert rows[1]["k"] == "4"


def test_latex_escapes_and_balances(tmp_path: Path) -> None:
    write_tables(table(), tmp_path)
    text = (tmp_path / "hh-test.tex").read_text()
    assert r"$L_{\mathrm{QP}}$ \& friends" in text
    assert r"help\_ful" in text
    assert r"\label{tab:hh-test}" in text
    assert text.count(r"\begin{") == text.count(r"\end{")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body if line.startswith(("base", "DPO"))} == {
        line.count(" & ") for line in body if line.startswith("method")
    }
    # A bare % would comment out the rest of its line.
    assert all("%" not in line.replace(r"\%", "") for line in text.splitlines()[1:])


def test_files_and_figures_are_written_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pool, scores = judged(), np.random.default_rng(1).normal(size=240)
    ks = [1, 2, 4]
    against_k = {"Q-probe L_QP": curve(pool, scores, ks, 0.1), "skyline": curve(pool, pool.wins, ks, 0.0)}
    shares, rate = [5, 20, 100], win_rate(pool, pool.base_law()).rate
    depths = {"linear": band([rate, rate, rate]), "2 layers": band([rate, rate, rate])}
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert [p.name for p in write_tables(table(), folder)] == [f"hh-test.{s}" for s in ("md", "tex", "csv", "txt")]
        names = [p.name for p in write_figures(["Title", "setting"], folder, ks, against_k, shares, depths)]
        assert names == [f"win_rate_against_{x}.{s}" for x in ("k", "share") for s in ("png", "pdf")]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert [p.name for p in write_figures(["t"], tmp_path / "c", ks, against_k, [], {})] == names[:2]
