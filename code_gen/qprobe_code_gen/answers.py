"""The final number of an answer in words: where it stands, and what it is worth, exactly.

Read in this order: behind `####` (GSM-8K's own mark), behind "the answer is", inside \\boxed{...}, else the last number of all.
Where it stops: digits only (no "seventy-two"), English separators (1,000.5), no powers of ten; a per cent is its number.
"""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"
AMOUNT = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?>\.[0-9]+)?"
# A minus behind a digit, a letter or a bracket subtracts; digits inside a word (m2) are no number.
NUMBER = re.compile(
    rf"(?:(?<![\w)\]%])(?P<minus>-\$?|\$-))?(?<![A-Za-z_0-9])(?P<amount>{AMOUNT}|(?<!\.)\.[0-9]+)"
    r"(?:\s?/\s?(?P<over>(?=[0-9.]*[1-9])[0-9]+(?:\.[0-9]+)?))?"
)
# A sentence may say what the answer is; behind a colon it may also begin to reason, so a number must follow at once.
SENTENCE = r"((?:(?![.!?]\s)[^\n])*)"
STATED = re.compile(
    rf"\banswer\b[^.\n0-9]{{0,40}}?\b(?:is|be)\b{SENTENCE}|\banswer\W{{0,3}}[:=](?=[^\n\w]*[0-9]){SENTENCE}", re.I
)
# "#### 2. Then": a heading of Markdown, not an answer.
NUMBERED = re.compile(r"[.):]\s+\w")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9.]+)\}\s*\{([0-9.]+)\}")
# How LaTeX writes inside numbers, and a minus of its own.
WRITTEN = (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\u2212", "-"))


def number(text: str) -> Decimal | None:
    """A text that is one number and nothing else, but for white space, a dollar and a per cent sign; else None."""
    found = NUMBER.fullmatch(text.strip().lstrip("$").rstrip("%"))
    return None if found is None else _value(found)


def final_number(text: str) -> Decimal | None:
    """The number that an answer ends in; None where it has none.

    Returns: an exact decimal; a fraction that does not come out even is rounded to 28 digits.
    """
    for written, plain in WRITTEN:
        text = text.replace(written, plain)
    text = FRACTION.sub(r"\1/\2", text)
    for line in re.findall(rf"{MARK}\s*([^\n]*)", text):
        found = NUMBER.search(line)
        if found and not re.search(r"\w", line[: found.start()]) and not NUMBERED.match(line[found.end() :]):
            # The first: what a model writes behind its answer belongs to a question of its own making.
            return _result(line)
    stated = [said or given for said, given in STATED.findall(text)]
    for clause in (*reversed(stated), *reversed(BOXED.findall(text))):
        value = _result(clause)
        if value is not None:
            return value
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _result(clause: str) -> Decimal | None:
    """The first number of a clause, or of what its last equals sign gives."""
    found = NUMBER.search(clause.rpartition("=")[2])
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["amount"].replace(",", ""))
    if found["over"]:
        value /= Decimal(found["over"])
    # Plain negation would round a long number.
    return value.copy_negate() if found["minus"] else value
