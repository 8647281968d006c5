"""Where a completion of a programming problem surely ends, while it is drawn.

A closing fence ends it, and so does a line at the left margin behind a function that is finished and asks for nothing more: no
helper, constant or import that it needs can follow. All else is left to `reading`, which cuts nothing that a program needs.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from qprobe_code_gen.programs.reading import Given, is_whole

# Raised whenever completions may end elsewhere than before.
VERSION = 1
# What a server is told: a fence that names no language seldom opens anything.
CLOSING_FENCE = "\n```\n"
_FENCE_LINE = re.compile(r"\n {0,3}(?:`{3,}|~{3,})(?P<info>[^`\n]*)(?P<line_end>\n|\Z)")
# What begins at the left margin, read far enough to see that it does not define the function anew. `sys.setrecursionlimit` may
# still belong to a program that is finished without it.
_BEGINS_NEW = re.compile(
    r"\n(?:(?:(?:async )?def|class) (?P<defined>\w+)\b.|(?P<assigned>\w+) ?= |(?!sys\.)\w+[(.]"
    r'|(?:import|from|assert|if|for|while|with)[ (]|print\b.|try:|"""|\'\'\')',
    re.DOTALL,
)
_CODE = re.compile(r"^(?:[ \t]+\S|(?:def|class|import|from|return)\b|@)", re.MULTILINE)
_AT_MARGIN = re.compile(r"\n(?:[^\s#][^\n]*| {0,3}[`~]{3,}[ \t]*\n[^\n]*)\Z")
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
        return {"rule": f"program, version {VERSION}"}

    def may_end(self, recent: str) -> bool:
        """Whether the text of the last tokens ends in a line at the left margin, or behind a fence."""
        return _AT_MARGIN.search(recent) is not None

    def end(self, prompt: str, text: str, last: bool) -> int | None:
        """Where the completion ends; None while it may go on.

        Args:
            prompt: as rendered.
            text: of the completion so far.
            last: whether nothing follows it any more.
        """
        given = self._given(prompt)
        fence = _closing_fence(text, given, last)
        for new in _BEGINS_NEW.finditer(text, 0, len(text) if fence is None else fence):
            if given.entry_point not in (new["defined"], new["assigned"]) and _is_whole(text[: new.start()], given):
                return new.start()
        return fence

    def _given(self, prompt: str) -> Given:
        if prompt not in self._known:
            asked = prompt.rstrip()
            held = [pair for pair in self.asked if (asked.endswith(pair[0]) if self.behind else pair[0] in asked)]
            self._known[prompt] = max(held, key=lambda pair: len(pair[0]), default=("", NOTHING))[1]
        return self._known[prompt]


# While tokens come, the same text before a line is asked about several times.
_is_whole = functools.lru_cache(maxsize=1024)(is_whole)


def _closing_fence(text: str, given: Given, last: bool) -> int | None:
    """Where a fence closes code, the prompt's or a block's; None where none does."""
    block: int | None = None  # where the code of a block begins
    for fence in _FENCE_LINE.finditer("\n" + text):
        at, behind = fence.start() - 1, fence.end("info") - 1
        if fence["info"].strip():
            block = behind if block is None else block
        elif block is None and not _CODE.search(text, 0, max(at, 0)):
            block = behind
        elif (fence["line_end"] or last) and not _in_string(
            given.code + text[:at] if block is None else text[block:at]
        ):
            return at
    return None


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
