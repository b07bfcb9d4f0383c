"""Data whose seed is a name: values, bit patterns, positions, keys."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_ROW_NAMES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32
    float64 complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2
    float8_e5m2fnuz float8_e8m0fnu"""

ROW_DTYPES = tuple(getattr(torch, name) for name in _ROW_NAMES.split() if hasattr(torch, name))


def generator(name: str) -> torch.Generator:
    """A generator whose seed is the name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """Random values: normal for floating and complex dtypes, any bits for integers."""
    seeded = generator(name)
    if dtype.is_complex:
        parts = torch.randn((*shape, 2), generator=seeded, dtype=torch.float64)
        return torch.view_as_complex(parts).to(dtype).to(device)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.randn(shape, generator=seeded, dtype=torch.float64).to(device, dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=seeded).to(device, dtype)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=seeded)
    return raw.to(torch.uint8).view(dtype).reshape(shape).to(device)


def random_bits(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu"
) -> Tensor:
    """Any bit pattern of the dtype: NaN with payloads, infinities, denormals, both zeros."""
    if dtype == torch.bool:
        return random(name, shape, dtype, device)
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator(name)).to(torch.uint8)
    return raw.view(dtype).reshape(shape).to(device)


def random_index(
    name: str,
    batch: int,
    num_tokens: int,
    num_keep: int,
    order: str = "ascending",
    device: Any = "cpu",
) -> Tensor:
    """[batch, num_keep] distinct positions, `ascending` or `shuffled`."""
    seeded = generator(name)
    rows = [torch.randperm(num_tokens, generator=seeded)[:num_keep] for _ in range(batch)]
    index = torch.stack(rows) if rows else torch.empty((0, num_keep), dtype=torch.int64)
    return (index.sort(dim=1).values if order == "ascending" else index).to(device)


def random_keys(
    name: str, shape: tuple[int, int, int], num_tokens: int, named: int, order: str = "ascending"
) -> Tensor:
    """[*shape, named] int32 distinct keys of each query; "padded" rows end in -1, some are all."""
    seeded = generator(f"keys {name}")
    keys = torch.rand((*shape, num_tokens), generator=seeded).argsort(-1)[..., :named]
    if order != "shuffled":
        keys = keys.sort(-1).values
    if order == "padded":
        left = torch.randint(0, named + 1, (*shape, 1), generator=seeded)
        left[:, :, ::3] = 0
        keys = keys.masked_fill(torch.arange(named) >= left, -1)
    if order == "empty":
        keys = keys.masked_fill(keys >= 0, -1)
    return keys.to(torch.int32)
