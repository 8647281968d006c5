"""The judge's process: runs the tests, and asks the candidate's process for every call. Standard library only.

It never runs a line of the candidate's. What the candidate answers becomes plain data of this process or ends the verdict;
whatever else it does, it does to itself. A judge is forked for each verdict and cannot be looked into.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from itertools import islice
from types import FrameType
from typing import Any, NoReturn

from . import channel as asked
from . import child
from .channel import Asking, Gone, Unasked
from .codec import ITEMS, NAMED, Decoder, Encoder, Garbled, Unsendable, replace

# What a candidate's process may say of its own end.
ENDS = ("failed", "error", "syntax_error", "out_of_memory")
STOPS = (StopIteration, StopAsyncIteration)


class _Judge:
    """One verdict.

    Args:
        request: code, header, imports, tests and expression (sources), names to call and names to read (lists).
        channel: to the candidate's process.
        tell: writes verdict, detail and value, and ends this process.
        value_bytes: largest value of the expression, bytes.
    """

    def __init__(
        self,
        request: dict[str, Any],
        channel: Asking,
        tell: Callable[[str, str, bytes], NoReturn],
        value_bytes: int,
    ) -> None:
        self.request = request
        self.channel = channel
        self.tell = tell
        self.value_bytes = value_bytes
        self.items = 0
        self.raised: tuple[BaseException | None, str, str] = (None, "", "")  # the candidate's last, verdict, detail

    def run(self) -> NoReturn:
        """Run everything and say how it ended."""
        # The program runs while this process compiles.
        self._ask(asked.PROGRAM, self.request["code"])
        refusal: child.Refused | None = None
        try:
            tests = child.compiled(self.request["tests"], child.TESTS)
            expression = None
            if self.request["expression"]:
                expression = child.compiled(self.request["expression"], child.EXPRESSION)
        except child.Refused as fault:
            refusal = fault
        self._ready(refusal)
        try:
            namespace = self._names()
            exec(tests, namespace)
            value = b""
            if expression is not None:
                value = repr(eval(expression, namespace)).encode("utf-8", "backslashreplace")
        except BaseException as fault:
            self._failed(fault)
        self._ask(asked.FINISH, None)
        kind, data = self._hear()
        if kind != asked.RETURNED or data:
            self.tell("error", "the program garbled its channel to the tests at their end", b"")
        self.tell(*child.within(value, self.value_bytes))

    def _ready(self, refusal: child.Refused | None) -> None:
        kind, data = self._hear()
        if kind != asked.RETURNED or data:
            verdict, detail = self._end(kind, data)
            # Programs are compiled before their tests, and tests before a program runs.
            if refusal is None or verdict == "syntax_error":
                self.tell(verdict, detail, b"")
        if refusal is not None:
            verdict, detail = refusal.args
            self.tell(verdict, detail, b"")

    def _names(self) -> dict[str, Any]:
        """What the tests see: this process's builtins, the header and its imports, the candidate's functions by proxy."""
        read = self.request["values"]
        namespace = Names(child.MODULE.__dict__, self.value, read) if read else child.MODULE.__dict__
        for source in (self.request["header"], self.request["imports"]):
            if source:
                exec(child.compiled(source, child.HEADER), namespace)
        for name in self.request["calls"]:
            namespace[name] = self.proxy(name)
        return namespace

    def proxy(self, name: str) -> Callable[..., Any]:
        """A function that is called in the candidate's process."""

        def call(*arguments: Any, **named: Any) -> Any:
            return self.call(asked.CALL, name, arguments, named)

        call.__name__ = call.__qualname__ = name
        return call

    def value(self, name: str) -> Any:
        """A value of the candidate's module, as it is now; for a function its proxy."""
        return self.call(asked.VALUE, name, (), {})

    def call(self, kind: int, name: str | int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Ask a question, and give what the candidate's function returns or raise what it raises."""
        encoder = self._ask(kind, (name, arguments, named))
        answer, data = self._hear()
        if answer == asked.EXHAUSTED and kind == asked.NEXT and not data:
            raise StopIteration
        if answer == asked.FUNCTION and kind == asked.VALUE and not data:
            return self.proxy(str(name))
        if answer not in (asked.RETURNED, asked.RAISED):
            if answer == asked.UNSENDABLE:
                where = f"the result of {name}()" if kind == asked.CALL else "an item" if kind == asked.NEXT else name
                detail = self._plain(data, 1)[0]
                self.tell("failed", f"{where}{self._line()} is no plain value: {detail}", b"")
            verdict, detail = self._end(answer, data)
            self.tell(verdict, detail, b"")
        try:
            said, changes = Decoder(encoder.containers, self.iterator).decode(data)
            for number, new in changes:
                replace(encoder.containers[number], new)
            if answer == asked.RETURNED:
                return said
            fault = self._exception(*said)
        except (Garbled, TypeError, ValueError, IndexError) as reason:
            self.tell("error", f"the program garbled its answer to a call of {name}(): {reason}", b"")
        raise fault

    def iterator(self, handle: int) -> _Remote:
        """An iterator of the candidate's process."""
        return _Remote(self, handle)

    def next(self, handle: int) -> Any:
        """The next item of an iterator of the candidate's process."""
        self.items += 1
        if self.items > ITEMS:
            self.tell("failed", f"the tests took more than {ITEMS} items from iterators of the program", b"")
        return self.call(asked.NEXT, handle, (), {})

    def _ask(self, kind: int, question: Any) -> Encoder:
        encoder = Encoder({}, self._items)
        try:
            self.channel.ask(kind, b"" if question is None else encoder.encode(question))
        except Unsendable as fault:
            self.tell("error", f"what is sent to the program{self._line()} is no plain value: {fault}", b"")
        except (Gone, Unasked) as fault:
            self._gone(fault)
        return encoder

    def _hear(self) -> tuple[int, bytes]:
        try:
            return self.channel.answer()
        except (Gone, Unasked) as fault:
            self._gone(fault)

    def _gone(self, fault: Gone | Unasked) -> NoReturn:
        if isinstance(fault, Gone):
            self.tell(child.GONE, "the program closed its channel to the tests before they had returned", b"")
        self.tell("error", f"the program garbled its channel to the tests: {fault}", b"")

    def _end(self, kind: int, data: bytes) -> tuple[str, str]:
        if kind == asked.ENDED:
            verdict, detail = self._plain(data, 2)
            if verdict in ENDS:
                return verdict, detail
        return "error", "the program garbled its channel to the tests: an answer of another kind"

    def _plain(self, data: bytes, count: int) -> list[str]:
        reason = "texts were due"
        try:
            texts = Decoder((), None).decode(data)
        except Garbled as fault:
            texts, reason = None, str(fault)
        if type(texts) is not list or len(texts) != count or not all(type(text) is str for text in texts):
            self.tell("error", f"the program garbled its channel to the tests: {reason}", b"")
        return texts

    def _items(self, iterator: Any) -> int | list[Any]:
        if type(iterator) is _Remote:
            return iterator.handle
        return list(islice(iterator, ITEMS + 1))

    def _exception(self, name: str, arguments: list[Any], text: str, verdict: str, detail: str) -> BaseException:
        kind: Any = NAMED.get(name) if type(name) is str else None
        # A StopIteration would cut a `zip(map(f, ...), ...)` of the tests short.
        ordinary = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, STOPS)
        if not ordinary or verdict not in ENDS or type(text) is not str:
            raise Garbled("an exception of no built-in class")
        try:
            fault: Exception = kind(*arguments)
            fault = fault if str(fault) == text else kind(text)
        except Exception:  # some built-in classes want arguments of their own
            fault = Exception(text)
        self.raised = (fault, verdict, str(detail))
        return fault

    def _failed(self, fault: BaseException) -> NoReturn:
        known, verdict, detail = self.raised
        if fault is known:
            self.tell(verdict, detail, b"")
        verdict, detail = child.describe(fault)
        if verdict == "out_of_memory":  # of this process: the program's value is more than the tests can take
            verdict = "failed"
        self.tell(verdict, detail, b"")

    def _line(self) -> str:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename in child.PLACES:
                return f" at line {frame.f_lineno} of {child.PLACES[frame.f_code.co_filename]}"
            frame = frame.f_back
        return ""


