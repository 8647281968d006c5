"""Bytes to values, of messages that may be anything. Standard library only."""

from __future__ import annotations

import struct
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .tags import (
    ARRAY,
    BIG,
    BYTEARRAY,
    COMPLEX,
    CONSTANTS,
    COUNT,
    COUNTER,
    DATE,
    DATETIME,
    DECIMAL,
    DEFAULT,
    DEPTH,
    DEQUE,
    DICT,
    FLOAT,
    FRACTION,
    FROZENSET,
    HANDLE,
    INT,
    ITEMS,
    ITERATOR,
    KEYS,
    LIST,
    NAME,
    NAMED,
    NAMEDTUPLE,
    NDARRAY,
    NOT_IMPLEMENTED,
    ORDERED,
    OWN,
    PAIRS,
    PLAIN_DTYPE,
    RANGE,
    RAW,
    REAL,
    SCALAR,
    SET,
    SHARED,
    SLICE,
    SMALL,
    TEXT,
    TIME,
    TIMEDELTA,
    TIMEZONE,
    TUPLE,
    VALUES,
    Garbled,
)


def pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    """Keys with their values, of a list where they take turns."""
    if len(items) % 2:
        raise Garbled("a key without a value")
    return zip(items[::2], items[1::2], strict=True)


def _named(items: list[Any]) -> Any:
    name, count, *rest = items
    fields, values = rest[:count], rest[count:]
    if type(name) is not str or not all(type(field) is str for field in fields) or len(fields) != len(values):
        raise Garbled("a namedtuple whose names are no names")
    return _named_class(name, tuple(fields))(*values)


@lru_cache(maxsize=256)
def _named_class(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)  # it takes identifiers alone


def _decimal(items: list[Any]) -> Decimal:
    (text,) = items
    if type(text) is not str:
        raise Garbled("a decimal number that is no text")
    return Decimal(text)


