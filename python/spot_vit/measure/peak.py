"""The most that a machine does: multiply-accumulates a second in a large matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spot_vit.nn.packed import candidates, pack_linear
from spot_vit.utils.timing import take_turns

SIZES = {"cpu": 2048, "cuda": 8192}  # of the square matrices
ROUNDS = 5


@dataclass(frozen=True)
class Peak:
    """The fastest large matrix product.

    Attributes:
        gmacs_per_s: billions of multiply-accumulates a second.
        by: who multiplied: "torch", or who does so with packed weights.
        size: of the square matrices.
    """

    gmacs_per_s: float
    by: str
    size: int


def measured_peak(
    dtype: torch.dtype, device: torch.device | str = "cpu", size: int | None = None
) -> Peak:
    """Multiplies square matrices with torch and, on a CPU, with packed weights; the best counts.

    Args:
        dtype: of the matrices.
        device: where they are.
        size: of the matrices; by default one at which a product takes a tenth of a second.
    """
    device = torch.device(device)
    size = size or SIZES.get(device.type, SIZES["cpu"])
    x = torch.randn(size, size, device=device, dtype=dtype)
    sides: dict[str, Callable[[int], Any]] = {"torch": partial(_product, x)}
    if device.type == "cpu":
        for kind in candidates(dtype):
            layer = nn.Linear(size, size, bias=False, dtype=dtype).eval()
            sides[kind] = partial(_layer, pack_linear(layer, kind), x)
    with torch.inference_mode():
        times = take_turns(sides, device, rounds=ROUNDS, warmup=1)
    best = min(times, key=lambda name: min(times[name].wall))
    return Peak(size**3 / 1e9 / min(times[best].wall), best, size)


def _product(x: torch.Tensor, _: int) -> torch.Tensor:
    return x @ x


def _layer(layer: nn.Module, x: torch.Tensor, _: int) -> torch.Tensor:
    return layer(x)
