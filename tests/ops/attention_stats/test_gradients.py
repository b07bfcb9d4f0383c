"""Gradients of attention_stats on its samples, of lse, and of the backward op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.attention.drawn import op_values
from ops.attention_stats.drawn import mask, qkv
from ops.cases import OPS
from ops.cases.attention_stats import attention_reference
from support.arguments import to_dtype
from support.attention import with_leaves
from support.comparison import assert_close
from support.data import FLOATING
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from spot_ext import attention_stats_reference

_SAMPLES = [
    s.name for s in OPS["attention_stats"].samples if s.name not in ("ViT", "head dim 64", "flat")
]


def _checked(name: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    args = OPS["attention_stats"].sample(name).args(device, torch.float64)
    args = tuple(
        value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for value in args
    )
    places = [place for place in (0, 1, 2, 4) if args[place] is not None]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        out, stats, _ = OPS["attention_stats"].call(*filled)
        return (out, stats) if stats.requires_grad else (out,)

    return function, [args[place].requires_grad_() for place in places]


def test_enough_shapes_are_checked() -> None:
    assert len(_SAMPLES) >= 20


@pytest.mark.parametrize("name", _SAMPLES)
def test_gradcheck(name: str, device: torch.device) -> None:
    function, leaves = _checked(name, device)
    assert gradcheck(function, leaves, check_undefined_grad=False, fast_mode=leaves[0].numel() > 99)


@pytest.mark.parametrize("name", _SAMPLES)
def test_second_derivatives_are_right_or_refused(name: str, device: torch.device) -> None:
    function, leaves = _checked(name, device)
    try:
        assert gradgradcheck(function, leaves, check_undefined_grad=False, fast_mode=True)
    except GradcheckError:
        raise
    except RuntimeError as error:
        assert "differentiable once" in str(error)


def test_lse_is_not_differentiable(device: torch.device) -> None:
    q, k, v = qkv(2, 9, 2, 8, device=device)
    q.requires_grad_()
    out, stats, lse = OPS["attention_stats"].call(q, k, v, mask(2, 8, device=device))
    assert out.requires_grad and stats.requires_grad and not lse.requires_grad
    assert_close(lse, attention_reference(q, k, v, mask(2, 8, device=device))[2])


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_backward_op_gives_all_gradients(dtype: torch.dtype, device: torch.device) -> None:
    backward = torch.ops.spot.attention_stats_backward
    values = op_values("attention_stats_backward", dtype, device)
    grads = backward(*values.values())
    names = ("q", "k", "v", "keep", "bias")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [grad.dtype for grad in grads] == [dtype] * 3 + [wide] * 2
    assert all(grad.is_contiguous() for grad in grads)
    keywords = {x: values[x] for x in (*names, "scale", "num_prefix", "class_token")}
    for grad_stats in (values["grad_stats"], None):
        call, leaves = with_leaves(to_dtype(keywords, torch.float64), *names)
        outputs = attention_stats_reference(**call)
        sent = [values["grad_out"], torch.zeros_like(outputs[1]) if grad_stats is None
                else grad_stats]  # fmt: skip
        exact = torch.autograd.grad(outputs, leaves, [x.double() for x in sent])
        grads = backward(*(values | {"grad_stats": grad_stats}).values())
        for name, grad, truth in zip(names, grads, exact, strict=True):
            error = ((grad.double() - truth).norm() / truth.norm()).item()
            limit = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
            assert grad.shape == truth.shape and error < limit, f"{name}: error {error:.1e}"
