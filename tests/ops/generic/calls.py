"""Calls of an op that several of the generic tests make."""

from __future__ import annotations

from typing import Any

import torch
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import tensors
from support.gradients import gradients
from torch import Tensor
from torch.utils._pytree import tree_map_only

DIFFERENTIABLE = [op for op in OPS.values() if op.grads]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def vit(op: Op, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> tuple[Any, ...]:
    """A call of the size of a ViT."""
    if op.large:
        return op.sample(op.large).args(device, dtype)
    plain = op.exact or op.name.startswith("attention_stats")
    name = {"select_tokens": "(2, 196, 137)"}.get(op.name, "ViT" if plain else "ViT, mean")
    return op.sample(name).args(device, dtype)


def large(op: Op, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> tuple[Any, ...]:
    """A call that several threads share: 12 ViT images."""
    args = vit(op, dtype, device)
    if op.large:
        return args
    copies = 12 // args[0].shape[0]

    def repeat(value: Tensor) -> Tensor:
        if value.dtype == torch.int64:
            return value.repeat(copies, 1)
        return torch.cat([value.roll(step, dims=1) for step in range(copies)])

    return tree_map_only(Tensor, repeat, args)


def outcome(op: Op, args: tuple[Any, ...], call: Any = None) -> list[Tensor]:
    """Outputs and gradients, detached."""
    outputs, grads = gradients(call or op.call, args)
    return [value.detach() for value in (*tensors(outputs), *grads) if value is not None]
