"""What connectivity's sets must do: nest, permute, gather, stay above the threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from ops.connectivity.drawn import build, cases, exact_approx, predicted, rows_of
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random, random_index

from spot_ext import connectivity


@given(cases())
def test_budgets_nest(device: torch.device, case: dict[str, Any]) -> None:
    values = build(case, torch.float32, device)
    previous: list[set[int]] | None = None
    for budget in range(1, case["in_play"] + 1):
        named = rows_of(connectivity(**(values | {"budget": budget})))
        if previous is not None:
            assert all(less <= more for less, more in zip(previous, named, strict=True))
            assert all(
                len(more) <= len(less) + 1 for less, more in zip(previous, named, strict=True)
            )
        previous = named
    if previous and not case["masked"] and case["threshold"] is None:
        assert all(named == set(range(case["in_play"])) for named in previous)


@pytest.mark.parametrize("coef_topk", [None, 8])
def test_budgets_nest_where_sums_are_not_exact(coef_topk: int | None, device: torch.device) -> None:
    coefficients, basis = predicted(97, torch.float32, device, batch=1)
    previous: list[set[int]] = [set() for _ in range(6 * 96)]
    for budget in range(1, 98):
        named = rows_of(connectivity(coefficients, basis, budget, coef_topk=coef_topk))
        assert all(less < more for less, more in zip(previous, named, strict=True))
        previous = named


def test_permuting_images_heads_and_queries_permutes_the_result(device: torch.device) -> None:
    coefficients, basis = predicted(70, torch.float32, device, batch=3)
    index = connectivity(coefficients, basis, 18, coef_topk=8)
    for dim in range(3):
        order = random_index(f"order {dim}", 1, index.shape[dim], index.shape[dim], "shuffled")[0]
        moved = connectivity(coefficients.index_select(dim, order.to(device)), basis, 18,
                             coef_topk=8)  # fmt: skip
        assert_same_bits(moved, index.index_select(dim, order.to(device)))


def test_a_larger_batch_changes_nothing(device: torch.device) -> None:
    coefficients, basis = predicted(70, torch.float32, device, batch=3)
    index = connectivity(coefficients, basis, 18, coef_topk=8)
    for image in range(3):
        for head in range(6):
            alone = coefficients[image : image + 1, head : head + 1]
            assert_same_bits(
                connectivity(alone, basis, 18, coef_topk=8),
                index[image : image + 1, head : head + 1],
            )


def test_permuting_columns_permutes_the_sets(device: torch.device) -> None:
    """Without ties; the order of positions has no say."""
    coefficients, basis = predicted(70, torch.float64, device)
    basis = basis + 1e-3 * random("no ties", (32, 70), torch.float64, device).abs()
    order = random_index("columns", 1, 70, 70, "shuffled", device)[0]
    index = connectivity(coefficients, basis, 18)
    moved = connectivity(coefficients, basis[:, order], 18)
    back = order[moved.long()].sort(-1).values.to(torch.int32)
    assert_same_bits(back, index)


def test_more_of_the_same_coefficient_changes_nothing(device: torch.device) -> None:
    """Sets depend on the direction of a row of coefficients alone: powers of two are exact."""
    coefficients, basis = predicted(70, torch.float32, device)
    index = connectivity(coefficients, basis, 18, coef_topk=8)
    for factor in (2.0**-20, 0.5, 2.0**20):
        assert_same_bits(connectivity(coefficients * factor, basis, 18, coef_topk=8), index)


# ---- columns -------------------------------------------------------------------------------------


def test_all_columns_in_order_are_no_columns(device: torch.device) -> None:
    for dtype in FLOATING:
        coefficients, basis = predicted(70, dtype, device)
        everything = torch.arange(70, device=device).expand(2, -1)
        for options in ({}, {"coef_topk": 8}, {"threshold": 0.01}):
            assert_same_bits(
                connectivity(coefficients, basis, 18, everything, **options),
                connectivity(coefficients, basis, 18, **options),
            )


@pytest.mark.parametrize("kind", ["some", "shuffled", "repeated"])
def test_columns_gather_the_basis(kind: str, device: torch.device) -> None:
    coefficients, basis = predicted(70, torch.float32, device, batch=3)
    coefficients = coefficients[:, :, :40]
    if kind == "repeated":
        columns = torch.randint(0, 70, (3, 41), generator=generator(kind)).to(device)
    else:
        columns = random_index(kind, 3, 70, 41, "ascending" if kind == "some" else kind, device)
    index = connectivity(coefficients, basis, 11, columns, coef_topk=8)
    for image in range(3):
        alone = connectivity(
            coefficients[image : image + 1], basis[:, columns[image]], 11, coef_topk=8
        )
        assert_same_bits(index[image : image + 1], alone)


@pytest.mark.parametrize("dtype", FLOATING)
def test_masked_names_the_keys_that_compacted_names(
    dtype: torch.dtype, device: torch.device
) -> None:
    """What masked training rests on: rows of kept tokens name the same tokens either way."""
    coefficients, basis = predicted(70, dtype, device)
    keep = torch.zeros(2, 69, device=device, dtype=dtype)
    kept = random_index("kept", 2, 69, 40, device=device)
    keep.scatter_(1, kept, 1)
    masked = connectivity(coefficients, basis, 18, keep=keep, coef_topk=8)
    columns = torch.cat([kept.new_zeros(2, 1), kept + 1], dim=1)
    rows = kept[:, None, :, None].expand(2, 6, 40, 32)
    fewer = connectivity(coefficients.gather(2, rows), basis, 18, columns, coef_topk=8)
    assert (fewer >= 0).all()
    named = columns[:, None, None].expand(2, 6, 40, -1).gather(-1, fewer.long()).int()
    assert_same_bits(masked.gather(2, kept[:, None, :, None].expand(2, 6, 40, 18)), named)


# ---- mask and threshold --------------------------------------------------------------------------


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.6, 1.0])
def test_dropped_columns_are_never_named(
    part: float, num_prefix: int, device: torch.device
) -> None:
    coefficients, basis = predicted(50, torch.float32, device, prefix=num_prefix)
    flips = torch.rand((2, 50 - num_prefix), generator=generator(f"{part}"))
    keep = (flips < part).float().to(device)
    index = connectivity(coefficients, basis, 20, keep=keep)
    for image in range(2):
        allowed = set(range(num_prefix))
        allowed |= {num_prefix + t for t, x in enumerate(keep[image].tolist()) if x == 1}
        for named in rows_of(index[image : image + 1]):
            assert named <= allowed and len(named) == min(20, len(allowed))


@pytest.mark.parametrize("kind", FLOATING)
def test_the_mask_may_have_another_dtype(kind: torch.dtype, device: torch.device) -> None:
    coefficients, basis = predicted(50, torch.float32, device)
    keep = (torch.rand((2, 49), generator=generator("mask")) < 0.6).to(device)
    index = connectivity(coefficients, basis, 20, keep=keep.to(kind))
    assert_same_bits(index, connectivity(coefficients, basis, 20, keep=keep.float()))
    strided = torch.stack([keep, ~keep], dim=-1)[..., 0].to(kind)
    assert_same_bits(index, connectivity(coefficients, basis, 20, keep=strided))


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.008, 0.0125, 0.02, 1.0, math.inf, -math.inf])
def test_columns_exceed_the_threshold(threshold: float, device: torch.device) -> None:
    coefficients, basis = predicted(50, torch.float64, device)
    approx = exact_approx(coefficients, basis, None)
    index = connectivity(coefficients, basis, 20, threshold=threshold)
    above = (approx > threshold).sum(-1)
    assert threshold not in (0.008, 0.0125) or (above < 20).any() or (above > 20).any()
    assert_same_bits((index >= 0).sum(-1), above.clamp(max=20))
    named = approx.gather(-1, index.long().clamp(min=0))
    assert (named > threshold)[index >= 0].all()
    unlimited = connectivity(coefficients, basis, 20)
    for few, many in zip(rows_of(index), rows_of(unlimited), strict=True):
        assert few <= many


def test_a_column_at_the_threshold_is_out(device: torch.device) -> None:
    """The comparison is with the threshold as given, in float64 when the inputs are."""
    one = torch.ones(1, 1, 3, 1, dtype=torch.float64, device=device)
    basis = torch.tensor([[0.5, 0.5 + 2**-50, 0.5 - 2**-50]], dtype=torch.float64, device=device)
    index = connectivity(one, basis, 3, threshold=0.5)
    assert index.tolist() == [[[[1, -1, -1]] * 3]]
