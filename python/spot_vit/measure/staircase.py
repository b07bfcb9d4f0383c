"""The largest keep ratio within a latency: latency over tokens is a staircase, seen through noise.

Matrix products are done in tiles and by several threads, so that a token less may cost nothing, and
now and then more than one token more. Nothing here therefore expects that fewer tokens take less
time, or that two measurements of one setting agree.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

Timer = Callable[[Sequence[float]], Sequence[Sequence[float]]]
"""Times keep ratios in turns: samples of milliseconds for each, 1 being the dense model."""

STEPS = 1000  # ratios tried are multiples of 1 / STEPS
GRID = 10  # ratios that are measured first, spread over the range
NOISE_LIMIT = 0.1  # relative; medians further apart than that are not called equal


def largest_within(
    timer: Timer,
    target: float,
    *,
    least: Fraction = Fraction(0),
    tokens: Callable[[float], Hashable] = lambda ratio: ratio,
    where: str = "",
) -> float:
    """The largest ratio whose latency does not exceed the target, or equals one that does not.

    The dense model comes first: nothing else is measured where it is fast enough. Then a grid of
    ratios, and between the largest that fits and the next one the edge of the step. Latencies are
    equal where they differ by less than measurements of one setting do.

    Args:
        timer: measures; what it gives for a ratio at different times is put together.
        target: milliseconds.
        least: the smallest ratio allowed.
        tokens: what decides the latency of a ratio, such as its numbers of tokens; ratios with the
            same are measured once.
        where: words on what is timed, for messages.

    Returns:
        A multiple of 1 / STEPS; 1 where the dense model meets the target, or where it misses it by
        no more than noise and pruning slows it down, which a `RuntimeWarning` then says.

    Raises:
        ValueError: no ratio meets the target; it names the range.
    """
    found = _Measured(timer, tokens)
    found.measure([1.0])
    if found.ms(1.0) <= target:
        return 1.0
    low = min(max(1, math.ceil(least * STEPS)), STEPS)
    grid = sorted({low + (STEPS - low) * k // GRID for k in range(GRID)})
    found.measure([*(step / STEPS for step in grid), 1.0])
    dense = found.ms(1.0)
    if dense <= target:  # the first measurement was a slow one
        return 1.0
    fitting = [step for step in grid if found.ms(step / STEPS) <= target]
    if not fitting:
        fastest = min(grid, key=lambda step: found.ms(step / STEPS))
        best = found.ms(fastest / STEPS)
        if min(best, dense) > target * (1 + found.noise):
            raise ValueError(_out_of_reach(target, low, fastest, best, dense))
        fitting = [fastest]
    anchor = fitting[-1] / STEPS

    def fits(step: int) -> bool:
        time, equal = found.ms(step / STEPS), 1 + found.noise
        return time <= target or time <= equal * min(target, found.ms(anchor))

    low = max(step for step in grid if step in fitting or fits(step))
    high = next((step for step in grid if step > low), STEPS)
    while high - low > 1:
        middle = (low + high) // 2
        if not found.knows(middle / STEPS):
            found.measure([anchor, middle / STEPS])
        if fits(middle):
            low = middle
        else:
            high = middle
    if low < STEPS and found.ms(low / STEPS) >= (dense := found.ms(1.0)):
        warnings.warn(
            f"pruning slows this model down here{where}: keep={low / STEPS:g} takes "
            f"{found.ms(low / STEPS):.3g} ms and the dense model {dense:.3g} ms, so keep=1 is "
            f"chosen for a budget of {target:g} ms",
            RuntimeWarning,
            stacklevel=2,
        )
        return 1.0
    return low / STEPS


class _Measured:
    """Samples of each setting, however often it was measured."""

    def __init__(self, timer: Timer, tokens: Callable[[float], Hashable]) -> None:
        self._timer, self._tokens = timer, tokens
        self._samples: dict[Hashable, list[float]] = {}
        self._keys: dict[float, Hashable] = {}

    def measure(self, ratios: Sequence[float]) -> None:
        """Measures ratios in turns; of those with the same tokens one."""
        one_each = {self._key(ratio): ratio for ratio in ratios}
        for key, samples in zip(one_each, self._timer(list(one_each.values())), strict=True):
            self._samples.setdefault(key, []).extend(samples)

    def knows(self, ratio: float) -> bool:
        """Whether a ratio, or one with the same tokens, was measured."""
        return self._key(ratio) in self._samples

    def ms(self, ratio: float) -> float:
        """Median milliseconds of a ratio that was measured."""
        return statistics.median(self._samples[self._key(ratio)])

    @property
    def noise(self) -> float:
        """How far two medians of one setting may be apart, as a share: two standard errors."""
        errors = []
        for samples in self._samples.values():
            if len(samples) < 2:
                continue
            low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
            error = 0.93 * (high - low) / math.sqrt(len(samples))  # of a median, if all are normal
            errors.append(error / middle)
        return min(2 * math.sqrt(2) * statistics.median(errors or [0.0]), NOISE_LIMIT)

    def _key(self, ratio: float) -> Hashable:
        if ratio not in self._keys:
            self._keys[ratio] = self._tokens(ratio)
        return self._keys[ratio]


def _out_of_reach(target: float, low: int, fastest: int, best: float, dense: float) -> str:
    words = f"a budget of {target:g} ms is out of reach: "
    if fastest < STEPS and best >= dense:
        return words + (
            f"the dense model takes {printed(dense, up=True)} ms, and pruning slows it down here "
            f"(keep={fastest / STEPS:g} takes {printed(best, up=True)} ms)"
        )
    return words + (
        f"keep from {low / STEPS:g} to 1 costs {printed(best, up=True)} to "
        f"{printed(dense, up=False)} ms"
    )


def printed(value: float, up: bool) -> str:
    """Three digits, rounded so that a printed bound can itself be reached."""
    scale = 10 ** (2 - math.floor(math.log10(value))) if value > 0 else 1
    return f"{(math.ceil if up else math.floor)(value * scale) / scale:g}"
