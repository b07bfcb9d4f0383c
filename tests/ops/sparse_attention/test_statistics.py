"""Identities and digits of the statistics of sparse_attention."""

from __future__ import annotations

import pytest
import torch
from ops.attention.drawn import SPARSE, case_of
from support.arguments import to_dtype
from support.attention import NAMES
from support.comparison import assert_close
from support.data import generator

from spot_ext import sparse_attention, sparse_attention_reference


@pytest.mark.parametrize("masked", [False, True])
def test_rows_and_columns_sum_to_what_the_class_token_leaves(
    masked: bool, device: torch.device
) -> None:
    """n row_mean + cls_in = 1 where anything is seen, and sum_t n col_mean = sum_t n row_mean."""
    values = SPARSE.build(
        case_of(count=40, named=9, masked=masked, order="padded"), torch.float64, device
    )
    out, stats = sparse_attention(**values, need_stats=True)
    stats, seen = stats[:, 1:], out[:, 1:].any(-1)
    alive = torch.ones(2, 39, 1, device=device).double()
    if masked:
        alive = values["keep"][..., None]
    n = alive.sum(1, keepdim=True)
    assert_close(n * stats[..., 2] + stats[..., 1], seen * alive, 1e-12)
    assert_close(stats[..., 4].sum(1), stats[..., 2].sum(1), 1e-12)
    assert not stats[(alive == 0)[..., 0]].any()
    assert (~seen).any()


@pytest.mark.parametrize("named", [4, 13, 36])
def test_uniform_attention_has_the_statistics_of_counts(named: int, device: torch.device) -> None:
    """With K of n keys each: rows have mean 1/n and variance (1/K - 1/n)/n."""
    case = case_of(count=36, named=named, num_prefix=0, scale=0.0, heads=3)
    values = SPARSE.build(case, torch.float64, device)
    _, stats = sparse_attention(**values, need_stats=True)
    count = torch.zeros(2, 3, 36, dtype=torch.float64, device=device)
    places = values["index"].flatten(2).long()
    count.scatter_add_(2, places, torch.ones_like(places, dtype=torch.float64))
    share = count.transpose(1, 2) / 36
    expected = torch.stack([
        0 * share, 0 * share, 0 * share + 1 / 36, 0 * share + (1 / named - 1 / 36) / 36,
        share / named, share * (1 - share) / named**2,
    ], dim=-1)  # fmt: skip
    assert_close(stats, expected, 1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variance", [1e-9, 1e-12])
@pytest.mark.parametrize(("count", "named"), [(197, 50), (577, 145)])
def test_tiny_variances_of_columns_are_right(
    count: int, named: int, variance: float, masked: bool, device: torch.device
) -> None:
    """Columns that all rows name, with nearly equal weight 1/K: E[p^2] - mean^2 has no digits."""
    case = case_of(count=count, named=named, dim=64, heads=2, num_prefix=1, masked=masked)
    values = SPARSE.build(case, torch.float64, device)
    # All rows name tokens 1 to 16 and others behind them; all of those are kept, like the rest.
    for row in values["index"].flatten(0, 2):
        rest = 17 + torch.randperm(count - 17, generator=generator("rest"))[: named - 16]
        row[:] = torch.cat([torch.arange(1, 17), rest.sort().values]).int()
    if masked:  # drops tokens that nobody names: every row keeps its K keys
        values["keep"][:] = 1
        free = torch.ones(count, dtype=torch.bool, device=device)
        free[values["index"].flatten().long()] = False
        values["keep"][:, free[1:]] = 0
        assert not values["keep"].all()
    values["q"] = values["q"] * variance**0.5 * named
    values = to_dtype(values, torch.float32)
    exact = sparse_attention_reference(**to_dtype(values, torch.float64), need_stats=True)[1]
    actual = sparse_attention(**values, need_stats=True)[1]
    truth = exact[:, 1:17, :, 5]
    assert 0.3 * variance < truth.median() < 3 * variance
    error = (actual[:, 1:17, :, 5].double() / truth - 1).square().mean().sqrt().item()
    assert error < (1e-4 if variance > 1e-10 else 2e-3), f"relative error {error:.1e}"


@pytest.mark.parametrize("variance", [1e-9, 1e-12])
def test_tiny_variances_of_rows_are_right(variance: float, device: torch.device) -> None:
    """All patch tokens named, the class token not: every row is nearly uniform over them."""
    values = SPARSE.build(case_of(count=197, named=196, dim=64), torch.float64, device)
    values["index"][:] = torch.arange(1, 197, device=device).int()
    values["q"] = values["q"] * variance**0.5 * 196
    values = to_dtype(values, torch.float32)
    exact = sparse_attention_reference(**to_dtype(values, torch.float64), need_stats=True)[1][:, 1:]
    actual = sparse_attention(**values, need_stats=True)[1][:, 1:]
    for column in (3, 5):
        truth = exact[..., column]
        assert 0.5 * variance < truth.median() < 2 * variance
        error = (actual[..., column].double() / truth - 1).square().mean().sqrt().item()
        assert error < (1e-4 if variance > 1e-10 else 2e-3), f"{NAMES[column]}: {error:.1e}"
