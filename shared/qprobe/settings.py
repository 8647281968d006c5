"""From a configuration or a JSON file to typed settings: unknown keys, missing keys and wrong values are sentences."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

_Made = TypeVar("_Made")


class UsageError(ValueError):
    """A word of the command line that is not known; the message says which one was perhaps meant. Exit status 2."""


def build(make: Callable[..., _Made], values: Mapping[str, Any], where: str, **more: Any) -> _Made:
    """Call a dataclass or a factory with the keys of one part of a configuration.

    Args:
        make: what is called.
        values: its keyword arguments as configured; parts of them may be dataclasses of their own.
        where: the part's name, for messages.
        more: arguments that the program adds.

    Raises:
        ValueError: a key that `make` does not know, one that it needs and does not get, or a value of the wrong type.
    """
    check_keys(values, accepted(make) - set(more), where)
    kinds, arguments = kinds_of(make), dict(values)
    for name, value in values.items():
        fitted = converted(value, kinds.get(name, Any), f"{where}.{name}")
        # 1 stays 1 where a float is asked for: identities of tables hold what was configured.
        arguments[name] = value if fitted == value else fitted
    try:
        return make(**arguments, **more)
    except TypeError as error:
        raise ValueError(f"{where} cannot be used as configured: {error}.") from error


def converted(value: Any, kind: Any, where: str) -> Any:
    """A plain value as a declared type: lists as tuples, mappings as dataclasses; unknown types take anything.

    Raises:
        ValueError: it does not fit; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        choices = [argument for argument in arguments if argument is not types.NoneType]
        if len(choices) == 1 and (dataclasses.is_dataclass(choices[0]) or typing.get_origin(choices[0])):
            return converted(value, choices[0], where)
        for choice in choices:
            try:
                return converted(value, choice, where)
            except ValueError:
                continue
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return build(kind, value, where)
    elif origin in (tuple, list, Sequence):
        if isinstance(value, list | tuple):
            items = (converted(item, arguments[0], f"{where}[{place}]") for place, item in enumerate(value))
            return tuple(items) if origin is tuple else list(items)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {key: converted(item, arguments[1], f"{where}[{key!r}]") for key, item in value.items()}
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind not in (int, str, bool, types.NoneType) or (
        isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
    ):
        return value
    wanted = kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
    raise ValueError(f"{where} is {value!r}: it should be {wanted.replace('None', 'null')}.")


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ValueError where `values` has a key that is not among the known ones."""
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(
            f"{where} has no key {', '.join(unknown)}{meant(unknown[0], known)}: it knows {', '.join(sorted(known))}."
        )


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean "..."?)` where a known name is like the word, or its last part with dots is; else nothing."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word.lower(), names, 1, 0.6)
    if not close:  # a key without its part, such as temperature for sampler.temperature
        last = {name: name.rpartition(".")[2] for name in names}
        own = word.rpartition(".")[2].lower()
        parts = difflib.get_close_matches(own, last.values(), 1, 0.8)
        close = [name for name in names if last[name] in parts]
    return f" (did you mean {' or '.join(close[:3])}?)" if close else ""


def accepted(make: Callable[..., Any]) -> set[str]:
    """Names of the keyword arguments that a dataclass or function takes."""
    if dataclasses.is_dataclass(make):
        return {f.name for f in dataclasses.fields(make) if f.init}
    return {name for name in inspect.signature(make).parameters if name != "self"}


def defaults(make: Callable[..., Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """The keyword arguments of a dataclass or factory as a part of a configuration: plain defaults, `???` where there is none."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(make).parameters.items():
        if name not in without and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            value = "???" if parameter.default is parameter.empty else parameter.default
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            found[name] = value
    return found


@functools.cache
def kinds_of(make: Any) -> dict[str, Any]:
    """The declared type of every argument of a dataclass or function."""
    if inspect.isclass(make) and not dataclasses.is_dataclass(make):
        return typing.get_type_hints(make.__init__)
    return typing.get_type_hints(make)
