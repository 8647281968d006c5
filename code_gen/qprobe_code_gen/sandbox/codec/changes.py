"""What a call has changed in its arguments: seen in one process, made in the other. Standard library only."""

from __future__ import annotations

import sys
from array import array
from collections import deque
from itertools import chain
from operator import is_
from typing import Any

from .decoder import pairs
from .tags import Garbled


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
            items = list(pairs(new))
            dict.clear(target)
            dict.update(target, items)
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
