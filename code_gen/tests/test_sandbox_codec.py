"""Values that cross between judge and candidate: the same value on the other side, or a sentence; never anything else."""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator, MappingView
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qprobe_code_gen.sandbox.codec import DEPTH, Decoder, Encoder, Garbled, Unsendable, contents, replace, same, tags


def sent(value: Any, own: dict[int, int] | None = None) -> bytes:
    return Encoder(own or {}, list).encode(value)


def crossed(value: Any) -> Any:
    return Decoder((), None).decode(sent(value))


def told_apart(value: Any) -> Any:
    """A value as something that equals only a value of the same types, with nan equal to itself and -0.0 not to 0.0."""
    if isinstance(value, np.generic):
        return value.dtype.str, value.tobytes()
    if isinstance(value, float):
        return type(value).__name__, "nan" if math.isnan(value) else (float(value), math.copysign(1, value))
    if isinstance(value, complex):
        return "complex", told_apart(value.real), told_apart(value.imag)
    if isinstance(value, Decimal):
        return "Decimal", value.as_tuple()
    if isinstance(value, list | tuple | deque):
        return type(value).__name__, [told_apart(x) for x in value], getattr(value, "maxlen", None)
    if isinstance(value, slice):
        return "slice", told_apart((value.start, value.stop, value.step))
    if isinstance(value, dict):
        return type(value).__name__, [(told_apart(k), told_apart(v)) for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(told_apart(x)) for x in value)
    if isinstance(value, array):
        return "array", value.typecode, value.tobytes()
    if isinstance(value, np.ndarray):
        return "ndarray", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, MappingView | Iterator):  # dict.values() has no equality of its own, nor has an iterator
        return type(value).__name__, told_apart(list(value))
    return type(value), value


TEXT = st.text(st.characters(codec=None, categories=None), max_size=8)  # lone surrogates among them
HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.complex_numbers()
    | TEXT
    | st.binary(max_size=8)
    | st.decimals().filter(lambda x: not x.is_snan())  # which has no hash
    | st.fractions()
    | st.dates()
    | st.times(timezones=st.none() | st.just(UTC))
    | st.datetimes(timezones=st.none() | st.just(timezone(timedelta(hours=2), "X")))
    | st.timedeltas()
    | st.sampled_from([int, list, ValueError, len, ..., NotImplemented, Counter, type(None)])
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE
    | st.builds(bytearray, st.binary(max_size=8))
    | st.builds(array, st.just("d"), st.lists(st.floats(), max_size=3))
    | st.builds(np.array, st.lists(st.floats(width=32), max_size=3), st.just("<f4"))
    | st.builds(np.int8, st.integers(-128, 127))
    | st.slices(9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.builds(OrderedDict, st.dictionaries(HASHABLE, inner, max_size=3))
        | st.builds(lambda d: defaultdict(list, d), st.dictionaries(HASHABLE, inner, max_size=3))
        | st.builds(Counter, st.dictionaries(HASHABLE, st.integers(), max_size=3))
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.just(3))
        | st.sets(HASHABLE, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=400, deadline=None)
def test_a_value_is_the_same_on_the_other_side(value: Any) -> None:
    assert told_apart(crossed(value)) == told_apart(value)


# CI's share of time: 100,000 of each take a quarter of an hour, and did pass.
MANY = 20_000


@pytest.mark.slow
@given(VALUES)
@settings(max_examples=MANY, deadline=None)
def test_many_values_are_the_same_on_the_other_side(value: Any) -> None:
    assert told_apart(crossed(value)) == told_apart(value)


def check_decoded_or_garbled(data: bytes) -> None:
    """Whatever the bytes are: a sentence, or a value that crosses as any other."""
    try:
        value, again = (Decoder([[1], {}], None).decode(data) for _ in range(2))  # crossing empties an iterator
    except Garbled as error:
        said = str(error)
    else:
        said = "a value"
        other = crossed(value)
        with contextlib.suppress(RecursionError):  # a container that holds itself has crossed; it cannot be compared
            assert told_apart(other) == told_apart(again)
    assert said


