"""Plain values as bytes and back: what crosses between judge and candidate. Standard library only.

A message is a tree of nodes in pre-order: a tag, then a leaf's bytes or a container's number of children. Every container has a
number, in the order in which containers open, so a second mention is a reference and sharing is kept; a mention of a
container of the message that is answered is a reference too, so the judge gets its own object back. Nothing recurses. The
bytes of a candidate may be anything: `decode` builds plain data of known types from them, or raises `Garbled`; no name is
looked up but in `NAMED`, and no code runs. Instances of subclasses are sent as the plain value that they stand on.
"""

from __future__ import annotations

import builtins
import re
import struct
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from io import IOBase
from itertools import chain
from operator import is_
from typing import Any

BYTES = 32 << 20  # of one message
ITEMS = 1_000_000  # values in one message, keys of dicts included
DEPTH = 1_000  # containers in containers; comparing deeper ones is a RecursionError in plain Python too

TAG_COUNT, TAG_INT, TAG_FLOAT = struct.Struct("<BI"), struct.Struct("<Bq"), struct.Struct("<Bd")
COUNT, INT, FLOAT = struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<d")

# Leaves.
NONE, TRUE, FALSE, ELLIPSIS, NOT_IMPLEMENTED, SMALL, BIG, REAL, TEXT, RAW, NAME, SCALAR = range(12)
SHARED, OWN, HANDLE = 12, 13, 14  # a container of this message; of the one that is answered; an iterator of the other side
# Leaves that can be changed, and so have a number as containers have.
BYTEARRAY, ARRAY, NDARRAY = 16, 17, 18
# Containers that can be changed: they exist, empty, before their children.
LIST, DICT, SET, DEQUE, ORDERED, DEFAULT, COUNTER = 32, 33, 34, 35, 36, 37, 38
# Containers that cannot: they exist when their children do.
(TUPLE, FROZENSET, NAMEDTUPLE, SLICE, RANGE, COMPLEX, DECIMAL, FRACTION, DATE, TIME, DATETIME, TIMEDELTA, TIMEZONE) = range(
    64, 77
)
KEYS, VALUES, PAIRS, ITERATOR = 77, 78, 79, 80

CONSTANTS = {NONE: None, TRUE: True, FALSE: False, ELLIPSIS: ..., NOT_IMPLEMENTED: NotImplemented}
TYPES = (OrderedDict, defaultdict, Counter, deque, Decimal, Fraction, date, datetime, time, timedelta, timezone, array)
FUNCTIONS = "abs all any ascii bin callable chr divmod format hash hex len max min oct ord pow repr round sorted sum"
# Types and functions that may be arguments and results, by name. None of them runs code that a candidate wrote.
NAMED: dict[str, Any] = {
    **{name: value for name, value in vars(builtins).items() if isinstance(value, type) and not name.startswith("_")},
    **{name: vars(builtins)[name] for name in FUNCTIONS.split()},
    **{kind.__name__: kind for kind in TYPES},
    "NoneType": type(None),
}
NAME_OF = {id(value): name for name, value in NAMED.items()}
# No objects, no structures: numbers, times and texts alone.
PLAIN_DTYPE = re.compile(r"[<>|=](?:[biufcSUmM]\d+|\?|[mM]8\[[0-9]*[a-zA-Zμ]+\])")


class Unsendable(Exception):  # noqa: N818 - no error of this program: a word on a value
    """A value is no plain data, or too much of it; the text says what it is."""


class Garbled(Exception):  # noqa: N818
    """Bytes that no honest sender sends; the text says what is wrong with them."""


