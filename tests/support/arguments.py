"""Arguments of ops: their tensors, those in lists too, replaced, in another dtype, copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result or an argument list, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, str) or not isinstance(value, Iterable):
        return []
    return [item for part in value for item in tensors(part)]


def refilled(args: tuple[Any, ...], values: Iterable[Tensor]) -> tuple[Any, ...]:
    """The arguments with other tensors, in order."""
    rest = iter(values)
    return tuple(_refilled(value, rest) for value in args)


def _refilled(value: Any, rest: Iterator[Tensor]) -> Any:
    if isinstance(value, list):
        return [_refilled(item, rest) for item in value]
    return next(rest) if isinstance(value, Tensor) else value


def to_dtype(args: Any, dtype: torch.dtype) -> Any:
    """Floating tensors cast to `dtype`, detached; gradients are asked for where they were."""

    def cast(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.detach()
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return tree_map_only(Tensor, cast, args)


def clone(args: Any, device: Any = None) -> Any:
    """A deep copy with the same strides, also of overlapping ones; fresh leaves."""

    def copy(value: Tensor) -> Tensor:
        if value.numel() == 0 or any(stride < 0 for stride in value.stride()):
            return value.detach().clone().to(device).requires_grad_(value.requires_grad)
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        flat = value.detach().as_strided((extent,), (1,)).clone().to(device)
        return flat.as_strided(value.shape, value.stride()).requires_grad_(value.requires_grad)

    return tree_map_only(Tensor, copy, args)


def with_grad(args: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """Leaf copies of the arguments; the floating ones at `places` ask for a gradient."""
    fresh = list(clone(args))
    for place in places:
        for value in tensors(fresh[place : place + 1]):
            value.requires_grad_(value.is_floating_point())
    return tuple(fresh)