def test_a_pair_that_is_no_tuple_of_two_is_garbled() -> None:
    pairs = bytearray(sent({"a": 1.0}.items()))
    pairs[5] = tags.SET  # in the place of the tuple
    with pytest.raises(Garbled, match="pair"):
        Decoder((), None).decode(bytes(pairs))


@given(st.binary(max_size=64))
@example(b"")
@example(bytes([64, 255, 255, 255, 255]))
@settings(max_examples=1000, deadline=None)
def test_any_bytes_are_a_value_or_a_sentence(data: bytes) -> None:
    check_decoded_or_garbled(data)


@pytest.mark.slow
@given(VALUES, st.data())
@settings(max_examples=MANY, deadline=None)
def test_a_message_with_a_changed_byte_is_a_value_or_a_sentence(value: Any, data: st.DataObject) -> None:
    message = bytearray(sent(value))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    check_decoded_or_garbled(bytes(message))


def test_a_length_that_is_not_there_takes_no_memory() -> None:
    tracemalloc.start()
    for tag in (6, 8, 9, 16, 32, 33, 64):
        with pytest.raises(Garbled):
            Decoder((), None).decode(struct.pack("<BI", tag, 1_000_000) + b"\0" * 9)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_singletons_and_types_stay_themselves() -> None:
    for value in (None, True, False, ..., NotImplemented, int, list, Counter, OSError, len):
        assert crossed(value) is value


def test_sharing_and_cycles_are_kept() -> None:
    inner: list[Any] = [1]
    a, b, (c, _) = crossed([inner, inner, (inner, {})])
    assert a is b is c
    loop: list[Any] = []
    loop.append({"self": loop})
    again = crossed(loop)
    assert again[0]["self"] is again


