"""connectivity against its definition, written once more as loops, and its properties."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import OPS
from ops.cases.base import Sample
from ops.cases.connectivity_data import Prediction, basis_of, exact_values, rounding_of_logits
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random, random_index
from support.layouts import LAYOUTS, lay_out
from support.memory import MEASURE_MEMORY, crash_free
from support.switches import threads
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spot_ext import (
    connectivity,
    connectivity_reference,
    predict_connectivity,
    predict_connectivity_reference,
)

# ---- the definition as loops ---------------------------------------------------------------------


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


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    num_prefix = draw(st.sampled_from([0, 1, 1, 2, 5]))
    queries = draw(st.integers(0 if num_prefix else 1, 9))
    in_play = num_prefix + queries
    return {
        "batch": draw(st.integers(0, 3)),
        "heads": draw(st.integers(1, 3)),
        "queries": queries,
        "in_play": in_play,
        "rank": draw(st.integers(0, 6)),
        "budget": draw(st.integers(1, in_play)),
        "columns": draw(st.sampled_from(["", "", "some", "shuffled", "repeated"])),
        "masked": draw(st.booleans()),
        "coef_topk": draw(st.sampled_from([None, None, 1, 2, 3, 8])),
        "threshold": draw(st.sampled_from([None, None, 0.0, -0.5, 0.25, 100.0])),
        "odd": draw(st.sampled_from(["", "", "coefficients", "basis"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def case_of(**changes: Any) -> dict[str, Any]:
    """One case, described as `cases` does."""
    return {
        "batch": 2, "heads": 2, "queries": 30, "in_play": 31, "rank": 8, "budget": 7, "columns": "",
        "masked": False, "coef_topk": None, "threshold": None, "odd": "", "layout": "contiguous",
        "seed": 0,
    } | changes  # fmt: skip


def build(case: dict[str, Any], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Arguments of the public function, whose sums are exact in every dtype; many ties."""
    seed = case["seed"]
    rows = case["batch"], case["heads"], case["queries"], case["rank"]
    in_play = case["in_play"]
    grid = in_play + 4 if case["columns"] else in_play
    coefficients = exact_values(f"coefficients {seed}", rows, -4, 8)
    basis = exact_values(f"basis {seed}", (case["rank"], grid), -2, 6, 0.6)
    if case["odd"] == "basis":  # 0 * inf is NaN: whether what does not count is multiplied is open
        case = case | {"coef_topk": None}
    if case["odd"]:
        odd = {"coefficients": coefficients, "basis": basis}[case["odd"]].view(-1)
        for number, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
            if number < len(odd):
                odd[(seed + 7 * number) % len(odd)] = value
    columns = keep = None
    if case["columns"] == "repeated":
        drawn = torch.randint(0, grid, (rows[0], in_play), generator=generator(f"columns {seed}"))
        columns = drawn.to(device)
    elif case["columns"]:
        order = "ascending" if case["columns"] == "some" else "shuffled"
        columns = random_index(f"columns {seed}", rows[0], grid, in_play, order, device)
    if case["masked"]:
        flips = torch.rand((rows[0], rows[2]), generator=generator(f"keep {seed}"))
        keep = (flips < 0.6).to(device, dtype)
    return {
        "coefficients": lay_out(coefficients.to(dtype), case["layout"]).to(device),
        "basis": lay_out(basis.to(dtype), case["layout"]).to(device),
        "budget": case["budget"], "columns": columns, "keep": keep,
        "coef_topk": case["coef_topk"], "threshold": case["threshold"],
    }  # fmt: skip


def rows_of(index: Tensor) -> list[set[int]]:
    """The columns that each row names; ascending, and -1 only behind them."""
    assert index.dtype == torch.int32 and index.is_contiguous()
    named = []
    for row in index.flatten(0, 2).tolist():
        real = [j for j in row if j != -1]
        assert row == sorted(set(real)) + [-1] * (len(row) - len(real))
        named.append(set(real))
    return named


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


# ---- sums that are not exact ---------------------------------------------------------------------


