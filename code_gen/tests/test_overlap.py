"""Problems that tell of each other: reported with and without, and never in two folds."""

from qprobe_code_gen.problems import Problem, mbpp, overlap


def problem(number: int, text: str, name: str) -> Problem:
    row = {"task_id": number, "text": text, "code": f"def {name}(): ...", "test_setup_code": ""}
    return mbpp.problem_from_row(row | {"test_list": [f"assert {name}({number}) == {number}"]})


TRAINING = [problem(601, "Add two numbers.", "add"), problem(602, "Sort a list.", "order")]


def test_tested_problems_that_share_a_name_or_their_words_with_a_training_one_are_found() -> None:
    tested = [
        problem(11, "Add three numbers.", "add"),
        problem(12, "sort  a LIST.", "arrange"),
        problem(13, "Sort a list.", "order"),
        problem(14, "Count words.", "count"),
    ]
    assert overlap.shared_with(TRAINING, tested, "mbpp-train") == {
        "share an entry point (2) or their text (2) with a problem of mbpp-train": frozenset(
            {"MBPP/011", "MBPP/012", "MBPP/013"}
        )
    }
    assert overlap.shared_with(TRAINING, tested[-1:], "mbpp-train") == {}


def test_in_one_set_such_problems_are_a_cluster_through_however_many() -> None:
    set_of = [
        problem(1, "Add two numbers.", "add"),
        problem(2, "Count words.", "count"),
        problem(3, "Words.", "add"),
        problem(4, "words.", "total"),
    ]
    found = overlap.clusters(set_of)
    assert found is not None
    assert found["MBPP/001"] == found["MBPP/003"] == found["MBPP/004"] != found["MBPP/002"]
    assert overlap.clusters(set_of[:2]) is None


def test_of_the_published_test_problems_32_share_a_name_with_a_training_one_and_three_their_text() -> None:
    training, tested = (mbpp.load(name).problems for name in ("mbpp-train", "mbpp-test"))
    ((words, ids),) = overlap.shared_with(training, tested, "mbpp-train").items()
    assert "an entry point (32) or their text (3)" in words
    assert len(ids) == 34
