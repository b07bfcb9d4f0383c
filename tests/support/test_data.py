"""Drawn data and their layouts are what they are said to be."""

from __future__ import annotations

import pytest
import torch
from support.arguments import clone
from support.comparison import assert_same_bits, bits
from support.data import ROW_DTYPES, random, random_index
from support.layouts import LAYOUTS, lay_out, lay_out_index


def test_data_is_random_repeatable_and_never_zero() -> None:
    for dtype in ROW_DTYPES:
        one, other = (random("x", (3, 50), dtype) for _ in range(2))
        assert_same_bits(one, other)
        assert len(bits(one).unique()) > 1 and bits(one).any()
    assert not torch.equal(random("x", (9,), torch.float32), random("y", (9,), torch.float32))
    index = random_index("i", 40, 9, 5)
    assert (index.diff(dim=1) > 0).all() and index.min() == 0 and index.max() == 8
    shuffled = random_index("i", 40, 9, 5, "shuffled")
    assert (shuffled.diff(dim=1) < 0).any() and torch.equal(shuffled.sort(1).values, index)
    assert random_index("i", 0, 9, 5).shape == (0, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2)], ids=str)
def test_layouts(layout: str, shape: tuple[int, ...]) -> None:
    value = random("value", shape, torch.float32)
    moved = lay_out(value, layout)
    assert moved.shape == value.shape
    if layout == "expanded":
        assert moved.stride(0) == 0 and torch.equal(moved[3], value[0])
        return
    if layout == "flat":
        assert moved.stride(1) == 0 and torch.equal(moved[:, 3], value[:, 0])
        return
    assert torch.equal(moved, value)
    assert moved.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (moved.storage_offset() == 1) == (layout == "offset")
    again = clone(moved)
    assert again.stride() == moved.stride() and torch.equal(again, moved)
    assert again.untyped_storage().data_ptr() != moved.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_layouts_stay_distinct(layout: str) -> None:
    index = lay_out_index(random_index("i", 4, 9, 5, "shuffled"), layout)
    assert all(len(set(row.tolist())) == 5 for row in index)
