"""Gradients of token_relevance, and those that there are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.relevance import relevance_reference
from ops.relevance.drawn import NAMES, build, leaves
from support.comparison import assert_close, assert_same_bits
from support.slow import most_slow
from torch import Tensor

from spot_ext import token_relevance

_SHAPES: list[dict[str, Any]] = [
    {},
    {"keep": ""},
    {"keep": "all"},
    {"keep": "none"},
    {"keep": "soft"},
    {"features": None},
    {"features": 0},
    {"features": 0, "keep": ""},
    {"channels": None},
    {"channels": None, "keep": ""},
    {"channels": None, "batch": 1, "count": 1},
    {"channels": 7},
    {"channels": 33, "remap": 2},
    {"remap": 0},
    {"remap": 2, "features": 1, "hidden": (1, 1)},
    {"remap": 18, "hidden": (17, 9)},
    {"count": 1, "keep": ""},
    {"count": 1, "keep": "none"},
    {"count": 0},
    {"count": 0, "keep": ""},
    {"batch": 0},
    {"batch": 5, "count": 3, "keep": "soft"},
    {"batch": 1, "count": 35},
    {"hidden": (0, 3)},
]


@pytest.mark.parametrize("shape", most_slow(_SHAPES, 12), ids=str)
def test_gradcheck(shape: dict[str, Any], device: torch.device) -> None:
    values = build(device=device, **shape)
    given = leaves(values)

    def call(*tensors: Tensor) -> Tensor:
        return token_relevance(**(values | dict(zip(given, tensors, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(given.values()), atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_there_are_no_second_derivatives(name: str, device: torch.device) -> None:
    values = build(device=device)
    leaf = leaves(values)[name]
    (first,) = torch.autograd.grad(
        token_relevance(**values).square().sum(), leaf, create_graph=True
    )
    assert first.any()
    words = "token_relevance is differentiable once.*token_relevance_reference"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(first.sum(), leaf)


def test_the_backward_op_gives_what_is_asked_for(device: torch.device) -> None:
    args = OPS["token_relevance_backward"].sample("wider").args(device, torch.float64)
    everything = torch.ops.spot.token_relevance_backward(*args)
    for mask in range(16):
        wanted = [bool(mask >> place & 1) for place in range(4)]
        grads = torch.ops.spot.token_relevance_backward(*args[:20], *wanted)
        asked = (*wanted[:3], *[wanted[3]] * 10)
        for grad, whole, flag in zip(grads, everything, asked, strict=True):
            if flag:
                assert_same_bits(grad, whole)
            else:
                assert grad.numel() == 0


def test_the_op_returns_what_its_backward_needs(device: torch.device) -> None:
    values = build(device=device)
    for actual, expected in zip(
        torch.ops.spot.token_relevance(*values.values()),
        relevance_reference(*values.values()),
        strict=True,
    ):
        assert_close(actual, expected)
