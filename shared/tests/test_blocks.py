"""`auto` on planted data: what carries the signal is chosen, "nothing" or "use the untrained one" is said, reports are honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qprobe.probe.blocks import auto, cross_validated, transferred, untrained_aucs
from qprobe.probe.intervals import paired_difference
from qprobe.probe.ranking import mixed_prompts, within_prompt_auc
from qprobe.probe.solvers import NothingToLearn, Rows

ONE = ("centred_mse",)


def planted(signal: str | None, prompts: int = 60, seed: int = 0, strength: float = 3.0, columns: int = 20) -> Rows:
    """Two blocks and two untrained scores of which one, or none, decides which of a prompt's six rows are good."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), 6)
    count = len(groups)
    level = rng.normal(size=prompts)[groups]
    blocks = {
        "hidden": rng.normal(size=(count, columns)) + level[:, None],
        "likelihood": 40 + 100 * rng.normal(size=(count, 5)),
    }
    untrained = {"entropy": rng.normal(size=count), "length": np.round(50 + 20 * rng.normal(size=count))}
    sources = {name: block[:, 0] for name, block in blocks.items()} | untrained
    margin = level + rng.normal(size=count)
    if signal is not None:
        own = sources[signal]
        margin += strength * (own - own.mean()) / own.std()
    return Rows(blocks, (margin > 0).astype(float), groups, anchors=untrained)


@pytest.mark.parametrize("signal", ["hidden", "likelihood"])
def test_the_block_with_the_signal_is_chosen_and_beats_every_untrained_score(signal: str) -> None:
    report = cross_validated(planted(signal))
    for solution in report.solutions:
        assert solution.choice is not None
        assert solution.choice.learnt
        assert signal in solution.choice.candidate.weighting
    assert report.learnt
    assert report.gain(report.probe).low > 0.1
    assert all(report.gain(report.probe, control).low > 0 for control in report.untrained)
    assert "beats the best untrained score" in report.verdict()


def test_where_an_untrained_score_knows_it_all_it_is_what_one_uses() -> None:
    report = cross_validated(planted("entropy"))
    assert set(report.controls) == {"entropy"}
    assert report.control is not None
    as_it_is = [s.choice for s in report.solutions if s.choice is not None and s.choice.candidate.untrained]
    assert len(as_it_is) >= 4
    assert all(choice.averaged == 1 for choice in as_it_is)
    assert report.auc(report.probe, report.control).low > -0.03
    assert "use" in report.verdict()
    assert "untrained" in report.verdict()


def test_where_nothing_carries_a_signal_nothing_is_said_to_be_learnt() -> None:
    """Of 20 tables without a signal about one may pass for one with, at each of the two looks."""
    seeds = range(20)
    reports = [cross_validated(planted(None, prompts=30, seed=seed), ONE, folds=3) for seed in seeds]
    assert sum(report.learnt for report in reports) <= 3
    chosen = [auto(planted(None, prompts=30, seed=seed), ONE).choice for seed in seeds]
    assert sum(choice is not None and choice.learnt for choice in chosen) <= 4
    assert "Nothing was learnt" in next(report for report in reports if not report.learnt).verdict()
    # No optimism: the mean over tables of what was chosen inside and measured outside is chance.
    means = np.array([report.auc(report.probe).value for report in reports])
    assert abs(means.mean() - 0.5) < 3 * means.std(ddof=1) / np.sqrt(len(means))


def test_both_blocks_are_used_where_both_know_a_part() -> None:
    rows = planted(None, prompts=150, strength=0)
    hidden, likelihood = (block[:, 0] for block in rows.blocks.values())
    noise = np.random.default_rng(5).normal(size=len(rows))
    margin = 1.5 * hidden / hidden.std() + 1.5 * (likelihood - 40) / 100 + noise
    both = Rows(rows.blocks, (margin > 0).astype(float), rows.groups)
    solution = auto(both, ONE)
    assert solution.choice is not None
    assert set(solution.choice.candidate.weighting) == {"hidden", "likelihood"}
    alone = {
        name: cross_validated(Rows({name: block}, both.rewards, both.groups), ONE)
        for name, block in both.blocks.items()
    }
    together = cross_validated(both, ONE)
    for report in alone.values():
        rng = np.random.default_rng(0)
        assert paired_difference(together.probe.aucs, report.probe.aucs, rng=rng).low > 0


