"""Values and gradients of every op are those of its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from ops.cases.results import assert_results
from ops.generic.calls import dtype_name
from support.arguments import tensors, to_dtype, with_grad
from support.comparison import assert_close, assert_gradient
from support.data import FLOATING
from support.gradients import gradients
from torch import Tensor


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_values(op: Op, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    args = sample.args(device, dtype)
    actual = tensors(op.call(*args))
    plain = tensors(op.reference(*args))
    exact = tensors(op.reference(*to_dtype(args, torch.float64)))
    assert_results(op, dtype, actual, plain, exact)


def _drawn(call: Callable[..., Any], args: tuple[Any, ...], draws: int) -> list[Tensor | None]:
    """Gradients of several incoming ones, stacked; of one as they are."""
    each = [gradients(call, args, draw=draw)[1] for draw in range(draws)]
    if draws == 1:
        return each[0]
    return [None if of[0] is None else torch.stack(of) for of in zip(*each, strict=True)]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(("op", "sample"), [p for p in each_sample() if p.values[0].grads])
def test_gradients(op: Op, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    args = with_grad(sample.args(device, dtype), op.grads)
    wanted = [value for value in tensors(args) if value.requires_grad]
    # A gradient of one number is one rounding, and may cancel: there several incoming gradients.
    draws = 16 if any(value.numel() == 1 for value in wanted) else 1
    actual = _drawn(op.call, args, draws)
    plain = _drawn(op.reference, args, draws)
    exact = _drawn(op.reference, to_dtype(args, torch.float64), draws)
    assert len(actual) == len(wanted) > 0
    for number, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        if theirs is None and mine is not None:  # an argument that the output does not depend on
            assert not mine.any(), f"gradient {number} should be zero"
            continue
        assert_gradient(mine, theirs, truth, f"gradient {number}", rounding=op.rounding(dtype))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "partial"])
@pytest.mark.parametrize(
    ("op", "sample"), [p for p in each_sample(traced=True) if p.values[0].grads]
)
def test_incoming_gradients_of_any_strides(
    op: Op, sample: Sample, kind: str, device: torch.device
) -> None:
    args = with_grad(sample.args(device, torch.float64), op.grads)
    _, actual = gradients(op.call, args, kind)
    _, expected = gradients(op.reference, args, kind)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None) or not (mine if theirs is None else theirs).any()
        if mine is not None and theirs is not None:
            assert_close(mine, theirs, what="gradient")


def _takes_numbers(op: Op) -> bool:
    return any(isinstance(arg, int | float) for arg in op.samples[0].args("cpu", torch.float32))


@pytest.mark.parametrize(
    "op",
    [op for op in OPS.values() if op.public is not None and _takes_numbers(op)],
    ids=lambda op: op.name,
)
def test_numbers_may_be_numpys(op: Op, device: torch.device) -> None:
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    args = op.samples[0].args(device, torch.float32)
    numpys = tuple(kinds.get(type(arg), lambda value: value)(arg) for arg in args)
    assert any(isinstance(arg, np.generic) for arg in numpys)
    for one, other in zip(tensors(op.public(*numpys)), tensors(op.public(*args)), strict=True):
        assert torch.equal(one, other)
