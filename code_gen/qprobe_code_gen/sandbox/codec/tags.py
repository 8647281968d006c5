"""The tags of nodes, what may be sent by name, and the bounds of a message. Standard library only."""

from __future__ import annotations

import builtins
import re
import struct
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

BYTES = 32 << 20  # of one message
ITEMS = 1_000_000  # values in one message, keys of dicts included
DEPTH = 1_000  # containers in containers; comparing deeper ones is a RecursionError in plain Python too

TAG_COUNT, TAG_INT, TAG_FLOAT = struct.Struct("<BI"), struct.Struct("<Bq"), struct.Struct("<Bd")
COUNT, INT, FLOAT = struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<d")

# Leaves.
_NONE, _TRUE, _FALSE, _ELLIPSIS, NOT_IMPLEMENTED, SMALL, BIG, REAL, TEXT, RAW, NAME, SCALAR = range(12)
SHARED, OWN, HANDLE = (
    12,
    13,
    14,
)  # a container of this message; of the one that is answered; an iterator of the other side
# Leaves that can be changed, and so have a number as containers have.
BYTEARRAY, ARRAY, NDARRAY = 16, 17, 18
# Containers that can be changed: they exist, empty, before their children.
LIST, DICT, SET, DEQUE, ORDERED, DEFAULT, COUNTER = 32, 33, 34, 35, 36, 37, 38
# Containers that cannot: they exist when their children do.
(TUPLE, FROZENSET, NAMEDTUPLE, SLICE, RANGE, COMPLEX, DECIMAL, FRACTION, DATE, TIME, DATETIME, TIMEDELTA, TIMEZONE) = (
    range(64, 77)
)
KEYS, VALUES, PAIRS, ITERATOR = 77, 78, 79, 80
# A deque can be changed, but what it may hold at most is known only with its first child, and cannot be set afterwards.
WITH_CHILDREN = frozenset((*range(TUPLE, ITERATOR + 1), DEQUE))

CONSTANTS = {_NONE: None, _TRUE: True, _FALSE: False, _ELLIPSIS: ..., NOT_IMPLEMENTED: NotImplemented}
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


class Unsendable(Exception):
    """A value is no plain data, or too much of it; the text says what it is."""


class Garbled(Exception):
    """Bytes that no honest sender sends; the text says what is wrong with them."""
