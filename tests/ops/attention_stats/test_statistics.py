"""Identities and digits of the statistics of attention_stats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.attention.drawn import DENSE, case_of
from ops.attention_stats.drawn import mask, qkv
from support.arguments import to_dtype
from support.attention import NAMES
from support.comparison import assert_close, assert_same_bits
from support.data import generator
from torch import Tensor

from spot_ext import attention_stats, attention_stats_reference


@pytest.mark.parametrize("masked", [False, True])
def test_rows_sum_to_one(masked: bool, device: torch.device) -> None:
    """n row_mean + cls_in = 1, and sum_t n col_mean = n - sum_t cls_in, with one prefix token."""
    q, k, v = qkv(3, 20, 2, 8, device=device)
    keep = mask(3, 19, device=device) if masked else None
    _, stats = attention_stats(q, k, v, keep)
    cls_in, row_mean, col_mean = (stats[:, 1:, :, i] for i in (1, 2, 4))
    alive = torch.ones(3, 19, 1, device=device).double() if keep is None else keep[..., None]
    n = alive.sum(1, keepdim=True)
    assert_close(n * row_mean + cls_in, alive.expand_as(cls_in), 1e-12)
    assert_close((n * col_mean).sum(1), n[:, 0] - cls_in.sum(1), 1e-12)
    assert_close(row_mean.sum(1), col_mean.sum(1), 1e-12)
    assert not stats[:, 0].any()
    if keep is not None:
        assert not stats[:, 1:][keep == 0].any()


def _maps(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The map [B, N, H, N] of the reference in float64 and of the op: what identity values give."""
    batch, count, heads, dim = values["q"].shape
    assert dim == count
    one = torch.eye(count, device=values["q"].device)[None, :, None].expand(batch, -1, heads, -1)
    mapped = values | {"v": one.to(values["q"].dtype)}
    exact = attention_stats_reference(**to_dtype(mapped, torch.float64))[0]
    return exact, attention_stats(**mapped)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_rows_and_columns_sum_to_what_the_prefix_leaves(
    num_prefix: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """n row_mean + prefix columns = 1, and sum_t n col_mean = n - sum_t prefix columns."""
    case = case_of(count=37, dim=37, num_prefix=num_prefix, masked=masked, bias="one")
    values = DENSE.build(case, dtype, device)
    exact, actual = _maps(values)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(actual.double(), exact, 4e-3 if dtype == torch.bfloat16 else tolerance, "map")
    stats = attention_stats(**values)[1][:, num_prefix:].double()
    alive = torch.ones(2, 37 - num_prefix, 1, device=device).double()
    if masked:
        alive = values["keep"].double()[..., None]
    n = alive.sum(1, keepdim=True)
    taken = exact[:, num_prefix:, :, :num_prefix].sum(-1) * alive  # [B, N-P, H]
    assert_close(n * stats[..., 2] + taken, alive.expand_as(taken), tolerance, "rows")
    total = (n * stats[..., 4]).sum(1)
    assert_close(total, n[:, 0] - taken.sum(1), tolerance, "columns")
    cls = exact[:, 0, :, num_prefix:].transpose(1, 2) * alive if num_prefix else 0 * taken
    assert_close(stats[..., 0], cls, tolerance, "cls_out")
    cls = exact[:, num_prefix:, :, 0] * alive if num_prefix else 0 * taken
    assert_close(stats[..., 1], cls, tolerance, "cls_in")


def test_uniform_attention_has_equal_means_and_no_variance(device: torch.device) -> None:
    for count in (2, 5, 197):
        q, k, v = qkv(2, count, 2, 8, torch.float32, device)
        out, stats = attention_stats(torch.zeros_like(q), k, v)
        expected = torch.tensor([1, 1, 1, 0, 1, 0], device=device) / count
        torch.testing.assert_close(
            stats[:, 1:], expected.expand(2, count - 1, 2, 6), rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v), rtol=0, atol=1e-5)


