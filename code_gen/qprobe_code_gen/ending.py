"""Where a completion of a programming problem surely ends, while it is drawn.

A closing fence ends it, and so does a line at the left margin behind a function that is finished and asks for nothing more: no
helper, constant or import that it needs can follow. All else is left to `reading`, which cuts nothing that a program needs.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from qprobe_code_gen.reading import Given, is_whole

# Raised whenever completions may end elsewhere than before.
VERSION = 1
# What a server is told: a fence that names no language seldom opens anything.
CLOSING_FENCE = "\n```\n"
FENCE_LINE = re.compile(r"\n {0,3}(?:`{3,}|~{3,})(?P<info>[^`\n]*)(?P<line_end>\n|\Z)")
# What begins at the left margin, read far enough to see that it does not define the function anew. `sys.setrecursionlimit` may
# still belong to a program that is finished without it.
BEGINS_NEW = re.compile(
    r"\n(?:(?:(?:async )?def|class) (?P<defined>\w+)\b.|(?P<assigned>\w+) ?= |(?!sys\.)\w+[(.]"
    r'|(?:import|from|assert|if|for|while|with)[ (]|print\b.|try:|"""|\'\'\')',
    re.DOTALL,
)
CODE = re.compile(r"^(?:[ \t]+\S|(?:def|class|import|from|return)\b|@)", re.MULTILINE)
AT_MARGIN = re.compile(r"\n(?:[^\s#][^\n]*| {0,3}[`~]{3,}[ \t]*\n[^\n]*)\Z")
NOTHING = Given("", "", "", "")


class ProgramEnd:
    """The rule by which completions of some problems end; a rule of `qprobe.sampling`.

    Args:
        asked: for every problem a text that its prompts hold, and what its completions go on with.
        behind: whether that text ends the prompts.
    """

    def __init__(self, asked: Sequence[tuple[str, Given]], behind: bool) -> None:
        self.asked = [(text.strip(), given) for text, given in asked]
        self.behind = behind
        self._known: dict[str, Given] = {}

    def identity(self) -> dict[str, Any]:
        return {"rule": "program", "version": VERSION}

    def may_end(self, recent: str) -> bool:
        """Whether the text of the last tokens ends in a line at the left margin, or behind a fence."""
        return AT_MARGIN.search(recent) is not None

    def end(self, prompt: str, text: str, last: bool) -> int | None:
        """Where the completion ends; None while it may go on.

        Args:
            prompt: as rendered.
            text: of the completion so far.
            last: whether nothing follows it any more.
        """
        given = self._given(prompt)
        return next(self._ends(text, given, last), None)

    def _ends(self, text: str, given: Given, last: bool) -> Iterator[int]:
        found = [(m.start(), m) for expression in (FENCE_LINE, BEGINS_NEW) for m in expression.finditer(text)]
        for at, match in sorted(found, key=lambda pair: pair[0]):
            if match.re is BEGINS_NEW:
                if given.entry_point not in (match["defined"], match["assigned"]) and _is_whole(text[:at], given):
                    yield at
            elif not match["info"].strip() and (match["line_end"] or last) and _closes(text[:at], given):
                yield at

    def _given(self, prompt: str) -> Given:
        if prompt not in self._known:
            asked = prompt.rstrip()
            held = [pair for pair in self.asked if (asked.endswith(pair[0]) if self.behind else pair[0] in asked)]
            self._known[prompt] = max(held, key=lambda pair: len(pair[0]), default=("", NOTHING))[1]
        return self._known[prompt]


# While tokens come, the same text before a line is asked about several times.
_is_whole = functools.lru_cache(maxsize=1024)(is_whole)


def _closes(before: str, given: Given) -> bool:
    """Whether a bare fence behind this text closes code."""
    fences = list(FENCE_LINE.finditer("\n" + before))
    if not fences:
        return CODE.search(before) is not None and not _in_string(given.code + before)
    opened = bool(fences[-1]["info"].strip()) or len(fences) % 2 == 1
    named = [fence for fence in fences if fence["info"].strip()] or fences
    return opened and not _in_string(before[named[-1].end() - 1 :])


def _in_string(code: str) -> bool:
    """Whether code ends inside a string of several lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        return "unterminated triple-quoted" in error.msg
    except (ValueError, MemoryError, RecursionError):  # it is no code
        return False
    return False
