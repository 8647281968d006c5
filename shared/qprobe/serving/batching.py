"""Work of many clients in shared batches: one thread computes, whoever waits is served in batches of what goes together.

    dispatcher = Dispatcher([Lane("score", score, most=256), Lane("draw", draw, most=128)])
    result = await dispatcher.submit("draw", item, key=law, size=8, until=time.monotonic() + 60)

A lane that stands first is served first: what finishes a request goes before what begins one. A batch is the oldest job of a
lane with all others of the same key, and whoever of this key comes while it runs, where the work asks for more: as long as there
is place, and nothing else waits. A batch that fails is done again job by job, so that one client's fault is his own.

Where it stops: a job whose client has gone leaves a batch where the work asks `Job.wanted`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# Seconds that a lane waits for more before its batch is cut: clients that were answered together ask again together.
GATHER = 0.01


class TooLate(Exception):
    """A deadline passed before anything could be given."""


@dataclass(eq=False)
class Job:
    """Something that a client waits for.

    Args:
        item: what the work is given.
        key: jobs of equal keys may share a batch.
        size: rows that it adds to one.
        until: of `time.monotonic`, from which it is not wanted.
        gone: whether its client has left.
    """

    item: Any
    key: Hashable
    size: int
    until: float
    future: asyncio.Future[Any]
    gone: bool = False

    def wanted(self) -> bool:
        """Whether somebody still waits for it; asked by the thread that works."""
        return not self.gone and time.monotonic() < self.until


@dataclass
class Lane:
    """Work of one kind.

    Args:
        name: for `submit`, and for who counts.
        work: gives every job with its result as it is done; it runs in the dispatcher's thread. It is given the jobs, and what it
            may ask for another one, None where there is none now.
        most: rows of a batch, a single job apart.
        gather: seconds to wait for more jobs.
        done: told of every job that is done: the lane's name, whether it is its batch's first, its rows, and the seconds since
            the last one.
    """

    name: str
    work: Callable[[Sequence[Job], Callable[[], Job | None]], Iterable[tuple[Job, Any]]]
    most: int
    gather: float = 0.0
    done: Callable[[str, bool, int, float], None] = lambda *_: None
    waiting: deque[Job] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, job: Job) -> None:
        with self._lock:
            self.waiting.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job that may wait no more."""
        with self._lock, contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def batch(self) -> list[Job]:
        """Take the oldest job that is wanted and all that go with it; jobs that nobody wants are dropped."""
        with self._lock:
            while self.waiting and not self.waiting[0].wanted():
                _fail(self.waiting.popleft(), TooLate())
            taken: list[Job] = []
            rows = 0
            for job in list(self.waiting):
                if taken and (job.key != taken[0].key or rows + job.size > self.most):
                    continue
                self.waiting.remove(job)
                if job.wanted():
                    taken.append(job)
                    rows += job.size
                else:
                    _fail(job, TooLate())
            return taken

    def more(self, key: Hashable, rows: int) -> Job | None:
        """Take the oldest job, where it goes with a batch of a key that has so many rows; asked by the thread that works."""
        with self._lock:
            job = self.waiting[0] if self.waiting else None
            if job is None or job.key != key or rows + job.size > self.most or not job.wanted():
                return None
            return self.waiting.popleft()


class Dispatcher:
    """Serves its lanes, in the order in which they are given, by one thread.

    It is used inside one event loop: `start` and `close` belong to its beginning and end.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qprobe-work")
        self._woken = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._serving is not None and not self._serving.done()

    def start(self) -> None:
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def close(self) -> None:
        """End when the batch in work is done; whoever still waits is told."""
        if self._serving is not None:
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        for lane in self.lanes.values():
            while lane.waiting:
                _fail(lane.waiting.popleft(), TooLate())
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def submit(self, lane: str, item: Any, *, key: Hashable, size: int, until: float, give_up: float) -> Any:
        """The result of a job.

        Args:
            until: of `time.monotonic`: what is not finished then is left, and the work gives what there is.
            give_up: of `time.monotonic`: nobody waits longer.

        Raises:
            TooLate: it could not be begun before `until`, or there was no result before `give_up`.
            Exception: what the work raised for this job.
        """
        job = Job(item, key, size, until, asyncio.get_running_loop().create_future())
        self.lanes[lane].put(job)
        self._woken.set()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + give_up - time.monotonic()):
                return await job.future
        except TimeoutError:
            raise TooLate from None
        finally:
            job.gone = True
            self.lanes[lane].drop(job)  # while a long batch runs, those who came and went would pile up

    async def run(self, work: Callable[[], Any]) -> Any:
        """Do something alone in the dispatcher's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _serve(self) -> None:
        while True:
            lane = next((lane for lane in self.lanes.values() if lane.waiting), None)
            if lane is None:
                self._woken.clear()
                await self._woken.wait()
                continue
            if lane.gather:
                await asyncio.sleep(lane.gather)
                if any(other.waiting for other in self.lanes.values() if not other.gather):
                    continue  # something that finishes a request has come
            if jobs := lane.batch():
                await self._done(lane, jobs)

    def _worked(self, lane: Lane, jobs: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        """Do a batch, in the thread; the list holds the jobs that are in work, those that it takes on the way too."""
        others = [other for other in self.lanes.values() if other is not lane]
        rows, key = sum(job.size for job in jobs), jobs[0].key
        first, began = True, time.monotonic()

        def more() -> Job | None:
            nonlocal rows
            if any(other.waiting for other in others) or (job := lane.more(key, rows)) is None:
                return None
            jobs.append(job)
            rows += job.size
            return job

        for job, result in lane.work(list(jobs), more):
            jobs.remove(job)  # a batch that others join may never end
            rows -= job.size
            now = time.monotonic()
            lane.done(lane.name, first, job.size, now - began)
            first, began = False, now
            loop.call_soon_threadsafe(_succeed, job, result)

    async def _done(self, lane: Lane, jobs: list[Job]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.run(lambda: self._worked(lane, jobs, loop))
        except asyncio.CancelledError:
            for job in list(jobs):
                job.gone = True  # so that the thread comes to its end
                _fail(job, TooLate())
            raise
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:
                if job.wanted():
                    await self._done(lane, [job])
                else:
                    _fail(job, TooLate())


def _succeed(job: Job, result: Any) -> None:
    if not job.future.done():
        job.future.set_result(result)


def _fail(job: Job, error: BaseException) -> None:
    if not job.future.done():
        job.future.set_exception(error)
        job.future.exception()  # read once: whoever has gone does not read it
