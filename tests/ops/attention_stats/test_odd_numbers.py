"""attention_stats with infinite, NaN and very large logits."""

from __future__ import annotations

import math

import pytest
import torch
from ops.attention.drawn import DENSE, case_of
from ops.attention_stats.drawn import qkv
from support.arguments import to_dtype
from support.attention import with_leaves
from support.comparison import assert_close
from support.data import FLOATING
from support.gradients import gradients

from spot_ext import attention_stats, attention_stats_reference


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_row_without_a_softmax_is_nan(
    odd: float, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """A logit of +inf or NaN spoils its row, and the columns that the row sees."""
    for row in (0, 1, 4):  # the class token, another prefix token, a patch
        q, k, v = qkv(1, 9, 2, 8, dtype, device)
        bias = torch.zeros(1, 2, 9, 9, dtype=dtype, device=device)
        bias[0, 1, row, 6] = odd
        keep = torch.tensor([[1, 0, 1, 1, 1, 0, 1.0]], device=device) if masked else None
        out, stats = attention_stats(q, k, v, keep, bias, num_prefix=2)
        expected = torch.zeros_like(stats, dtype=torch.bool)
        if row == 0:
            expected[:, 2:, 1, 0] = True
        elif row == 4:
            expected[:, 4, 1, 1:4] = True
            expected[:, 2:, 1, 4:] = True
        if masked:
            expected[:, [3, 7]] = False
        assert torch.equal(stats.isnan(), expected)
        assert out[0, row, 1].isnan().all() and out.isnan().sum() == 8
        more = attention_stats_reference(q, k, v, keep, bias, num_prefix=2)
        for mine, theirs in zip((out, stats), more, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["products", "bias", "all high", "all low"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_logits_of_ten_thousand(
    dtype: torch.dtype, where: str, masked: bool, device: torch.device
) -> None:
    """Outputs are finite and right, all gradients are finite and there."""
    values = DENSE.build(case_of(count=41, dim=16, masked=masked, bias="each"), dtype, device)
    if where == "products":
        values["q"] = values["q"] * 250
        values["scale"] = 1.0
        products = torch.einsum("bihd,bjhd->bhij", values["q"].double(), values["k"].double())
        values["scale"] = 1e4 / products.abs().max().item()
    elif where == "bias":
        values["bias"] = values["bias"] / values["bias"].abs().max() * 1e4
    else:  # float32 keeps 1e-3 of such logits
        values["bias"] = values["bias"].sign() * 8 + (9.9e3 if where == "all high" else -9.9e3)
    call, leaves = with_leaves(values, "q", "k", "v", "keep", "bias")
    (out, stats), grads = gradients(lambda *_: attention_stats(**call), tuple(leaves))
    exact_out, exact_stats = attention_stats_reference(**to_dtype(values, torch.float64))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 3e-2)
    assert_close(out.double(), exact_out, tolerance, "out")
    assert_close(stats.double(), exact_stats, min(tolerance, 1e-2), "stats")
    assert out.isfinite().all() and stats.isfinite().all()
    assert (stats[..., [3, 5]] >= 0).all() and (stats >= -1e-6).all()
    assert len(grads) == 4 + masked and all(grad.isfinite().all() for grad in grads)
    assert all(grad.any() for grad in grads[2:])


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    q, k, v = qkv(2, 9, 2, 8, torch.float32, device)
    q[0, 4, 1] = math.nan
    out, stats = attention_stats(q, k, v)
    assert out[0, 4, 1].isnan().all() and stats[0, 4, 1, 1:4].isnan().all()
    out[0, 4, 1] = 0
    assert out.isfinite().all() and stats[1].isfinite().all() and stats[0, :, 0].isfinite().all()
