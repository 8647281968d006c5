"""The dispatcher: jobs of one key share a batch, lanes have their order, and nobody's fault or absence is another's."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from qprobe.serving.batching import Dispatcher, Job, Lane, TooLate


class Work:
    """Notes its batches and doubles every item, once it is let go."""

    def __init__(self, order: list[Any] | None = None) -> None:
        self.batches: list[list[Any]] = []
        self.order = [] if order is None else order
        self.free = threading.Event()
        self.free.set()

    def __call__(self, jobs: Sequence[Job], more: object) -> Iterable[tuple[Job, Any]]:
        self.free.wait(10)
        items = [job.item for job in jobs]
        self.batches.append(items)
        self.order += items
        if "bad" in items:
            raise ValueError("bad")
        return [(job, job.item * 2) for job in jobs]


async def with_lanes(*lanes: Lane) -> Dispatcher:
    dispatcher = Dispatcher(lanes)
    dispatcher.start()
    return dispatcher


def submit(dispatcher: Dispatcher, item: Any, lane: str = "a", key: Any = 0, size: int = 1, seconds: float = 5) -> Any:
    now = time.monotonic()
    job = dispatcher.submit(lane, item, key=key, size=size, until=now + seconds, give_up=now + seconds)
    return asyncio.ensure_future(job)


def test_what_goes_together_shares_a_batch_up_to_its_rows() -> None:
    async def body() -> None:
        work = Work()
        work.free.clear()
        dispatcher = await with_lanes(Lane("a", work, most=4))
        first = submit(dispatcher, 1)
        await asyncio.sleep(0.05)
        rest = [submit(dispatcher, item, key=item % 2, size=2) for item in (2, 3, 4, 6, 10)]
        big = submit(dispatcher, 8, size=9)  # larger than a batch: alone
        await asyncio.sleep(0)
        work.free.set()
        assert await asyncio.gather(first, *rest, big) == [2, 4, 6, 8, 12, 20, 16]
        assert work.batches == [[1], [2, 4], [3], [6, 10], [8]]
        await dispatcher.close()

    asyncio.run(body())


def test_the_first_lane_goes_first() -> None:
    async def body() -> None:
        order: list[Any] = []
        first, second = Work(order), Work(order)
        second.free.clear()
        dispatcher = await with_lanes(Lane("a", first, most=4), Lane("b", second, most=1, gather=0.01))
        jobs = [submit(dispatcher, 1, "b"), submit(dispatcher, 2, "b")]
        await asyncio.sleep(0.1)
        jobs.append(submit(dispatcher, 3, "a"))
        await asyncio.sleep(0)
        second.free.set()
        await asyncio.gather(*jobs)
        assert order == [1, 3, 2]
        await dispatcher.close()

    asyncio.run(body())


def test_a_fault_is_his_who_made_it() -> None:
    async def body() -> None:
        work = Work()
        work.free.clear()
        dispatcher = await with_lanes(Lane("a", work, most=9))
        jobs = [submit(dispatcher, item) for item in ("x", "y", "bad", "z")]
        await asyncio.sleep(0.05)
        work.free.set()
        found = await asyncio.gather(*jobs, return_exceptions=True)
        assert [found[0], found[1], found[3]] == ["xx", "yy", "zz"]
        assert isinstance(found[2], ValueError)
        await dispatcher.close()

    asyncio.run(body())


def test_who_has_gone_or_is_too_late_is_not_worked_for() -> None:
    async def body() -> None:
        work = Work()
        work.free.clear()
        dispatcher = await with_lanes(Lane("a", work, most=9))
        first = submit(dispatcher, 1)
        await asyncio.sleep(0.05)
        gone, late, stays = submit(dispatcher, 2), submit(dispatcher, 3, seconds=0.05), submit(dispatcher, 4)
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(TooLate):
            await late
        work.free.set()
        assert await first == 2
        assert await stays == 8
        assert work.batches == [[1], [4]]
        work.free.clear()
        waits = submit(dispatcher, 5)
        await asyncio.sleep(0.05)
        left = submit(dispatcher, 6)
        await asyncio.sleep(0.05)
        threading.Timer(0.1, work.free.set).start()
        await dispatcher.close()
        assert not dispatcher.alive
        for job in (waits, left):
            with pytest.raises(TooLate):
                await job
        assert work.batches[2:] == [[5]]

    asyncio.run(body())


def test_who_has_gone_does_not_wait_on() -> None:
    async def body() -> None:
        work = Work()
        work.free.clear()
        lane = Lane("a", work, most=1)
        dispatcher = await with_lanes(lane)
        first = submit(dispatcher, 1)
        await asyncio.sleep(0.05)  # in work
        others = [submit(dispatcher, number) for number in range(2, 6)]
        await asyncio.sleep(0.05)
        for other in others[1:]:
            other.cancel()
        await asyncio.gather(*others[1:], return_exceptions=True)
        assert [job.item for job in lane.waiting] == [2]
        work.free.set()
        assert await first == 2
        assert await others[0] == 4
        await dispatcher.close()

    asyncio.run(body())


def test_who_comes_while_a_batch_runs_joins_it_where_it_fits_and_nobody_else_waits() -> None:
    async def body() -> None:
        batches: list[list[Any]] = []
        step = threading.Semaphore(0)

        def work(jobs: Sequence[Job], more: Callable[[], Job | None]) -> Iterable[tuple[Job, Any]]:
            """Every job takes two steps; new ones are asked for at each."""
            taken = [[job, 2] for job in jobs]
            batches.append([job.item for job in jobs])
            while taken:
                step.acquire(timeout=10)
                for of_one in taken:
                    of_one[1] -= 1
                yield from [(job, job.item * 2) for job, left in taken if not left]
                taken = [of_one for of_one in taken if of_one[1]]
                while taken and (job := more()) is not None:
                    batches[-1].append(job.item)
                    taken.append([job, 2])

        other = Work()
        dispatcher = await with_lanes(Lane("first", other, most=4), Lane("a", work, most=4))

        async def one_step() -> None:
            await asyncio.sleep(0.01)  # what was submitted is there
            step.release()
            await asyncio.sleep(0.05)

        first = submit(dispatcher, 1, size=2)
        await asyncio.sleep(0.05)
        second, third = submit(dispatcher, 2, size=2), submit(dispatcher, 3, size=1)
        await one_step()
        assert batches == [[1, 2]]  # a third would be more than four rows
        await one_step()
        assert first.done()  # before the batch has ended
        assert not second.done()
        assert batches == [[1, 2, 3]]  # there is place now
        elsewhere, fourth = submit(dispatcher, "x", "first"), submit(dispatcher, 4, size=1)
        await one_step()
        await one_step()
        assert await third == 6
        assert await elsewhere == "xx"  # went before the fourth
        step.release(2)
        assert await fourth == 8
        another = submit(dispatcher, 5, key=1)
        step.release(2)
        assert await another == 10
        assert batches == [[1, 2, 3], [4], [5]]
        assert await second == 4
        await dispatcher.close()

    asyncio.run(body())


def test_a_batch_that_fails_is_done_again_with_those_that_joined_it() -> None:
    async def body() -> None:
        tried: list[list[Any]] = []
        begun, go_on = threading.Event(), threading.Event()

        def work(jobs: Sequence[Job], more: Callable[[], Job | None]) -> Iterable[tuple[Job, Any]]:
            items = [job.item for job in jobs]
            tried.append(items)
            begun.set()
            go_on.wait(10)
            if (joined := more()) is not None:
                items.append(joined.item)
                jobs = [*jobs, joined]
            if "bad" in items:
                raise ValueError("bad")
            for job in jobs:
                yield job, job.item * 2

        dispatcher = await with_lanes(Lane("a", work, most=9))
        good = submit(dispatcher, "x")
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        bad = submit(dispatcher, "bad")
        await asyncio.sleep(0)
        go_on.set()
        assert await good == "xx"
        with pytest.raises(ValueError, match="bad"):
            await bad
        assert tried == [["x", "bad"], ["x"], ["bad"]]
        await dispatcher.close()

    asyncio.run(body())
