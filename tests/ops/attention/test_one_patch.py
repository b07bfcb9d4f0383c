"""A single patch token with statistics: its variance is zero, or NaN as its entry is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.data import FLOATING
from torch import Tensor

import spot_ext
from spot_ext import _C


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def _operands(dtype: torch.dtype, num_tokens: int) -> list[Tensor]:
    seed = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(1, num_tokens, 2, 8, generator=seed).to(dtype) for _ in range(3)]


def _both(q: Tensor, k: Tensor, v: Tensor, keep: Any, num_prefix: int) -> Iterator[Any]:
    """Kernel and definition of dense attention, and of sparse attention that names every key."""
    count = q.shape[1]
    index = torch.arange(count, dtype=torch.int32).expand(1, 2, count - num_prefix, count)
    more = {"num_prefix": num_prefix, "need_stats": True}
    yield (
        spot_ext.attention_stats(q, k, v, keep, **more)[1],
        spot_ext.attention_stats_reference(q, k, v, keep, **more)[1],
    )
    yield (
        spot_ext.sparse_attention(q, k, v, index, keep, **more)[1],
        spot_ext.sparse_attention_reference(q, k, v, index, keep, **more)[1],
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("odd", [math.nan, math.inf, None])
@pytest.mark.parametrize("dropped", [0, 3, 130])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", FLOATING)
def test_its_variance(dtype: torch.dtype, num_prefix: int, dropped: int, odd: float | None) -> None:
    """`dropped` others are masked: few tokens are one span of queries, many are several."""
    count = num_prefix + 1 + dropped
    q, k, v = _operands(dtype, count)
    if odd is not None:
        q[0, num_prefix, 1, 0] = odd
        k[0, :, 1, 0] = k[0, :, 1, 0].abs() + 1
    keep = None
    if dropped:
        keep = torch.zeros(1, 1 + dropped)
        keep[0, 0] = 1
    for actual, expected in _both(q, k, v, keep, num_prefix):
        variances = actual[0, num_prefix, :, [3, 5]]
        assert torch.equal(actual.isnan(), expected.isnan())
        assert variances[0].eq(0).all()
        assert variances[1].eq(0).all() if odd is None else variances[1].isnan().all()
