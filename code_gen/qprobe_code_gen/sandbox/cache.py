"""Executions that need not be repeated: the same program with the same tests and limits under the same interpreter."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from .verdicts import Execution, Limits, Program

_ENTRIES = 100_000
_LARGEST_OUTPUT = 1 << 14  # characters; longer ones are not kept


class Cache:
    """Keeps the newest executions in memory.

    Args:
        version: of the interpreter that executes.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._kept: OrderedDict[bytes, Execution] = OrderedDict()

    def key(self, program: Program, limits: Limits) -> bytes:
        """What the outcome depends on, as a digest."""
        parts = (program.code, program.tests, program.expression, program.reference, limits, self._version)
        # repr keeps the parts apart and shows lone surrogates as escapes.
        return hashlib.sha256(repr(parts).encode()).digest()

    def get(self, key: bytes) -> Execution | None:
        """The execution under a key, if it is still kept."""
        execution = self._kept.get(key)
        if execution is not None:
            self._kept.move_to_end(key)
        return execution

    def put(self, key: bytes, execution: Execution) -> None:
        """Keep an execution."""
        if len(execution.output) + len(execution.value or "") <= _LARGEST_OUTPUT:
            self._kept[key] = execution
        while len(self._kept) > _ENTRIES:
            self._kept.popitem(last=False)
