"""Values to the bytes of a message. Standard library only."""

from __future__ import annotations

import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from io import IOBase
from itertools import chain
from typing import Any

from . import tags
from .tags import BYTES, DEPTH, ITEMS, NAME_OF, PLAIN_DTYPE, Unsendable


def _described(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    return f"an object of the class {name[:80]}"


def _big(value: int) -> bytes:
    if -(1 << 63) <= value < 1 << 63:
        return tags.TAG_INT.pack(tags.SMALL, value)
    length = value.bit_length() // 8 + 1
    if length > BYTES:
        raise Unsendable(f"an integer of {length} bytes")
    return tags.TAG_COUNT.pack(tags.BIG, length) + value.to_bytes(length, "little", signed=True)


def _text(value: str) -> bytes:
    if len(value) > BYTES:
        raise Unsendable(f"a text of {len(value)} characters")
    data = value.encode("utf-8", "surrogatepass")
    return tags.TAG_COUNT.pack(tags.TEXT, len(data)) + data


def _raw(value: bytes) -> bytes:
    if len(value) > BYTES:
        raise Unsendable(f"{len(value)} bytes")
    return tags.TAG_COUNT.pack(tags.RAW, len(value)) + value


def _name(value: Any) -> bytes:
    name = NAME_OF.get(id(value))
    if name is None:
        what = "the class" if isinstance(value, type) else "the function"
        raise Unsendable(f"{what} {getattr(value, '__qualname__', '?')!s:.80}")
    return bytes([tags.NAME, len(name)]) + name.encode()


_LEAVES: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"\x00",
    bool: lambda value: b"\x01" if value else b"\x02",
    type(...): lambda _: b"\x03",
    type(NotImplemented): lambda _: b"\x04",
    int: _big,
    float: lambda value: tags.TAG_FLOAT.pack(tags.REAL, value),
    str: _text,
    bytes: _raw,
    type: _name,
    type(len): _name,
}
# What an instance of a subclass stands on, by the base's own methods: the subclass may have others.
_STANDS_ON: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}
_Children = tuple[int, Iterable[Any], int]  # tag, children, how many


def _children_of_named(value: Any) -> _Children:
    fields = tuple(type(value)._fields)
    items = [type(value).__name__, len(fields), *fields, *tuple.__iter__(value)]
    return tags.NAMEDTUPLE, items, len(items)


def _dict(tag: int, kind: type[dict[Any, Any]] = dict) -> Callable[[Any], _Children]:
    def children(value: Any) -> _Children:
        items = list(kind.items(value))
        return tag, chain.from_iterable(items), 2 * len(items)

    return children


def _default(value: Any) -> _Children:
    items = list(dict.items(value))
    factory = value.default_factory if id(value.default_factory) in NAME_OF else None
    return tags.DEFAULT, chain([factory], chain.from_iterable(items)), 2 * len(items) + 1


def _listed(tag: int, kind: type) -> Callable[[Any], _Children]:
    def children(value: Any) -> _Children:
        items = list(kind.__iter__(value))  # type: ignore[attr-defined]
        return tag, items, len(items)

    return children


def _fields(tag: int, names: str) -> Callable[[Any], _Children]:
    listed = names.split()

    def children(value: Any) -> _Children:
        return tag, [getattr(value, name) for name in listed], len(listed)

    return children


def _timezone(value: Any) -> _Children:
    given = value.__getinitargs__()  # with a name only where it has one of its own
    return tags.TIMEZONE, given, len(given)


_CLOCK = "hour minute second microsecond fold tzinfo"
_CONTAINERS: dict[type, Callable[[Any], _Children]] = {
    list: _listed(tags.LIST, list),
    tuple: _listed(tags.TUPLE, tuple),
    dict: _dict(tags.DICT),
    set: _listed(tags.SET, set),
    frozenset: _listed(tags.FROZENSET, frozenset),
    deque: lambda value: (tags.DEQUE, [value.maxlen, *deque.__iter__(value)], 1 + len(value)),
    OrderedDict: _dict(tags.ORDERED, OrderedDict),
    defaultdict: _default,
    Counter: _dict(tags.COUNTER),
    slice: _fields(tags.SLICE, "start stop step"),
    range: _fields(tags.RANGE, "start stop step"),
    complex: _fields(tags.COMPLEX, "real imag"),
    Decimal: lambda value: (tags.DECIMAL, [Decimal.__str__(value)], 1),
    Fraction: _fields(tags.FRACTION, "numerator denominator"),
    date: _fields(tags.DATE, "year month day"),
    time: _fields(tags.TIME, _CLOCK),
    datetime: _fields(tags.DATETIME, f"year month day {_CLOCK}"),
    timedelta: _fields(tags.TIMEDELTA, "days seconds microseconds"),
    timezone: _timezone,
    type({}.keys()): lambda value: (tags.KEYS, items := list(value), len(items)),
    type({}.values()): lambda value: (tags.VALUES, items := list(value), len(items)),
    type({}.items()): lambda value: (tags.PAIRS, items := list(value), len(items)),
    type(OrderedDict().keys()): lambda value: (tags.KEYS, items := list(value), len(items)),
    type(OrderedDict().values()): lambda value: (tags.VALUES, items := list(value), len(items)),
    type(OrderedDict().items()): lambda value: (tags.PAIRS, items := list(value), len(items)),
}


def _bytearray(value: Any) -> bytes:
    if len(value) > BYTES:
        raise Unsendable(f"{len(value)} bytes")
    data = bytes(bytearray.__getitem__(value, slice(None)))
    return tags.TAG_COUNT.pack(tags.BYTEARRAY, len(data)) + data


