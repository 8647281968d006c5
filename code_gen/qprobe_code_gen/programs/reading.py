"""The program that a completion was meant to be: one function, `read`, for every prompt style.

Where a statement ends is decided by Python's own compiler, where a block of code ends by CommonMark's fences. It stops there:
code is never repaired, so what does not compile earns nothing.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qprobe_code_gen.programs.relevance import BUILTINS, Statement, defines, relevant
from qprobe_code_gen.programs.statements import BLANK, FENCE, SHORTEST_FENCE, Compiler, Found, Scan

# Raised whenever a completion may be read as another program than before: rewards of an older version are made anew.
VERSION = 2
# What a model ends its turn with, where its sampler lets it through.
_LAST_MARKS = re.compile(r"(?:<\|\w{1,30}\|>|</s>|<eos>|<end_of_turn>|<EOT>)\s{0,9}\Z")
CONSOLE = re.compile(r"^[ \t]*(?:>>> |\.\.\. |\.\.\.$)")
_TAGS = r"(?:think|thinking|thought|reasoning|reflection|scratchpad)"
REASONING = re.compile(rf"^[ \t]*(?:<{_TAGS}>|\[THINK\])", re.IGNORECASE | re.MULTILINE)
_REASONED = re.compile(rf"</{_TAGS}>|\[/THINK\]", re.IGNORECASE)
# The same where the prompt began the reasoning: at a line's end, where no program's string has it.
_REASONED_IN_PROMPT = re.compile(rf"(?:</{_TAGS}>|\[/THINK\])[ \t]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Given:
    """What a completion was asked to go on with.

    Args:
        header: code before the function: imports and given helper functions.
        signature: the `def` line(s) of the function; empty where the problem gives none.
        docstring: the lines behind the signature, as far as the prompt showed them; empty where it did not.
        entry_point: the name that the tests call; empty where it is not known.
    """

    header: str
    signature: str
    docstring: str
    entry_point: str

    @property
    def code(self) -> str:
        return self.header + self.signature + self.docstring


@dataclass(frozen=True)
class Reading:
    """A completion as a program.

    Args:
        program: what is executed.
        statements: those that belong to it; none where the completion cannot be read as a program.
    """

    program: str
    statements: Sequence[Statement] = ()


def read(completion: str, given: Given) -> Reading:
    """The program that a completion was meant to be.

    1. Lines end as Python's do (`\\n`, `\\r\\n`, `\\r`), at no other character. Reasoning is set aside: from a `<think>` that
       begins a line to its `</think>`, or all before a `</think>` where the prompt began it.
    2. The completion is read behind the given code, one top-level statement after another. A statement is the fewest lines
       that compile, so that comments, strings and brackets at the left margin end no body, and a fence inside a string is none.
       A line at the margin where no statement begins is talk and left out.
    3. A fence opens a block, or closes one: at least as many of the same marks, and nothing behind them. Lines of a block lose
       the indentation of its first and a quotation mark. A bare fence behind code that no fence opened closes that code;
       behind it further blocks are read, and no talk. A block that names another language counts where it defines the
       function. Code between backticks, and on the line of the fence, is code.
    4. All statements are one program in their order: helpers stay, the last definition of the function wins, and one without a
       body never does. What only shows the function at work goes (`relevance`): assertions, prints, calls, main guards.
    5. Where this defines no function with a body, other readings are tried in turn, and the first that does so is taken:
       the body without the given docstring (which fixes an indentation); all lines as code, those before a fence at a
       line's end, inside backticks, in indented blocks and a console's too; and, where they then return something, the body
       without fences, with the first line indented as the others are, with all lines indented.
    6. Where none does, the program is the given code and the completion as they are.

    Args:
        completion: as sampled. The compiler's effort is bounded by its length: 100 kB take about a second at most, whatever
            they are.
        given: what it was asked to go on with.
    """
    text = re.sub(r"\r\n?", "\n", completion)
    answer = _without_reasoning(_LAST_MARKS.sub("", text.removeprefix("\ufeff")))
    compiler = Compiler(len(answer))
    with warnings.catch_warnings():  # of the answer's code
        warnings.simplefilter("ignore")
        for code, body, everywhere, returns in _ways(answer, given):
            if compiler.tired:
                break
            found = list(Scan(compiler, code, body, everywhere).statements())
            statements = _program(found, given.entry_point, returns)
            if statements:
                return Reading("\n".join(s.text for s in statements).rstrip("\n") + "\n", statements)
    return Reading(given.code + text)


def is_whole(completion: str, given: Given) -> bool:
    """Whether a completion so far is a program that asks for nothing more: every name that it uses is defined."""
    text = re.sub(r"\r\n?", "\n", completion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(Scan(Compiler(len(text)), given.code, text).statements())
        statements = _program(found, given.entry_point, returns=False)
        known = BUILTINS.union(*(s.binds for s in statements))
        return bool(statements) and not any(s.uses - known for s in statements)


def _ways(answer: str, given: Given) -> Iterator[tuple[str, str, bool, bool]]:
    """What the answer may be: code before it, the answer, whether all lines are code, whether it has to return something."""
    yield given.code, answer, False, False
    bare = given.header + given.signature.rstrip("\n") + "\n"
    if given.signature:
        yield bare, answer, False, False
    yield given.code, _loose(answer), True, False
    if given.signature:
        body = "\n".join(line for line in answer.split("\n") if not FENCE.fullmatch(line)).strip("\n")
        yield bare, body, False, True
        behind = [line[: len(line) - len(line.lstrip(BLANK))] for line in body.strip().split("\n")[1:] if line.strip()]
        yield bare, min(filter(None, behind), key=len, default="    ") + body.strip(), False, True
        yield bare, textwrap.indent(body, "    "), False, True


def _program(found: Sequence[Found], entry_point: str, returns: bool) -> list[Statement]:
    """The statements of one program; none where the function is not defined with a body."""
    defining = [f for f in found if defines(f.statement, entry_point)]
    if not defining or (returns and not any(isinstance(n, ast.Return) for n in ast.walk(defining[-1].statement.node))):
        return []
    blocks = {f.block for f in defining}
    kept = relevant([f.statement for f in found if not f.foreign or f.block in blocks], entry_point)
    return sorted(kept, key=lambda s: not (isinstance(s.node, ast.ImportFrom) and s.node.module == "__future__"))


def _without_reasoning(text: str) -> str:
    begin, end = REASONING.search(text), _REASONED_IN_PROMPT.search(text)
    if end and (not begin or end.start() < begin.start()):
        text = text[end.end() :]
    parts, at = [], 0
    while begin := REASONING.search(text, at):
        end = _REASONED.search(text, begin.end())
        parts.append(text[at : begin.start()])
        at = end.end() if end else len(text)
    return "".join(parts) + text[at:]


def _loose(answer: str) -> str:
    """The answer with all that may be code on lines of its own, at the margin."""
    groups: list[list[str]] = []
    for line in "\n".join(map(_unmarked, answer.split("\n"))).split("\n"):
        # A group is indented lines or lines at the margin, with the empty lines behind them.
        if not groups or (line.strip() and (line[0] in BLANK) != (groups[-1][0][:1] in BLANK or not groups[-1][0])):
            groups.append([])
        groups[-1].append(line)
    return "\n".join(_at_margin("\n".join(group)) for group in groups)


def _unmarked(line: str) -> str:
    """A line without a console's mark and the fence at its end, and with definitions between backticks on lines of their own."""
    line = CONSOLE.sub("", line)
    for mark in "`~":
        code = line.rstrip().rstrip(mark)
        if len(line.rstrip()) - len(code) >= SHORTEST_FENCE and code.strip("`~> \t"):
            line = code
    between = re.split(r"`+", line)
    if not any(re.search(r"\b(?:def|lambda)\b", code) for code in between[1::2]):
        return line
    return "\n".join(part.strip() for part in between)


def _at_margin(group: str) -> str:
    """A group of lines without their indentation where a definition or an import begins it."""
    begins = re.match(r"\s+(?:(?:async|def|class|import|from)\b|@)", group)
    return textwrap.dedent(group) if begins else group