def predicted(
    count: int, dtype: torch.dtype, device: Any, batch: int = 2, rank: int = 32, prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """Softmax coefficients and a thresholded basis, as an untrained predictor gives them."""
    logits = random(f"predicted {count}", (batch, 6, count - prefix, rank), torch.float64)
    basis = 0.02 * random(f"basis {count}", (rank, count), torch.float64).abs().clamp(max=2)
    basis = basis.masked_fill(basis <= 0.02, 0)
    return (2 * logits).softmax(-1).to(device, dtype), basis.to(device, dtype)


def exact_approx(
    coefficients: Tensor, basis: Tensor, coef_topk: int | None, columns: Tensor | None = None
) -> Tensor:
    """The sums in float64, of the coefficients that count."""
    coef, basis = coefficients.double(), basis.double()
    if coef_topk is not None:
        least = coef.sort(dim=-1, descending=True, stable=True).indices[..., coef_topk:]
        coef = coef.scatter(-1, least, 0.0)
    return coef @ (basis if columns is None else basis[:, columns].transpose(0, 1)[:, None])


def assert_only_near_the_cut(index: Tensor, approx: Tensor, budget: int, margin: Tensor) -> None:
    """Names every column more than `margin` above the cut and none as far below it."""
    cut = approx.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
    named = torch.zeros_like(approx, dtype=torch.bool).scatter(-1, index.long(), True)
    assert (named.sum(-1) == budget).all()
    missing, extra = ~named & (approx > cut + margin), named & (approx < cut - margin)
    assert not missing.any() and not extra.any(), (int(missing.sum()), int(extra.sum()))


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


# ---- properties ----------------------------------------------------------------------------------


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


# ---- numbers at the ends -------------------------------------------------------------------------


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


# ---- the same bits -------------------------------------------------------------------------------


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


# ---- autograd and autocast -----------------------------------------------------------------------


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


# ---- coefficients made inside --------------------------------------------------------------------


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


def coefficients_by_hand(
    q: Tensor, k: Tensor, down: Tensor, projections: list[Any],
    columns: Tensor | None, keep: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """Token by token, in float64."""
    q, k, down = q.double(), k.double(), down.double()
    batch, queries, heads, width = q.shape
    tokens = k.shape[1]
    result = q.new_zeros(batch, heads, queries, down.shape[1])
    for b, h in itertools.product(range(batch), range(heads)):
        query, key = q[b, :, h], k[b, :, h]
        if projections[0] is not None:
            to_query, plus_query, to_key, plus_key = (x.double() for x in projections)
            query, key = query @ to_query.mT + plus_query, key @ to_key.mT + plus_key
            width = len(plus_query)
        sums = q.new_zeros(down.shape[1], key.shape[1])
        for j in range(tokens):
            patch = j - (tokens - queries)
            if columns is not None and columns[b, j] == len(down):
                continue
            if keep is not None and patch >= 0 and keep[b, patch] == 0:
                continue
            sums += torch.outer(down[j if columns is None else columns[b, j]], key[j])
        factor = 1 / math.sqrt(max(width, 1)) if scale is None else scale
        result[b, h] = (factor * query @ sums.mT).softmax(-1)
    return result


def test_either_order_of_products_is_tried(device: torch.device) -> None:
    """Of the sizes that the tests below have, down to a single query."""
    for count, queries in ((50, 49), (70, 1), (197, 196)):
        counted = {}
        for channels in (8, 96):
            values = operands(count, torch.float32, device, channels, batch=1, heads=1)
            with FlopCounterMode(display=False) as counter:
                predict_connectivity(**(values | {"q": values["q"][:, :queries]}), budget=1)
            counted[channels] = counter.get_total_flops() - 2 * queries * 32 * count
        projecting = 2 * (queries + count) * (32 + 32)  # for each channel
        assert counted[8] == 8 * projecting and counted[96] < 96 * projecting


def assert_as_by_hand(args: tuple[Any, ...]) -> None:
    """The op and its definition, whose arguments `args` are."""
    q, k, down, *projections, up, budget, columns, keep, scale, coef_topk = args[:13]
    basis_threshold, threshold = args[13:]
    basis = basis_of(up, basis_threshold)[:, : len(up) + (columns is not None)]
    coefficients = coefficients_by_hand(q, k, down, projections, columns, keep, scale)
    expected = connectivity(
        coefficients, basis, budget, columns, keep, coef_topk=coef_topk, threshold=threshold,
    )  # fmt: skip
    for number, call in enumerate((OP.call, OP.public, OP.reference)):
        assert_same_bits(call(*args), expected, ("op", "function", "definition")[number])


@pytest.mark.parametrize("sample", OP.samples, ids=lambda sample: sample.name)
def test_predicted_sets_are_those_of_exact_coefficients(
    sample: Sample, device: torch.device
) -> None:
    """Of the same basis, columns, mask and thresholds: rounding has no say in samples."""
    for dtype in FLOATING:
        assert_as_by_hand(sample.args(device, dtype))


@st.composite
def predictions(draw: Any) -> Prediction:
    queries, num_prefix = draw(st.integers(1, 20)), draw(st.sampled_from([1, 1, 0, 3]))
    in_play = queries + num_prefix
    columns = draw(st.sampled_from([None, in_play + 9]))
    layouts = {x: draw(st.sampled_from(LAYOUTS[:-1])) for x in ("rows", "down", "weights", "basis")}
    return Prediction(
        name=str(draw(st.integers(0, 1 << 30))),
        batch=draw(st.sampled_from([2, 1, 3])),
        heads=draw(st.sampled_from([2, 1, 3])),
        queries=queries,
        num_prefix=num_prefix,
        rank=draw(st.integers(2, 12)),
        budget=draw(st.integers(1, max(in_play - 1, 1))),
        columns=columns,
        fused=columns is not None and queries > 0 and draw(st.booleans()),
        keep=draw(st.sampled_from(["", "random"])),
        coef_topk=draw(st.sampled_from([None, None, 1, 2, 3, 8])),
        threshold=draw(st.sampled_from([None, None, 0.0, -0.5, 0.25])),
        basis_threshold=draw(st.sampled_from([None, None, 0.0, 0.5])),
        dim=draw(st.sampled_from([1, 2, 4, 7, 16, 33])),
        channels=draw(st.sampled_from([None, 1, 2, 5, 8, 17])),
        scale=draw(st.sampled_from([None, None, 0.3, -1.0])),
        **{f"{name}_layout": layout for name, layout in layouts.items()},
    )


@given(predictions(), st.sampled_from(FLOATING))
def test_predicted_by_hand(device: torch.device, sample: Prediction, dtype: torch.dtype) -> None:
    assert_as_by_hand(sample.args(device, dtype))


@by_order
@pytest.mark.parametrize("coef_topk", [None, 8])
@pytest.mark.parametrize("count", [65, 197, 577])
@pytest.mark.parametrize("dtype", FLOATING)
def test_predicted_sets_differ_only_near_the_cut(
    dtype: torch.dtype,
    count: int,
    coef_topk: int | None,
    channels: int | None,
    device: torch.device,
) -> None:
    """Coefficients are those of float32 for 16 bits too: nothing is rounded on the way."""
    values = operands(count, dtype, device, channels, batch=1)
    budgets = 1, -(-count // 4), -(-count // 2)
    assert_predicted_near_the_cut(values, budgets, coef_topk=coef_topk)


AROUND = 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 130
SIZES = {
    "head dim": [{"dim": dim, "channels": c} for dim in AROUND for c in (None, 3, 80)],
    "channels": [{"dim": dim, "channels": c} for c in (0, *AROUND) for dim in (16, 40)],
    "rank": [{"rank": rank, "channels": c} for rank in AROUND for c in (None, 3, 80)],
    "tokens": [
        {"count": count, "channels": c, "dim": 5, "rank": 11, "heads": 1}
        for count in (*AROUND, 127, 129, 191, 192, 193, 255, 256, 257, 385)
        for c in (None, 3, 40)
    ],
}


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("dtype", FLOATING)
def test_predicted_for_every_size(what: str, dtype: torch.dtype, device: torch.device) -> None:
    for number, sizes in enumerate(SIZES[what]):
        size = {"count": 40, "dim": 24, "rank": 20, "batch": 2, "heads": 2} | sizes
        values = operands(dtype=dtype, device=device, **size)
        count, columns, keep = size["count"], None, None
        if number % 2:
            keep = (torch.rand((2, count - 1), generator=generator(f"{sizes}")) < 0.6).to(device)
            keep = keep.to(dtype)
        if number % 4 > 1 and count > 1:
            order = random_index(f"{sizes}", 2, count, count - count // 4, "shuffled", device)
            values |= {"q": values["q"][:, : order.shape[1] - 1],
                       "k": values["k"][:, : order.shape[1]]}  # fmt: skip
            columns, keep = order, None if keep is None else keep[:, : order.shape[1] - 1]
        in_play = values["k"].shape[1]
        fewest = in_play if keep is None else 1 + int(keep.sum(1).min())
        budgets = {1, -(-fewest // 3), fewest}
        assert_predicted_near_the_cut(values, budgets, columns, keep, (None, 3)[number % 3 > 0])


@by_order
def test_channels_of_zeros_change_nothing(channels: int | None, device: torch.device) -> None:
    """Nor the other order of products, which they make worth while."""
    values = operands(70, torch.float64, device, channels)
    expected = predict_connectivity(**values, budget=18, coef_topk=8)
    if channels is None:  # as with weights that change nothing
        channels = 32
        for name in ("query", "key"):
            values[f"{name}_weight"] = torch.eye(32, dtype=torch.float64, device=device)
            values[f"{name}_bias"] = torch.zeros(32, dtype=torch.float64, device=device)
        assert_same_bits(predict_connectivity(**values, budget=18, coef_topk=8), expected)
    scale = channels**-0.5
    for more in (1, 3, 10, 30, 200):
        wider = dict(values)
        for name in ("query", "key"):
            weight, bias = values[f"{name}_weight"], values[f"{name}_bias"]
            wider[f"{name}_weight"] = F.pad(weight, (0, 0, 0, more))
            wider[f"{name}_bias"] = F.pad(bias, (0, more))
        index = predict_connectivity(**wider, budget=18, scale=scale, coef_topk=8)
        assert_same_bits(index, expected)


@by_order
def test_the_default_scale(channels: int | None, device: torch.device) -> None:
    for dtype in FLOATING:
        values = operands(70, dtype, device, channels)
        width = 32 if channels is None else channels
        index = predict_connectivity(**values, budget=18, coef_topk=8)
        for scale, same in ((width**-0.5, True), (1.0, False), (-(width**-0.5), False)):
            other = predict_connectivity(**values, budget=18, scale=scale, coef_topk=8)
            assert torch.equal(other, index) == same
        flat = predict_connectivity(**values, budget=18, scale=0.0, coef_topk=8)
        even = torch.full((2, 6, 69, 32), 1 / 32, dtype=dtype, device=device)
        assert_same_bits(flat, connectivity(even, values["up"].mT, 18, coef_topk=8))


@pytest.mark.parametrize("name", ["query_weight", "query_bias", "key_weight", "key_bias"])
@pytest.mark.parametrize("channels", [8, 96])
def test_every_weight_has_a_say(channels: int, name: str, device: torch.device) -> None:
    values = operands(70, torch.float32, device, channels)
    index = predict_connectivity(**values, budget=18)
    other = values | {name: values[name].flip(0)}
    # Other coefficients for all heads, and other sets for most rows.
    changed = (predict_connectivity(**other, budget=18) != index).any(-1)
    assert changed.double().mean() > 0.5


@by_order
def test_predicted_alone_as_in_the_batch(channels: int | None, device: torch.device) -> None:
    """Images, heads and queries know nothing of each other."""
    values = operands(70, torch.float32, device, channels, batch=3)
    index = predict_connectivity(**values, budget=18, coef_topk=8)

    def part(images: slice, heads: slice, queries: slice) -> Tensor:
        fewer = {"q": values["q"][images, queries, heads], "k": values["k"][images, :, heads]}
        return predict_connectivity(**(values | fewer), budget=18, coef_topk=8)

    everything = slice(None)
    for b in range(3):
        for h in range(6):
            alone = part(slice(b, b + 1), slice(h, h + 1), everything)
            assert_same_bits(alone, index[b : b + 1, h : h + 1])
    for first, count in ((0, 1), (3, 1), (68, 1), (5, 33), (17, 52)):
        some = slice(first, first + count)
        assert_same_bits(part(everything, everything, some), index[:, :, some])


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("count", "batch"), [(197, 1), (65, 3)])
def test_predicted_with_any_number_of_threads(
    count: int, batch: int, dtype: torch.dtype, channels: int | None
) -> None:
    values = operands(count, dtype, "cpu", channels, batch=batch)
    results = []
    for number in (1, 2, 3, 4):
        with threads(number):
            results.append(predict_connectivity(**values, budget=-(-count // 4), coef_topk=8))
    for other in results[1:]:
        assert_same_bits(other, results[0])


# ---- the basis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [None, 0.0, 0.0125, 0.02, 1.0, -1.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_the_basis_is_up_or_what_exceeds_the_threshold(
    dtype: torch.dtype, threshold: float | None, device: torch.device
) -> None:
    values = operands(70, dtype, device, 8)
    signs = torch.randint(0, 2, (70, 32), generator=generator("signs")).to(device) * 2 - 1
    signed = values | {"up": values["up"] * signs}
    index = predict_connectivity(**signed, budget=18, basis_threshold=threshold)
    basis = signed["up"] if threshold is None else values["up"].abs()
    if threshold is not None:
        basis = torch.where(basis.double() > threshold, basis, torch.zeros_like(basis))
    made = predict_connectivity(**(values | {"up": basis}), budget=18)
    assert_same_bits(index, made)
    assert threshold is None or threshold > 0 or (index.diff(dim=-1) > 1).any()


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_an_entry_at_the_threshold_is_zero(threshold: float | None, device: torch.device) -> None:
    """The comparison is with the threshold as given, in float64 when the inputs are."""
    for level in (0.02, 0.5):
        low = torch.tensor(level, dtype=torch.float64)
        high = torch.nextafter(low, low + 1)
        up = torch.stack([low, high, -low, -high])[:, None].to(device)
        q, k = (torch.ones(1, n, 1, 1, dtype=torch.float64, device=device) for n in (3, 4))
        index = predict_connectivity(
            q, k, torch.ones_like(up), up, 4, basis_threshold=level, threshold=threshold
        )
        expected = [0, 1, 2, 3] if threshold is None else [1, 3, -1, -1]
        assert index.tolist() == [[[expected] * 3]]


# ---- keys: which are added up --------------------------------------------------------------------


@by_order
@pytest.mark.parametrize("kind", ["some", "shuffled", "repeated"])
def test_predicted_columns_gather_down_and_up(
    kind: str, channels: int | None, device: torch.device
) -> None:
    values = operands(70, torch.float32, device, channels, batch=3)
    if kind == "repeated":
        columns = torch.randint(0, 70, (3, 41), generator=generator(kind)).to(device)
    else:
        columns = random_index(kind, 3, 70, 41, "ascending" if kind == "some" else kind, device)
    values |= {"q": values["q"][:, :40], "k": values["k"][:, :41]}
    index = predict_connectivity(**values, budget=11, columns=columns, coef_topk=8)
    for image in range(3):
        own, one = columns[image], slice(image, image + 1)
        gathered = {"q": values["q"][one], "k": values["k"][one], "down": values["down"][own],
                    "up": values["up"][own]}  # fmt: skip
        alone = predict_connectivity(**(values | gathered), budget=11, coef_topk=8)
        assert_same_bits(index[one], alone)
        # Rows of down that no token names have no say.
        odd = values["down"].clone()
        odd[[t for t in range(70) if t not in own.tolist()]] = math.nan
        again = predict_connectivity(**(values | {"down": odd}), budget=11, columns=columns,
                                     coef_topk=8)  # fmt: skip
        assert_same_bits(again[one], index[one])


@by_order
def test_permuting_tokens_and_columns_permutes_the_sets(
    channels: int | None, device: torch.device
) -> None:
    values = operands(70, torch.float64, device, channels)
    more = random("no ties", (70, 32), torch.float64, device).abs()
    values["up"] = values["up"] + 1e-3 * more
    order = random_index("tokens", 2, 70, 70, "shuffled", device)
    index = predict_connectivity(**values, budget=18, coef_topk=8)
    rows = order[:, :, None, None].expand(values["k"].shape)
    moved = values | {"k": values["k"].gather(1, rows)}
    named = predict_connectivity(**moved, budget=18, columns=order, coef_topk=8)
    back = order[:, None, None].expand(2, 6, 69, -1).gather(-1, named.long())
    assert_same_bits(back.sort(-1).values.to(torch.int32), index)


@by_order
def test_predicted_masked_names_the_keys_that_compacted_names(
    channels: int | None, device: torch.device
) -> None:
    """Dropped keys are not added up, and their rows of `down` and columns are not there."""
    values = operands(70, torch.float64, device, channels)
    kept = random_index("kept", 2, 69, 40, device=device)
    keep = torch.zeros(2, 69, device=device).scatter(1, kept, 1)
    masked = predict_connectivity(**values, budget=18, keep=keep, coef_topk=8)
    columns = torch.cat([kept.new_zeros(2, 1), kept + 1], dim=1)
    q, k = (
        x.gather(1, rows[:, :, None, None].expand(-1, -1, 6, 32))
        for x, rows in ((values["q"], kept), (values["k"], columns))
    )
    fewer = predict_connectivity(**(values | {"q": q, "k": k}), budget=18, columns=columns,
                                 coef_topk=8)  # fmt: skip
    assert (fewer >= 0).all()
    named = columns[:, None, None].expand(2, 6, 40, -1).gather(-1, fewer.long()).int()
    assert_same_bits(masked.gather(2, kept[:, None, :, None].expand(2, 6, 40, 18)), named)
    everything = predict_connectivity(**values, budget=18, keep=torch.ones_like(keep), coef_topk=8)
    assert_same_bits(everything, predict_connectivity(**values, budget=18, coef_topk=8))
    assert not torch.equal(everything, masked)


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_dropped_keys_have_no_say(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """Not even with numbers that would spoil all sums."""
    values = operands(70, dtype, device, channels)
    keep = (torch.rand((2, 69), generator=generator("mask")) < 0.6).to(device, dtype)
    index = predict_connectivity(**values, budget=12, keep=keep, coef_topk=8)
    for value in (math.nan, math.inf, 1e4):
        k = values["k"].clone()
        k[:, 1:][keep == 0] = value
        odd = predict_connectivity(**(values | {"k": k}), budget=12, keep=keep, coef_topk=8)
        assert_same_bits(odd, index)
    for kind in FLOATING:
        other = predict_connectivity(**values, budget=12, keep=keep.to(kind), coef_topk=8)
        assert_same_bits(other, index)
    gone = 1 + (keep.sum(0) == 0).nonzero().flatten()  # of both images
    assert len(gone) > 3
    down = values["down"].clone()
    down[gone] = math.nan
    for call in (predict_connectivity, predict_connectivity_reference):
        clean = call(**values, budget=12, keep=keep, coef_topk=8)
        odd = call(**(values | {"down": down}), budget=12, keep=keep, coef_topk=8)
        assert_same_bits(odd, clean)


@by_order
def test_fused_tokens_are_not_added_up_and_compete_at_zero(
    channels: int | None, device: torch.device
) -> None:
    """Columns beyond the grid: as columns whose rows of `down` and `up` are zero."""
    values = operands(70, torch.float64, device, channels)
    columns = torch.arange(70, device=device).repeat(2, 1)
    columns[0, 5], columns[1, 69] = 70, 70
    index = predict_connectivity(**values, budget=60, columns=columns, coef_topk=8)
    for image, place in ((0, 5), (1, 69)):
        zeroed = {name: values[name].clone() for name in ("down", "up")}
        for value in zeroed.values():
            value[place] = 0
        alone = predict_connectivity(**(values | zeroed), budget=60, coef_topk=8)
        assert_same_bits(alone[image], index[image])
        odd = values["k"].clone()
        odd[image, place] = math.nan
        again = predict_connectivity(**(values | {"k": odd}), budget=60, columns=columns,
                                     coef_topk=8)  # fmt: skip
        assert_same_bits(again, index)
        every = predict_connectivity(**values, budget=70, columns=columns, threshold=-1e-9)
        assert (every[image] == place).any(-1).all()
        above = predict_connectivity(**values, budget=70, columns=columns, threshold=0.0)
        assert not (above[image] == place).any()


# ---- odd numbers ---------------------------------------------------------------------------------


@by_order
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("coef_topk", [None, 8])
def test_an_odd_query_spoils_its_own_rows(
    coef_topk: int | None,
    dtype: torch.dtype,
    value: float,
    channels: int | None,
    device: torch.device,
) -> None:
    """Its logits are infinite or NaN, its coefficients NaN, and so all its columns: ties."""
    values = operands(50, dtype, device, channels)
    clean = predict_connectivity(**values, budget=12, coef_topk=coef_topk)
    odd = values["q"].clone()
    odd[1, 5, 2, 7] = value
    index = predict_connectivity(**(values | {"q": odd}), budget=12, coef_topk=coef_topk)
    assert index[1, 2, 5].tolist() == list(range(12))
    index[1, 2, 5] = clean[1, 2, 5]
    assert_same_bits(index, clean)


@by_order
@pytest.mark.parametrize("place", [0, 4, 49])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
def test_an_odd_key_spoils_its_head(
    dtype: torch.dtype, value: float, place: int, channels: int | None, device: torch.device
) -> None:
    """Of its image: every sum has it."""
    values = operands(50, dtype, device, channels)
    clean = predict_connectivity(**values, budget=12)
    odd = values["k"].clone()
    odd[1, place, 2, 7] = value
    index = predict_connectivity(**(values | {"k": odd}), budget=12)
    assert (index[1, 2] == torch.arange(12, device=device)).all()
    index[1, 2] = clean[1, 2]
    assert_same_bits(index, clean)


@pytest.mark.parametrize("name", ["query_weight", "query_bias", "key_weight", "key_bias", "down"])
@pytest.mark.parametrize("channels", [8, 96])
def test_an_odd_weight_spoils_everything(channels: int, name: str, device: torch.device) -> None:
    values = operands(50, torch.float32, device, channels)
    odd = values[name].clone()
    odd.view(-1)[1] = math.nan
    index = predict_connectivity(**(values | {name: odd}), budget=12)
    assert (index == torch.arange(12, device=device)).all()


@pytest.mark.parametrize("threshold", [None, 0.02])
@pytest.mark.parametrize("dtype", FLOATING)
def test_an_odd_entry_of_up_spoils_its_column(
    dtype: torch.dtype, threshold: float | None, device: torch.device
) -> None:
    """NaN exceeds every threshold: its column is the last of all; that of infinity the first."""
    values = operands(50, dtype, device, 8)
    odd = values["up"].clone()
    odd[[0, 7, 49], [1, 3, 31]] = math.nan
    odd[20, 5] = math.inf
    values["up"] = odd
    for named in rows_of(predict_connectivity(**values, budget=47, basis_threshold=threshold)):
        assert named == set(range(50)) - {0, 7, 49}
    only = predict_connectivity(**values, budget=1, basis_threshold=threshold)
    assert (only == 20).all()


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_large_logits_leave_one_coefficient(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """Softmax does not overflow: columns are those of the basis row that wins."""
    values = operands(50, dtype, device, channels)
    values["q"] = values["q"] * 1000
    logits, loss = exact_logits(values, dtype=torch.promote_types(dtype, torch.float32))
    best = logits.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > 1000
    assert clear.double().mean() > 0.1 and logits.max() > 5000 and loss < 1
    index = predict_connectivity(**values, budget=12)
    eye = torch.eye(32, dtype=dtype, device=device)[None, None]
    alone = connectivity(eye, values["up"].mT, 12)
    assert_same_bits(index[clear], alone[0, 0, best.indices[..., 0]][clear])


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_sums_of_keys_are_kept_in_float32(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """256 + 1/4 is no number of bfloat16, and 256 * 512 none of float16."""
    q, k = (torch.zeros(1, n, 1, 32, dtype=dtype, device=device) for n in (49, 50))
    down = torch.zeros(50, 32, dtype=dtype, device=device)
    up = torch.zeros(50, 32, dtype=dtype, device=device)
    q[..., 0], k[:, :4, :, 0] = 1, torch.tensor([256.0, 0.25, 512, -512], device=device)[:, None]
    # Sums of 256 and of 256.25, beside 512 * 512 that cancel, and of far less.
    down[0, :2], down[1, 1], down[2:4, :2] = 1, 1, 512
    down[0, 2:] = -512
    up[2, 0], up[3, 1] = 1, 1
    values = {"q": q, "k": k, "down": down, "up": up}
    if channels is not None:
        eye = torch.eye(channels, 32, dtype=dtype, device=device)
        values |= {"query_weight": eye, "key_weight": eye, "query_bias": eye[:, -1] * 0,
                   "key_bias": eye[:, -1] * 0}  # fmt: skip
    index = predict_connectivity(**values, budget=2, scale=1.0)
    assert index.tolist() == [[[[2, 3]] * 49]]
    assert predict_connectivity(**values, budget=1, scale=1.0).tolist() == [[[[3]] * 49]]


# ---- memory --------------------------------------------------------------------------------------

_SCRATCH = """
import json
import torch
import spot_ext

torch.set_num_threads(2)
found = []
for call in (spot_ext.connectivity, spot_ext.connectivity_reference):
    for count in (65, 1025):  # the first call warms up
        coefficients, basis = torch.rand(2, 6, count - 1, 32), torch.rand(32, count)
        most, index = rise(lambda: call(coefficients, basis, 50, coef_topk=8))
    found.append(most - 4 * index.numel())
print(json.dumps(found))
"""


def test_no_score_matrix_is_ever_in_memory() -> None:
    """Peak resident size beyond the result, of 12 matrices of 1024 x 1025: 0.05 of their bytes."""
    kernel, reference = json.loads(crash_free(MEASURE_MEMORY + _SCRATCH))
    matrices = 2 * 6 * 1024 * 1025 * 4
    assert reference > matrices, "the measurement does not see matrices where there are some"
    assert kernel <= 0.05 * matrices


_PREDICTION_SCRATCH = """
import json
import torch
import spot_ext

torch.set_num_threads(2)

def stored(q, k, down, up, budget, coef_topk):
    keys = torch.einsum("nr,bnhd->bhdr", down, k)
    return spot_ext.connectivity(q.transpose(1, 2) @ keys, up.mT, budget, coef_topk=coef_topk)

def inside(channels):
    weight, bias = torch.rand(channels, 32) - 0.5, torch.rand(channels)
    both = dict(query_weight=weight, query_bias=bias, key_weight=weight, key_bias=bias)
    return lambda *args, **more: spot_ext.predict_connectivity(*args, **both, **more)

found = []
for call in (spot_ext.predict_connectivity, inside(16), inside(96), stored,
             spot_ext.predict_connectivity_reference):
    for count in (65, 1025):  # the first call warms up
        packed = torch.rand(8, count, 3, 6, 32)
        args = packed[:, 1:, 0], packed[:, :, 1], *torch.rand(2, count, 32), 50
        most, index = rise(lambda: call(*args, coef_topk=8))
    found.append(most - 4 * index.numel())
print(json.dumps(found))
"""


def test_no_coefficients_are_ever_in_memory() -> None:
    """Nor projections, nor queries and keys whose strides are others: half of the bytes of
    coefficients, beside 48 matrices of scores."""
    *inside, stored, reference = json.loads(crash_free(MEASURE_MEMORY + _PREDICTION_SCRATCH))
    coefficients, matrices = 8 * 6 * 1024 * 32 * 4, 8 * 6 * 1024 * 1025 * 4
    assert reference > matrices, "the measurement does not see matrices where there are some"
    assert stored > 0.8 * coefficients, "nor coefficients"
    assert len(inside) == 3 and max(inside) <= 0.5 * coefficients, inside


_EDGES = """
import torch
import spot_ext
from support.memory import guarded

draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for queries, prefix, rank, grid in ((1, 0, 1, 1), (7, 1, 3, 9), (16, 0, 8, 16), (33, 2, 5, 40),
                                        (64, 1, 17, 65), (130, 3, 33, 150)):
        coefficients = guarded(torch.randn(2, 3, queries, rank, generator=draw).to(dtype))
        basis = guarded(torch.randn(rank, grid, generator=draw).to(dtype))
        keep = guarded((torch.rand(2, queries, generator=draw) < 0.6).to(dtype))
        columns = torch.stack([torch.randperm(grid, generator=draw)[: queries + prefix]] * 2)
        for budget in {1, queries, queries + prefix} if queries < 60 else {7}:
            for topk in (None, 2):
                named = spot_ext.connectivity(coefficients, basis, budget, guarded(columns), keep,
                                              coef_topk=topk)
                assert named.max() < queries + prefix
        for dim, channels in ((1, None), (5, None), (16, 3), (5, 2), (3, 17), (16, 16)):
            tokens = queries + prefix
            shapes = (2, queries, 3, dim), (2, tokens, 3, dim), (grid, rank)
            up = guarded(torch.randn(grid, rank, generator=draw).to(dtype))
            fused = columns.clone()
            fused[:, -1] = grid
            if channels is not None:
                shapes += (channels, dim), (channels,), (channels, dim), (channels,)
            drawn = [guarded(torch.randn(s, generator=draw).to(dtype)) for s in shapes]
            drawn += [None] * (7 - len(drawn))
            named = torch.ops.spot.predict_connectivity(
                *drawn, up, tokens, guarded(fused) if tokens < grid else None, keep,
                coef_topk=2, basis_threshold=0.5 if dim == 5 else None)
            assert named.max() < tokens
        for bad in (grid, -1, 2**31, 2**62, -(2**62)):
            columns[1, -1] = bad
            try:
                spot_ext.connectivity(coefficients, basis, 1, guarded(columns), keep)
                raise SystemExit(f"{bad} was not refused")
            except ValueError as error:
                assert "columns" in str(error)
"""


def test_nothing_is_read_behind_the_arguments() -> None:
    """They end where memory begins that ends the process when it is touched."""
    crash_free(_EDGES)
