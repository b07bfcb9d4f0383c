"""Cases of `connectivity`: against the dense map and its largest columns in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Case, Side, input_sets
from spot_ext import connectivity

EAGER = "dense map and topk"
HEADS, DIM = 6, 64
SHARE, COEF_TOPK = 0.25, 8  # of the keys; coefficients that count (published)
REDUCE_N, REDUCE_C, STD, LEAST = 6, 2, 0.02, 0.02  # published


def budget_of(tokens: int) -> int:
    """Keys of each query."""
    return math.ceil(SHARE * tokens)


class Predictor:
    """An untrained connectivity predictor with published sizes: METHOD B1."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(1)

        def normal(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=draw, device=device, dtype=dtype)

        channels, rank = DIM // REDUCE_C, tokens // REDUCE_N
        self.q_weight, self.k_weight = (normal(channels, DIM, scale=DIM**-0.5) for _ in "qk")
        self.q_bias, self.k_bias = (normal(channels, scale=0.1) for _ in "qk")
        self.down = normal(tokens, rank, scale=STD)
        up = normal(rank, tokens, scale=STD).abs()
        self.basis = torch.where(up > LEAST, up, 0)

    def coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, N-1, R] of q, k [B, N, H, D]; associated so that no token is projected alone."""
        keys = (self.down.mT @ k.flatten(2)).unflatten(2, k.shape[2:])  # [B, R, H, D]
        keys = F.linear(keys, self.k_weight) + self.down.sum(0)[:, None, None] * self.k_bias
        keys = keys * HEADS**-0.5
        offset = (keys @ self.q_bias).transpose(1, 2)[:, :, None]  # [B, H, 1, R]
        keys = (keys @ self.q_weight).permute(0, 2, 3, 1)
        return (q[:, 1:].transpose(1, 2) @ keys + offset).softmax(dim=-1)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, N-1, K] int32: what `sparse_attention` takes."""
        coefficients = self.coefficients(q, k)
        return connectivity(coefficients, self.basis, budget_of(k.shape[1]), coef_topk=COEF_TOPK)


def ours(coefficients: Tensor, basis: Tensor, columns: Tensor | None = None) -> Tensor:
    """The op with the published options."""
    in_play = basis.shape[1] if columns is None else columns.shape[1]
    return connectivity(coefficients, basis, budget_of(in_play), columns, coef_topk=COEF_TOPK)


def eager(coefficients: Tensor, basis: Tensor, columns: Tensor | None = None) -> Tensor:
    """As a careful user writes it, with ties as they come."""
    values, order = coefficients.topk(COEF_TOPK, dim=-1, sorted=False)
    coefficients = torch.zeros_like(coefficients).scatter_(-1, order, values)
    if columns is None:
        approx = coefficients @ basis
    else:
        approx = coefficients @ basis.mT[columns].mT[:, None]
    best = approx.topk(budget_of(approx.shape[-1]), dim=-1, sorted=False).indices
    return best.sort(dim=-1).values.to(torch.int32)


class Inputs:
    """Sets of coefficients of random queries and keys; `kept` of the patch tokens in play."""

    def __init__(
        self, batch: int, tokens: int, kept: int | None, dtype: torch.dtype, device: str
    ) -> None:
        draw = torch.Generator(device).manual_seed(0)
        predictor = Predictor(tokens, dtype, device)
        queries = tokens - 1 if kept is None else kept
        self.bytes = batch * HEADS * queries * (tokens // REDUCE_N) * dtype.itemsize
        self.sets = []
        for _ in range(input_sets(self.bytes, device)):
            shape = (2, batch, tokens, HEADS, DIM)
            q, k = torch.randn(shape, generator=draw, device=device, dtype=dtype)
            coefficients, columns = predictor.coefficients(q, k), None
            if kept is not None:
                scores = torch.rand((batch, tokens - 1), generator=draw, device=device)
                patches = 1 + scores.topk(kept).indices.sort(-1).values
                columns = F.pad(patches, (1, 0))
                coefficients = coefficients[:, :, :kept].contiguous()
            self.sets.append((coefficients, predictor.basis, columns))

    def forward(self, function: Callable[..., Any]) -> Side:
        """`function(coefficients, basis, columns)` as a side."""
        return lambda i: function(*self.sets[i % len(self.sets)])


def cases(device: str) -> Iterator[Case]:
    """Without bars: its share of the whole has one, in `benchmarks/sparse_attention.py`."""
    cpu = device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    sizes = [(8, 197), (8, 577), (2, 1025)] if cpu else [(64, 197), (32, 577), (16, 1025)]
    for batch, tokens in sizes:
        for kept in (None, 7 * (tokens - 1) // 10):
            inputs = Inputs(batch, tokens, kept, dtype, device)
            name = f"[{batch},{HEADS},{tokens}] {str(dtype).removeprefix('torch.')}"
            if kept is not None:
                name += f", {kept} patches left"
            yield Case(name, inputs.forward(ours), {EAGER: inputs.forward(eager)}, {}, inputs.bytes)
