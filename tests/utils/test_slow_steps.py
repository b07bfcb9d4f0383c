"""Slow steps are noticed, and their cause is named."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
from spot_vit.utils import slow_steps
from spot_vit.utils.machine import Clock
from spot_vit.utils.slow_steps import SlowSteps


class Machine:
    """A machine whose clock, use and swapping are set by hand."""

    def __init__(self) -> None:
        self.wall = self.own = self.busy = 0.0
        self.faults = 0

    def now(self) -> Clock:
        return Clock(self.wall, self.own, self.busy)

    def pass_(self, seconds: float, own: float = 2.0, others: float = 0.0) -> None:
        """Time in which this process and others use so many CPUs."""
        self.wall += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(slow_steps.Clock, "now", made.now)
    monkeypatch.setattr(slow_steps.time, "perf_counter", lambda: made.wall)
    monkeypatch.setattr(slow_steps, "_seconds_of_children", lambda _: 0.0)
    monkeypatch.setattr(slow_steps.os, "cpu_count", lambda: 2)

    class Usage:
        @property
        def ru_majflt(self) -> int:
            return made.faults

    monkeypatch.setattr(slow_steps.resource, "getrusage", lambda _: Usage())
    return made


def steps(watch: SlowSteps, machine: Machine, count: int, seconds: float, **use: Any) -> list[str]:
    said = []
    for _ in range(count):
        machine.pass_(seconds, **use)
        said.append(watch(0.0))
    return [words for words in said if words]


def test_even_steps_say_nothing(machine: Machine) -> None:
    watch = SlowSteps(threads=2)
    assert steps(watch, machine, 480, 0.125) == []
    assert steps(watch, machine, 96, 0.1875, others=1.0) == []  # slower, but not by much


def test_other_processes_are_named(machine: Machine) -> None:
    watch = SlowSteps(threads=2)
    steps(watch, machine, 96, 0.125)
    (words, *more) = steps(watch, machine, 2, 4.0, own=1.0, others=1.0)
    assert words.startswith("a step takes 4 s instead of 0.125 s: other processes used 1.00 CPUs")
    assert words.endswith("fewer --threads wait less for each other")
    assert more  # what is slow does not become usual
    alone = SlowSteps(threads=1)
    steps(alone, machine, 96, 0.125, own=1.0)
    (words, *_) = steps(alone, machine, 2, 4.0, own=0.4, others=1.6)
    assert "only 0.40 CPU seconds per second" in words and "--threads" not in words


def test_data_memory_and_what_is_not_known_are_told_apart(machine: Machine) -> None:
    def slow(waited: float = 0.0, faults: int = 0) -> str:
        watch = SlowSteps(threads=2)
        for number in range(96):
            machine.pass_(0.125)
            assert watch(0.01 * number) is None
        machine.pass_(4.0)
        machine.faults += faults
        words = watch(0.95 + waited)
        assert words is not None
        return words.partition(": ")[2]

    assert slow(waited=3.0) == (
        "75% of the time went into waiting for data; more --workers may help"
    )
    assert "--batch-size" in slow(faults=1000)
    assert slow() == "neither data nor other processes are to blame"


def test_pauses_are_left_out(machine: Machine) -> None:
    watch = SlowSteps(threads=2)
    steps(watch, machine, 96, 0.125)
    machine.pass_(60.0)
    watch.pause()
    assert steps(watch, machine, 96, 0.125) == []


def burn(seconds: float) -> None:
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass


def test_loaders_of_data_are_no_strangers() -> None:
    before = slow_steps._seconds_of_children(os.getpid())
    child = multiprocessing.get_context("fork").Process(target=burn, args=(60.0,))
    child.start()
    try:
        stop = time.monotonic() + 20
        while slow_steps._seconds_of_children(os.getpid()) < before + 0.1:
            assert time.monotonic() < stop
    finally:
        child.kill()
        child.join()


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"factor": 1.0}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match="expected factor > 1 and seconds > 0"):
            SlowSteps(**wrong)
