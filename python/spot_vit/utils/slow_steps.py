"""Steps of a training that are suddenly slow, and what may be the cause."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from spot_vit.utils.machine import Clock, contention


@dataclass
class _Counters:
    """What is looked at between two moments."""

    clock: Clock
    waited: float
    swapped: int

    @staticmethod
    def now(waited: float) -> _Counters:
        clock = Clock.now()
        clock.own += _seconds_of_children(os.getpid())
        return _Counters(clock, waited, resource.getrusage(resource.RUSAGE_SELF).ru_majflt)


class SlowSteps:
    """Notices when steps take much longer than they did, and names what may be the cause.

    Call it after every step. Steps are counted for some seconds, and their mean is compared with
    what was usual before; then, if they are slow, the figures of that time tell why: waiting for
    data, other processes on the CPUs, memory on the disk.

    Args:
        factor: how many times the usual duration is slow.
        seconds: over which the mean is taken.
        threads: that a step uses; torch's own when None.

    Raises:
        ValueError: unless factor is above 1 and seconds are positive.
    """

    def __init__(
        self, factor: float = 2.0, seconds: float = 3.0, threads: int | None = None
    ) -> None:
        if not (factor > 1 and seconds > 0):
            raise ValueError(
                f"expected factor > 1 and seconds > 0, got factor={factor}, seconds={seconds}"
            )
        self.factor, self.seconds = factor, seconds
        self.threads = torch.get_num_threads() if threads is None else threads
        self._usual: deque[float] = deque(maxlen=100)
        self._steps, self._start = 0, _Counters.now(0.0)
        self._next = time.perf_counter() + seconds

    def __call__(self, waited: float = 0.0) -> str | None:
        """Counts a step; gives a line where the last ones were slow, else None.

        Args:
            waited: seconds that were spent waiting for data so far, in all.
        """
        self._steps += 1
        if time.perf_counter() < self._next:
            return None
        now = _Counters.now(waited)
        step = now.clock.since(self._start.clock).wall / self._steps
        reason = None
        if self._usual and step > self.factor * (usual := statistics.median(self._usual)):
            reason = f"a step takes {step:.3g} s instead of {usual:.3g} s: {self._why(now)}"
        else:
            self._usual.append(step)
        self._steps, self._start = 0, now
        self._next = time.perf_counter() + self.seconds
        return reason

    def pause(self) -> None:
        """Leaves out what was done since the last step: an evaluation, a checkpoint."""
        self._steps, self._start = 0, _Counters.now(self._start.waited)
        self._next = time.perf_counter() + self.seconds

    def _why(self, now: _Counters) -> str:
        clock = now.clock.since(self._start.clock)
        share = (now.waited - self._start.waited) / clock.wall
        if share > 0.5:
            return f"{share:.0%} of the time went into waiting for data; more --workers may help"
        if (now.swapped - self._start.swapped) / clock.wall > 100:
            return "memory was read back from the disk; a smaller --batch-size needs less"
        if found := contention(clock, self.threads, os.cpu_count() or 1):
            fewer = "" if self.threads == 1 else "; fewer --threads wait less for each other"
            return f"{found}{fewer}"
        return "neither data nor other processes are to blame"


def _seconds_of_children(process: int) -> float:
    """CPU seconds of running children, which load data, and of theirs; 0 where it is not known."""
    total = 0.0
    with suppress(OSError, ValueError, IndexError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                total += ticks / os.sysconf("SC_CLK_TCK") + _seconds_of_children(int(child))
    return total