def _sorted_out(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__
    return f"an object of the class {name[:80]}"


# ------------------------------------------------------------------------------------------------ values to bytes


def _big(value: int) -> bytes:
    if -(1 << 63) <= value < 1 << 63:
        return TAG_INT.pack(SMALL, value)
    length = value.bit_length() // 8 + 1
    if length > BYTES:
        raise Unsendable(f"an integer of {length} bytes")
    return TAG_COUNT.pack(BIG, length) + value.to_bytes(length, "little", signed=True)


def _text(value: str) -> bytes:
    if len(value) > BYTES:
        raise Unsendable(f"a text of {len(value)} characters")
    data = value.encode("utf-8", "surrogatepass")
    return TAG_COUNT.pack(TEXT, len(data)) + data


def _raw(value: bytes) -> bytes:
    if len(value) > BYTES:
        raise Unsendable(f"{len(value)} bytes")
    return TAG_COUNT.pack(RAW, len(value)) + value


def _name(value: Any) -> bytes:
    name = NAME_OF.get(id(value))
    if name is None:
        what = "the class" if isinstance(value, type) else "the function"
        raise Unsendable(f"{what} {getattr(value, '__qualname__', '?')!s:.80}")
    return bytes([NAME, len(name)]) + name.encode()


LEAVES: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"\x00",
    bool: lambda value: b"\x01" if value else b"\x02",
    type(...): lambda _: b"\x03",
    type(NotImplemented): lambda _: b"\x04",
    int: _big,
    float: lambda value: TAG_FLOAT.pack(REAL, value),
    str: _text,
    bytes: _raw,
    type: _name,
    type(len): _name,
}
# What an instance of a subclass stands on, by the base's own methods: the subclass may have others.
STANDS_ON: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}
Children = tuple[int, Iterable[Any], int]  # tag, children, how many


def _children_of_named(value: Any) -> Children:
    fields = tuple(type(value)._fields)
    items = [type(value).__name__, len(fields), *fields, *tuple.__iter__(value)]
    return NAMEDTUPLE, items, len(items)


def _dict(tag: int) -> Callable[[Any], Children]:
    def children(value: Any) -> Children:
        items = list(dict.items(value))
        return tag, chain.from_iterable(items), 2 * len(items)

    return children


def _ordered(value: Any) -> Children:
    items = list(OrderedDict.items(value))
    return ORDERED, chain.from_iterable(items), 2 * len(items)


def _default(value: Any) -> Children:
    items = list(dict.items(value))
    factory = value.default_factory if id(value.default_factory) in NAME_OF else None
    return DEFAULT, chain([factory], chain.from_iterable(items)), 2 * len(items) + 1


def _listed(tag: int, kind: type) -> Callable[[Any], Children]:
    def children(value: Any) -> Children:
        items = list(kind.__iter__(value))  # type: ignore[attr-defined]
        return tag, items, len(items)

    return children


def _fields(tag: int, names: str) -> Callable[[Any], Children]:
    listed = names.split()

    def children(value: Any) -> Children:
        return tag, [getattr(value, name) for name in listed], len(listed)

    return children


def _timezone(value: Any) -> Children:
    given = value.__getinitargs__()  # with a name only where it has one of its own
    return TIMEZONE, given, len(given)


CLOCK = "hour minute second microsecond fold tzinfo"
CONTAINERS: dict[type, Callable[[Any], Children]] = {
    list: _listed(LIST, list),
    tuple: _listed(TUPLE, tuple),
    dict: _dict(DICT),
    set: _listed(SET, set),
    frozenset: _listed(FROZENSET, frozenset),
    deque: lambda value: (DEQUE, [value.maxlen, *deque.__iter__(value)], 1 + len(value)),
    OrderedDict: _ordered,
    defaultdict: _default,
    Counter: _dict(COUNTER),
    slice: _fields(SLICE, "start stop step"),
    range: _fields(RANGE, "start stop step"),
    complex: _fields(COMPLEX, "real imag"),
    Decimal: lambda value: (DECIMAL, [Decimal.__str__(value)], 1),
    Fraction: _fields(FRACTION, "numerator denominator"),
    date: _fields(DATE, "year month day"),
    time: _fields(TIME, CLOCK),
    datetime: _fields(DATETIME, f"year month day {CLOCK}"),
    timedelta: _fields(TIMEDELTA, "days seconds microseconds"),
    timezone: _timezone,
    type({}.keys()): lambda value: (KEYS, items := list(value), len(items)),
    type({}.values()): lambda value: (VALUES, items := list(value), len(items)),
    type({}.items()): lambda value: (PAIRS, items := list(value), len(items)),
    type(OrderedDict().keys()): lambda value: (KEYS, items := list(value), len(items)),
    type(OrderedDict().values()): lambda value: (VALUES, items := list(value), len(items)),
    type(OrderedDict().items()): lambda value: (PAIRS, items := list(value), len(items)),
}


