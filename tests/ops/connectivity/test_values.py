"""connectivity against its definition, written once more as loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.connectivity.drawn import (
    assert_only_near_the_cut,
    build,
    case_of,
    cases,
    exact_approx,
    predicted,
    rows_of,
)
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random
from support.switches import threads
from torch import Tensor

from spot_ext import connectivity, connectivity_reference


def ranked(values: list[float]) -> list[int]:
    """Positions from the largest to the least; NaN last, ties by position."""
    return sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i], i)
                  if not math.isnan(values[i]) else (True, 0.0, i))  # fmt: skip


def by_hand(
    coefficients: Tensor,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> list[list[list[list[int]]]]:
    """The rows of the result as nested lists, entry by entry."""
    table = basis.tolist()
    result = []
    for b, image in enumerate(coefficients.tolist()):
        grid = basis.shape[1]
        names = list(range(grid)) if columns is None else columns[b].tolist()
        prefix = len(names) - coefficients.shape[2]
        dropped = set()
        if keep is not None:
            dropped = {prefix + t for t, value in enumerate(keep[b].tolist()) if value == 0}
        heads = []
        for head in image:
            rows = []
            for row in head:
                used = ranked(row)[: len(row) if coef_topk is None else coef_topk]
                weights = [c if r in used else 0.0 for r, c in enumerate(row)]
                approx = [sum((c * table[r][j] for r, c in enumerate(weights)), 0.0)
                          for j in names]  # fmt: skip
                best = [j for j in ranked(approx) if j not in dropped
                        and (threshold is None or approx[j] > threshold)][:budget]  # fmt: skip
                rows.append(sorted(best) + [-1] * (budget - len(best)))
            heads.append(rows)
        result.append(heads)
    return result


@given(cases(), st.sampled_from(FLOATING))
def test_values_by_hand(device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> None:
    """Where sums are exact the sets are those of the dense definition, ties included."""
    values = build(case, dtype, device)
    moved = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in values.items()}
    expected = by_hand(**{n: v.double() if n in ("coefficients", "basis") else v
                          for n, v in moved.items()})  # fmt: skip
    shape = (*values["coefficients"].shape[:3], case["budget"])
    for function in (connectivity_reference, connectivity):
        index = function(**values)
        assert index.shape == shape and index.dtype == torch.int32
        assert index.tolist() == expected, function.__name__
        rows_of(index)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "equal": lambda x: x * 0 + 3,
    "few values": lambda x: (2 * x).round(),
    "all scales": lambda x: x * 10.0 ** (6 * x.roll(1)),
    "large": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-40,
    "infinite": lambda x: torch.where(x.abs() > 1, x.sign() * math.inf, x),
    "minus infinity": lambda x: torch.where(x > 0, -math.inf, x),
    "half zero": lambda x: x.clamp(min=0),
    "zeros of both signs": lambda x: torch.where(x > 0, 0.0, -0.0),
    "neighbours": lambda x: 1 + (2 * x).round() * 2.0**-23,
    "sorted": lambda x: x.sort().values,
    "some NaN": lambda x: torch.where(x > 1, math.nan, x),
}


@given(
    st.lists(st.sampled_from(sorted(_KINDS)), min_size=2, max_size=4),
    st.integers(2, 300),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_of_any_numbers(
    device: torch.device,
    kinds: list[str],
    count: int,
    part: float,
    masked: bool,
    dtype: torch.dtype,
) -> None:
    """Each image ranks numbers of another kind, as they are and with other signs and scales."""
    seeded = generator(f"{kinds} {count}")
    numbers = torch.randn((len(kinds), count), generator=seeded, dtype=torch.float64)
    rows = [_KINDS[kind](row) for kind, row in zip(kinds, numbers, strict=True)]
    basis = torch.cat(rows)[None].to(device, dtype)
    columns = torch.arange(basis.shape[1], device=device).view(len(kinds), count)
    powers = 2.0 ** torch.randint(-3, 4, (len(kinds), 1, count, 1), generator=seeded)
    signs = torch.randint(0, 2, powers.shape, generator=seeded) * 2 - 1
    coefficients = (powers * signs).to(device, dtype)
    flips = torch.rand((len(kinds), count), generator=seeded) < 0.6
    keep = flips.to(device, dtype) if masked else None
    budget = max(1, math.ceil(part * count))
    index = connectivity(coefficients, basis, budget, columns, keep)
    assert_same_bits(index, connectivity_reference(coefficients, basis, budget, columns, keep))


@pytest.mark.parametrize("first", range(1, 140, 10))
def test_every_number_of_columns_and_coefficients(first: int, device: torch.device) -> None:
    for count in range(first, first + 10):
        case = case_of(queries=count, in_play=count, rank=1 + count % 37, seed=count,
                       coef_topk=(None, 8, 3)[count % 3], masked=count % 2 == 0)  # fmt: skip
        for budget in {1, (count + 3) // 4, count - 1 or 1, count}:
            values = build(case | {"budget": budget}, torch.float32, device)
            assert_same_bits(connectivity(**values), connectivity_reference(**values))


@pytest.mark.parametrize("coef_topk", [None, 8])
@pytest.mark.parametrize("count", [65, 197, 577])
@pytest.mark.parametrize("dtype", FLOATING)
def test_sets_differ_only_within_two_units_of_the_cut(
    dtype: torch.dtype, count: int, coef_topk: int | None, device: torch.device
) -> None:
    coefficients, basis = predicted(count, dtype, device, batch=1)
    approx = exact_approx(coefficients, basis, coef_topk)
    assert (approx > 0).double().mean() > 0.5
    wide = torch.promote_types(dtype, torch.float32)
    for budget in (1, -(-count // 4), -(-count // 2)):
        index = connectivity(coefficients, basis, budget, coef_topk=coef_topk)
        rows_of(index)
        cut = approx.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
        # In float64 there is no wider truth: both sums are rounded.
        units = 8 if dtype == torch.float64 else 2
        assert_only_near_the_cut(index, approx, budget, units * torch.finfo(wide).eps * cut.abs())


@pytest.mark.parametrize("rank", [3, 8, 33])
def test_columns_a_few_roundings_apart(rank: int, device: torch.device) -> None:
    """All columns within some units of each other: sets are right up to what sums must lose."""
    steps = torch.randint(0, 64, (rank, 200), generator=generator(f"steps {rank}"))
    basis = (1 + steps * 2.0**-23).float().to(device)
    coefficients = random(f"near {rank}", (2, 2, 199, rank), torch.float32, device).softmax(-1)
    approx = exact_approx(coefficients, basis, None)
    index = connectivity(coefficients, basis, 50)
    # Twice what a sum of `rank` rounded products of positive numbers may be off, here near 1.
    assert_only_near_the_cut(index, approx, 50, torch.tensor(2.0 * rank * 2.0**-24, device=device))
    assert len({tuple(row) for row in index.flatten(0, 2).tolist()}) > 100


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("count", "batch"), [(197, 1), (65, 3), (577, 1)])
def test_any_number_of_threads_gives_the_same(count: int, batch: int, dtype: torch.dtype) -> None:
    coefficients, basis = predicted(count, dtype, "cpu", batch=batch)
    results = []
    for number in (1, 2, 3, 4):
        with threads(number):
            results.append(connectivity(coefficients, basis, -(-count // 4), coef_topk=8))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_nothing_is_differentiable(device: torch.device) -> None:
    coefficients, basis = predicted(50, torch.float32, device)
    index = connectivity(coefficients.requires_grad_(), basis.requires_grad_(), 12)
    assert not index.requires_grad
    assert_same_bits(index, connectivity(coefficients.detach(), basis.detach(), 12))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_autocast_rounds_what_it_is_given(ambient: torch.dtype, device: torch.device) -> None:
    coefficients, basis = predicted(197, torch.float32, device)
    with torch.amp.autocast(device.type, dtype=ambient):
        index = connectivity(coefficients, basis, 50)
        mixed = connectivity(coefficients.to(ambient), basis, 50)
    expected = connectivity(coefficients.to(ambient), basis.to(ambient), 50)
    assert_same_bits(index, expected)
    assert_same_bits(mixed, expected)
    assert not torch.equal(expected, connectivity(coefficients, basis, 50))
