"""predict_connectivity names the sets of exact coefficients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases.base import Sample
from ops.cases.connectivity_data import Prediction, basis_of
from ops.connectivity.predictor import OP, assert_predicted_near_the_cut, by_order, operands
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random_index
from support.layouts import LAYOUTS
from support.slow import most_slow
from support.switches import threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spot_ext import connectivity, predict_connectivity


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
@pytest.mark.parametrize("count", most_slow([65, 197, 577], 2))
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