def _bytearray(value: Any) -> bytes:
    data = bytes(bytearray.__getitem__(value, slice(None)))
    return TAG_COUNT.pack(BYTEARRAY, len(data)) + data


def _array(value: Any) -> bytes:
    data = array.tobytes(value)
    return bytes([ARRAY, ord(value.typecode)]) + COUNT.pack(len(data)) + data


def _ndarray(value: Any) -> bytes:
    code, data = _dtype(value), type(value).tobytes(value)
    shape = b"".join(map(INT.pack, value.shape))
    return bytes([NDARRAY, len(code)]) + code + bytes([value.ndim]) + shape + COUNT.pack(len(data)) + data


def _scalar(value: Any) -> bytes:
    code, data = _dtype(value), value.tobytes()
    return bytes([SCALAR, len(code)]) + code + COUNT.pack(len(data)) + data


def _dtype(value: Any) -> bytes:
    code = value.dtype.str
    if value.nbytes > BYTES:
        raise Unsendable(f"an array of {value.nbytes} bytes")
    if value.dtype.hasobject or not PLAIN_DTYPE.fullmatch(code):
        raise Unsendable(f"an array of the type {str(value.dtype)[:80]}")
    return str(code).encode()


CHANGEABLE_LEAVES: dict[type, Callable[[Any], bytes]] = {bytearray: _bytearray, array: _array}


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
                leaf = LEAVES.get(kind)
                if leaf is not None:
                    piece = leaf(value)
                    pieces.append(piece)
                    size += len(piece)
                    if size > BYTES:
                        raise Unsendable(f"more than {BYTES >> 20} MiB")
                    continue
                ident = id(value)
                if ident in self.own:
                    pieces.append(TAG_COUNT.pack(OWN, self.own[ident]))
                    continue
                if ident in numbers:
                    if ident in unfinished:
                        raise Unsendable("a tuple that holds itself")
                    pieces.append(TAG_COUNT.pack(SHARED, numbers[ident]))
                    continue
                written = self._open(value, kind)
                if isinstance(written, bytes):
                    if CHANGEABLE <= written[0] < LIST:
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
                pieces.append(TAG_COUNT.pack(tag, count))
                size += TAG_COUNT.size
                if tag in BUILD:
                    unfinished.add(ident)
                stack.append((iter(children), ident))
                break
            else:
                unfinished.discard(stack.pop()[1])
        if size > BYTES:
            raise Unsendable(f"more than {BYTES >> 20} MiB")
        return b"".join(pieces)

    def _open(self, value: Any, kind: type) -> bytes | Children:
        """The bytes of a leaf that is none of the usual ones, or the children of a container."""
        children = CONTAINERS.get(kind)
        if children is not None:
            return children(value)
        changeable = CHANGEABLE_LEAVES.get(kind)
        if changeable is not None:
            return changeable(value)
        numpy = sys.modules.get("numpy")
        bases = type.__dict__["__mro__"].__get__(kind)
        if numpy is not None and getattr(numpy, "ndarray", None) in bases:
            return _ndarray(value)
        if numpy is not None and getattr(numpy, "generic", None) in bases:  # some stand on float or str too
            return _scalar(value)
        for base in bases:
            if base in STANDS_ON:
                return LEAVES[base](STANDS_ON[base](value))
            if base is tuple and _is_named(kind):
                return _children_of_named(value)
            if base in CONTAINERS:
                return CONTAINERS[base](value)
            if base in CHANGEABLE_LEAVES:
                return CHANGEABLE_LEAVES[base](value)
            if base is type:
                return _name(value)
        if issubclass(kind, tzinfo) or issubclass(kind, IOBase) or not hasattr(kind, "__next__"):
            if id(value) in NAME_OF:
                return _name(value)
            if callable(value) and hasattr(value, "__qualname__"):
                raise Unsendable(f"the function {value.__qualname__!s:.80}")
            raise Unsendable(_sorted_out(kind))
        handle = self.iterate(value)
        if isinstance(handle, int):
            return TAG_COUNT.pack(HANDLE, handle)
        return ITERATOR, handle, len(handle)


