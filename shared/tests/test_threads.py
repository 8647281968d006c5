"""The number of threads follows the machine: planted speeds and a planted clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qprobe.models import threads
from qprobe.models.threads import Threads


class Machine:
    """Products a second by the number of threads; `now` is the clock."""

    def __init__(self, **speeds: float) -> None:
        self.speeds = {int(name[1:]): speed for name, speed in speeds.items()}
        self.now = 0.0
        self.asked: list[int] = []

    def speed(self, count: int) -> float:
        self.asked.append(count)
        torch.set_num_threads(count)
        return self.speeds[count]

    def clock(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(threads.SETTING, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_as_many_as_are_fast_and_come_back() -> None:
    machine = Machine(_1=100.0, _2=30.0)  # beside another process
    fitted = Threads(machine.speed, machine.clock)
    assert fitted.fit() == 2  # it may be a moment
    machine.now += 2.0
    assert fitted.fit() == 1
    machine.speeds = {1: 100.0, 2: 190.0}  # it has ended
    machine.now += 2.0
    assert fitted.fit() == 1  # nobody has looked yet
    machine.now += 60.0
    assert fitted.fit() == 1
    machine.now += 2.0
    assert fitted.fit() == 2
    assert torch.get_num_threads() == 2


def test_a_moment_changes_nothing() -> None:
    machine = Machine(_1=100.0, _2=190.0)
    fitted = Threads(machine.speed, machine.clock)
    for second in range(100):
        machine.now = float(second)
        machine.speeds[2] = 30.0 if second % 10 == 0 else 190.0
        assert fitted.fit() == 2


@pytest.mark.parametrize(("two", "wanted"), [(200.0, 2), (99.0, 2), (90.0, 2), (80.0, 1)])
def test_another_number_has_to_be_worth_it(two: float, wanted: int) -> None:
    machine = Machine(_1=100.0, _2=two)
    fitted = Threads(machine.speed, machine.clock)
    fitted.fit()
    machine.now = 60.0
    assert fitted.fit() == wanted


def test_halves_and_doubles_are_tried_up_to_what_there_was_at_first() -> None:
    torch.set_num_threads(8)
    machine = Machine(_8=1.0, _4=2.0, _2=4.0, _1=1.0)
    fitted = Threads(machine.speed, machine.clock)
    found = []
    for now in range(0, 480, 60):
        machine.now = float(now)
        found.append(fitted.fit())
    assert found == [8, 4, 4, 2, 2, 2, 2, 2]
    assert set(machine.asked) == {8, 4, 2, 1}
    machine.speeds = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    for now in range(500, 1100, 100):
        machine.now = float(now)
        fitted.fit()
    assert torch.get_num_threads() == 8  # and never 16


def test_a_setting_is_kept_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.SETTING, "2")
    machine = Machine(_1=100.0, _2=1.0)
    assert Threads(machine.speed, machine.clock).fit() == 2
    assert machine.asked == []


def test_most_calls_only_look_at_the_clock() -> None:
    machine = Machine(_1=100.0, _2=200.0)
    fitted = Threads(machine.speed, machine.clock)
    for _ in range(100):
        fitted.fit()
    assert sorted(machine.asked) == [1, 1, 2, 2]


def test_a_pass_of_a_model_asks(monkeypatch: pytest.MonkeyPatch, tiny_model: object) -> None:
    from qprobe import models
    from qprobe.models.prefix import PrefixRun

    asked: list[int] = []
    monkeypatch.setattr(threads, "fit", lambda: asked.append(1))
    PrefixRun(models.load(tiny_model)).prefill([[1, 2, 3]])  # type: ignore[arg-type]
    assert asked


def test_the_measurement_is_of_real_products() -> None:
    assert threads.products_a_second(1) > 0
    assert torch.get_num_threads() == 1
