"""Which completions are Python, and the colours of their tokens as runs of characters.

A text is kept as it is; its colours are a second string such as "3k1 4f": three characters of a keyword, one of none, four
of a name. So a page can set every text as text, and nothing in a completion is ever read as HTML.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

try:
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, Keyword, Name, Number, Operator, String
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the page needs Pygments: pip install 'qprobe[report]'", name="pygments") from error

# Looked up from the first to the last: a special kind comes before the kind that holds it.
_COLOURS: tuple[tuple[Any, str], ...] = (
    (Operator.Word, "k"),
    (Keyword.Constant, "n"),
    (Keyword, "k"),
    (String, "s"),
    (Comment, "c"),
    (Number, "n"),
    (Name.Function, "f"),
    (Name.Class, "f"),
    (Name.Decorator, "f"),
    (Name.Builtin, "b"),
    (Name.Exception, "b"),
)
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_PYTHON_LINE = re.compile(
    r"^\s*(def \w+\(|class \w+.*:$|return\b|import \w|from \w+.* import |(if|elif|for|while|with) .+:$|[\w, .\[\]]+ [-+*/]?= )",
    re.MULTILINE,
)
_PYTHON = PythonLexer(stripnl=False, ensurenl=False)


def look_like_python(texts: Iterable[str]) -> bool:
    """Whether most of a pool's texts hold a line that only code has; those in fences say so themselves."""
    bare = [text for text in texts if text.strip() and "```" not in text]
    return 2 * sum(bool(_PYTHON_LINE.search(text)) for text in bare) > len(bare)


def opens_fence(prompt: str) -> bool:
    """Whether a prompt ends inside a fence, which its completions then go on in."""
    return len(_FENCE.findall(prompt)) % 2 == 1


def colours(text: str, *, python: bool, opened: bool) -> str:
    """The colours of a text's tokens.

    Args:
        text: a completion.
        python: a text without a fence is Python.
        opened: the prompt has opened a fence.

    Returns: runs as numbers of UTF-16 units (a browser counts in these), each with the letter of its colour or a blank: k
        keyword, s string, c comment, n number, f defined name, b built-in name. Empty where nothing is coloured.
    """
    runs: list[tuple[int, str]] = []
    for piece, is_code in _pieces(text, python, opened):
        tokens = _PYTHON.get_tokens_unprocessed(piece) if is_code else [(0, None, piece)]
        for _, kind, value in tokens:
            colour = " " if kind is None else next((c for of, c in _COLOURS if kind in of), " ")
            colour = colour if value.strip() else " "
            length = len(value.encode("utf-16-le")) // 2
            if runs and runs[-1][1] == colour:
                length += runs.pop()[0]
            runs.append((length, colour))
    if all(colour == " " for _, colour in runs):
        return ""
    return "".join(f"{length}{colour}" for length, colour in runs)


def _pieces(text: str, python: bool, opened: bool) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is Python; fences themselves are not."""
    fences = list(_FENCE.finditer(text))
    open_, code = opened, opened or (python and not fences)
    start = 0
    for fence in fences:
        yield text[start : fence.start()], code
        yield fence.group(), False
        open_ = not open_
        code = open_ and fence.group(1).lower() in ("", "python", "python3", "py")
        start = fence.end()
    yield text[start:], code
