"""Cases of `sparse_attention`, alone and with the predictor: against dense and masked attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from spot_vit.utils.timing import Case, Side, input_sets
from torch import Tensor

from benchmarks.attention_stats import sdpa
from benchmarks.connectivity import DIM, HEADS, SHARE, budget_of, untrained
from spot_ext import sparse_attention
from spot_ext.sparse_attention import named_keys

DENSE = "dense scaled_dot_product_attention"
MASKED = "scaled_dot_product_attention with a boolean mask"
FLEX = "flex_attention with the same mask, compiled"


def sparse(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Attention to the keys that the index names."""
    return sparse_attention(q, k, v, index)[0]


def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Attention to all keys."""
    return sdpa(q, k, v)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention to the same keys, by a mask [B, H, N, N] that costs nothing here."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*heads_first, attn_mask=mask).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    """Attention to the same keys by FlexAttention, which skips blocks nobody sees."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(*heads_first, block_mask=block_mask).transpose(1, 2)


def block_mask(index: Tensor, tokens: int) -> Any:
    """What FlexAttention takes for the boolean map of an index; built before any timing."""
    from torch.nn.attention.flex_attention import create_block_mask

    mask = named_keys(index, tokens)
    return create_block_mask(lambda b, h, i, j: mask[b, h, i, j], *mask.shape, device=index.device)


class Inputs:
    """Sets of random q, k, v, as views of a fused projection, and what a predictor names."""

    def __init__(self, batch: int, tokens: int, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.tokens, self.predictor = tokens, untrained(tokens, dtype, device)
        shape = (batch, tokens, 3, HEADS, DIM)
        keys = batch * HEADS * (tokens - 1) * budget_of(tokens)
        self.bytes = batch * tokens * 3 * HEADS * DIM * dtype.itemsize + 4 * keys
        self.sets = [
            torch.randn(shape, generator=draw, device=device, dtype=dtype).unbind(2)
            for _ in range(input_sets(self.bytes, device))
        ]
        self.index = [self.predictor(q[:, 1:], k) for q, k, _ in self.sets]
        self.grad = torch.randn(
            (batch, tokens, HEADS, DIM), generator=draw, device=device, dtype=dtype
        )

    def forward(self, function: Callable[..., Tensor], last: list[Any] | None = None) -> Side:
        """`function(q, k, v, one of last)`, by default of the indices, as a side."""
        last = self.index if last is None else last
        return lambda i: function(*self.sets[i % len(self.sets)], last[i % len(last)])

    def training(self, function: Callable[..., Tensor], last: list[Any] | None = None) -> Side:
        """Forward and backward of `function`, as a side."""
        last = self.index if last is None else last

        def side(i: int) -> Any:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in self.sets[i % len(self.sets)]]
                out = function(*leaves, last[i % len(last)])
                return torch.autograd.grad(out, leaves, self.grad)

        return side

    def whole(self) -> Side:
        """Predictor, connectivity and attention, as a side."""

        def side(i: int) -> Tensor:
            q, k, v = self.sets[i % len(self.sets)]
            return sparse(q, k, v, self.predictor(q[:, 1:], k))

        return side

    def masks(self) -> list[Tensor]:
        """The boolean maps of the indices."""
        return [named_keys(index, self.tokens) for index in self.index]

    def block_masks(self) -> list[Any]:
        """The same for FlexAttention."""
        return [block_mask(index, self.tokens) for index in self.index]


def cases(device: str) -> Iterator[Case]:
    """Bars: the share of the other's time that is allowed, as its inverse."""
    yield from _cpu_cases() if device == "cpu" else _cuda_cases()


def _cpu_cases() -> Iterator[Case]:
    dtype = torch.float32
    forward: list[tuple[int, int, dict[str, float]]] = [
        (8, 197, {DENSE: 0.42}),
        (8, 577, {DENSE: 0.38, MASKED: 0.24}),
        (2, 1025, {DENSE: 0.38}),
    ]
    for batch, tokens, allowed in forward:
        inputs = Inputs(batch, tokens, dtype, "cpu")
        others = {
            DENSE: inputs.forward(dense),
            MASKED: inputs.forward(masked, inputs.masks()),
        }
        bars = {other: 1 / share for other, share in allowed.items()}
        yield Case(
            _name("forward", batch, tokens, dtype), inputs.forward(sparse), others, bars,
            inputs.bytes,
        )  # fmt: skip
    for batch, tokens, bars in ((8, 197, {}), (8, 577, {DENSE: 1 / 0.55})):
        inputs = Inputs(batch, tokens, dtype, "cpu")
        yield Case(
            _name("forward + backward", batch, tokens, dtype), inputs.training(sparse),
            {DENSE: inputs.training(dense)}, bars, inputs.bytes,
        )  # fmt: skip
    for batch, tokens, share in ((8, 577, 0.80), (2, 1025, 0.65)):
        inputs = Inputs(batch, tokens, dtype, "cpu")
        yield Case(
            _name("predictor, connectivity, attention", batch, tokens, dtype), inputs.whole(),
            {DENSE: inputs.forward(dense)}, {DENSE: 1 / share}, inputs.bytes,
        )  # fmt: skip


def _cuda_cases() -> Iterator[Case]:
    """Recorded without bars."""
    dtype = torch.bfloat16
    for batch, tokens in ((32, 577), (16, 1025), (2, 4097)):
        inputs = Inputs(batch, tokens, dtype, "cuda")
        masks = inputs.block_masks()
        yield Case(
            _name("forward", batch, tokens, dtype), inputs.forward(sparse),
            {DENSE: inputs.forward(dense), MASKED: inputs.forward(masked, inputs.masks()),
             FLEX: inputs.forward(flex, masks)}, {}, inputs.bytes,
        )  # fmt: skip
        yield Case(
            _name("forward + backward", batch, tokens, dtype), inputs.training(sparse),
            {DENSE: inputs.training(dense), FLEX: inputs.training(flex, masks)}, {},
            inputs.bytes,
        )  # fmt: skip
        yield Case(
            _name("predictor, connectivity, attention", batch, tokens, dtype), inputs.whole(),
            {DENSE: inputs.forward(dense)}, {}, inputs.bytes,
        )  # fmt: skip


def _name(what: str, batch: int, tokens: int, dtype: torch.dtype) -> str:
    shape = f"[{batch},{tokens},{HEADS},{DIM}] {str(dtype).removeprefix('torch.')}"
    return f"{what} {shape}, {SHARE:.0%} of the keys"
