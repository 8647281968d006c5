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

from . import tags
from .tags import DEPTH, ITEMS, NAMED, PLAIN_DTYPE, Garbled


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


_BUILD: dict[int, Callable[[list[Any]], Any]] = {
    tags.TUPLE: tuple,
    tags.FROZENSET: frozenset,
    tags.NAMEDTUPLE: _named,
    tags.SLICE: lambda items: slice(*_exactly(items, 3)),
    tags.RANGE: lambda items: range(*_exactly(items, 3)),
    tags.COMPLEX: lambda items: complex(*_exactly(items, 2)),
    tags.DECIMAL: _decimal,
    tags.FRACTION: lambda items: Fraction(*_exactly(items, 2)),
    tags.DATE: lambda items: date(*_exactly(items, 3)),
    tags.TIME: _clock(time),
    tags.DATETIME: _clock(datetime),
    tags.TIMEDELTA: lambda items: timedelta(*_exactly(items, 3)),
    tags.TIMEZONE: lambda items: timezone(*items),
    tags.KEYS: lambda items: dict.fromkeys(items).keys(),
    tags.VALUES: lambda items: dict(enumerate(items)).values(),
    tags.PAIRS: lambda items: dict(_two(item) for item in items).items(),
    tags.ITERATOR: iter,
    tags.DEQUE: lambda items: deque(items[1:], items[0]),
}
_MAKE: dict[int, Callable[[], Any]] = {
    tags.LIST: list,
    tags.DICT: dict,
    tags.SET: set,
    tags.ORDERED: OrderedDict,
    tags.DEFAULT: defaultdict,
    tags.COUNTER: Counter,
}


def _two(item: Any) -> tuple[Any, Any]:
    """A pair as it is sent; of a set of two the order would be by chance."""
    if type(item) is not tuple or len(item) != 2:
        raise Garbled("a pair that is no tuple of two")
    return item


def _exactly(items: list[Any], count: int) -> list[Any]:
    if len(items) != count:
        raise Garbled(f"{len(items)} children where {count} belong")
    return items


def _fill_default(target: Any, items: list[Any]) -> None:
    target.default_factory = items[0]
    dict.update(target, pairs(items[1:]))


_FILL: dict[int, Callable[[Any, list[Any]], Any]] = {
    tags.LIST: list.extend,
    tags.DICT: lambda target, items: dict.update(target, pairs(items)),
    tags.SET: set.update,
    tags.ORDERED: lambda target, items: OrderedDict.update(target, pairs(items)),
    tags.DEFAULT: _fill_default,
    tags.COUNTER: lambda target, items: dict.update(target, pairs(items)),
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
            if tag == tags.SMALL:
                (value,) = tags.INT.unpack_from(data, at)
                at += 8
            elif tag == tags.TEXT:
                (length,) = tags.COUNT.unpack_from(data, at)
                at += 4
                value = _cut(data, at, length).decode("utf-8", "surrogatepass")
                at += length
            elif tag <= tags.NOT_IMPLEMENTED:
                value = tags.CONSTANTS[tag]
            elif tag == tags.REAL:
                (value,) = tags.FLOAT.unpack_from(data, at)
                at += 8
            elif tag >= tags.LIST:
                (count,) = tags.COUNT.unpack_from(data, at)
                at += 4
                items += count
                if items > ITEMS or len(stack) >= DEPTH:
                    raise Garbled("more values than may be sent")
                if tag not in _BUILD and tag not in _MAKE:
                    raise Garbled(f"the unknown tag {tag}")
                number = len(containers)
                containers.append(_UNFINISHED if tag in _BUILD else _MAKE[tag]())
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
        if tag in _BUILD:
            value = _BUILD[tag](children)
            self.containers[number] = value
        else:
            value = self.containers[number]
            _FILL[tag](value, children)
        return value

    def _leaf(self, tag: int, data: bytes, at: int) -> tuple[Any, int]:
        """A leaf that is none of the usual ones, and where the next node begins."""
        if tag in (tags.NAME, tags.SCALAR, tags.NDARRAY):
            code = _cut(data, at + 1, data[at]).decode()
            at += 1 + data[at]
            if tag == tags.NAME:
                return NAMED[code], at
            return self._numpy(tag, code, data, at)
        if tag == tags.ARRAY:
            code, at = chr(data[at]), at + 1
        (count,) = tags.COUNT.unpack_from(data, at)
        at += 4
        if tag in (tags.SHARED, tags.OWN):
            value = (self.containers if tag == tags.SHARED else self.own)[count]
            if value is _UNFINISHED:
                raise Garbled("a tuple that holds itself")
            return value, at
        if tag == tags.HANDLE:
            if self.iterator is None:
                raise Garbled("an iterator where none may be")
            return self.iterator(count), at
        piece = _cut(data, at, count)
        if tag == tags.RAW:
            return piece, at + count
        if tag == tags.BIG:
            return int.from_bytes(piece, "little", signed=True), at + count
        if tag == tags.BYTEARRAY:
            value = bytearray(piece)
        elif tag == tags.ARRAY:
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
        if tag == tags.NDARRAY:
            shape = struct.unpack_from(f"<{data[at]}q", data, at + 1)
            at += 1 + 8 * data[at]
        (count,) = tags.COUNT.unpack_from(data, at)
        value: Any = numpy.frombuffer(_cut(data, at + 4, count), numpy.dtype(code)).reshape(shape).copy()
        if tag == tags.SCALAR:
            value = value[()]
        else:
            self.containers.append(value)
        return value, at + 4 + count


_UNFINISHED = object()


def _cut(data: bytes, at: int, length: int) -> bytes:
    piece = data[at : at + length]
    if len(piece) != length:
        raise Garbled("a value that is cut off")
    return piece
