"""Cases of `attention_stats`: against fused attention without statistics, and eager with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from spot_vit.utils.timing import Case, Side, input_sets
from torch import Tensor

from spot_ext import attention_stats

SDPA, EAGER = "scaled_dot_product_attention, no statistics", "eager attention and statistics"
PLAIN = "the same with need_stats=False"
HEADS, DIM = 6, 64


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention alone, for what the statistics cost."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention that keeps its map, and the six statistics from it, in few passes over it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = torch.softmax(q * DIM**-0.5 @ k.transpose(-2, -1), dim=-1)
    patch = p[:, :, 1:, 1:]
    row_var, row_mean = torch.var_mean(patch, dim=-1, correction=0)
    col_var, col_mean = torch.var_mean(patch, dim=-2, correction=0)
    columns = [p[:, :, 0, 1:], p[:, :, 1:, 0], row_mean, row_var, col_mean, col_var]
    return (p @ v).transpose(1, 2), torch.stack(columns, dim=-1).transpose(1, 2)


class Inputs:
    """Sets of random q, k, v, as views of a fused projection, and gradients to send back."""

    def __init__(self, batch: int, tokens: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        shape = (batch, tokens, 3, HEADS, DIM)
        self.bytes = batch * tokens * 3 * HEADS * DIM * dtype.itemsize
        self.sets = [
            torch.randn(shape, generator=draw, device=device, dtype=dtype).unbind(2)
            for _ in range(input_sets(self.bytes, device))
        ]
        self.grad_out = torch.randn(
            (batch, tokens, HEADS, DIM), generator=draw, device=device, dtype=dtype
        )
        self.grad_stats = torch.randn((batch, tokens, HEADS, 6), generator=draw, device=device)

    def forward(self, function: Callable[..., Any]) -> Side:
        """`function(q, k, v)` as a side."""
        return lambda i: function(*self.sets[i % len(self.sets)])

    def training(self, function: Callable[..., Any], *grads: Tensor) -> Side:
        """Forward and backward of `function`, with these gradients of its results, as a side."""

        def side(i: int) -> Any:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in self.sets[i % len(self.sets)]]
                results = function(*leaves)
                results = results[: len(grads)] if isinstance(results, tuple) else (results,)
                return torch.autograd.grad(results, leaves, grads)

        return side


def cases(device: str) -> Iterator[Case]:
    """Bars: the share of the other's time that is allowed, as its inverse."""
    if device == "cpu":
        single, half = torch.float32, torch.bfloat16
        forward = [
            (8, 98, single, {SDPA: 0.75}),
            (8, 138, single, {SDPA: 0.72}),
            (8, 197, single, {SDPA: 0.82, EAGER: 0.22}),
            (8, 577, single, {SDPA: 0.85, EAGER: 0.14}),
            (2, 1025, single, {SDPA: 0.92}),
            (1, 197, single, {}),
            (8, 197, half, {SDPA: 0.60} if torch.cpu._is_avx512_bf16_supported() else {}),
        ]
        training = [(8, 197, single, 1.15), (8, 577, single, None)]
    else:
        half = torch.bfloat16
        forward = [
            (64, 98, half, {}),
            (64, 197, half, {SDPA: 1.3, EAGER: 0.2}),
            (64, 577, half, {SDPA: 1.3, EAGER: 0.2}),
            (8, 1025, half, {}),
            (64, 197, torch.float32, {}),
        ]
        training = [(64, 197, half, 1.6), (64, 577, half, 1.6)]
    for batch, tokens, dtype, allowed in forward:
        inputs = Inputs(batch, tokens, dtype, device)
        others = {SDPA: inputs.forward(sdpa), EAGER: inputs.forward(eager)}
        if tokens == 197:
            others[PLAIN] = inputs.forward(partial(attention_stats, need_stats=False))
        yield Case(
            f"forward {_shape(batch, tokens, dtype)}",
            inputs.forward(attention_stats),
            others,
            {other: 1 / share for other, share in allowed.items()},
            inputs.bytes,
        )
    for batch, tokens, dtype, share in training:
        inputs = Inputs(batch, tokens, dtype, device)
        yield Case(
            f"forward + backward {_shape(batch, tokens, dtype)}",
            inputs.training(attention_stats, inputs.grad_out, inputs.grad_stats),
            {SDPA: inputs.training(sdpa, inputs.grad_out)},
            {} if share is None else {SDPA: 1 / share},
            inputs.bytes,
        )


def _shape(batch: int, tokens: int, dtype: torch.dtype) -> str:
    return f"[{batch},{tokens},{HEADS},{DIM}] {str(dtype).removeprefix('torch.')}"
