"""Keep ratios from budgets: so many GMACs, or so many milliseconds on this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spot_vit.config.fields import is_number, is_whole, plain
from spot_vit.measure.flops import count_flops, image_size
from spot_vit.measure.staircase import STEPS, largest_within, printed
from spot_vit.utils.modes import eval_mode
from spot_vit.utils.sizes import input_size
from spot_vit.utils.timing import take_turns

ROUNDS, WARMUP = 5, 1  # passes of each ratio whenever it is measured


@dataclasses.dataclass(frozen=True)
class Budget:
    """A budget: what one forward pass may cost, in one of two units.

    Attributes:
        gmacs: billions of multiply-accumulates per image, as `count_flops` gives them.
        latency_ms: median milliseconds per batch, measured on the model's device when it is set.
        batch: images per batch, for `latency_ms`.
        threads: CPU threads, for `latency_ms`; None for torch's current number.
        input_size: (channels, height, width); None for what the model was built for.
    """

    gmacs: float | None = None
    latency_ms: float | None = None
    batch: int = 1
    threads: int | None = None
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if (self.gmacs is None) == (self.latency_ms is None):
            raise ValueError("a budget names either gmacs or latency_ms")
        if self.latency_ms is None and (self.batch != 1 or self.threads is not None):
            raise ValueError("batch and threads belong to a budget of latency_ms")
        for name in ("gmacs", "latency_ms", "batch", "threads"):
            value = plain(getattr(self, name))
            if value is None and name != "batch":
                continue
            counts = name in ("batch", "threads")
            fits = is_whole(value) if counts else is_number(value)
            if not fits or not 0 < value < math.inf:
                kind = "int" if counts else "number"
                raise ValueError(f"{name} of a budget must be a positive {kind}, got {value!r}")
            object.__setattr__(self, name, value)
        if self.input_size is not None:
            object.__setattr__(self, "input_size", image_size(self.input_size))

    @classmethod
    def from_mapping(cls, budget: Mapping[str, Any]) -> Budget:
        """A budget from `keep={"gmacs": 2.8}` or `keep={"latency_ms": 20, "batch": 8}`."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(budget) - set(names)):
            raise ValueError(f"a budget has no {unknown}; it has {names}")
        return cls(**budget)


def solve_keep(model: Any, budget: Mapping[str, Any]) -> float:
    """The largest ρ at which a SPOT model stays within the budget; the model is left as it was.

    A budget that the dense model does not exceed gives 1. So does one of `latency_ms` that it
    exceeds by no more than measurements scatter where pruning slows the model down; a
    `RuntimeWarning` says so, with both times.

    Args:
        model: a SPOT model; the blocks where it decides and its method stay as they are.
        budget: fields of `Budget`.

    Returns:
        ρ as `SpotConfig.keep` takes it: an exact multiple of 1/1000. At least one patch survives
        the last stage.

    Raises:
        ValueError: a malformed budget, or one that no ratio meets; the range is named.
    """
    wanted = Budget.from_mapping(budget)
    channels, height, width = wanted.input_size or input_size(model)
    size = (channels, height, width)
    config = model.spot_config

    def at(ratio: float) -> Any:
        model._configure(config.replace(keep=ratio))
        return model

    try:
        patches = count_flops(at(1.0), size).layers[-1].tokens - model.num_prefix_tokens
        least = _smallest_ratio(patches, stages=len(config.at))
        if wanted.gmacs is not None:
            return largest_ratio(
                lambda ratio: count_flops(at(ratio), size).total / 1e9,
                wanted.gmacs,
                steps=STEPS,
                least=least,
                unit="GMACs",
            )
        assert wanted.latency_ms is not None
        parameter = next(model.parameters())
        if parameter.is_meta:
            raise ValueError("a budget of latency_ms needs a model with weights, not a meta device")
        images = torch.randn(wanted.batch, *size, device=parameter.device, dtype=parameter.dtype)
        with _threads(wanted.threads):
            return largest_within(
                lambda ratios: latencies(at, ratios, images),
                wanted.latency_ms,
                least=least,
                tokens=lambda ratio: _tokens(at(ratio), size),
                where=f" (batch {wanted.batch}, {height}x{width} pixels, {_device(images)})",
            )
    finally:
        model._configure(config)


def largest_ratio(
    cost: Callable[[float], float],
    target: float,
    *,
    steps: int,
    least: Fraction = Fraction(0),
    unit: str = "",
) -> float:
    """Bisection for the largest ratio whose cost does not exceed the target.

    Args:
        cost: does not fall as the ratio rises from `least`; the ratio 1 is a case of its own,
            since there nothing is scored.
        target: in the unit of `cost`.
        steps: ratios tried are multiples of 1 / steps.
        least: the smallest ratio allowed.
        unit: of `cost`, for the message.

    Returns:
        The ratio; 1 where the target is what 1 costs, or more.

    Raises:
        ValueError: the target lies below what `least` costs.
    """
    dense = cost(1.0)
    if target >= dense:
        return 1.0
    low, high = max(1, math.ceil(least * steps)), steps
    cheapest = cost(low / steps)
    if target < cheapest:
        raise ValueError(
            f"a budget of {target:g} {unit} is out of reach: keep from {low / steps:g} to 1 costs "
            f"{printed(cheapest, up=True)} to {printed(dense, up=False)} {unit}"
        )
    while high - low > 1:  # low is within the target, high is not
        middle = (low + high) // 2
        if cost(middle / steps) <= target:
            low = middle
        else:
            high = middle
    return low / steps


def _smallest_ratio(patches: int, stages: int) -> Fraction:
    """The least multiple of 1/1000 that leaves one of `patches` after the last stage."""
    for step in range(1, STEPS):
        ratio = Fraction(step, STEPS)
        if patches * ratio**stages >= 1:
            return ratio
    return Fraction(1)


@torch.inference_mode()
def latencies(
    at: Callable[[float], Any], ratios: Sequence[float], images: Tensor
) -> list[list[float]]:
    """Milliseconds of forward passes in eval mode, the ratios taking turns.

    Args:
        at: gives the model set to a ratio; it is one model, and set outside of what is timed.
        ratios: which to time.
        images: [B, C, H, W] on the model's device.

    Returns:
        Samples for each ratio, after a few untimed passes.
    """
    samples: list[list[float]] = [[] for _ in ratios]
    for passed in range(WARMUP + ROUNDS):
        for ratio, times in zip(ratios, samples, strict=True):
            side = partial(_forward, at(ratio), images)
            with eval_mode(side.args[0]):
                found = take_turns({"model": side}, images.device, rounds=1, warmup=0)
            if passed >= WARMUP:
                times += [1e3 * seconds for seconds in found["model"].wall]
    return samples


def _forward(model: Any, images: Tensor, _: int) -> Any:
    return model(images)


def _tokens(model: Any, size: tuple[int, int, int]) -> tuple[int, ...]:
    """Tokens that attend in each layer."""
    return tuple(layer.tokens for layer in count_flops(model, size).layers)


def _device(images: Tensor) -> str:
    threads = torch.get_num_threads()
    if images.device.type != "cpu":
        return str(images.device)
    return f"{threads} thread{'s' * (threads > 1)}"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
