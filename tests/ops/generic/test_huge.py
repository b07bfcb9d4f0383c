"""Offsets and sizes beyond 2^31 elements, of memory that is never touched, and of real memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import tensors
from support.comparison import assert_same_bits
from support.night import record
from torch import Tensor
from torch.utils._pytree import tree_map_only

_FAR = 2**31 + 64


class _Space:
    """Zeros that no page stands for until it is written."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.whole = torch.from_numpy(np.zeros((_FAR + 2**20) * dtype.itemsize, np.uint8))
        self.whole = self.whole.view(dtype)
        self.used = 0

    def far(self, value: Tensor) -> Tensor:
        """`value` whose first dimension of two or more has a stride beyond 2^31 elements."""
        wide = [dim for dim, size in enumerate(value.shape) if size == 2]
        if not wide or value.numel() > 2**18:
            return value
        strides = list(torch.empty(value.shape).stride())
        strides[wide[0]] = _FAR
        placed = self.whole[self.used :].as_strided(value.shape, strides)
        self.used += value.numel()
        return placed.copy_(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(
    torch.float32, marks=pytest.mark.nightly)], ids=str)  # fmt: skip
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_strides_beyond_two_to_the_31(op: Op, dtype: torch.dtype) -> None:
    """Images that far apart, in every tensor that has two of something."""
    spaces: dict[torch.dtype, _Space] = {}

    def far(value: Tensor) -> Tensor:
        return spaces.setdefault(value.dtype, _Space(value.dtype)).far(value)

    used = 0
    for sample in op.samples:
        near = sample.args("cpu", dtype)
        if not sample.traced or not all(x.numel() for x in tensors(near)):
            continue
        args = tree_map_only(Tensor, far, near)
        used += any(max(x.stride(), default=0) >= _FAR for x in tensors(args))
        expected = tensors(op.call(*tree_map_only(Tensor, Tensor.contiguous, near)))
        for mine, theirs in zip(tensors(op.call(*args)), expected, strict=True):
            assert_same_bits(mine, theirs, sample.name)
        if used == 3:
            break
    assert used or op.name == "pack_linear"
    record("strides", op.name, calls=used)


def _rows(count: int, width: int, kind: torch.dtype = torch.float32) -> Tensor:
    """One row, as often as it is asked for."""
    return torch.arange(1, width + 1).to(kind).expand(1, count, width)


def _keys() -> Tensor:
    return torch.tensor([[5, 2**29 + 3, 2**30 - 7]])


# Calls of more than 2^31 elements, most of which are never looked at, and what they give.
_EXPANDED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "compact_tokens": lambda: (
        OPS["compact_tokens"].call(_rows(2**30, 4), _keys(), 1), _rows(4, 4)),
    "connectivity": lambda: (
        OPS["connectivity"].call(torch.ones(1, 1, 3, 4), torch.ones(4, 1).expand(4, 2**30), 2,
                                 _keys()),
        torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 3, 2)),
    "predict_connectivity": lambda: (
        OPS["predict_connectivity"].call(
            torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), _rows(2**30, 4)[0], None, None, None,
            None, _rows(2**30, 4)[0], 2, _keys()),
        torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 3, 2)),
    "token_evidence": lambda: (
        OPS["token_evidence"].call([_rows(2**29, 6)[:, :, None]], [2**29], [0],
                                   [_keys().clamp(max=2**29 - 1)], "raw", False, 0, 6, False),
        _rows(3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXPANDED)
def test_expanded_tensors_beyond_two_to_the_31(name: str) -> None:
    actual, expected = _EXPANDED[name]()
    assert_same_bits(actual, expected.contiguous())


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_real_rows_beyond_two_to_the_31(dtype: torch.dtype) -> None:
    """2^31 elements and more that are there: read, moved and written back; up to 13 GB."""
    count, width = 2**15 + 9, 2**16
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokens = torch.zeros(1, count, width, dtype=dtype)
    places = torch.tensor([[3, 2**15 - 2, 2**15 + 7]])
    for number, at in enumerate(places[0].tolist(), 1):
        tokens[0, at + 1] = number
    kept = OPS["compact_tokens"].call(tokens, places, 1)
    assert kept[0, :, 0].tolist() == [0, 1, 2, 3] and kept[0, :, -1].tolist() == [0, 1, 2, 3]
    grid = OPS["scatter_tokens"].call(kept, places, count - 1, 1)
    assert torch.equal(grid, tokens)
    back = OPS["compact_tokens_backward"].call(kept, places, count - 1, 1, 0)
    assert torch.equal(back, tokens)
    record("real", "compact_tokens", elements=tokens.numel())


@pytest.mark.nightly
def test_real_sums_beyond_two_to_the_31() -> None:
    """fuse_tokens over 2^31 numbers: all that are not indexed count, the last too."""
    count, width = 2**15 + 9, 2**16
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokens = torch.zeros(1, count, width, dtype=torch.bfloat16)
    tokens[0, -1], tokens[0, 5] = 3, 7
    weights = torch.zeros(1, count, dtype=torch.bfloat16)
    weights[0, -1] = weights[0, 5] = 1
    out = OPS["fuse_tokens"].call(tokens, weights, torch.tensor([[5]]), 0, True)
    assert out.shape == (1, width) and (out == 3).all()
    record("real", "fuse_tokens", elements=tokens.numel())
