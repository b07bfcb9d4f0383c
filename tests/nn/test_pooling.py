"""Pooling over kept tokens is timm's pooling over the tokens that are left."""

from __future__ import annotations

import pytest
import torch
from spot_vit.nn.pooling import pool_kept
from timm.layers import global_pool_nlc

PREFIX, PATCHES = 2, 9


def tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, PREFIX + PATCHES, 5, generator=generator, dtype=torch.float64)
    return drawn.to(dtype)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("kind", ["", "token", "avg", "max", "avgmax"])
def test_pools_what_timm_would_pool_of_the_survivors(kind: str, include: bool) -> None:
    x = tokens()
    kept = torch.tensor([0, 3, 4, 8])
    mask = torch.zeros(3, PATCHES, dtype=x.dtype)
    mask[:, kept] = 1
    found = pool_kept(x, mask, kind, PREFIX, include_prefix=include)
    rest = torch.cat([x[:, :PREFIX], x[:, PREFIX:][:, kept]], dim=1)
    expected = global_pool_nlc(
        x if kind == "" else rest, kind, num_prefix_tokens=PREFIX, reduce_include_prefix=include
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_images_keep_their_own_tokens() -> None:
    x, mask = tokens(), torch.zeros(3, PATCHES, dtype=torch.float64)
    mask[0, 1] = mask[1, 2] = mask[2, 3] = 1
    found = pool_kept(x, mask, "avg", PREFIX)
    assert torch.equal(found, torch.stack([x[b, PREFIX + 1 + b] for b in range(3)]))


def test_where_nothing_is_kept_there_is_no_nan() -> None:
    x, mask = tokens(), torch.zeros(3, PATCHES, dtype=torch.float64)
    assert torch.equal(pool_kept(x, mask, "avg", PREFIX), torch.zeros(3, 5, dtype=x.dtype))
    assert torch.equal(pool_kept(x, mask, "max", PREFIX), x[:, PREFIX:].amax(dim=1))


def test_averages_pass_the_gradient_of_the_mask() -> None:
    x = tokens()
    mask = torch.ones(3, PATCHES, dtype=x.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: pool_kept(x, m, "avg", PREFIX), mask)


def test_half_precision_is_summed_in_float32() -> None:
    x = tokens(torch.float16)
    mask = torch.ones(3, PATCHES, dtype=x.dtype)
    exact = x[:, PREFIX:].double().mean(dim=1)
    found = pool_kept(x, mask, "avg", PREFIX)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