CHANGEABLE = BYTEARRAY


def _is_named(kind: type) -> bool:
    fields = getattr(kind, "_fields", None)
    return type(fields) is tuple and all(type(name) is str for name in fields)


# ------------------------------------------------------------------------------------------------ bytes to values


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    if len(items) % 2:
        raise Garbled("a key without a value")
    return zip(items[::2], items[1::2], strict=True)


def _named(items: list[Any]) -> Any:
    name, count, *rest = items
    fields, values = rest[:count], rest[count:]
    if type(name) is not str or not all(type(field) is str for field in fields) or len(fields) != len(values):
        raise Garbled("a namedtuple whose names are no names")
    return namedtuple(name, fields)(*values)  # type: ignore[misc]  # it takes identifiers alone  # noqa: PYI024


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
}
MAKE: dict[int, Callable[[], Any]] = {
    LIST: list,
    DICT: dict,
    SET: set,
    DEQUE: deque,
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
    dict.update(target, _pairs(items[1:]))


FILL: dict[int, Callable[[Any, list[Any]], Any]] = {
    LIST: list.extend,
    DICT: lambda target, items: dict.update(target, _pairs(items)),
    SET: set.update,
    ORDERED: lambda target, items: OrderedDict.update(target, _pairs(items)),
    DEFAULT: _fill_default,
    COUNTER: lambda target, items: dict.update(target, _pairs(items)),
}
# What a deque may hold at most is known only with its first child, and cannot be set afterwards: it exists with its children.
BUILD[DEQUE] = lambda items: deque(items[1:], items[0])


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
        except MemoryError:
            raise Garbled("more than fits into memory") from None
        except (struct.error, IndexError, ValueError, TypeError, ArithmeticError, LookupError, ImportError) as fault:
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


# ------------------------------------------------------------------------------------------------ what has changed


def contents(value: Any) -> Any:
    """What a container holds, as a value that is sent for its changes; None where it cannot be changed."""
    if isinstance(value, list):
        return list(list.__iter__(value))
    if isinstance(value, dict):
        return list(chain.from_iterable(dict.items(value)))
    if isinstance(value, set):
        return list(set.__iter__(value))
    if isinstance(value, deque):
        return list(deque.__iter__(value))
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, array):
        return value.tobytes()
    numpy = sys.modules.get("numpy")
    return value.tobytes() if numpy is not None and isinstance(value, numpy.ndarray) else None


def same(before: Any, after: Any) -> bool:
    """Whether two `contents` are the same objects in the same order, or the same bytes."""
    if isinstance(before, bytes):
        return bool(before == after)
    return len(before) == len(after) and all(map(is_, before, after))


def replace(target: Any, new: Any) -> None:
    """Put new contents into a container.

    Args:
        new: as `contents` gives them.

    Raises:
        Garbled: the container cannot be changed, or cannot hold this.
    """
    numpy = sys.modules.get("numpy")
    try:
        if type(new) is bytes:
            if isinstance(target, bytearray):
                target[:] = new
            elif isinstance(target, array):
                fresh = array(target.typecode, new)
                target[:] = fresh
            elif numpy is not None and isinstance(target, numpy.ndarray):
                target[...] = numpy.frombuffer(new, target.dtype).reshape(target.shape)
            else:
                raise Garbled("bytes as the changes of what holds none")
            return
        if type(new) is not list:
            raise Garbled("changes that are no list")
        if isinstance(target, list):
            list.__setitem__(target, slice(None), new)
        elif isinstance(target, dict):
            pairs = list(_pairs(new))
            dict.clear(target)
            dict.update(target, pairs)
        elif isinstance(target, set):
            set.clear(target)
            set.update(target, new)
        elif isinstance(target, deque):
            deque.clear(target)
            deque.extend(target, new)
        else:
            raise Garbled("changes of what cannot be changed")
    except (TypeError, ValueError) as fault:
        raise Garbled(f"{type(fault).__name__} in the changes of an argument") from None
