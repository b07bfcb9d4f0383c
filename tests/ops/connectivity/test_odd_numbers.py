"""connectivity with ties, NaN, infinities and tiny numbers."""

from __future__ import annotations

import math

import pytest
import torch
from ops.connectivity.drawn import predicted, rows_of
from support.comparison import assert_same_bits
from support.data import FLOATING

from spot_ext import connectivity


@pytest.mark.parametrize("dtype", FLOATING)
def test_ties_go_to_the_lower_column_and_coefficient(
    dtype: torch.dtype, device: torch.device
) -> None:
    same = torch.ones(1, 1, 40, 4, dtype=dtype, device=device)
    index = connectivity(same, torch.ones(4, 40, dtype=dtype, device=device), 13)
    assert index.tolist() == [[[list(range(13))] * 40]]
    zeros = torch.tensor([0.0, -0.0], dtype=dtype, device=device).repeat(20)
    index = connectivity(same[..., :1], zeros[None], 13)
    assert index.tolist() == [[[list(range(13))] * 40]], "zeros of both signs are equal"
    # Only the first two of four equal coefficients count: columns 30 and 31.
    basis = torch.zeros(4, 40, dtype=dtype, device=device)
    for r, column in enumerate((31, 30, 3, 2)):
        basis[r, column] = 1
    index = connectivity(same, basis, 2, coef_topk=2)
    assert index.tolist() == [[[[30, 31]] * 40]]
    signed = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype, device=device).expand(1, 1, 40, 4)
    index = connectivity(signed, basis, 2, coef_topk=2)
    assert index.tolist() == [[[[0, 1]] * 40]]


def test_nan_ranks_below_minus_infinity(device: torch.device) -> None:
    one = torch.ones(1, 1, 5, 1, device=device)
    nan, inf = math.nan, math.inf
    basis = torch.tensor([[nan, -inf, 1.0, inf, nan]], device=device)
    expected = [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    for budget, columns in enumerate(expected, 1):
        assert connectivity(one, basis, budget).tolist() == [[[columns] * 5]]
        assert connectivity(-one, -basis, budget).tolist() == [[[columns] * 5]]
    index = connectivity(one, basis, 5, threshold=-inf)
    assert index.tolist() == [[[[2, 3, -1, -1, -1]] * 5]], "NaN and -inf exceed nothing"


@pytest.mark.parametrize("where", ["coefficients", "all of a row", "basis"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_nan_stays_where_it_is(dtype: torch.dtype, where: str, device: torch.device) -> None:
    coefficients, basis = predicted(50, dtype, device)
    clean = connectivity(coefficients, basis, 12)
    if where == "basis":
        basis = basis.clone()
        basis[3, [0, 7, 49]] = math.nan
        index = connectivity(coefficients, basis, 12)
        assert all(named.isdisjoint({0, 7, 49}) for named in rows_of(index))
        assert_same_bits(connectivity(coefficients, basis, 50), torch.arange(
            50, dtype=torch.int32, device=device).expand(2, 6, 49, 50).contiguous())  # fmt: skip
        return
    odd = coefficients.clone()
    odd[1, 2, 5, slice(None) if "all" in where else 4] = math.nan
    index = connectivity(odd, basis, 12)
    assert index[1, 2, 5].tolist() == list(range(12)), "all columns are NaN: ties"
    index[1, 2, 5] = clean[1, 2, 5]
    assert_same_bits(index, clean)
    # A NaN coefficient ranks last: unless all count, it does not.
    fewer = connectivity(odd, basis, 12, coef_topk=8)
    if where == "coefficients":
        others = odd.clone()
        others[1, 2, 5, 4] = -1.0
        assert_same_bits(fewer, connectivity(others, basis, 12, coef_topk=8))


@pytest.mark.parametrize("dtype", FLOATING)
def test_sums_are_kept_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    """256 + 1/4 and 256 + 1/2 are one number in bfloat16, and in float16 256 * 512 is infinite."""
    coefficients = torch.tensor([256.0, 0.25, 0.5], dtype=dtype, device=device)
    coefficients = coefficients.expand(1, 1, 4, 3)
    basis = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=dtype, device=device)
    assert connectivity(coefficients, basis, 1).tolist() == [[[[2]] * 4]]
    assert connectivity(coefficients, basis, 2).tolist() == [[[[1, 2]] * 4]]
    basis[0, 3] = 512
    assert connectivity(coefficients, 512 * basis[:, :3].repeat(1, 2), 1).tolist() == [[[[2]] * 4]]


def test_tiny_numbers_are_told_apart(device: torch.device) -> None:
    """Denormals are numbers, and not ties at zero."""
    basis = torch.tensor([[1.0, 3, 2, 0]], device=device) * 2.0**-146
    one = torch.ones(1, 1, 4, 1, device=device)
    assert connectivity(one, basis, 1).tolist() == [[[[1]] * 4]]
    assert connectivity(one, basis, 2).tolist() == [[[[1, 2]] * 4]]
