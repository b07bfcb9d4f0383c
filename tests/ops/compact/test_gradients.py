"""Gradients of the compact slice, first and second, and dtypes under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import OPS
from ops.compact.drawn import index_of, row_cases, rows_of
from support.comparison import assert_same_bits
from support.data import random, random_index
from support.gradients import gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from spot_ext import (
    compact_tokens,
    compact_tokens_reference,
    fuse_tokens,
    scatter_tokens,
    scatter_tokens_reference,
)


@given(case=row_cases(), kind=st.sampled_from(["random", "expanded", "transposed", "partial"]))
def test_gradients_equal_those_of_the_definitions(
    device: torch.device, case: dict[str, Any], kind: str
) -> None:
    prefix, num_tokens = case["num_prefix"], case["num_tokens"]
    index = index_of(case).to(device)
    full = rows_of(case, "tokens", prefix + num_tokens, torch.float64, random).to(device)
    kept = rows_of(case, "second", prefix + case["num_keep"], torch.float64, random).to(device)
    extra = rows_of(case, "second", case["num_extra"], torch.float64, random).to(device)
    for call, reference, args in (
        (compact_tokens, compact_tokens_reference, (full, index, prefix, extra)),
        (scatter_tokens, scatter_tokens_reference, (kept, index, num_tokens, prefix, full)),
        (scatter_tokens, scatter_tokens_reference, (kept, index, num_tokens, prefix)),
    ):
        leaves = tuple(
            a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a is not index else a
            for a in args
        )
        _, actual = gradients(call, leaves, kind)
        _, expected = gradients(reference, leaves, kind)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same_bits(mine, theirs)


def _small(op: str) -> list[Any]:
    names = [s.name for s in OPS[op].samples if "ViT" not in s.name and "odd sizes" not in s.name]
    assert len(names) >= 20
    return [pytest.param(op, name, id=f"{op}-{name}".replace(" ", "_")) for name in names]


def _leaves(op: str, name: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    """A function of the differentiable arguments, and those, without overlapping memory."""
    args = OPS[op].sample(name).args(device, torch.float64)
    places = [i for i in OPS[op].grads if i < len(args) and isinstance(args[i], Tensor)]
    leaves = [args[i].detach().clone(memory_format=torch.contiguous_format) for i in places]

    def function(*values: Tensor) -> Any:
        filled = list(args)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return OPS[op].call(*filled)

    return function, [leaf.requires_grad_() for leaf in leaves]


_TWICE = ["compact_tokens", "compact_tokens_backward", "scatter_tokens"]


@pytest.mark.parametrize(("op", "name"), [p for op in (*_TWICE, "fuse_tokens") for p in _small(op)])
def test_gradcheck(op: str, name: str, device: torch.device) -> None:
    function, leaves = _leaves(op, name, device)
    assert gradcheck(function, leaves, check_undefined_grad=False)


@pytest.mark.parametrize(("op", "name"), [p for op in _TWICE for p in _small(op)])
def test_gradgradcheck(op: str, name: str, device: torch.device) -> None:
    function, leaves = _leaves(op, name, device)
    assert gradgradcheck(function, leaves, check_undefined_grad=False)


def test_complex_gradients(device: torch.device) -> None:
    tokens = random("tokens", (2, 6, 2), torch.complex128, device).requires_grad_()
    index = random_index("index", 2, 5, 3, "shuffled", device)
    assert gradcheck(lambda x: compact_tokens(x, index), (tokens,))
    assert gradgradcheck(lambda x: compact_tokens(x, index), (tokens,))
    assert gradcheck(lambda x: scatter_tokens(x[:, :4], index, 7), (tokens,))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_meet_under_autocast(ambient: torch.dtype, device: torch.device) -> None:
    """A float32 residual stream beside what linear layers and softmax return under autocast."""
    wide = random("wide", (2, 6, 4), torch.float32, device)
    index = random_index("index", 2, 5, 3, "shuffled", device)
    weights = random("weights", (2, 5), torch.float32, device).softmax(-1)
    with torch.amp.autocast(device.type, dtype=ambient):
        for tokens in (wide, wide.to(ambient)):
            for w in (weights, weights.to(ambient)):
                out = fuse_tokens(tokens, w, index)
                assert out.dtype == ambient
                assert_same_bits(out, fuse_tokens(wide.to(ambient), weights.to(ambient), index))
            assert compact_tokens(tokens, index).dtype == tokens.dtype
            for extra in (wide[:, :2], wide[:, :2].to(ambient)):
                common = torch.promote_types(tokens.dtype, extra.dtype)
                out = compact_tokens(tokens, index, 1, extra)
                expected = compact_tokens_reference(tokens.to(common), index, 1, extra.to(common))
                assert_same_bits(out, expected)
            for background in (wide, wide.to(ambient)):
                common = torch.promote_types(tokens.dtype, background.dtype)
                out = scatter_tokens(tokens[:, :4], index, 5, 1, background)
                expected = scatter_tokens_reference(
                    tokens[:, :4].to(common), index, 5, 1, background.to(common)
                )
                assert_same_bits(out, expected)
            whole = torch.ones(2, 6, 4, dtype=torch.int64, device=device)
            assert compact_tokens(whole, index).dtype == torch.int64
    with pytest.raises(TypeError, match="weights"):
        fuse_tokens(wide.to(ambient), weights, index)
