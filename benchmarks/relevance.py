"""Cases of `token_relevance`: against the same predictor in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from spot_vit.utils.timing import Case, Side, input_sets
from torch import Tensor

from spot_ext import token_relevance

EAGER = "the same in plain PyTorch"
DIM, FEATURES = 384, 108  # DeiT-S with its statistics and two moments of them, 6 heads


def eager(
    tokens: Tensor,
    features: Tensor,
    keep: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    remap_weight: Tensor,
    remap_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    fc3_weight: Tensor,
    fc3_bias: Tensor,
) -> Tensor:
    """As a careful user writes it: the shared half once per image, no concatenation."""
    normed = F.layer_norm(tokens, tokens.shape[2:], norm_weight, norm_bias)
    local, shared = F.gelu(F.linear(normed, remap_weight, remap_bias)).chunk(2, dim=-1)
    total = (shared * keep[..., None]).sum(dim=1)
    mean = (total / keep.sum(dim=1, keepdim=True).clamp(min=1)).to(local.dtype)
    half = local.shape[2]
    to_local, to_shared, to_features = fc1_weight.split([half, half, features.shape[2]], dim=1)
    hidden = F.linear(local, to_local) + F.linear(mean, to_shared, fc1_bias)[:, None]
    hidden = F.gelu(hidden + F.linear(features, to_features))
    hidden = F.gelu(F.linear(hidden, fc2_weight, fc2_bias))
    return F.linear(hidden, fc3_weight, fc3_bias).float().log_softmax(dim=-1)


class Inputs:
    """Sets of random tokens and features beside one set of weights."""

    def __init__(self, batch: int, tokens: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=draw, device=device, dtype=dtype)

        def linear(rows: int, width: int) -> list[Tensor]:
            return [normal(rows, width, scale=width**-0.5), normal(rows, scale=0.1)]

        width = DIM + FEATURES
        self.weights = [normal(DIM, scale=0.1) + 1, normal(DIM, scale=0.1), *linear(DIM, DIM)]
        self.weights += [*linear(width // 2, width), *linear(width // 4, width // 2)]
        self.weights += linear(2, width // 4)
        self.bytes = batch * tokens * width * dtype.itemsize
        self.sets = [
            (
                normal(batch, tokens + 1, DIM)[:, 1:],  # after a class token
                normal(batch, tokens, FEATURES),
                (torch.rand((batch, tokens), generator=draw, device=device) < 0.7).float(),
            )
            for _ in range(input_sets(self.bytes, device))
        ]
        self.grad = torch.randn((batch, tokens, 2), generator=draw, device=device)

    def forward(self, function: Callable[..., Any]) -> Side:
        """`function` of the inputs, as a side."""
        return lambda i: function(*self.sets[i % len(self.sets)], *self.weights)

    def training(self, function: Callable[..., Any]) -> Side:
        """Forward and backward of `function`, with all gradients."""

        def side(i: int) -> Any:
            with torch.enable_grad():
                values = (*self.sets[i % len(self.sets)], *self.weights)
                leaves = [x.detach().requires_grad_() for x in values]
                return torch.autograd.grad(function(*leaves), leaves, self.grad)

        return side


def cases(device: str) -> Iterator[Case]:
    """Both sides spend nine tenths of their time in the same products: that bounds the gain."""
    cpu = device == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    bars = {EAGER: 1.03} if cpu else {}
    for batch, tokens in [(8, 196), (8, 137), (8, 96), (1, 196)] if cpu else [(64, 196), (1, 196)]:
        inputs = Inputs(batch, tokens, dtype, device)
        name = f"[{batch},{tokens},{DIM}] + {FEATURES} {str(dtype).removeprefix('torch.')}"
        for what, side in (("forward", inputs.forward), ("forward + backward", inputs.training)):
            ours, other = side(token_relevance), side(eager)
            yield Case(f"{what} {name}", ours, {EAGER: other}, bars, inputs.bytes)
