"""From a configuration to settings: unknown and missing keys are sentences, before any work."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
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
    try:
        return make(**values, **more)
    except TypeError as error:
        raise ValueError(f"{where} cannot be used as configured: {error}.") from error


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ValueError where `values` has a key that is not among the known ones."""
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(f"{where} has no key {', '.join(unknown)}: it knows {', '.join(sorted(known))}.")


def accepted(make: Callable[..., Any]) -> set[str]:
    """Names of the keyword arguments that a dataclass or function takes."""
    if dataclasses.is_dataclass(make):
        return {f.name for f in dataclasses.fields(make) if f.init}
    return {name for name in inspect.signature(make).parameters if name != "self"}
