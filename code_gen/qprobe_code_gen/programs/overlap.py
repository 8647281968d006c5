"""Problems that are nearly the same: a function of the same name, or the same words.

MBPP's published split has 32 functions and three texts on both sides, so that a probe may know a tested problem from training.
They are not dropped, but reported with and without (`shared_with`); in cross-validation they stay in one fold (`clusters`).
"""

from __future__ import annotations

from collections.abc import Sequence

from qprobe_code_gen.programs.mbpp import REQUEST
from qprobe_code_gen.programs.problem import Problem


def _text_of(problem: Problem) -> str:
    """What is asked for in words, without tests, but for case and white space."""
    return " ".join(problem.description.partition(REQUEST)[0].casefold().split())


def shared_with(training: Sequence[Problem], tested: Sequence[Problem], name: str) -> dict[str, frozenset[str]]:
    """The tested problems that ask for the same as a training problem.

    Args:
        name: of the training set.

    Returns: what is wrong with them, in words -> their task ids; nothing where there is none.
    """
    names, texts = {problem.entry_point for problem in training} - {""}, set(map(_text_of, training))
    by_name = {problem.task_id for problem in tested if problem.entry_point in names}
    by_text = {problem.task_id for problem in tested if _text_of(problem) in texts}
    if not by_name | by_text:
        return {}
    words = f"share an entry point ({len(by_name)}) or their text ({len(by_text)}) with a problem of {name}"
    return {words: frozenset(by_name | by_text)}


def clusters(problems: Sequence[Problem]) -> dict[str, str] | None:
    """Task id -> the first problem that it shares an entry point or its text with, over however many; None where none does."""
    above: dict[str, str] = {}

    def root(key: str) -> str:
        while (up := above.setdefault(key, key)) != key:
            key = up
        return key

    for problem in problems:
        for key in (f"name {problem.entry_point}" if problem.entry_point else "", f"text {_text_of(problem)}"):
            if key:
                above[root(key)] = root(problem.task_id)
    found = {problem.task_id: root(problem.task_id) for problem in problems}
    return found if len(set(found.values())) < len(found) else None
