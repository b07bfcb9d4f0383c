"""Honest timing: sides take turns in one process, and a busy machine gives no ratio.

A side is called as `side(i)`; i counts calls, so that it can rotate its inputs. Whoever times
anything here does it through `take_turns`, but for rounds that are captured in a CUDA graph: device
time then comes from events around its replays.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from spot_vit.utils.machine import Clock, contention, wait_for_quiet

T = TypeVar("T")
Side = Callable[[int], Any]
TURN = 25  # calls of one side before the next has its turn: enough to fill the caches its own way
TURN_SECONDS = 0.5  # a turn of slow calls is shorter: clocks drift within seconds

# ---- sides that take turns -----------------------------------------------------------------------


@dataclass
class Times:
    """Times of the calls of one side.

    Attributes:
        wall: seconds from start to end; on CUDA the device has finished then.
        cpu: CPU seconds of this process.
        faults: new pages of memory.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Median milliseconds of a call."""
        return 1e3 * statistics.median(self.wall)


def take_turns(
    sides: Mapping[str, Side],
    device: torch.device | str,
    *,
    rounds: int,
    seconds: float = 0.0,
    warmup: int = 1,
    turn: int = 1,
    after_round: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Times several sides, round after round, so that a busy machine slows all alike.

    Args:
        sides: what to call, by name.
        device: where they compute; CUDA is waited for before and after every call.
        rounds: timed rounds, at least.
        seconds: rounds go on until so many have passed.
        warmup: untimed calls of each side before.
        turn: calls of a side in a round.
        after_round: called after each round, outside of what is timed.
    """
    device = torch.device(device)
    times = {name: Times() for name in sides}
    i = 0
    for _ in range(warmup):
        for side in sides.values():
            side(i)
            i += 1
    _finish(device)
    stop, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < stop:
        for name, side in sides.items():
            for _ in range(turn):
                _call(side, i, device, times[name])
                i += 1
        done += 1
        after_round()
    return times


def _call(side: Side, i: int, device: torch.device, times: Times) -> None:
    faults = _page_faults()
    cpu, wall = time.process_time(), time.perf_counter()
    result = side(i)
    _finish(device)
    times.wall.append(time.perf_counter() - wall)
    times.cpu.append(time.process_time() - cpu)
    times.faults.append(_page_faults() - faults)
    del result  # before the next call, which gets its memory back


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# ---- cases: one side of ours against others ------------------------------------------------------


@dataclass
class Case:
    """Sides to compare; `at_least` is the ratio (its time / ours) that each other must reach."""

    name: str
    ours: Side
    others: dict[str, Side]
    at_least: dict[str, float] = field(default_factory=dict)
    bytes_per_round: int = 0  # of the inputs, for the rotation on CUDA


def summary(samples: list[float]) -> dict[str, float]:
    """Median and spread of seconds, in milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered) * 1e3,
        "p10_ms": ordered[round(0.1 * last)] * 1e3,
        "p90_ms": ordered[round(0.9 * last)] * 1e3,
        "rounds": len(ordered),
    }


def keep_memory() -> None:
    """Tells glibc to keep freed memory. Otherwise its luck decides which side gets new pages.

    Allocations beyond its largest threshold, 32 MiB, still come as new pages, on all sides.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 << 20)


def _measure_cpu(sides: dict[str, Side], seconds: float) -> tuple[dict[str, Any], str | None]:
    tried = take_turns(sides, "cpu", rounds=1, warmup=2)
    slowest = max(times.wall[0] for times in tried.values())
    turn = min(TURN, max(1, int(TURN_SECONDS / slowest)))
    start = Clock.now()
    found = take_turns(
        sides, "cpu", rounds=math.ceil(2 * TURN / turn), seconds=seconds, warmup=0, turn=turn
    )
    clock = Clock.now().since(start)
    times = {
        name: summary(one.wall)
        | {
            "cpu_median_ms": statistics.median(one.cpu) * 1e3,
            "page_faults_median": statistics.median(one.faults),
        }
        for name, one in found.items()
    }
    return times, contention(clock, torch.get_num_threads(), os.cpu_count() or 1)


def input_sets(bytes_per_round: int, device: str) -> int:
    """How many sets of inputs to rotate: past twice the L2 on CUDA.

    One on the CPU, where the op before has just written them: in cache as far as they fit.
    """
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(4, -(-2 * cache // max(bytes_per_round, 1))), 64)


def _gpu_shared() -> str | None:
    """Whether another process computes on a GPU here, as far as nvidia-smi can see."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        pids = subprocess.run(query, capture_output=True, text=True).stdout.split()
    except OSError:
        return None
    return f"{len(pids) - 1} other processes use the GPU" if len(pids) > 1 else None


def _measure_cuda(
    sides: dict[str, Side], seconds: float, sets: int
) -> tuple[dict[str, Any], str | None]:
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    eager: dict[str, list[float]] = {name: [] for name in sides}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # warm-up, as graph capture wants it
        for side in sides.values():
            for i in range(sets):
                side(i)
    torch.cuda.synchronize()
    for name, side in sides.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(sets):
                side(i)
        graphs[name].replay()
    torch.cuda.synchronize()
    stop, rounds = time.perf_counter() + seconds, 0
    while rounds < 10 or time.perf_counter() < stop:
        for name, side in sides.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e-3 / sets)
            started = time.perf_counter()
            for i in range(sets):
                side(i)
            torch.cuda.synchronize()
            eager[name].append((time.perf_counter() - started) / sets)
        rounds += 1
    return {
        name: summary(times[name]) | {"eager_median_ms": statistics.median(eager[name]) * 1e3}
        for name in sides
    }, _gpu_shared()


def until_quiet(
    measure: Callable[[], tuple[T, str | None]], patience: float
) -> tuple[T, str | None, int]:
    """Measures, again while the machine is contended and patience lasts.

    Args:
        measure: gives what was measured, and why it cannot be compared, or None.
        patience: seconds to wait for a quiet machine; what waiting takes, and more attempts.

    Returns:
        What `measure` gave last, and the number of attempts.
    """
    attempts = 0
    while True:
        patience = wait_for_quiet(patience)
        attempts += 1
        found, reason = measure()
        if reason is None or patience == 0:
            return found, reason, attempts


def measure(
    case: Case, device: str, seconds: float = 1.0, patience: float = 10.0
) -> dict[str, Any]:
    """Times a case, again while the machine is contended and patience lasts; then without ratio."""
    sides = {"spot": case.ours, **case.others}

    @torch.no_grad()
    def once() -> tuple[dict[str, Any], str | None]:
        if device == "cpu":
            return _measure_cpu(sides, seconds)
        return _measure_cuda(sides, seconds, input_sets(case.bytes_per_round, device))

    times, reason, attempts = until_quiet(once, patience)
    rows = []
    for other in case.others:
        ratio = times[other]["median_ms"] / times["spot"]["median_ms"] if reason is None else None
        bar = case.at_least.get(other)
        held = None if ratio is None or bar is None else ratio >= bar
        rows.append({"other": other, "ratio": ratio, "at_least": bar, "held": held})
    return {
        "case": case.name,
        "times": times,
        "rows": rows,
        "contended": reason,
        "attempts": attempts,
    }