def _clock(kind: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    def build(items: list[Any]) -> Any:
        *fields, fold, zone = items
        return kind(*fields, zone, fold=fold)

    return build


BUILD: dict[int, Callable[[list[Any]], Any]] = {
    TUPLE: tuple,
    FROZENSET: frozenset,
    NAMEDTUPLE: _named,
    SLICE: lambda items: slice(*_exactly(items, 3)),
    RANGE: lambda items: range(*_exactly(items, 3)),
    COMPLEX: lambda items: complex(*_exactly(items, 2)),
    DECIMAL: _decimal,
    FRACTION: lambda items: Fraction(*_exactly(items, 2)),
    DATE: lambda items: date(*_exactly(items, 3)),
    TIME: _clock(time),
    DATETIME: _clock(datetime),
    TIMEDELTA: lambda items: timedelta(*_exactly(items, 3)),
    TIMEZONE: lambda items: timezone(*items),
    KEYS: lambda items: dict.fromkeys(items).keys(),
    VALUES: lambda items: dict(enumerate(items)).values(),
    PAIRS: lambda items: dict(items).items(),
    ITERATOR: iter,
    DEQUE: lambda items: deque(items[1:], items[0]),
}
MAKE: dict[int, Callable[[], Any]] = {
    LIST: list,
    DICT: dict,
    SET: set,
    ORDERED: OrderedDict,
    DEFAULT: defaultdict,
    COUNTER: Counter,
}


def _exactly(items: list[Any], count: int) -> list[Any]:
    if len(items) != count:
        raise Garbled(f"{len(items)} children where {count} belong")
    return items


def _fill_default(target: Any, items: list[Any]) -> None:
    target.default_factory = items[0]
    dict.update(target, pairs(items[1:]))


FILL: dict[int, Callable[[Any, list[Any]], Any]] = {
    LIST: list.extend,
    DICT: lambda target, items: dict.update(target, pairs(items)),
    SET: set.update,
    ORDERED: lambda target, items: OrderedDict.update(target, pairs(items)),
    DEFAULT: _fill_default,
    COUNTER: lambda target, items: dict.update(target, pairs(items)),
}


class Decoder:
    """Bytes to values, of messages that may be anything.

    Args:
        own: the containers of the message that this one answers, by number.
        iterator: makes an iterator of the other side from its number; None: there may be none.
    """

    def __init__(self, own: Sequence[Any], iterator: Callable[[int], Any] | None) -> None:
        self.own = own
        self.iterator = iterator
        self.containers: list[Any] = []  # of this message, by number

    def decode(self, data: bytes) -> Any:
        """The value of a whole message.

        Raises:
            Garbled: no honest sender sends this.
        """
        try:
            return self._decode(data)
        except Garbled:
            raise
        except (
            struct.error,
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            ImportError,
            RecursionError,
        ) as fault:
            raise Garbled(f"{type(fault).__name__} in a value") from None

    def _decode(self, data: bytes) -> Any:
        containers, at, items = self.containers, 0, 0
        stack: list[tuple[int, int, list[Any], int]] = []  # tag, number of children, children, number of the container
        while True:
            tag = data[at]
            at += 1
            if tag == SMALL:
                (value,) = INT.unpack_from(data, at)
                at += 8
            elif tag == TEXT:
                (length,) = COUNT.unpack_from(data, at)
                at += 4
                value = _cut(data, at, length).decode("utf-8", "surrogatepass")
                at += length
            elif tag <= NOT_IMPLEMENTED:
                value = CONSTANTS[tag]
            elif tag == REAL:
                (value,) = FLOAT.unpack_from(data, at)
                at += 8
            elif tag >= LIST:
                (count,) = COUNT.unpack_from(data, at)
                at += 4
                items += count
                if items > ITEMS or len(stack) >= DEPTH:
                    raise Garbled("more values than may be sent")
                if tag not in BUILD and tag not in MAKE:
                    raise Garbled(f"the unknown tag {tag}")
                number = len(containers)
                containers.append(UNFINISHED if tag in BUILD else MAKE[tag]())
                if count:
                    stack.append((tag, count, [], number))
                    continue
                value = self._finish(tag, [], number)
            else:
                value, at = self._leaf(tag, data, at)
            while stack:
                tag, count, children, number = stack[-1]
                children.append(value)
                if len(children) < count:
                    break
                stack.pop()
                value = self._finish(tag, children, number)
            else:
                if at != len(data):
                    raise Garbled("bytes behind the value")
                return value

    def _finish(self, tag: int, children: list[Any], number: int) -> Any:
        if tag in BUILD:
            value = BUILD[tag](children)
            self.containers[number] = value
        else:
            value = self.containers[number]
            FILL[tag](value, children)
        return value

    def _leaf(self, tag: int, data: bytes, at: int) -> tuple[Any, int]:
        """A leaf that is none of the usual ones, and where the next node begins."""
        if tag in (NAME, SCALAR, NDARRAY):
            code = _cut(data, at + 1, data[at]).decode()
            at += 1 + data[at]
            if tag == NAME:
                return NAMED[code], at
            return self._numpy(tag, code, data, at)
        if tag == ARRAY:
            code, at = chr(data[at]), at + 1
        (count,) = COUNT.unpack_from(data, at)
        at += 4
        if tag in (SHARED, OWN):
            value = (self.containers if tag == SHARED else self.own)[count]
            if value is UNFINISHED:
                raise Garbled("a tuple that holds itself")
            return value, at
        if tag == HANDLE:
            if self.iterator is None:
                raise Garbled("an iterator where none may be")
            return self.iterator(count), at
        piece = _cut(data, at, count)
        if tag == RAW:
            return piece, at + count
        if tag == BIG:
            return int.from_bytes(piece, "little", signed=True), at + count
        if tag == BYTEARRAY:
            value = bytearray(piece)
        elif tag == ARRAY:
            value = array(code)
            value.frombytes(piece)
        else:
            raise Garbled(f"the unknown tag {tag}")
        self.containers.append(value)
        return value, at + count

    def _numpy(self, tag: int, code: str, data: bytes, at: int) -> tuple[Any, int]:
        import numpy

        if not PLAIN_DTYPE.fullmatch(code):
            raise Garbled("an array of objects")
        shape: tuple[int, ...] = ()
        if tag == NDARRAY:
            shape = struct.unpack_from(f"<{data[at]}q", data, at + 1)
            at += 1 + 8 * data[at]
        (count,) = COUNT.unpack_from(data, at)
        value: Any = numpy.frombuffer(_cut(data, at + 4, count), numpy.dtype(code)).reshape(shape).copy()
        if tag == SCALAR:
            value = value[()]
        else:
            self.containers.append(value)
        return value, at + 4 + count


UNFINISHED = object()


def _cut(data: bytes, at: int, length: int) -> bytes:
    piece = data[at : at + length]
    if len(piece) != length:
        raise Garbled("a value that is cut off")
    return piece
