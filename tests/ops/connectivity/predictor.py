"""Calls of predict_connectivity as a predictor makes them, in either order of products."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.connectivity_data import rounding_of_logits
from ops.connectivity.drawn import assert_only_near_the_cut, exact_approx, predicted, rows_of
from support.data import random
from torch import Tensor
from torch.nn import functional as F

from spot_ext import predict_connectivity

OP = OPS["predict_connectivity"]

# Of the last place of the cut: exponentials and sums of a row are off by some.
UNITS = 16

# Channels, of 32 a head and 32 coefficients, and so which of the two orders of products is taken.
ORDERS = {"no projections": None, "projected first": 8, "added up first": 96}

by_order = pytest.mark.parametrize("channels", ORDERS.values(), ids=ORDERS)


def operands(
    count: int, dtype: torch.dtype, device: Any, channels: int | None, batch: int = 2,
    rank: int = 32, dim: int = 32, heads: int = 6,
) -> dict[str, Tensor]:  # fmt: skip
    """Arguments as a predictor has them: queries and keys of a fused projection, a class token."""

    def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = random(f"{name} {count} {channels}", shape, torch.float64)
        return (scale * drawn).to(device, dtype)

    packed = normal("qkv", batch, count, 3, heads, dim)
    values = {
        "q": packed[:, 1:, 0], "k": packed[:, :, 1],
        "down": normal("down", count, rank, scale=2 * count**-0.5),
        "up": predicted(count, dtype, device, batch=1, rank=rank)[1].mT.contiguous(),
    }  # fmt: skip
    if channels is not None:
        for name in ("query", "key"):
            values[f"{name}_weight"] = normal(name, channels, dim, scale=dim**-0.5)
            values[f"{name}_bias"] = normal(f"{name} bias", channels, scale=0.5)
    return values


def exact_logits(
    values: dict[str, Tensor],
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, float]:
    """[B, H, N-P, R] in float64, and what plain products lose in `dtype`."""
    projections = (values.get(f"{x}_{y}") for x in ("query", "key") for y in ("weight", "bias"))
    tokens = values["q"], values["k"], values["down"]
    return rounding_of_logits(*tokens, *projections, columns, keep, scale, dtype=dtype)


def assert_predicted_near_the_cut(
    values: dict[str, Tensor],
    budgets: Iterable[int],
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    coef_topk: int | None = None,
) -> None:
    """Sets are those of exact coefficients but for columns within rounding of the cut."""
    wide = torch.promote_types(values["q"].dtype, torch.float32)
    eps = torch.finfo(wide).eps
    logits, loss = exact_logits(values, columns, keep, dtype=wide)
    approx = exact_approx(logits.softmax(-1), values["up"].mT, coef_topk, columns)
    if keep is not None:
        dropped = F.pad(keep == 0, (1, 0))  # after the class token
        approx = approx.masked_fill(dropped[:, None, None], -math.inf)
    # Twice what plain products lose, of two columns or coefficients that are compared.
    relative = UNITS * eps + 4 * loss
    clear = torch.ones_like(logits[..., 0], dtype=torch.bool)
    if coef_topk is not None and coef_topk < logits.shape[-1]:
        best = logits.sort(dim=-1, descending=True).values
        last, next_ = best[..., coef_topk - 1], best[..., coef_topk]
        clear = (last - next_ > relative) | ((last == 0) & (next_ == 0))
        assert clear.sum() >= 0.95 * clear.numel()
    for budget in budgets:
        index = predict_connectivity(**values, budget=budget, columns=columns, keep=keep,
                                     coef_topk=coef_topk)  # fmt: skip
        rows_of(index)
        cut = approx.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
        margin = relative * cut.abs()
        near = (approx != 0) & (approx != cut) & ((approx - cut).abs() < margin)
        assert near.sum() <= 0.01 * near.numel(), "nothing to tell"
        assert_only_near_the_cut(
            index, approx, budget, margin.masked_fill(~clear[..., None], math.inf)
        )
