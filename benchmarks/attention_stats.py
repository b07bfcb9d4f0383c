"""`attention_stats` as it is now (torch operators), for the record: no bar is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Case, Side, input_sets
from spot_ext import attention_stats, attention_stats_reference


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention alone, for what the statistics cost."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def cases(device: str) -> Iterator[Case]:
    """DeiT-S at 224 pixels; float32 on the CPU, bfloat16 on CUDA."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for batch in (1, 16):
        draw = torch.Generator(device).manual_seed(0)
        shape = (batch, 197, 6, 64)
        size = 3 * batch * 197 * 384 * dtype.itemsize
        sets = [
            [torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(3)]
            for _ in range(input_sets(size, device))
        ]

        def side(function: Callable[..., Any], sets: list[list[Tensor]] = sets) -> Side:
            return lambda i: function(*sets[i % len(sets)])

        yield Case(
            f"attention_stats [{batch},197,6,64] {str(dtype).removeprefix('torch.')}",
            side(attention_stats),
            {
                "reference": side(attention_stats_reference),
                "scaled_dot_product_attention, no statistics": side(sdpa),
            },
            {},
            size,
        )