def test_of_several_losses_the_one_is_chosen_that_orders_left_out_rows_best() -> None:
    """Prompts differ in what their rewards are about, which a loss within prompts does not see."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), 6)
    level = rng.normal(size=80)[groups]
    told = rng.normal(size=len(groups))
    # The first column says which prompt is easy, and the wrong way round which row of a prompt is good.
    features = np.column_stack([level - 0.3 * told, rng.normal(size=(len(groups), 3))])
    rewards = np.clip(level + 0.3 * told, -4, 4)
    rows = Rows(features, rewards, groups)
    means = {}
    for loss in ("reward_mse", "centred_mse"):
        choice = auto(rows, [loss]).choice  # type: ignore[list-item]
        assert choice is not None
        means[loss] = choice.auc
    assert means["centred_mse"] > 0.9 > means["reward_mse"]
    solution = auto(rows, ["reward_mse", "centred_mse"])
    assert solution.loss == "centred_mse"
    assert solution.choice is not None
    assert solution.choice.candidate.loss == "centred_mse"
    assert solution.choice.candidates == len(solution.aucs)


def test_what_was_reported_on_took_part_in_no_choice() -> None:
    """Other rewards of one fold's prompts change nothing about the probe that scores them."""
    rows = planted("hidden")
    order = np.random.default_rng(0).permutation(60)
    out = (order % 5)[rows.groups] == 2
    turned = np.where(out, 1 - rows.rewards, rows.rewards)
    one = cross_validated(rows, ONE)
    two = cross_validated(Rows(rows.blocks, turned, rows.groups, anchors=rows.anchors), ONE)
    for name, own in one.solutions[2].coefficients.items():
        np.testing.assert_array_equal(own, two.solutions[2].coefficients[name])


def test_a_table_that_chooses_nothing_is_reported_on() -> None:
    report = transferred(planted("hidden"), planted("hidden", seed=1), ONE)
    assert report.gain(report.probe).low > 0.1
    assert len(report.solutions) == len(report.controls) == 1
    lines = report.table().splitlines()
    assert lines[0].startswith("60 prompts")
    assert [line.split()[0] for line in lines[2:]] == ["probe", "best", "entropy", "length"]


def test_gains_and_aucs_are_those_of_the_definitions() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    score = np.array([3.0, 2.0, 1.0, 5.0, 5.0, 5.0])
    rows = Rows(np.arange(6.0), rewards, [0, 0, 0, 1, 1, 1], anchors={"score": score})
    report = transferred(planted_like(rows), rows, ONE)
    (known,) = report.untrained
    assert known.aucs.tolist() == [0.0, 0.5]
    assert known.rewards.tolist() == pytest.approx([0, 2 / 3])
    assert report.one.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert report.best.tolist() == [1, 1]
    assert untrained_aucs(rows) == {"score": 0.25}


def planted_like(rows: Rows) -> Rows:
    """A table to train on with the same block and untrained score."""
    return Rows(np.arange(6.0), rows.rewards, rows.groups, anchors=rows.anchors)


def test_reports_without_untrained_scores_have_no_control() -> None:
    rows = planted("hidden")
    report = cross_validated(Rows(rows.blocks, rows.rewards, rows.groups), ONE)
    assert report.control is None
    assert report.untrained == []
    assert "over one candidate" in report.verdict()


@pytest.mark.parametrize("rewards", [np.ones(12), np.repeat([0.0, 1.0], 6)])
def test_nothing_to_choose_between_is_a_sentence(rewards: Any) -> None:
    rows = Rows(np.arange(24.0).reshape(12, 2), rewards, np.repeat([0, 1], 6), anchors={"length": np.arange(12.0)})
    with pytest.raises(NothingToLearn, match="differ"):
        auto(rows)


def test_the_mean_of_those_as_good_is_scored_by_rows_that_were_left_out_of_all_of_them() -> None:
    rows = planted("hidden", prompts=120, strength=0.8)
    one, mean = auto(rows, average=False), auto(rows)
    assert one.choice is not None
    assert mean.choice is not None
    assert mean.choice.averaged > 1 == one.choice.averaged
    assert f"mean with {mean.choice.averaged - 1}" in mean.sentence()
    left_out = float(np.nanmean(within_prompt_auc(mean.left_out, rows.rewards, rows.groups)))
    assert mean.choice.auc == pytest.approx(left_out, abs=1e-9)
    # It is a linear probe of the same size: its own scores within prompts deviate as those of the chosen one do.
    fresh = planted("hidden", prompts=300, strength=0.8, seed=1)
    scores = [solution.score(fresh.blocks, fresh.anchors) for solution in (one, mean)]
    aucs = [
        within_prompt_auc(own, fresh.rewards, fresh.groups)[mixed_prompts(fresh.rewards, fresh.groups)]
        for own in scores
    ]
    assert paired_difference(aucs[1], aucs[0], rng=np.random.default_rng(0)).low > -0.02
    assert np.corrcoef(*scores)[0, 1] > 0.9
    assert mean.beta >= 0