def test_instances_of_subclasses_are_what_they_stand_on() -> None:
    class Text(str):
        def __str__(self) -> str:
            return "a lie"

    class Listed(list[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([9, 9])

        def __len__(self) -> int:
            return 2

    class Colour(IntEnum):
        RED = 1

    assert crossed([Text("x"), Listed([1]), Colour.RED]) == ["x", [1], 1]
    assert [type(x) for x in crossed([Text("x"), Listed([1]), Colour.RED])] == [str, list, int]


def test_a_namedtuple_keeps_its_names() -> None:
    class Point(NamedTuple):
        x: int
        y: int

    again = crossed(Point(1, 2))
    assert again == (1, 2)
    assert (again.y, again._asdict(), type(again).__name__) == (2, {"x": 1, "y": 2}, "Point")
    other = namedtuple("other", "a")(3)  # type: ignore[misc]
    assert crossed(other).a == 3


def test_large_integers_have_no_limit_of_digits() -> None:
    for value in (1 << 63, -(1 << 63), -(1 << 63) - 1, 10**100_000):
        assert crossed(value) == value


def test_numpy_values_that_hold_no_objects_cross() -> None:
    for value in (np.arange(6).reshape(2, 3), np.array(["é", "xx"]), np.array([True]), np.zeros((0, 3)), np.array(2.5)):
        assert told_apart(crossed(value)) == told_apart(value)
    for scalar in (np.float64(0.1), np.bool_(True), np.str_("x"), np.datetime64("2020-01-01"), np.int8(-3)):
        again = crossed(scalar)
        assert (again, type(again)) == (scalar, type(scalar))
    with pytest.raises(Unsendable, match="array"):
        sent(np.array([object()]))


def test_dictionary_views_compare_as_views() -> None:
    d = {"a": 1, "b": 2}
    assert crossed(d.keys()) == {"b", "a"}
    assert list(crossed(d.values())) == [1, 2]
    assert crossed(d.items()) == {("a", 1), ("b", 2)}


class Own:
    pass


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


TOO_MUCH = {
    "a function": (lambda: told_apart, "function"),
    "a class": (lambda: Own, "class .*Own"),
    "an object": (Own, "Own"),
    "an object in a list": (lambda: [Own()], "Own"),
    "nesting": (lambda: deep(DEPTH + 1), "one in another"),
    "nesting a million deep": (lambda: deep(1_000_000), "one in another"),
    "a long text": (lambda: "x" * (100 << 20), "text of"),
    "many bytes": (lambda: bytes(100 << 20), "bytes"),
    "two texts": (lambda: [b"x" * (20 << 20), b"y" * (20 << 20)], "MiB"),
    "many items": (lambda: [0] * 2_000_000, "values"),
    "an integer": (lambda: 1 << (300 << 20), "integer"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_what_cannot_be_sent_is_a_sentence(kind: str) -> None:
    make, word = TOO_MUCH[kind]
    with pytest.raises(Unsendable, match=word):
        sent(make())


def test_an_open_file_and_a_tuple_that_holds_itself_are_sentences() -> None:
    with open("/dev/null") as file, pytest.raises(Unsendable, match="TextIOWrapper"):  # noqa: PTH123
        sent(file)
    inner: list[Any] = []
    outer = (inner,)
    inner.append(outer)
    with pytest.raises(Unsendable, match="itself"):
        sent(outer)


def test_iterators_are_asked_for_by_number_or_sent_whole() -> None:
    kept: list[Any] = []

    def keep(iterator: Any) -> int:
        kept.append(iterator)
        return len(kept) - 1

    message = Encoder({}, keep).encode([iter([1]), (x for x in "ab"), map(abs, [1])])
    assert Decoder((), lambda number: f"number {number}").decode(message) == ["number 0", "number 1", "number 2"]
    with pytest.raises(Garbled):
        Decoder((), None).decode(message)
    assert list(crossed(iter([1, 2]))) == [1, 2]


def test_containers_of_the_message_that_is_answered_come_back_as_themselves() -> None:
    first, second = [1], {"a": 2}
    question = Encoder({}, list)
    data = question.encode((first, second))
    other = Decoder((), None)
    _, d = other.decode(data)
    answer = Encoder({id(x): n for n, x in enumerate(other.containers)}, list).encode([d, [d]])
    again = Decoder(question.containers, None).decode(answer)
    assert again[0] is second
    assert again[1][0] is second


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1, 2], [3]),
        ({"a": 1}, {"b": [2]}),
        ({1, 2}, {3}),
        (bytearray(b"ab"), bytearray(b"xyz")),
        (deque([1, 2], 3), deque([2])),
        (array("i", [1]), array("i", [2, 3])),
        (np.arange(3), np.arange(3) * 2),
        (Counter("a"), Counter("bb")),
    ],
)
def test_changes_are_seen_and_made(before: Any, after: Any) -> None:
    assert same(contents(before), contents(before))
    assert not same(contents(before), contents(after))
    kind = type(before)
    replace(before, crossed(contents(after)))
    assert type(before) is kind
    assert told_apart(before)[:2] == told_apart(after)[:2] or before == after


def test_changes_of_what_cannot_be_changed_are_a_sentence() -> None:
    for target, new in (((1,), [2]), ({}, [1]), ({}, [[], 1]), (set(), [[]]), ([], "x"), (bytearray(), [1])):
        with pytest.raises(Garbled):
            replace(target, new)
    assert contents((1, 2)) is None


def test_times_keep_zone_and_fold() -> None:
    for value in (
        datetime(2020, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=-3))),
        datetime(2020, 1, 2, fold=1),
        time(1, 2, tzinfo=UTC),
        date(2020, 2, 29),
        Fraction(3, 7),
        Decimal("1e999999999"),
    ):
        again = crossed(value)
        assert (again, repr(again)) == (value, repr(value))
    assert crossed(datetime(2020, 1, 2, fold=1)).fold == 1
