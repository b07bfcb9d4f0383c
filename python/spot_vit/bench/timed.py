"""Sides of a benchmark in turns, on a quiet machine or without ratios."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

from spot_vit.utils.machine import Clock, contention, others
from spot_vit.utils.timing import TURN, TURN_SECONDS, Side, Times, take_turns, until_quiet

T = TypeVar("T")

CALLS = 20  # timed calls of each side, at least


@dataclass
class Timed:
    """Times of several sides.

    Attributes:
        times: of each side.
        contended: why they cannot be compared, or None.
        attempts: how often they were measured.
    """

    times: dict[str, Times]
    contended: str | None
    attempts: int


def timed(
    sides: Mapping[str, Side], device: str, *, seconds: float, patience: float, name: str
) -> Timed:
    """Times sides, again while the machine is busy and patience lasts.

    Args:
        sides: what to call, each called before.
        device: where they compute.
        seconds: how long a measurement goes on, at least.
        patience: seconds to wait for a quiet machine; what waiting takes and more attempts.
        name: label of the progress bar.
    """
    tried = take_turns(sides, device, rounds=1, warmup=1)
    slowest = max(one.wall[0] for one in tried.values())
    turn = min(TURN, max(1, int(TURN_SECONDS / slowest)))
    rounds = math.ceil(CALLS / turn)

    def measure() -> dict[str, Times]:
        with tqdm(total=rounds, desc=name, unit="round", leave=False) as bar:
            return take_turns(
                sides, device, rounds=rounds, seconds=seconds, warmup=0, turn=turn,
                after_round=bar.update,
            )  # fmt: skip

    return Timed(*in_quiet(measure, device, patience))


def in_quiet(measure: Callable[[], T], device: str, patience: float) -> tuple[T, str | None, int]:
    """Measures, again while the machine is busy and patience lasts.

    Args:
        measure: takes its time, and gives what was measured.
        device: where it computes.
        patience: seconds to wait for a quiet machine.

    Returns:
        What was measured last, why it cannot be compared or None, and the number of attempts.
    """

    def once() -> tuple[T, str | None]:
        start = Clock.now()
        found = measure()
        return found, _busy(Clock.now().since(start), device)

    return until_quiet(once, patience)


def _busy(clock: Clock, device: str) -> str | None:
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    return contention(clock, threads, cpus) if device == "cpu" else others(clock, threads, cpus)
