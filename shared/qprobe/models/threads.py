"""How many threads torch computes with: as many as are fast now, by a measurement of some milliseconds now and then.

Two threads share every operation in halves and wait for each other. Beside another process that keeps one of two cores busy, the
half of one thread waits in a queue, and all work becomes several times slower than one thread alone would do it.

OMP_NUM_THREADS, where it is set, is what is taken, and nothing is measured.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

SETTING = "OMP_NUM_THREADS"
# Seconds from one measurement to the next, and to the one that has to confirm what it found: a moment's work of others is none.
_EVERY, _AGAIN = 10.0, 1.0
# Seconds of each number of threads in each of two turns: longer than a scheduler's slice.
_EACH = 0.02
# Another number is taken where it is faster by this, twice: a change costs, and a measurement is not exact.
_WORTH = 1.15


class Threads:
    """A number of threads that follows the machine.

    Args:
        speed: products a second with so many threads.
        clock: seconds.
    """

    def __init__(self, speed: Callable[[int], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._speed = speed
        self._clock = clock
        self._most = 0
        self._found = 0
        self._next = -float("inf")

    def fit(self) -> int:
        """Set torch's number of threads, measured anew when it is time; the number that is set.

        Called before work of at least some milliseconds; most calls only look at the clock.
        """
        now = torch.get_num_threads()
        if os.environ.get(SETTING) or self._clock() < self._next:
            return now
        self._most = max(self._most, now)
        tried = sorted({now, max(1, now // 2), min(self._most, 2 * now)})
        if len(tried) > 1:
            # In turns: what else the machine does may change from one moment to the next.
            speeds = dict.fromkeys(tried, 0.0)
            for count in [*tried, *reversed(tried)]:
                speeds[count] += self._speed(count)
            best = max(tried, key=lambda count: speeds[count])
            found = best if speeds[best] > _WORTH * speeds[now] else now
            confirmed, self._found = found == self._found, found
            torch.set_num_threads(found if confirmed else now)
        changes = len(tried) > 1 and self._found != torch.get_num_threads()
        self._next = self._clock() + (_AGAIN if changes else _EVERY)
        return torch.get_num_threads()


def products_a_second(count: int) -> float:
    """By products as small as those of a small model's layers, with so many threads; it leaves the number set."""
    torch.set_num_threads(count)
    left, right = torch.ones(64, 512), torch.ones(512, 512)
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _EACH:
        torch.mm(left, right)
        done += 1
    return done / passed


# A number of threads belongs to the thread that asks for it.
_own = threading.local()


def fit() -> int:
    """`Threads.fit` of the calling thread."""
    if not hasattr(_own, "threads"):
        _own.threads = Threads(products_a_second)
    threads: Threads = _own.threads
    return threads.fit()
