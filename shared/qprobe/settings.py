"""From a configuration to settings: unknown and missing keys are sentences, before any work."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Made = TypeVar("Made")


def build(make: Callable[..., Made], values: Mapping[str, Any], where: str, **more: Any) -> Made:
    """Call a dataclass or a factory with the keys of one part of a configuration.

    Args:
        make: what is called.
        values: its keyword arguments as configured.
        where: the part's name, for messages.
        more: arguments that the program adds.

    Raises:
        ValueError: a key that `make` does not know, one that it needs and does not get, or a value of the wrong kind.
    """
    check_keys(values, accepted(make) - set(more), where)
    for name, kind in _kinds(make).items():
        if name in values and not _fits(values[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
            raise ValueError(f"{where}.{name} is {values[name]!r}: it should be {wanted.replace('None', 'null')}.")
    try:
        return make(**values, **more)
    except TypeError as error:
        raise ValueError(f"{where} cannot be used as configured: {error}.") from error


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ValueError where `values` has a key that is not among the known ones."""
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(
            f"{where} has no key {', '.join(unknown)}{meant(unknown[0], known)}: it knows {', '.join(sorted(known))}."
        )


class UsageError(ValueError):
    """A word of the command line that nothing knows; the message says which one was perhaps meant. Exit status 2."""


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


def _kinds(make: Callable[..., Any]) -> dict[str, Any]:
    """The declared kind of every argument."""
    if inspect.isclass(make) and not dataclasses.is_dataclass(make):
        return typing.get_type_hints(make.__init__)
    return typing.get_type_hints(make)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a configuration is of a kind; kinds that no configuration can hold are not looked at."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool, types.NoneType):
        return isinstance(value, kind)
    return True
