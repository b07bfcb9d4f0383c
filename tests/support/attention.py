"""What the tests of attention ops share: sizes, names, the comparison with the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.arguments import to_dtype
from support.comparison import assert_accurate, assert_gradient
from support.gradients import gradients
from support.switches import cuda_kernels
from torch import Tensor

NAMES = ("cls_out", "cls_in", "row_mean", "row_var", "col_mean", "col_var")

HEAD_DIMS = (*range(1, 21), 24, 31, 32, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256)


def with_leaves(values: dict[str, Any], *names: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Detached arguments, and those of `names` that are there, which need gradients."""
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    leaves = [values[name].requires_grad_() for name in names if values[name] is not None]
    return values, leaves


def assert_as_accurate_as(
    reference: Callable[..., Any],
    function: Callable[..., Any],
    values: dict[str, Any],
    names: tuple[str, ...],
    need_stats: bool = True,
) -> None:
    """Outputs and all gradients by the error rule, beside the reference at the same dtype."""
    values, leaves = with_leaves(values, *names)
    wide = to_dtype(values, torch.float64)
    results = []
    for call, arguments in ((function, values), (reference, values), (reference, wide)):
        wanted = tuple(arguments[name] for name in names if arguments[name] is not None)
        bound = {**arguments, "need_stats": need_stats}
        results.append(gradients(lambda *_, f=call, a=bound: f(**a), wanted))
    (actual, grads), (plain, plain_grads), (exact, exact_grads) = results
    assert_accurate(actual[0], plain[0], exact[0], what="out")
    for column, name in enumerate(NAMES if need_stats else ()):
        assert_accurate(
            actual[1][..., column], plain[1][..., column], exact[1][..., column], what=name,
            scale=1.0 if "var" not in name else 0.1,
        )  # fmt: skip
    sizes = [1.0 + grad.abs().max().item() if grad is not None and grad.numel() else 1.0
             for grad in exact_grads]  # fmt: skip
    if cuda_kernels(values["q"].device):
        # Two dot products cancel there that were summed in other orders, one channel at a time.
        sizes = [2 * max(sizes)] * len(sizes)
    for size, *three in zip(sizes, grads, plain_grads, exact_grads, strict=True):
        if three[1] is None:
            assert three[0] is None or not three[0].any()
        else:
            assert_gradient(*three, scale=size)
    assert len(leaves) == len(grads)
