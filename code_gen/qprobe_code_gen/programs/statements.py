"""The top-level statements of a text that is Python in part: an answer with talk, fences and given code before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qprobe_code_gen.programs.relevance import Statement, is_stub

# A fence may stand behind the marks of lists and quotations, as in answers that count their steps.
FENCE = re.compile(r"(?P<before>(?:[ \t]|>|(?:[-*+]|\d{1,9}[.)])[ \t])*)(?P<marks>`{3,}|~{3,})(?P<info>.*)")
_CODE_ON_FENCE = re.compile(r"(?:[\w+.-]+[ \t]+)?((?:(?:async|def|class|import|from)[ \t]|@\w).*)")
PYTHON = re.compile(r"(?:\{?\s*\.?(?:python|py|ipython|pycon|sage|code|tool_code)[\d.]*(?![\w+#-]).*)?", re.IGNORECASE)
_NEEDS_MORE = re.compile(r"unterminated triple-quoted|was never closed|unexpected EOF")
# What goes on with a statement although it stands at the left margin.
_GOES_ON = re.compile(r"(?:else|elif|except|finally)\b|[)\]}]")
SHORTEST_FENCE = 3
BLANK = " \t\f"
_DEEPEST_FENCE = 3  # CommonMark: a closing fence is indented by three spaces at most
# What the compiler may be given for a text, in characters: it takes about a second for a million. A statement costs as much as
# so many characters, however short.
_EFFORT, _EFFORT_PER_CHARACTER, PIECE = 100_000, 3, 40


@dataclass(frozen=True)
class Found:
    """A statement, the block that it stands in, and whether that names another language."""

    statement: Statement
    block: int
    foreign: bool


class Compiler:
    """Compiles pieces of a text, with an effort that is bounded by the length of the text.

    Args:
        length: of the text, in characters.
    """

    def __init__(self, length: int) -> None:
        self.effort = _EFFORT + _EFFORT_PER_CHARACTER * length

    @property
    def tired(self) -> bool:
        """Whether no effort is left."""
        return self.effort < 0

    def statements(self, piece: str) -> list[ast.stmt] | SyntaxError:
        """The statements that a piece is made of, or why it is not."""
        self.effort -= len(piece)
        if self.tired:
            return SyntaxError("The text takes too long to read.")
        try:
            tree = ast.parse(piece)
            compile(tree, "<answer>", "exec")  # sees a `return` outside a function, which the parser does not
        except SyntaxError as error:
            self.effort -= PIECE
            return error
        except (ValueError, MemoryError, RecursionError) as error:  # a null byte, brackets without end
            self.effort -= PIECE
            return SyntaxError(str(error))
        self.effort -= PIECE * len(tree.body)
        return SyntaxError("The text takes too long to read.") if self.tired else tree.body


@dataclass(frozen=True)
class _Block:
    """What the lines at hand belong to: code that the prompt opened at first, then blocks and the talk between them.

    Args:
        number: counts the blocks.
        marks: of the fence that opened it; empty where none did.
        code: whether statements are looked for.
        foreign: whether it names another language.
        width: indentation that its lines lose.
        quoted: whether its lines lose a quotation mark.
    """

    number: int = 0
    marks: str = ""
    code: bool = True
    foreign: bool = False
    width: int = 0
    quoted: bool = False


class Scan:
    """Finds the statements of a text, line by line.

    Args:
        compiler: says what is a statement.
        code: given code, which the answer goes on with.
        answer: the rest of the text.
        everywhere: whether all lines may be code, and fences are nothing but lines to leave out.
    """

    def __init__(self, compiler: Compiler, code: str, answer: str, everywhere: bool = False) -> None:
        self.compiler = compiler
        self.lines = (code + answer).split("\n")
        self.given = code.count("\n")  # lines
        self.everywhere = everywhere
        self.block = _Block()
        self.answered = False  # whether the answer began with code that it did not open a fence for

    def statements(self) -> Iterator[Found]:
        at = 0
        while at < len(self.lines) and not self.compiler.tired:
            line = self._line(at)
            fence = FENCE.fullmatch(line)
            if fence and not self._is_content(fence):
                at, found = (at + 1, []) if self.everywhere else self._turn(at, fence)
            elif self.block.code and self._begins(line):
                at, found = self._statement(at)
            else:
                at, found = at + 1, []
            yield from found

    def _line(self, at: int) -> str:
        """A line without what is its block's."""
        line = self.lines[at]
        if self.block.quoted:
            line = re.sub(r"^[ \t]*> ?", "", line)
        indent = len(line) - len(line.lstrip(" \t"))
        return line[min(indent, self.block.width) :]

    def _begins(self, line: str) -> bool:
        """Whether a statement may begin with this line."""
        line = line.lstrip("\f")
        return bool(line.strip()) and line[0] not in " \t#" and not _GOES_ON.match(line)

    def _next(self, at: int) -> int:
        """The next line where a statement may begin or a fence stands."""
        at += 1
        while at < len(self.lines) and not self._begins(line := self._line(at)) and not FENCE.fullmatch(line):
            at += 1
        return at

    def _is_content(self, fence: re.Match[str]) -> bool:
        """Whether a fence is a line of the block at hand, because it cannot close it."""
        marks = self.block.marks
        closes = fence["marks"].startswith(marks) and not fence["info"].strip() and not fence["before"].strip()
        return bool(marks) and not (closes and len(fence["before"]) <= _DEEPEST_FENCE)

    def _turn(self, at: int, fence: re.Match[str]) -> tuple[int, list[Found]]:
        """Go on behind a fence that opens or closes a block, and what stands on its own line."""
        marks, info, number = fence["marks"], fence["info"].strip(), self.block.number + 1
        if self.block.marks or (self.block.number == 0 and self.answered and not info):
            self.block = _Block(number, code=False)
            return at + 1, []
        if marks[0] == "`" and "`" in info:  # no fence, but code between backticks
            inside = info[: info.rfind("`")].strip("` \t")
            for code in (inside, inside.partition(" ")[2]):
                nodes = self.compiler.statements(code)
                if isinstance(nodes, list) and nodes and not isinstance(nodes[0], ast.Expr):
                    return at + 1, [Found(statement, number, False) for statement in _split(code, nodes)]
            return at + 1, []
        code_here = _CODE_ON_FENCE.fullmatch(info)
        if code_here:
            self.lines[at] = code_here[1]
        at += not code_here
        self.block = _Block(
            number, marks, foreign=not code_here and not PYTHON.fullmatch(info), quoted=">" in fence["before"]
        )
        first = next((line for line in map(self._line, range(at, len(self.lines))) if line.strip()), "")
        self.block = replace(self.block, width=0 if code_here else len(first) - len(first.lstrip(" \t")))
        return at, []

    def _statement(self, at: int) -> tuple[int, list[Found]]:
        """The statement that begins at a line, if one does, and where to go on."""
        ends, nodes = self._fewest(at)
        end = ends
        if isinstance(nodes, SyntaxError):
            # Talk at the margin may begin with a word that goes on with a statement: what precedes it may be whole.
            cut = at + (nodes.lineno or 0) - 1
            if at < cut < end and self._line(cut)[:1] not in ("", *BLANK):
                end, nodes = cut, self.compiler.statements(self._text(at, cut))
        if isinstance(nodes, SyntaxError):
            return self._next(at), []
        if not self.block.marks and end > self.given and any(_is_code(node) for node in nodes):
            self.answered = True
        text = self._text(at, end)
        return end, [Found(statement, self.block.number, self.block.foreign) for statement in _split(text, nodes)]

    def _fewest(self, at: int) -> tuple[int, list[ast.stmt] | SyntaxError]:
        """The fewest lines from here that do not ask for more, and what they are."""
        ends = [self._next(at)]

        def piece(place: int) -> tuple[list[ast.stmt] | SyntaxError, bool]:
            nodes = self.compiler.statements(self._text(at, ends[place]))
            last = self._line(ends[place - 1] if place else at)
            more = isinstance(nodes, SyntaxError) and bool(_NEEDS_MORE.search(nodes.msg) or last.startswith("@"))
            return nodes, more

        nodes, more = piece(0)
        low, step = 0, 1
        while more and ends[-1] < len(
            self.lines
        ):  # a long string or bracket: first by leaps, then halving the last one
            low = len(ends) - 1
            while len(ends) <= low + step and ends[-1] < len(self.lines):
                ends.append(self._next(ends[-1]))
            step *= 2
            nodes, more = piece(len(ends) - 1)
        high = len(ends) - 1
        while not more and high - low > 1:
            middle = (low + high) // 2
            between, wants_more = piece(middle)
            if wants_more:
                low = middle
            else:
                high, nodes = middle, between
        return ends[high], nodes

    def _text(self, at: int, end: int) -> str:
        return "\n".join(map(self._line, range(at, end)))


def _is_code(node: ast.stmt) -> bool:
    """Whether a statement is no talk that happens to compile, and no function without a body."""
    return not is_stub(node) and not isinstance(node, ast.Expr | ast.AnnAssign)


def _split(text: str, nodes: Sequence[ast.stmt]) -> list[Statement]:
    """The statements of a text, each with its own: several may share a line."""
    if len(nodes) == 1:
        return [Statement(text, nodes[0])]
    lines = [line.encode() for line in text.split("\n")]  # places are counted in bytes
    found = []
    for node in nodes:
        assert node.end_lineno is not None  # of a statement that was parsed
        own = lines[node.lineno - 1 : node.end_lineno]
        own[-1] = own[-1][: node.end_col_offset]
        own[0] = own[0][node.col_offset :]
        found.append(Statement(b"\n".join(own).decode(), node))
    return found
