"""Cases of `connectivity`: against the dense map and its largest columns in plain PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from spot_vit import SparsifinerConfig
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.utils.timing import Case, Side, input_sets

from spot_ext import connectivity

EAGER = "dense map and topk"
STORED = "coefficients stored, then connectivity"
HEADS, DIM = 6, 64
SHARE, COEF_TOPK = 0.25, 8  # of the keys; coefficients that count (published)


def budget_of(tokens: int) -> int:
    """Keys of each query."""
    return math.ceil(SHARE * tokens)


@torch.no_grad()
def untrained(tokens: int, dtype: torch.dtype, device: str) -> ConnectivityPredictor:
    """A predictor with published sizes, whose logits are as large as trained ones."""
    torch.manual_seed(1)
    config = SparsifinerConfig(keep_rate=SHARE, coef_topk=COEF_TOPK)
    made = {"device": device, "dtype": dtype}
    predictor = ConnectivityPredictor(DIM, HEADS, 1, (1, tokens - 1), config, **made)
    for linear in (predictor.proj_c_q, predictor.proj_c_k):
        assert linear is not None
        linear.weight.normal_(std=DIM**-0.5)
        linear.bias.normal_(std=0.1)
    return predictor


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
        predictor = untrained(tokens, dtype, device)
        basis = predictor.basis().contiguous()
        queries = tokens - 1 if kept is None else kept
        self.bytes = batch * HEADS * queries * basis.shape[0] * dtype.itemsize
        self.sets = []
        for _ in range(input_sets(self.bytes, device)):
            shape = (2, batch, tokens, HEADS, DIM)
            q, k = torch.randn(shape, generator=draw, device=device, dtype=dtype)
            with torch.no_grad():
                coefficients, columns = predictor.coefficients(q[:, 1:], k), None
            if kept is not None:
                scores = torch.rand((batch, tokens - 1), generator=draw, device=device)
                patches = 1 + scores.topk(kept).indices.sort(-1).values
                columns = F.pad(patches, (1, 0))
                coefficients = coefficients[:, :, :kept].contiguous()
            self.sets.append((coefficients, basis, columns))

    def forward(self, function: Callable[..., Any]) -> Side:
        """`function(coefficients, basis, columns)` as a side."""
        return lambda i: function(*self.sets[i % len(self.sets)])


class Prediction:
    """Sets of random queries and keys, as views of a fused projection."""

    def __init__(self, batch: int, tokens: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.predictor = untrained(tokens, dtype, device)
        self.bytes = 2 * batch * tokens * HEADS * DIM * dtype.itemsize
        shape = (batch, tokens, 3, HEADS, DIM)
        self.sets = [
            torch.randn(shape, generator=draw, device=device, dtype=dtype).unbind(2)[:2]
            for _ in range(input_sets(self.bytes, device))
        ]

    def inside(self, i: int) -> Tensor:
        """The predictor as it is."""
        q, k = self.sets[i % len(self.sets)]
        return self.predictor(q[:, 1:], k)

    def stored(self, function: Callable[..., Tensor]) -> Side:
        """`function(coefficients, basis)` of its coefficients, as a side."""

        @torch.no_grad()
        def side(i: int) -> Tensor:
            q, k = self.sets[i % len(self.sets)]
            return function(self.predictor.coefficients(q[:, 1:], k), self.predictor.basis())

        return side


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
        inputs = Prediction(batch, tokens, dtype, device)
        name = f"predictor [{batch},{tokens},{HEADS},{DIM}] {str(dtype).removeprefix('torch.')}"
        others = {STORED: inputs.stored(ours), EAGER: inputs.stored(eager)}
        yield Case(name, inputs.inside, others, {}, inputs.bytes)
