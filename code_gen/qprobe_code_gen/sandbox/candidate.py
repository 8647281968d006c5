"""The candidate's process: runs a program and answers the judge's questions about it. Standard library only.

It is forked from processes that were never sent a test, an expected value or a token, and is sent none: the program, then
calls, one at a time. Nothing it answers is believed but plain data (`codec`), so nothing here needs to be safe from the
program; what is needed afterwards only survives what programs patch by accident.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any, NoReturn

from . import channel as asked
from . import child
from .codec import ITEMS, NAME_OF, Decoder, Encoder, Unsendable, contents, same

globals()["__builtins__"] = dict(child.SHARED_BUILTINS)
_ENDING = (StopIteration, StopAsyncIteration, SystemExit, KeyboardInterrupt, GeneratorExit)
_BUILT_IN = frozenset(id(value) for value in vars(builtins).values() if isinstance(value, type))


def run(fd: int) -> NoReturn:
    """Answer questions until there are no more, then leave.

    Args:
        fd: connected socket to the judge.
    """
    stdout = sys.stdout
    channel = asked.Answering(fd)
    answers = Answers()
    while (question := channel.question()) is not None:
        kind, payload = question
        if kind == asked.FINISH:
            child.flush(stdout)
            channel.answer(asked.RETURNED, b"")
            break
        try:
            if kind == asked.PROGRAM:
                code = child.compiled(Decoder((), None).decode(payload), child.PROGRAM)
                exec(code, child.MODULE.__dict__)
                answer = asked.RETURNED, b""
            else:
                answer = answers.to(kind, payload)
        except child.Refused as refusal:
            answer = asked.ENDED, answers.plain(refusal.args)
        except BaseException as fault:
            answer = asked.ENDED, answers.plain(child.describe(fault))
        channel.answer(*answer)
    else:
        child.flush(stdout)
    channel.leave(0)


class Answers:
    """Answers to questions about a program that has run; it keeps the iterators that were returned."""

    def __init__(self) -> None:
        self.iterators: list[Any] = []

    def to(self, kind: int, payload: bytes) -> tuple[int, bytes]:
        """The answer to a question: its kind and what it says."""
        decoder = Decoder((), self.iterators.__getitem__)
        name, arguments, named = decoder.decode(payload)
        before = [contents(value) for value in decoder.containers]
        own = {id(value): number for number, value in enumerate(decoder.containers)}
        try:
            outcome, said = asked.RETURNED, self._ask(kind, name, arguments, named)
        except BaseException as fault:
            bases = type.__dict__["__mro__"].__get__(type(fault))
            if kind == asked.NEXT and StopIteration in bases:
                return asked.EXHAUSTED, b""
            if Exception not in bases or MemoryError in bases or any(base in bases for base in _ENDING):
                return asked.ENDED, self.plain(child.describe(fault))
            outcome, said = asked.RAISED, self._raised(fault, bases)
        if kind == asked.VALUE and outcome == asked.RETURNED and callable(said) and not isinstance(said, type):
            return asked.FUNCTION, b""
        changes = []
        for number, value in enumerate(decoder.containers):
            if before[number] is not None and not same(before[number], after := contents(value)):
                changes.append([number, after])
        encoder = Encoder(own, self._keep)
        try:
            return outcome, encoder.encode([said, changes])
        except Unsendable as fault:
            return asked.UNSENDABLE, self.plain([str(fault)])

    def _ask(self, kind: int, name: Any, arguments: Any, named: Any) -> Any:
        if kind == asked.CALL:
            return _look_up(name)(*arguments, **named)
        if kind == asked.NEXT:
            return next(self.iterators[name])
        assert kind == asked.VALUE
        return _look_up(name)

    def _raised(self, fault: BaseException, bases: tuple[type, ...]) -> list[Any]:
        """What is said of an exception: its nearest built-in class, arguments where they are plain, text, detail, verdict."""
        nearest = next(base for base in bases if id(base) in _BUILT_IN)
        verdict, detail = child.describe(fault)
        arguments = BaseException.__dict__["args"].__get__(fault)
        try:
            Encoder({}, self._refuse).encode(arguments)
        except Unsendable:
            arguments = ()
        return [NAME_OF[id(nearest)], list(arguments), child.text_of(fault)[: 1 << 16], verdict, detail]

    def _keep(self, iterator: Any) -> int:
        if len(self.iterators) >= ITEMS:
            raise Unsendable(f"more than {ITEMS} iterators")
        self.iterators.append(iterator)
        return len(self.iterators) - 1

    def _refuse(self, iterator: Any) -> int:
        raise Unsendable("an iterator")

    def plain(self, said: Any) -> bytes:
        """Texts as an answer."""
        return Encoder({}, self._refuse).encode(list(said))


def _look_up(name: str) -> Any:
    """What a name stands for in the program's module.

    Raises:
        NameError: for nothing.
    """
    for names in (child.MODULE.__dict__, child.SHARED_BUILTINS):
        if name in names:
            return names[name]
    raise NameError(f"name {name!r} is not defined")
