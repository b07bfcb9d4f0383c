"""Sides of a benchmark in turns, on a quiet machine or without ratios."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from spot_vit.utils.machine import Clock, contention, others, wait_for_quiet
from spot_vit.utils.timing import TURN, TURN_SECONDS, Side, Times, take_turns

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
    rounds, attempts = math.ceil(CALLS / turn), 0
    while True:
        patience = wait_for_quiet(patience)
        attempts += 1
        start = Clock.now()
        with tqdm(total=rounds, desc=name, unit="round", leave=False) as bar:
            times = take_turns(
                sides, device, rounds=rounds, seconds=seconds, warmup=0, turn=turn,
                after_round=bar.update,
            )  # fmt: skip
        reason = _busy(Clock.now().since(start), device)
        if reason is None or patience == 0:
            return Timed(times, reason, attempts)


def _busy(clock: Clock, device: str) -> str | None:
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    return contention(clock, threads, cpus) if device == "cpu" else others(clock, threads, cpus)
