"""The control that probes are held against is chosen where the probes learned, and not on the prompts that are tested."""

from __future__ import annotations

import numpy as np

from qprobe.evaluation.best_control import best_control
from qprobe.evaluation.methods import Kind, Method

FIRST = Method("first", Kind.CONTROL, 4, np.array([[1.0, 1.0, 0.0, 0.0]]))
SECOND = Method("second", Kind.CONTROL, 4, np.array([[0.0, 0.0, 1.0, 0.6]]))
OTHERS = [
    Method("executes", Kind.RANKING, 4, np.ones((1, 4))),
    Method("a probe", Kind.PROBE, 4, np.ones((1, 4))),
    Method("not run", Kind.CONTROL, 4, None),
]


def test_a_fold_is_given_the_control_that_was_best_on_the_others() -> None:
    folds = np.array([0, 0, 1, 1])
    best = best_control([FIRST, SECOND, *OTHERS], folds=folds)
    assert best is not None
    assert best.rewards.tolist() == [0, 0, 0, 0]  # each is the best where it is not asked
    assert best.name == "second in 1 folds, first in 1 folds"
    assert best.among == "the best of 2 on every fold's training prompts"


def test_of_a_training_set_the_best_there_is_taken_however_it_does_here() -> None:
    best = best_control([FIRST, SECOND], training={"first": 0.1, "second": 0.2})
    assert best is not None
    assert (best.name, best.rewards.tolist()) == ("second", [0, 0, 1, 0.6])
    known = best_control([FIRST, SECOND], training={"first": 0.1})
    assert known is not None
    assert (known.name, known.among) == ("first", "")


def test_with_neither_it_is_the_best_on_these_very_prompts_and_that_is_said() -> None:
    best = best_control([SECOND, FIRST, *OTHERS])
    assert best is not None
    assert (best.name, best.among) == ("first", "the best of 2 on these very prompts")


def test_where_none_was_run_there_is_none() -> None:
    assert best_control(OTHERS) is None
    assert best_control(OTHERS, training={"not run": 1.0}) is None