class _Remote:
    """An iterator that lives in the candidate's process: one question an item."""

    __slots__ = ("handle", "judge")

    def __init__(self, judge: _Judge, handle: int) -> None:
        self.judge = judge
        self.handle = handle

    def __iter__(self) -> _Remote:
        return self

    def __next__(self) -> Any:
        return self.judge.next(self.handle)


class Names(dict[str, Any]):
    """The names of the tests, some of which are values of the candidate's module, read whenever they are used.

    Args:
        known: names of this process.
        read: asks for a value.
        values: the names that are asked for.
    """

    def __init__(self, known: dict[str, Any], read: Callable[[str], Any], values: list[str]) -> None:
        super().__init__(known)
        self._read = read
        self._values = frozenset(values) - vars(builtins).keys()

    def __missing__(self, name: str) -> Any:
        if name in self._values:
            return self._read(name)
        raise KeyError(name)


def run(request: dict[str, Any], fd: int, token: bytes, result_fd: int, value_bytes: int) -> NoReturn:
    """Judge one program, write the record, leave.

    Args:
        request: see `_Judge`.
        fd: connected socket to the candidate's process.
        token, result_fd: of the record.
        value_bytes: largest value of the expression, bytes.
    """
    stdout = sys.stdout

    def tell(verdict: str, detail: str, value: bytes) -> NoReturn:
        child.report(token, verdict, detail, value, result_fd, stdout)

    try:
        _Judge(request, Asking(fd), tell, value_bytes).run()
    except MemoryError:
        tell("failed", "the tests ran out of memory on what the program returned", b"")