def _array(value: Any) -> bytes:
    if len(value) * value.itemsize > BYTES:
        raise Unsendable(f"an array of {len(value)} items")
    data = array.tobytes(value)
    return bytes([tags.ARRAY, ord(value.typecode)]) + tags.COUNT.pack(len(data)) + data


def _ndarray(value: Any) -> bytes:
    code, data = _dtype(value), bytes(value.tobytes())
    shape = b"".join(map(tags.INT.pack, value.shape))
    return bytes([tags.NDARRAY, len(code)]) + code + bytes([value.ndim]) + shape + tags.COUNT.pack(len(data)) + data


def _scalar(value: Any) -> bytes:
    code, data = _dtype(value), bytes(value.tobytes())
    return bytes([tags.SCALAR, len(code)]) + code + tags.COUNT.pack(len(data)) + data


def _dtype(value: Any) -> bytes:
    code = value.dtype.str
    if value.nbytes > BYTES:
        raise Unsendable(f"an array of {value.nbytes} bytes")
    if value.dtype.hasobject or not PLAIN_DTYPE.fullmatch(code):
        raise Unsendable(f"an array of the type {str(value.dtype)[:80]}")
    return str(code).encode()


_CHANGEABLE_LEAVES: dict[type, Callable[[Any], bytes]] = {bytearray: _bytearray, array: _array}


class Encoder:
    """Values to the bytes of one message.

    Args:
        own: id -> number of the containers in the message that is answered.
        iterate: what is sent for an iterator: a number by which the other side asks for its items, or its items.
    """

    def __init__(self, own: dict[int, int], iterate: Callable[[Any], int | list[Any]]) -> None:
        self.own = own
        self.iterate = iterate
        self.containers: list[Any] = []  # of this message, by number; holding them also keeps their ids

    def encode(self, root: Any) -> bytes:
        """One value.

        Raises:
            Unsendable: it is no plain data, holds itself through a tuple, or is beyond `BYTES`, `ITEMS` or `DEPTH`.
        """
        pieces: list[bytes] = []
        numbers: dict[int, int] = {}
        unfinished: set[int] = set()  # containers that cannot be changed, and whose children are being written
        stack: list[tuple[Any, int]] = [(iter((root,)), 0)]
        size = items = 0
        while stack:
            for value in stack[-1][0]:
                kind = type(value)
                leaf = _LEAVES.get(kind)
                if leaf is not None:
                    piece = leaf(value)
                    pieces.append(piece)
                    size += len(piece)
                    if size > BYTES:
                        raise Unsendable(f"more than {BYTES >> 20} MiB")
                    continue
                ident = id(value)
                if ident in self.own:
                    pieces.append(tags.TAG_COUNT.pack(tags.OWN, self.own[ident]))
                    continue
                if ident in numbers:
                    if ident in unfinished:
                        raise Unsendable("a tuple that holds itself")
                    pieces.append(tags.TAG_COUNT.pack(tags.SHARED, numbers[ident]))
                    continue
                written = self._open(value, kind)
                if isinstance(written, bytes):
                    if tags.BYTEARRAY <= written[0] < tags.LIST:
                        numbers[ident] = len(self.containers)
                        self.containers.append(value)
                    pieces.append(written)
                    size += len(written)
                    continue
                tag, children, count = written
                items += count
                if items > ITEMS:
                    raise Unsendable(f"more than {ITEMS} values")
                if len(stack) > DEPTH:
                    raise Unsendable(f"more than {DEPTH} containers one in another")
                numbers[ident] = len(self.containers)
                self.containers.append(value)
                pieces.append(tags.TAG_COUNT.pack(tag, count))
                size += tags.TAG_COUNT.size
                if tag in tags.WITH_CHILDREN:
                    unfinished.add(ident)
                stack.append((iter(children), ident))
                break
            else:
                unfinished.discard(stack.pop()[1])
        if size > BYTES:
            raise Unsendable(f"more than {BYTES >> 20} MiB")
        return b"".join(pieces)

    def _open(self, value: Any, kind: type) -> bytes | _Children:
        """The bytes of a leaf that is none of the usual ones, or the children of a container."""
        children = _CONTAINERS.get(kind)
        if children is not None:
            return children(value)
        changeable = _CHANGEABLE_LEAVES.get(kind)
        if changeable is not None:
            return changeable(value)
        numpy = sys.modules.get("numpy")
        bases = type.__dict__["__mro__"].__get__(kind)
        if numpy is not None and getattr(numpy, "ndarray", None) in bases:
            return _ndarray(value)
        if numpy is not None and getattr(numpy, "generic", None) in bases:  # some stand on float or str too
            return _scalar(value)
        for base in bases:
            if base in _STANDS_ON:
                return _LEAVES[base](_STANDS_ON[base](value))
            if base is tuple and _is_named(kind):
                return _children_of_named(value)
            if base in _CONTAINERS:
                return _CONTAINERS[base](value)
            if base in _CHANGEABLE_LEAVES:
                return _CHANGEABLE_LEAVES[base](value)
            if base is type:
                return _name(value)
        if issubclass(kind, tzinfo) or issubclass(kind, IOBase) or not hasattr(kind, "__next__"):
            if id(value) in NAME_OF:
                return _name(value)
            if callable(value) and hasattr(value, "__qualname__"):
                raise Unsendable(f"the function {value.__qualname__!s:.80}")
            raise Unsendable(_described(kind))
        handle = self.iterate(value)
        if isinstance(handle, int):
            return tags.TAG_COUNT.pack(tags.HANDLE, handle)
        return tags.ITERATOR, handle, len(handle)


def _is_named(kind: type) -> bool:
    fields = getattr(kind, "_fields", None)
    return type(fields) is tuple and all(type(name) is str for name in fields)