def test_variances_keep_their_digits_when_attention_is_nearly_uniform(device: torch.device) -> None:
    """E[p^2] - mean^2 in float32 would leave nothing of variances near 1e-13."""
    q, k, v = qkv(1, 197, 2, 64, torch.float64, device)
    q = q * 1e-2
    exact = attention_stats_reference(q, k, v)[1][:, 1:]
    actual = attention_stats(q.float(), k.float(), v.float())[1][:, 1:].double()
    for column in (3, 5):
        error = (actual[..., column] / exact[..., column] - 1).abs().max().item()
        assert error < 1e-2, f"{NAMES[column]}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("count", "variance", "masked", "tolerance"),
    [
        (197, 1e-9, False, 1e-4),
        (197, 1e-12, False, 1e-4),
        (577, 1e-9, False, 1e-4),
        (577, 1e-12, False, 1e-4),
        (197, 1e-9, True, 1e-4),
        (197, 1e-12, True, 1.5e-4),  # here 1/n is 70 standard deviations from the mean 1/(n+1)
        (577, 1e-9, True, 1e-4),
        (577, 1e-12, True, 1e-4),
    ],
)
def test_tiny_variances_are_right(
    count: int, variance: float, masked: bool, tolerance: float, device: torch.device
) -> None:
    """To 1e-4 over the tokens. Near 1e-12 a single one may be off by more: float32 rounds each p
    by up to 2e-4 of its distance from the mean (N = 197); plain PyTorch is off by 5e-4 there."""
    values = DENSE.build(case_of(count=count, dim=64, masked=masked), torch.float64, device)
    n = count - 1 if not masked else values["keep"].sum(1).mean().item()
    values["q"] = values["q"] * variance**0.5 * n
    values = to_dtype(values, torch.float32)
    exact = attention_stats_reference(**to_dtype(values, torch.float64))[1][:, 1:]
    actual = attention_stats(**values)[1][:, 1:]
    alive = exact[..., 2] > 0
    for column in (3, 5):
        truth = exact[..., column][alive]
        assert 0.5 * variance < truth.median() < 2 * variance
        error = (actual[..., column][alive].double() / truth - 1).abs()
        total = error.square().mean().sqrt().item()
        assert total < tolerance, f"{NAMES[column]}: relative error {total:.1e}"
        largest = error.max().item()
        limit = tolerance if variance > 1e-10 else 4 * tolerance
        assert largest < limit, f"{NAMES[column]}: relative error {largest:.1e}"
    assert not actual[~alive].any()


@pytest.mark.parametrize("sink", [5.0, 9.0])
def test_variances_are_right_beside_a_sink(sink: float, device: torch.device) -> None:
    """A class token that takes 43 or 98 % of every row moves the means far from 1/n."""
    values = DENSE.build(case_of(count=197, dim=64, bias="one"), torch.float32, device)
    values["q"] = values["q"] * 6e-3
    values["bias"] = torch.zeros_like(values["bias"])
    values["bias"][..., 0] = sink
    exact = attention_stats_reference(**to_dtype(values, torch.float64))[1][:, 1:]
    actual = attention_stats(**values)[1][:, 1:].double()
    assert exact[..., 1].min() > (0.4 if sink == 5.0 else 0.95)
    for column in (3, 5):
        truth = exact[..., column]
        assert truth.min() > 1e-13 and truth.max() < 1e-9
        error = (actual[..., column] / truth - 1).square().mean().sqrt().item()
        assert error < 1e-4, f"{NAMES[column]}: relative error {error:.1e}"


@pytest.mark.parametrize("count", [197, 577])
def test_one_hot_attention_has_the_variances_of_counts(count: int, device: torch.device) -> None:
    """Column t is chosen c_t times: mean c_t / n, variance c_t / n (1 - c_t / n)."""
    _, k, v = qkv(1, count, 2, 64, torch.float32, device)
    chosen = torch.randint(1, count, (count,), generator=generator("chosen")).to(device)
    out, stats = attention_stats(20 * k[:, chosen], k, v)
    torch.testing.assert_close(out, v[:, chosen], rtol=1e-6, atol=1e-6)
    n = count - 1
    mean = torch.bincount(chosen[1:], minlength=count)[1:].double()[None, :, None] / n
    assert mean.max() * n >= 3 and (mean == 0).any()
    # Where nobody looks, roundings of 1/n and 1/n^2 may remain.
    for column, truth, rest in ((4, mean, 1 / n), (5, mean * (1 - mean), 1 / n**2)):
        actual = stats[:, 1:, :, column].double()
        truth = truth.expand_as(actual)
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=2e-5 * rest)
    for column, number in ((2, 1 / n), (3, (1 - 1 / n) / n)):
        actual = stats[:, 1:, :, column]
        torch.testing.assert_close(actual, torch.full_like(actual, number), rtol=1e-4, atol=0)


def test_one_patch_has_zero_variance(device: torch.device) -> None:
    q, k, v = qkv(2, 2, 3, 4, device=device)
    stats = attention_stats(q, k, v)[1]
    assert not stats[..., 3].any() and not stats[..., 5].any()
    assert_close(stats[:, 1, :, 2], stats[:, 1, :, 4])


@pytest.mark.parametrize("num_prefix", [1, 2, 5])
def test_statistics_ignore_the_prefix_but_for_the_class_token(
    num_prefix: int, device: torch.device
) -> None:
    q, k, v = qkv(2, 12, 2, 8, device=device)
    stats = attention_stats(q, k, v, num_prefix=num_prefix)[1]
    assert not stats[:, :num_prefix].any() and stats[:, num_prefix:].ne(0).all()
    none = attention_stats(q, k, v, num_prefix=num_prefix, class_token=False)[1]
    assert not none[..., :2].any()
    assert_same_bits(none[..., 2:], stats[..., 2:])
