"""The final number of an answer: hand-made texts, and numbers as exact decimals."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprobe_code_gen.answers import final_number, number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Behind the mark.
        ("48 / 2 = 24 in May.\n#### 72", "72"),
        ("#### $1,000.00", "1000"),
        ("####72", "72"),
        ("#### -5", "-5"),
        ("#### $-5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### 25%", "25"),
        ("#### **72**", "72"),
        ("####\n72", "72"),
        ("#### 72 clips in 2 months", "72"),
        ("#### 48 + 24 = 72", "72"),
        ("#### 72\n\nQ: another?\n#### 3", "72"),
        ("The answer is 5.\n#### 6", "6"),
        ("#### 3/4", "0.75"),
        ("#### The answer is 72", "72"),
        ("#### 1. Count\nThere are 3.\n#### 2. Add\nThe answer is 9.", "9"),
        ("####", None),
        # What the answer is said to be.
        ("The answer is 8.", "8"),
        ("the answer is therefore 3 of the 10", "3"),
        ("The final answer is: $\\boxed{72}$ out of 100", "72"),
        ("So the answer is 1,234.50 dollars", "1234.5"),
        ("The answer is **12** because 3 * 4 is easy: 7.", "12"),
        ("The answer is 5. No, the answer is 6. Checked 2 times.", "6"),
        ("The answer is 15 * 8 = 120 pints. It took 2 steps.", "120"),
        ("The answer to the question is 7, not 9", "7"),
        ("The answer should be 40 apples for 2.", "40"),
        ("**Answer:** $1,200 in 3 years", "1200"),
        ("Final answer: 7 of 9", "7"),
        ("Answer: She sold 48, then 24. In all 72.", "72"),
        ("The answer is unclear, I count 4.", "4"),
        # Boxed.
        ("\\boxed{42} is what 7 of us found", "42"),
        ("$\\boxed{\\frac{3}{4}}$ of 8", "0.75"),
        ("\\boxed{1{,}000} for 2", "1000"),
        ("\\boxed{\\$18} for 3", "18"),
        ("\\boxed{25\\%} of 60", "25"),
        ("\\boxed{\\text{about } 9} by 10", "9"),
        ("first \\boxed{1}, then \\boxed{2}, 3 times", "2"),
        ("\\boxed{x = 6} for 2", "6"),
        # The last number.
        ("She sold 48 and then 24, together 72 clips.", "72"),
        ("10-3", "3"),
        ("10 - 13 = -3", "-3"),
        ("10 - 13 = \u22123", "-3"),
        ("(-4)", "-4"),
        ("It costs $1,000,000.", "1000000"),
        ("He has .75", "0.75"),
        ("So he has...5", "5"),
        ("It is Rs.500", "500"),
        ("She needs 50 m2", "50"),
        ("1,2,3", "3"),
        ("half is 1/2", "0.5"),
        ("5/0", "0"),
        ("72.", "72"),
        ("007", "7"),
        ("<b>72</b>", "72"),
        # None.
        ("", None),
        ("I do not know.", None),
        ("seventy-two", None),
        ("Question: - $ , . / %", None),
    ],
)
def test_the_final_number_of_a_text(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=2), st.sampled_from(["#### {}", "answer is {}", "so {}"])
)
def test_a_number_is_read_as_it_was_written(value: Decimal, said: str) -> None:
    assert final_number(said.format(f"{value:,}")) == value
    assert final_number(said.format(value)) == value


@given(st.text(alphabet="#0123456789,.$-%/={}\\boxedanswer is:\n", max_size=200))
def test_no_text_is_too_strange(text: str) -> None:
    found = final_number(text)
    assert found is None or found.is_finite()


def test_equality_is_exact() -> None:
    assert number("1,000.00") == number("1000")
    assert number("3/4") == number(".75")
    assert number("0.1") != Decimal("0.1000000000000000055511151231257827")
    assert number("-" + "9" * 5000) == Decimal("-" + "9" * 5000)
    assert hash(number("1.50")) == hash(number("3/2"))


@pytest.mark.parametrize("text", ["", "72 clips", "4 5", "#### 4", "1,2", "five"])
def test_what_is_more_than_a_number_is_none(text: str) -> None:
    assert number(text) is None
