"""Problems that ask for the same function: reported with and without, and never in two folds."""

from collections.abc import Callable
from typing import Any

import pytest

from qprobe_code_gen.programs import Problem, mbpp, overlap


@pytest.fixture
def problem(mbpp_row: Callable[..., dict[str, Any]]) -> Callable[..., Problem]:
    """A problem with a text and the name of a function."""

    def make(number: int, text: str, name: str) -> Problem:
        tests = [f"assert {name}({number}) == {number}"]
        return mbpp.problem_from_row(mbpp_row(number, text=text, code=f"def {name}(): ...", test_list=tests))

    return make


def test_tested_problems_that_share_a_name_or_their_words_with_a_training_one_are_found(
    problem: Callable[..., Problem],
) -> None:
    training = [problem(601, "Add two numbers.", "add"), problem(602, "Sort a list.", "order")]
    tested = [
        problem(11, "Add three numbers.", "add"),
        problem(12, "sort  a LIST.", "arrange"),
        problem(13, "Sort a list.", "order"),
        problem(14, "Count words.", "count"),
    ]
    ((words, ids),) = overlap.shared_with(training, tested, "mbpp-train").items()
    assert words == "share an entry point (2) or their text (2) with a problem of mbpp-train"
    assert ids == {"MBPP/011", "MBPP/012", "MBPP/013"}
    assert overlap.shared_with(training, tested[-1:], "mbpp-train") == {}


def test_in_one_set_such_problems_are_a_cluster_through_however_many(problem: Callable[..., Problem]) -> None:
    texts = ["Add two numbers.", "Count words.", "Words.", "words."]
    problems = [
        problem(i, *pair) for i, pair in enumerate(zip(texts, ["add", "count", "add", "total"], strict=True), 1)
    ]
    found = overlap.clusters(problems)
    assert found is not None
    assert found["MBPP/001"] == found["MBPP/003"] == found["MBPP/004"] != found["MBPP/002"]
    assert overlap.clusters(problems[:2]) is None


def test_of_the_published_test_problems_32_share_a_name_with_a_training_one_and_three_their_text() -> None:
    training, tested = (mbpp.load(name).problems for name in ("mbpp-train", "mbpp-test"))
    ((words, ids),) = overlap.shared_with(training, tested, "mbpp-train").items()
    assert "an entry point (32) or their text (3)" in words
    assert len(ids) == 34
