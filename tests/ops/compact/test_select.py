"""select_tokens is a stable sort, whatever the scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random, random_bits
from support.layouts import LAYOUTS, lay_out
from torch import Tensor

from spot_ext import select_tokens, select_tokens_reference

_ODD_SCORES = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1.0000001, 5e-324, -5e-324, 1e-45, 6e-8,
    -6e-8, 65504.0, 3.4e38, -3.4e38, 1e308, 2.0**-14, 0.1,
]  # fmt: skip


def best_positions(scores: list[float], num_keep: int) -> list[int]:
    """The definition once more, in plain Python: NaN last, ties to the lower position."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i]),
    )
    return sorted(order[:num_keep])


@st.composite
def score_rows(draw: Any) -> tuple[Tensor, int]:
    batch, num_tokens = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    number = st.one_of(
        st.sampled_from(_ODD_SCORES),
        st.integers(-3, 3).map(float),
        st.floats(allow_nan=True, allow_infinity=True),
    )
    rows = draw(
        st.lists(
            st.lists(number, min_size=num_tokens, max_size=num_tokens),
            min_size=batch,
            max_size=batch,
        )
    )
    dtype = draw(st.sampled_from(FLOATING))
    scores = torch.tensor(rows, dtype=torch.float64).reshape(batch, num_tokens).to(dtype)
    scores = lay_out(scores, draw(st.sampled_from(LAYOUTS)))
    return scores, draw(st.integers(0, num_tokens))


@given(score_rows())
def test_select_is_a_stable_sort(device: torch.device, case: tuple[Tensor, int]) -> None:
    scores, num_keep = case
    expected = [best_positions(row.tolist(), num_keep) for row in scores.double()]
    expected = torch.tensor(expected, dtype=torch.int64).reshape(len(scores), num_keep)
    scores = scores.to(device)
    assert_same_bits(select_tokens_reference(scores, num_keep).cpu(), expected, "reference")
    assert_same_bits(select_tokens(scores, num_keep).cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [0.0, -1.5, math.nan, math.inf, -math.inf])
def test_select_among_equals_takes_the_first(
    dtype: torch.dtype, value: float, device: torch.device
) -> None:
    for num_tokens in (1, 2, 63, 64, 65, 200):
        scores = torch.full((2, num_tokens), value, dtype=dtype, device=device)
        for num_keep in {0, 1, num_tokens // 2, num_tokens}:
            expected = torch.arange(num_keep, device=device).expand(2, num_keep)
            assert_same_bits(select_tokens(scores, num_keep), expected.contiguous())


@pytest.mark.parametrize("dtype", FLOATING)
def test_select_orders_every_bit_pattern(dtype: torch.dtype, device: torch.device) -> None:
    """All 65,536 half-precision values, or as many random bit patterns of the wider dtypes."""
    if dtype.itemsize == 2:
        patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        scores = patterns[torch.randperm(65536, generator=generator("patterns"))].view(dtype)
    else:
        scores = random_bits("patterns", (65536,), dtype)
    scores = scores[None].to(device)
    for num_keep in (1, 2047, 32768, 63489, 65535):
        expected = select_tokens_reference(scores, num_keep)
        assert_same_bits(select_tokens(scores, num_keep), expected, f"{num_keep} of {dtype}")


def test_select_from_more_tokens_than_it_can_count_is_refused(device: torch.device) -> None:
    scores = torch.rand(1, 1, device=device).expand(1, 2**31)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 tokens, got 2147483648"):
        select_tokens(scores, 1)


def test_select_has_no_gradient(device: torch.device) -> None:
    scores = random("scores", (2, 9), torch.float32, device).requires_grad_()
    index = select_tokens(scores, 4)
    assert index.dtype == torch.int64 and not index.requires_grad
