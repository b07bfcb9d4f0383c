"""Random q, k, v and masks."""

from __future__ import annotations

from typing import Any

import torch
from support.data import generator, random
from torch import Tensor


def qkv(
    batch: int, count: int, heads: int, dim: int, dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
) -> list[Tensor]:  # fmt: skip
    return [random(f"{x} {count}", (batch, count, heads, dim), dtype, device) for x in "qkv"]


def mask(batch: int, patches: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Any:
    seeded = generator(f"mask {patches}")
    return (torch.rand((batch, patches), generator=seeded) < 0.6).to(device, dtype)
