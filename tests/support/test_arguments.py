"""Argument lists, and the gradients of calls with them."""

from __future__ import annotations

import torch
from support.arguments import clone, refilled, tensors, to_dtype, with_grad
from support.data import random
from support.gradients import cotangents, gradients


def test_arguments() -> None:
    args = (random("x", (2, 3), torch.float32).requires_grad_(), torch.arange(3), 5, None)
    wide = to_dtype(args, torch.float64)
    assert wide[0].dtype == torch.float64 and wide[0].requires_grad and wide[0].is_leaf
    assert wide[1].dtype == torch.int64 and wide[2:] == (5, None)
    fresh = with_grad(args, (0, 1, 3))
    assert fresh[0].requires_grad and fresh[0] is not args[0] and not fresh[1].requires_grad
    assert len(tensors(args)) == 2 and tensors(args[0])[0] is args[0]
    spread = clone(random("x", (1, 3), torch.float32).expand(4, 3))
    assert spread.stride() == (0, 1)


def test_cotangents() -> None:
    out = torch.empty(3, 4, 5, requires_grad=True)
    strides = {kind: cotangents(out, kind)[0].stride()
               for kind in ("random", "expanded", "transposed", "partial")}  # fmt: skip
    assert strides == {"random": (20, 5, 1), "expanded": (0, 0, 0), "transposed": (1, 3, 12),
                       "partial": (20, 0, 1)}  # fmt: skip
    assert all(grad.any() for kind in strides for grad in cotangents(out, kind))


def test_gradients_of_what_is_not_used_are_none() -> None:
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    _, (first, second) = gradients(lambda a, b: a * 2, (x, y))
    assert first is not None and second is None
    _, (third,) = gradients(lambda a: a.detach(), (x,))
    assert third is None


def test_lists_of_tensors() -> None:
    x, y, z = (random(name, (2, 3), torch.float32) for name in "xyz")
    args = ([x, y], [3, 4], [], z, "log1p")
    assert all(one is other for one, other in zip(tensors(args), (x, y, z), strict=True))
    fresh = with_grad(args, (0,))
    assert fresh[0][0].requires_grad and fresh[0][1].requires_grad and not fresh[3].requires_grad
    turned = refilled(args, (z, x, y))
    assert turned[0][0] is z and turned[0][1] is x and turned[3] is y
    assert (*turned[1:3], turned[4]) == ([3, 4], [], "log1p")
