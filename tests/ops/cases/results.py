"""How results of an op are compared with those of its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ops.cases.base import Op
from support.comparison import BACKWARD, FORWARD, assert_accurate, assert_same_bits
from torch import Tensor


def assert_results(
    op: Op,
    dtype: torch.dtype,
    actual: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    cancel: bool = False,
    terms: float = 0.0,
    scale64: float = 1.0,
) -> None:
    """Bits where the op only moves them; otherwise by the error rule, each statistic by itself.

    `plain` is the reference's at the dtype of `actual`, `exact` in float64. `cancel` says that
    results are gradients: terms may cancel that are summed in another order, and those in a wide
    dtype lose what their 16-bit terms do. `terms` is how large those are, if more than the results;
    of attention, how large logits are: probabilities are as accurate as those, relatively.
    `scale64` is what float64 results are compared relative to, if more than their largest.
    """
    rounding = 0.0
    if not op.exact:
        rounding = max(op.rounding(dtype), torch.finfo(dtype).eps if cancel else 0.0)
    assert len(actual) == len(plain)
    for number, (mine, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        assert mine.is_contiguous(), f"output {number} has strides {mine.stride()}"
        if op.exact:
            assert_same_bits(mine, theirs, f"output {number}")
        elif op.name in ("attention_stats", "sparse_attention") and number == 1 and mine.numel():
            for column in range(6):  # each statistic has its own scale
                # Squares are summed around 1/n: that of a far-off mean bounds the error.
                means = truth[..., column - 1].nan_to_num(0.0).abs()
                mean = means.max().item() if column in (3, 5) else 0.0
                most = truth[..., column].nan_to_num(0.0).abs().max().item()
                assert_accurate(
                    mine[..., column],
                    theirs[..., column],
                    truth[..., column],
                    what=f"statistic {column}",
                    scale=max(mean**2, most * (1 + terms / 6)),
                )
        else:
            finite = truth[truth.isfinite()]
            size = 1 + finite.abs().max().item() if cancel and finite.numel() else 0.0
            size = max(size, terms)
            assert_accurate(
                mine, theirs, truth, BACKWARD if cancel else FORWARD, f"output {number}",
                scale=size, rounding=rounding, scale64=scale64,
            )  # fmt: skip
