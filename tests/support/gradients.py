"""Gradients of a call, for incoming ones of any strides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from support.arguments import tensors
from support.data import generator
from torch import Tensor


@functools.lru_cache(maxsize=256)
def _cotangent(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str, number: int
) -> Tensor:
    seeded = generator(f"cotangent {number} {kind}")
    value = torch.randn(shape, generator=seeded, dtype=torch.float64).to(device, dtype)
    if kind == "expanded" and value.numel():  # what `sum` sends: every stride 0
        return value.flatten()[0].expand(shape)
    if kind == "transposed" and len(shape) > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "partial" and value.numel() and len(shape) > 1:  # what `mean(dim=1)` sends
        return value[:, :1].expand(shape)
    return value


def cotangents(outputs: Any, kind: str = "random", draw: int = 0) -> list[Tensor]:
    """Incoming gradients of the floating outputs, with the strides that autograd may produce."""
    return [
        _cotangent(tuple(out.shape), out.dtype, out.device, kind, number + 1000 * draw)
        for number, out in enumerate(tensors(outputs))
    ]


def gradients(
    call: Callable[..., Any], args: tuple[Any, ...], kind: str = "random", draw: int = 0
) -> tuple[Any, list[Tensor | None]]:
    """Outputs of `call` and the gradients of the arguments that ask for one."""
    outputs = call(*args)
    wanted = [value for value in tensors(args) if value.requires_grad]
    used = [out for out in tensors(outputs) if out.requires_grad]
    if not used or not wanted:
        return outputs, [None for _ in wanted]
    grads = torch.autograd.grad(used, wanted, cotangents(used, kind, draw), allow_unused=True)
    return outputs, list(grads)
