"""Figures of an evaluation: every method, interval and count that was measured is on them, and they are the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qprobe.report.results import (
    Band,
    Certainties,
    Certainty,
    Curve,
    LayerCurve,
    LearningCurve,
    PromptScore,
    PromptScores,
    Results,
    Row,
    TradeOff,
    TradeOffPoint,
)

SMALL = Results(
    title="A model & 100 % of its tasks",
    protocol="5-fold cross-validation over prompts",
    pool="human_eval",
    k=8,
    prompts=164,
    samples=1312,
    samples_per_prompt=8,
    mixed_prompts=31,
    seeds=10,
    rows=[Row(method="pass@1", value=0.123, prompts=164, samples_per_prompt=8)],
)


def band(*values: float | None) -> Band:
    ends = [(None, None) if value is None else (value - 0.05, value + 0.05) for value in values]
    return Band(value=list(values), low=[low for low, _ in ends], high=[high for _, high in ends])


def drawn(ks: list[int] | None = None) -> Results:
    """The small results with data for every figure; scores lie on 2 x base - 1 and on 0.5 x base."""
    ks = ks or [1, 2, 4, 8]
    rising = [0.1 + 0.02 * math.log2(k) for k in ks]
    bases = [0.0, 0.25, 0.5, 1.0]
    return dataclasses.replace(
        SMALL,
        reward_against_k=Curve(
            k=ks,
            series={
                "Q-probe L_PG": band(*rising),
                "Q-probe L_CE": band(*[0.9 * value + 0.01 for value in rising]),
                "skyline pass@k": band(*[2 * value - 0.1 for value in rising]),
            },
        ),
        reward_against_kl=TradeOff(
            series={
                "Q-probe L_CE": [TradeOffPoint(beta=b, kl=1 / (1 + b), reward=0.14 - b / 100) for b in (0.0, 1.0)],
                "Q-probe L_PG": [TradeOffPoint(beta=b, kl=1 / (1 + b), reward=0.16 - b / 100) for b in (0.0, 1.0, 3.0)],
            }
        ),
        reward_against_prompts=LearningCurve(
            prompts=[33, 66, 131], series={"Q-probe L_CE": band(0.1, 0.12, 0.13), "Q-probe L_PG": band(0.1, 0.11, 0.15)}
        ),
        scores_per_prompt=PromptScores(
            series={
                "Q-probe L_CE": [PromptScore(task_id=str(b), base=b, score=2 * b - 1) for b in bases],
                "Q-probe L_PG": [PromptScore(task_id=str(b), base=b, score=0.5 * b) for b in bases],
            }
        ),
    )


@pytest.fixture
def figures() -> Any:
    return pytest.importorskip("qprobe.report.figures", reason="figures need the extra `report`")


def curve_of(**lines: Band) -> Results:
    """The small results with lines at k = 1, 2, 4, ... alone."""
    (count,) = {len(line.value) for line in lines.values()}
    return dataclasses.replace(SMALL, reward_against_k=Curve(k=[2**i for i in range(count)], series=lines))


def clouds(**scores: list[tuple[float, float]]) -> Results:
    """The small results with points of base and score alone."""
    series = {
        method: [PromptScore(task_id=str(x), base=x, score=y) for x, y in points] for method, points in scores.items()
    }
    return dataclasses.replace(SMALL, scores_per_prompt=PromptScores(series=series))


def written(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def curves(axes: Any) -> list[Any]:
    """The lines of methods: not the base, nor the thin edges of bands."""
    return [line for line in axes.lines if line.get_linewidth() > 1]


def test_reward_against_k_shows_every_method_its_interval_and_the_base(figures: Any) -> None:
    results = drawn()
    (axes,) = figures.reward_against_k(results).axes
    assert results.reward_against_k is not None
    series = results.reward_against_k.series
    for line, band in zip(curves(axes), series.values(), strict=True):
        assert list(line.get_xdata()) == [1, 2, 4, 8]
        assert list(line.get_ydata()) == band.value
    assert len(axes.collections) == len(series)
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(0.16 + 0.05)  # L_PG at k=8, and half its interval
    (base,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert set(base.get_ydata()) == {0.1}  # the value at k=1, not the 0.123 of the row
    names = {r"Q-probe $L_{\mathrm{PG}}$", r"Q-probe $L_{\mathrm{CE}}$", "skyline pass@k", "base (pass@1)"}
    assert set(written(axes)) == names
    assert axes.get_xscale() == "linear"
    assert axes.figure.get_suptitle() == "A model & 100 % of its tasks\nhuman_eval: 164 prompts, 8 samples each"


def test_the_base_is_the_row_where_k_1_was_not_measured(figures: Any) -> None:
    (axes,) = figures.reward_against_k(drawn([2, 4])).axes
    (base,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert set(base.get_ydata()) == {0.123}


def test_the_axis_of_k_is_logarithmic_beyond_a_factor_of_8(figures: Any) -> None:
    (axes,) = figures.reward_against_k(drawn([1, 2, 3, 5, 10, 20, 30, 40, 48])).axes
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_transform().base == 2
    assert list(axes.get_xticks()) == [1, 2, 3, 5, 10, 20, 30, 48]  # 40 would touch 48
    assert [axes.xaxis.get_major_formatter()(tick) for tick in (1, 48)] == ["1", "48"]


def test_a_point_that_was_not_measured_is_left_out(figures: Any) -> None:
    (axes,) = figures.reward_against_k(curve_of(probe=band(0.1, None, 0.3), never=band(None, None, None))).axes
    (line,) = curves(axes)
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 4], [0.1, 0.3])
    assert set(written(axes)) == {"probe", "base (pass@1)"}


def test_reward_against_kl_goes_from_soft_to_argmax_and_names_its_temperatures(figures: Any) -> None:
    (axes,) = figures.reward_against_kl(drawn()).axes
    weaker, stronger = curves(axes)
    assert list(stronger.get_xdata()) == [0.25, 0.5, 1.0]
    assert list(stronger.get_ydata()) == pytest.approx([0.13, 0.15, 0.16])
    assert list(weaker.get_xdata()) == [0.5, 1.0]
    assert [text for text in written(axes) if "L_" not in text] == [r"$\beta$=0", "1", "3", "base (pass@1)"]
    assert axes.get_xlim()[0] == 0
    assert "nats" in axes.get_xlabel()


def test_scores_per_prompt_has_a_panel_a_method_with_its_slope(figures: Any) -> None:
    figure = figures.scores_per_prompt(drawn())
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [r"Q-probe $L_{\mathrm{CE}}$, slope 2.00", r"Q-probe $L_{\mathrm{PG}}$, slope 0.50"]
    first, second = figure.axes
    assert first.collections[0].get_offsets().tolist() == [[0, -1], [0.25, -0.5], [0.5, 0], [1, 1]]
    assert list(first.lines[0].get_ydata()) == pytest.approx([-1, 1])
    assert first.get_ylim() == second.get_ylim()


def test_panels_part_their_axes_where_scales_differ_too_much(figures: Any) -> None:
    first, second = figures.scores_per_prompt(clouds(small=[(0, 0), (1, 1)], large=[(0, 0), (1, 50)])).axes
    assert first.get_ylim()[1] < 2 < 50 < second.get_ylim()[1]


@pytest.mark.parametrize(("methods", "panels_in_top_row"), [(1, 1), (3, 3), (4, 2), (5, 3)])
def test_every_column_of_panels_ends_in_numbers(figures: Any, methods: int, panels_in_top_row: int) -> None:
    figure = figures.scores_per_prompt(clouds(**{f"probe {i}": [(0, 0), (1, 1)] for i in range(methods)}))
    figure.draw_without_rendering()
    assert len(figure.axes) == methods
    places = [axes.get_position() for axes in figure.axes]
    assert sum(place.y0 == pytest.approx(places[0].y0) for place in places) == panels_in_top_row
    lowest = {
        round(axes.get_position().x0, 3): axes for axes in sorted(figure.axes, key=lambda a: -a.get_position().y0)
    }
    assert len(lowest) == panels_in_top_row
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in lowest.values())


def test_a_method_looks_the_same_in_every_figure(figures: Any) -> None:
    results = drawn()
    (against_k,), (against_kl,) = figures.reward_against_k(results).axes, figures.reward_against_kl(results).axes
    by_k = [(line.get_color(), line.get_marker()) for line in curves(against_k)[:2]]
    by_kl = [(line.get_color(), line.get_marker()) for line in curves(against_kl)]
    assert by_k == by_kl[::-1]  # the second figure names L_CE first
    assert by_k[0] != by_k[1]


def test_names_of_lines_do_not_overlap(figures: Any) -> None:
    series = {f"a method with a long name {i}": band(0.1, 0.2 + i / 1e4) for i in range(6)}
    figure = figures.reward_against_k(curve_of(**series))
    figure.draw_without_rendering()
    from matplotlib.text import Text

    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: float(box.y0))
    assert len(boxes) == 7
    for lower, upper in itertools.pairwise(boxes):
        assert lower.y1 <= upper.y0 + 1  # within a pixel


def test_text_of_the_user_is_not_read_as_mathematics(figures: Any, tmp_path: Path) -> None:
    results = dataclasses.replace(curve_of(**{"_$5 or $6 \\frac": band(0.1, 0.2)}), title="costs $5 or $6^")
    figure = figures.reward_against_k(results)
    assert figure.get_suptitle().startswith(r"costs \$5 or \$6^")
    assert len(figures.write_figures(results, tmp_path)) == 2


def lines_at(axes: Any, xs: list[int]) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == xs]


def test_prompts_and_layers_have_a_line_a_method_in_its_colour_and_their_own_ticks(figures: Any) -> None:
    series = {"Q-probe L_CE": band(0.1, 0.3, 0.2), "Q-probe L_PG": band(0.1, 0.2, 0.4)}
    curve = LayerCurve(layers=[0, 12, 30], series=series, taken={method: [1, 2, 3] for method in series})
    results = dataclasses.replace(drawn(), reward_against_layer=curve)
    (layers,), (prompts,) = (
        draw(results).axes for draw in (figures.reward_against_layer, figures.reward_against_prompts)
    )
    assert [values in lines_at(layers, [0, 12, 30]) for values in ([0.1, 0.3, 0.2], [0.1, 0.2, 0.4])] == [True, True]
    assert [values in lines_at(prompts, [33, 66, 131]) for values in ([0.1, 0.12, 0.13], [0.1, 0.11, 0.15])] == [
        True,
        True,
    ]
    assert layers.get_xticks().tolist() == [0, 12, 30]
    assert [line.get_color() for line in curves(layers)[:2]] == [line.get_color() for line in curves(prompts)[:2]]
    assert prompts.get_xlabel() == "training prompts"
    assert "base (pass@1)" in written(prompts)
    assert figures.reward_against_layer(drawn()) is None


def test_certainty_shows_predicted_against_observed_and_what_the_surest_earn(figures: Any) -> None:
    own = Certainty(
        predicted=[0.2, 0.7],
        observed=band(0.1, 0.8),
        prompts=[30, 31],
        brier=0.1,
        brier_of_mean=0.2,
        shares=[0.5, 1.0],
        surest=band(0.8, 0.45),
    )
    results = dataclasses.replace(drawn(), certainty=Certainties(series={"Q-probe L_PG": own}))
    said, kept = figures.certainty(results).axes
    assert [0.1, 0.8] in [list(line.get_ydata()) for line in said.lines if list(line.get_xdata()) == [0.2, 0.7]]
    assert [0, 1] in [list(line.get_ydata()) for line in said.lines if list(line.get_xdata()) == [0, 1]]
    assert [0.8, 0.45] in [list(line.get_ydata()) for line in kept.lines if list(line.get_xdata()) == [0.5, 1.0]]
    assert figures.certainty(drawn()) is None
    with pytest.raises(ValueError, match="shares"):
        dataclasses.replace(own, shares=[1.0])


def test_figures_are_written_where_there_is_data_and_the_same_every_time(figures: Any, tmp_path: Path) -> None:
    import matplotlib as mpl

    assert figures.write_figures(SMALL, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    first = figures.write_figures(drawn(), tmp_path / "first")
    names = ["reward_against_k", "reward_against_kl", "reward_against_prompts", "scores_per_prompt"]
    assert [path.name for path in first] == [f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")]
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 50, "axes.facecolor": "red", "figure.dpi": 33}):
        settings = dict(mpl.rcParams)
        second = figures.write_figures(drawn(), tmp_path / "second")
        assert dict(mpl.rcParams) == settings
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().startswith(b"\x89PNG" if one.suffix == ".png" else b"%PDF")
        assert b"CreationDate" not in one.read_bytes()


def test_figures_that_are_there_of_the_same_results_are_not_drawn_again(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def write(figure: Any, folder: Path, name: str) -> list[Path]:
        made.append(name)
        folder.mkdir(exist_ok=True)
        for path in (paths := [folder / f"{name}.png", folder / f"{name}.pdf"]):
            path.write_bytes(b"a figure")
        return paths

    monkeypatch.setattr(figures, "write_figure", write)
    paths = figures.write_figures(drawn(), tmp_path)
    every = [path.stem for path in paths[::2]]
    assert made == every != []
    assert figures.write_figures(drawn(), tmp_path) == paths
    assert made == every
    paths[1].unlink()
    figures.write_figures(drawn(), tmp_path)
    assert made == 2 * every
    (tmp_path / "drawn.json").write_text("{")
    figures.write_figures(drawn(), tmp_path)
    assert made == 3 * every
    figures.write_figures(dataclasses.replace(drawn(), title="another"), tmp_path)
    assert made == 4 * every
    monkeypatch.setattr(figures, "write_figure", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        figures.write_figures(drawn(), tmp_path)
    monkeypatch.setattr(figures, "write_figure", write)
    figures.write_figures(dataclasses.replace(drawn(), title="another"), tmp_path)  # some may be of the others
    assert made == 5 * every
    monkeypatch.setattr(figures, "_code", lambda: ["newer"])
    figures.write_figures(dataclasses.replace(drawn(), title="another"), tmp_path)
    assert made == 6 * every


def test_matplotlib_is_loaded_only_for_figures_and_pyplot_never() -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra `report`")
    code = (
        "import sys, qprobe.report; assert 'matplotlib' not in sys.modules\n"
        "import qprobe.report.figures; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figures", "drawing"):
        monkeypatch.delitem(sys.modules, f"qprobe.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"qprobe\[report\]"):
        import qprobe.report.figures  # noqa: F401
