"""attention_stats and its backward op."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.attention import (
    OPTIONS,
    Attention,
    drawn_attention,
    gradients_of,
    largest_logit,
    leaves_of,
    log_sum_exp,
    operand_errors,
    saved_errors,
    uncertain_gradient,
)
from ops.cases.base import NAN, Bad, Op, positional, samples
from ops.cases.errors import t
from ops.cases.strategies import drawn
from support.layouts import LAYOUTS
from torch import Tensor

import spot_ext


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_stats_reference` with the third output of the op."""
    out, stats = spot_ext.attention_stats_reference(
        q, k, v, keep, bias, scale=scale, num_prefix=num_prefix, class_token=class_token,
        need_stats=need_stats,
    )  # fmt: skip
    everything = torch.ones((), dtype=torch.bool, device=q.device)
    return out, stats, log_sum_exp(q, k, everything, keep, scale, num_prefix, bias)


def attention_backward_reference(
    grad_out: Tensor,
    grad_stats: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lse: Tensor,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    keep_grad: bool = False,
    bias_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of the definition; it looks at none of the forward pass's results."""
    leaves = leaves_of(q, k, v, keep, bias)
    with torch.enable_grad():
        results = spot_ext.attention_stats_reference(
            *leaves, scale=scale, num_prefix=num_prefix, class_token=class_token,
            need_stats=grad_stats is not None,
        )  # fmt: skip
    asked = True, True, True, keep_grad, bias_grad
    return gradients_of(results, (grad_out, grad_stats), leaves, asked)


@dataclass(frozen=True)
class _Dense(Attention):
    """Every query meets every key."""

    def backward_args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """With all gradients that there are; without statistics none of them comes in."""
        *inputs, need_stats = self.args(device, dtype)
        grad, grad_stats = self.incoming(device, dtype, need_stats)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.no_grad():
            exact = [x.double() if isinstance(x, Tensor) else x for x in inputs]
            out, stats, lse = attention_reference(*exact, need_stats)
        asked = inputs[3] is not None, inputs[4] is not None
        return (
            grad, grad_stats, *inputs[:5], out.to(dtype), stats.to(wide), lse.to(wide),
            *inputs[5:], *asked,
        )  # fmt: skip


_DENSE = (
    _Dense("plain", traced=True),
    _Dense("masked", keep="random"),
    _Dense("masked with bias", keep="random", bias=1, traced=True),
    _Dense("bias of one", bias=1),
    _Dense("bias of each", bias=-1),
    _Dense("keep all", keep="all"),
    _Dense("keep none", keep="none"),
    _Dense("no statistics", keep="random", need_stats=False, traced=True),
    _Dense("no class token", class_token=False, keep="random"),
    _Dense("no prefix", num_prefix=0, class_token=False, keep="random", traced=True),
    _Dense("no prefix, no mask", num_prefix=0, class_token=False),
    _Dense("five prefix tokens", num_tokens=9, num_prefix=5, keep="random", traced=True),
    _Dense("prefix only", num_tokens=3, num_prefix=3, keep="random"),
    _Dense("one token", num_tokens=1, traced=True),
    _Dense("one patch", num_tokens=1, num_prefix=0, class_token=False, keep="random"),
    _Dense("no tokens", num_tokens=0, num_prefix=0, class_token=False),
    _Dense("empty batch", batch=0, keep="random", traced=True),
    _Dense("no heads", heads=0, keep="random"),
    _Dense("one channel", dim=1, keep="random"),
    _Dense("scaled", scale=0.37, keep="random"),
    _Dense("negative scale", scale=-1.5, keep="random"),
    _Dense("head dim 33", dim=33, heads=3),
    _Dense("head dim 64", dim=64, num_tokens=50, keep="random"),
    _Dense("ViT", batch=1, num_tokens=197, dim=32, keep="random"),
    *(_Dense(f"{layout}", layout=layout, keep="random", traced=layout == "swapped")
      for layout in LAYOUTS),
)  # fmt: skip


# tokens, head dim, prefix, mask, images of the bias, statistics, layout
_GPU = tuple(
    _Dense(f"[{tokens}, {dim}] {number}", num_tokens=tokens, dim=dim, num_prefix=prefix,
           class_token=prefix > 0, keep=keep, bias=bias, need_stats=need_stats, layout=layout)
    for number, (tokens, dim, prefix, keep, bias, need_stats, layout) in enumerate((
        (1, 32, 1, "", None, True, "contiguous"),
        (2, 8, 1, "random", None, True, "qkv"),
        (17, 64, 0, "", None, True, "qkv"),
        (17, 200, 2, "random", 1, True, "contiguous"),
        (64, 80, 2, "random", 2, True, "qkv"),
        (64, 20, 0, "random", None, False, "contiguous"),  # rows of no multiple of 16 bytes
        (100, 64, 1, "random", None, True, "qkv"),
        (129, 96, 1, "", 1, True, "contiguous"),
        (197, 64, 1, "", None, True, "qkv"),
        (197, 64, 1, "random", None, True, "qkv"),
        (197, 64, 1, "random", 1, False, "qkv"),
        (257, 64, 1, "", None, True, "qkv"),
        (257, 128, 2, "random", None, True, "contiguous"),
        (300, 64, 1, "random", None, True, "qkv"),
        (300, 128, 1, "", 1, True, "contiguous"),
        (300, 64, 5, "random", None, False, "qkv"),
    ))
)  # fmt: skip


_DRAWN = drawn_attention(_Dense, bias=st.sampled_from([None, None, 1, -1]))


def _attention_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values = {name: t(*good, device=device) for name in "qkv"}
        values |= {"keep": None, "bias": None, "scale": None, "num_prefix": 1}
        values |= {"class_token": True, "need_stats": True}
        return tuple((values | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    return (
        *operand_errors(build),
        bad("bias is a list", lambda d: {"bias": [1.0]}, TypeError, ("bias", "list"),
            op_words=("bias",)),
        bad("bias of rank 3", lambda d: {"bias": t(2, 6, 6, device=d)}, ValueError,
            ("bias", "4 dim")),
        bad("bias integer", lambda d: {"bias": t(1, 2, 6, 6, dtype=torch.int64, device=d)},
            TypeError, ("bias", "int64")),
        *(bad(f"bias {list(shape)}", lambda d, s=shape: {"bias": t(*s, device=d)}, ValueError,
              ("bias", str(list(shape))))
          for shape in ((3, 2, 6, 6), (1, 1, 6, 6), (1, 2, 1, 6), (1, 2, 6, 1), (2, 2, 5, 5))),
        bad("bias on another device", lambda d: {"bias": t(1, 2, 6, 6, device="meta")},
            ValueError, ("bias", "device")),
    )  # fmt: skip


def _attention_backward_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"grad_out": t(*good, device=device)}
        values["grad_stats"] = t(2, 6, 2, 6, device=device)
        values |= {name: t(*good, device=device) for name in "qkv"}
        values |= {"keep": None, "bias": None, "out": t(*good, device=device)}
        values |= {"stats": t(2, 6, 2, 6, device=device), "lse": t(2, 6, 2, device=device)}
        return tuple((values | changes).values())

    return (
        *saved_errors(build, ("keep", "bias")),
        Bad("bias of other columns", lambda d: build(d, bias=t(1, 2, 6, 5, device=d)),
            ValueError, ("bias", "size 6")),
    )  # fmt: skip


def _attention_flops(q: Tensor, *args: Any) -> tuple[int, int]:
    """Two products of the map; the statistics may add a few operations per entry of it."""
    batch, num_tokens, heads, dim = q.shape
    entries = batch * heads * num_tokens * num_tokens
    return 4 * entries * dim, 4 * entries * dim + 32 * entries


def _attention_backward_flops(
    grad_out: Tensor, grad_stats: Tensor | None, q: Tensor, *args: Any
) -> tuple[int, int]:
    """Five products of the map: the scores again, and four gradients."""
    least, most = _attention_flops(q)
    return 5 * least // 2, 5 * least // 2 + most - least


OPS = (
    Op("attention_stats", attention_reference,
       samples(_DENSE), _attention_errors(),
       _attention_flops, grads=(0, 1, 2, 3, 4), exact=False,
       public=positional(spot_ext.attention_stats, 5, *OPTIONS),
       once_only="differentiable once", gpu=samples(_GPU),
       terms=lambda q, k, v, keep=None, bias=None, scale=None, *_: largest_logit(q, k, scale),
       drawn=drawn(_DRAWN), odd={0: NAN, 1: NAN, 4: (math.nan, math.inf)}),
    Op("attention_stats_backward", attention_backward_reference,
       samples(_DENSE, "backward_args"),
       _attention_backward_errors(), _attention_backward_flops, exact=False,
       once_only="differentiable once", gpu=samples(_GPU, "backward_args"),
       scale64=uncertain_gradient, drawn=drawn(_DRAWN, "backward_args")),
)  # fmt: skip
