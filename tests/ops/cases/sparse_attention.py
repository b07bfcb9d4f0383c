"""sparse_attention and its backward op."""

from __future__ import annotations

import itertools
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
from ops.cases.base import Bad, Op, Unread, positional, samples
from ops.cases.errors import t
from ops.cases.strategies import drawn
from support.arguments import to_dtype
from support.data import random, random_keys
from support.layouts import LAYOUTS, lay_out
from torch import Tensor

import spot_ext
from spot_ext.sparse_attention import named_keys


def sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_attention_reference` with the third output of the op: -inf where nothing is seen."""
    out, stats = spot_ext.sparse_attention_reference(
        q, k, v, index, keep, scale=scale, num_prefix=num_prefix, class_token=class_token,
        need_stats=need_stats,
    )  # fmt: skip
    return out, stats, log_sum_exp(q, k, named_keys(index, q.shape[1]), keep, scale, num_prefix)


def sparse_backward_reference(
    grad_out: Tensor,
    grad_stats: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lse: Tensor,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    keep_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of the definition; it looks at none of the forward pass's results."""
    leaves = leaves_of(q, k, v, keep)
    with torch.enable_grad():
        results = spot_ext.sparse_attention_reference(
            *leaves[:3], index, leaves[3], scale=scale, num_prefix=num_prefix,
            class_token=class_token, need_stats=grad_stats is not None,
        )  # fmt: skip
    return gradients_of(results, (grad_out, grad_stats), leaves, (True, True, True, keep_grad))


@dataclass(frozen=True)
class _Sparse(Attention):
    named: int = 3  # keys of each patch query
    order: str = "ascending"  # shuffled; padded, empty: with -1
    index_layout: str = "contiguous"
    need_stats: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v, keep, _, *rest = super().args(device, dtype)
        shape = self.batch, self.heads, self.num_tokens - self.num_prefix
        index = random_keys(self.name, shape, self.num_tokens, self.named, self.order)
        return q, k, v, lay_out(index.to(device), self.index_layout), keep, *rest

    def backward_args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """With all gradients that there are; without statistics none of them comes in."""
        *inputs, need_stats = self.args(device, dtype)
        grad, grad_stats = self.incoming(device, dtype, need_stats)
        wide = torch.promote_types(dtype, torch.float32)
        exact = to_dtype(tuple(inputs), torch.float64)
        out, stats, lse = sparse_reference(*exact, need_stats)
        saved = out.to(dtype), stats.to(wide), lse.to(wide)
        return grad, grad_stats, *inputs[:5], *saved, *inputs[5:], inputs[4] is not None


_SPARSE = (
    _Sparse("plain", traced=True),
    _Sparse("masked with statistics", keep="random", need_stats=True, named=4, traced=True),
    _Sparse("statistics", need_stats=True, named=5, traced=True),
    _Sparse("masked", keep="random", traced=True),
    _Sparse("shuffled", order="shuffled", keep="random", need_stats=True, traced=True),
    _Sparse("rows end in -1", order="padded", keep="random", need_stats=True, named=5, traced=True),
    _Sparse("rows end in -1, no mask", order="padded", named=6),
    _Sparse("nothing named", order="empty", need_stats=True),
    _Sparse("no keys", named=0, keep="random", need_stats=True, traced=True),
    _Sparse("no keys, no prefix", named=0, num_prefix=0, class_token=False),
    _Sparse("one key", named=1, keep="random"),
    _Sparse("all keys", named=7, keep="random", need_stats=True, traced=True),
    _Sparse("all keys, shuffled", named=7, order="shuffled", need_stats=True),
    _Sparse("keep all", keep="all", need_stats=True),
    _Sparse("keep none", keep="none", need_stats=True, named=5),
    _Sparse("keep none, no prefix", keep="none", named=4, num_prefix=0, class_token=False),
    _Sparse("no class token", class_token=False, keep="random", need_stats=True),
    _Sparse("no prefix", num_prefix=0, class_token=False, keep="random", need_stats=True,
            traced=True),
    _Sparse("no prefix, rows end in -1", num_prefix=0, class_token=False, order="padded",
            keep="random", need_stats=True),
    _Sparse("five prefix tokens", num_tokens=9, num_prefix=5, keep="random", need_stats=True,
            traced=True),
    _Sparse("prefix only", num_tokens=3, num_prefix=3, keep="random", need_stats=True),
    _Sparse("one token", num_tokens=1, named=1, traced=True),
    _Sparse("one patch", num_tokens=1, num_prefix=0, class_token=False, named=1, keep="random",
            need_stats=True),
    _Sparse("no tokens", num_tokens=0, num_prefix=0, class_token=False, named=0),
    _Sparse("empty batch", batch=0, keep="random", traced=True),
    _Sparse("no heads", heads=0, keep="random"),
    _Sparse("one head", heads=1, keep="random"),
    _Sparse("one channel", dim=1, keep="random"),
    _Sparse("scaled", scale=0.37, keep="random", need_stats=True),
    _Sparse("scale 0", scale=0.0, keep="random", need_stats=True),
    _Sparse("negative scale", scale=-1.5, keep="random", need_stats=True),
    _Sparse("head dim 33", dim=33, heads=3, need_stats=True),
    _Sparse("head dim 64", dim=64, num_tokens=50, named=13, keep="random", need_stats=True),
    _Sparse("head dim 256", dim=256, num_tokens=20, named=9, order="padded"),
    _Sparse("many heads", heads=9, batch=3, num_tokens=11, named=6, order="shuffled"),
    _Sparse("ViT", batch=1, num_tokens=197, dim=32, named=50, keep="random", need_stats=True),
    _Sparse("twelve ViT images", batch=12, num_tokens=99, heads=3, dim=32, named=25,
            order="padded", keep="random", need_stats=True),
    *(_Sparse(f"{layout}", layout=layout, keep="random", need_stats=True,
              traced=layout == "swapped") for layout in LAYOUTS),
    *(_Sparse(f"{layout} list", index_layout=layout, order="padded", keep="random", named=5,
              traced=layout == "stepped") for layout in LAYOUTS[1:]),
)  # fmt: skip


# tokens, head dim, prefix, keys named, mask, statistics, layout, order of the names
_GPU = tuple(
    _Sparse(f"[{tokens}, {dim}] {number}", num_tokens=tokens, dim=dim, num_prefix=prefix,
            class_token=prefix > 0, named=named, keep=keep, need_stats=need_stats, layout=layout,
            order=order)
    for number, (tokens, dim, prefix, named, keep, need_stats, layout, order) in enumerate((
        (1, 32, 1, 1, "", True, "contiguous", "ascending"),  # no patch at all
        (2, 8, 1, 1, "random", True, "qkv", "ascending"),
        (17, 64, 0, 4, "", True, "qkv", "shuffled"),
        (17, 200, 2, 17, "random", True, "contiguous", "ascending"),
        (64, 20, 0, 9, "random", False, "contiguous", "shuffled"),  # no multiple of 16 bytes
        (64, 80, 2, 0, "random", True, "qkv", "ascending"),  # nothing named
        (40, 16, 0, 0, "random", True, "contiguous", "ascending"),  # no prefix either
        (70, 96, 1, 33, "random", True, "contiguous", "shuffled"),
        (100, 64, 1, 12, "random", True, "qkv", "padded"),
        (197, 64, 1, 50, "", True, "qkv", "ascending"),
        (197, 32, 1, 50, "random", False, "qkv", "padded"),
        (130, 128, 2, 64, "random", True, "contiguous", "shuffled"),
        (300, 64, 5, 40, "random", True, "qkv", "ascending"),
    ))
)  # fmt: skip


_DRAWN = drawn_attention(
    _Sparse,
    named=lambda tokens: st.integers(0, min(tokens, 40)),
    order=st.sampled_from(["ascending", "shuffled", "padded", "empty"]),
    index_layout=st.sampled_from(LAYOUTS),
)


def _unread(backward: bool = False) -> tuple[Unread, ...]:
    """One bad row: its query is NaN, others are not. float32 gathers, float16 has tensor cores."""

    def make(dtype: torch.dtype, row: tuple[int, ...]) -> Callable[[Any], tuple[Any, ...]]:
        def args(device: Any) -> tuple[Any, ...]:
            q, k, v = (random(x, (1, 41, 1, 64), dtype) for x in "qkv")
            index = random_keys("unread", (1, 1, 40), 41, 6, "shuffled")
            out, stats, lse = sparse_reference(q, k, v, index, need_stats=True)
            index[0, 0, 7] = torch.tensor(row, dtype=torch.int32)
            options: tuple[Any, ...] = (None, 1, True)
            if not backward:
                values = (q, k, v, index, None, *options, True)
            else:
                for saved in (out, stats, lse):  # as the forward pass leaves them
                    saved[0, 8] = math.nan
                grad = torch.ones_like(q)
                values = (grad, None, q, k, v, index, None, out, stats, lse, *options)
            return tuple(x.to(device) if isinstance(x, Tensor) else x for x in values)

        return args

    def holds(out: Tensor, *rest: Tensor) -> bool:
        others = torch.arange(41) != 8
        return bool(out[0, 8].isnan().all() and out[0, others].isfinite().all())

    rows = {
        "out of range": (0, 41, 2, 3, 4, 5),
        "far out of range": (0, 2**31 - 1, -(2**31), 3, 4, 5),
        "repeated": (0, 1, 2, 3, 1, 5),
        "behind a -1": (0, 1, 2, -1, 4, 5),
    }
    kinds = itertools.product((torch.float32, torch.float16), rows.items())
    return tuple(Unread(f"a name {name}, {d}", make(d, row), holds) for d, (name, row) in kinds)


def _keys(device: Any, *row: int) -> Tensor:
    """A legal index [2, 2, 5, 3] for 6 tokens, but for the last row."""
    index = random_keys("good", (2, 2, 5), 6, max(len(row), 3)).to(device)
    if row:
        index[1, 1, 4] = torch.tensor(row, dtype=torch.int32, device=device)
    return index


def _keys_errors(build: Callable[[Any, Any], tuple[Any, ...]]) -> list[Bad]:
    """Wrong indices of an op whose arguments with an index are `build(device, index)`."""

    def bad(label: str, index: Callable[[Any], Any], words: Any, raises: Any = ValueError,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(f"index {label}", lambda d: build(d, index(d)), raises, words, **more)

    def row(label: str, at: int, words: tuple[str, ...], *values: int) -> Bad:
        return bad(label, lambda d: _keys(d, *values), (f"index[1, 1, 4, {at}]", *words),
                   values=True)  # fmt: skip

    return [
        bad("is None", lambda d: None, ("index", "NoneType"), TypeError, op_words=()),
        bad("is a list", lambda d: [1], ("index", "list"), TypeError, op_words=()),
        bad("int64", lambda d: _keys(d).long(), ("index", "int32", "int64"), TypeError),
        bad("float", lambda d: _keys(d).float(), ("index", "int32", "float32"), TypeError),
        bad("of rank 3", lambda d: _keys(d)[0], ("index", "4 dim", "[2, 5, 3]")),
        bad("of another batch", lambda d: _keys(d)[:1], ("index", "size 2", "[1, 2, 5, 3]")),
        bad("of other heads", lambda d: _keys(d)[:, :1], ("index", "size 2", "[2, 1, 5, 3]")),
        bad("with the prefix", lambda d: random_keys("6", (2, 2, 6), 6, 3).to(d),
            ("index", "size 5", "[2, 2, 6, 3]")),
        bad("of more keys than tokens",
            lambda d: torch.arange(7, dtype=torch.int32, device=d).expand(2, 2, 5, 7),
            ("index", "7", "6")),
        bad("on another device", lambda d: _keys("meta"), ("index", "device")),
        bad("sparse", lambda d: _keys(d).to_sparse(), ("index", "sparse"), TypeError, layouts=True),
        row("too large", 2, ("in [0, 6)", "got 6"), 0, 2, 6),
        row("too large, in front", 0, ("in [0, 6)", "got 6"), 6, 2, 0),
        row("huge", 1, ("in [0, 6)", f"got {2**31 - 1}"), 0, 2**31 - 1, 3),
        row("below -1", 2, ("in [0, 6)", "got -2"), 0, 2, -2),
        row("far below -1", 0, ("in [0, 6)", f"got {-(2**31)}"), -(2**31), 2, 3),
        row("repeats", 2, ("repeated", "got 2"), 0, 2, 2),
        row("repeats far apart", 3, ("repeated", "got 5"), 5, 2, 0, 5),
        row("behind a -1", 2, ("-1 at the end of a row only", "got 3"), 0, -1, 3),
        row("behind many -1", 3, ("-1 at the end of a row only", "got 3"), -1, -1, -1, 3),
    ]  # fmt: skip


def _sparse_errors() -> tuple[Bad, ...]:
    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {name: t(2, 6, 2, 4, device=device) for name in "qkv"}
        values |= {"index": _keys(device), "keep": None, "scale": None, "num_prefix": 1}
        values |= {"class_token": True, "need_stats": False}
        return tuple((values | changes).values())

    return (
        *operand_errors(build),
        *_keys_errors(lambda d, index: build(d, index=index)),
    )


def _sparse_backward_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"grad_out": t(*good, device=device)}
        values["grad_stats"] = t(2, 6, 2, 6, device=device)
        values |= {name: t(*good, device=device) for name in "qkv"}
        values |= {"index": _keys(device), "keep": None, "out": t(*good, device=device)}
        values |= {"stats": t(2, 6, 2, 6, device=device), "lse": t(2, 6, 2, device=device)}
        return tuple((values | changes).values())

    return (
        *saved_errors(build, ("keep",)),
        *_keys_errors(lambda d, index: build(d, index=index)),
    )


def _sparse_flops(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *args: Any) -> tuple[int, int]:
    """As `_attention_flops`, of the entries that are named and of the prefix queries' rows."""
    batch, num_tokens, heads, dim = q.shape
    entries = index.numel() + batch * heads * (num_tokens - index.shape[2]) * num_tokens
    return 4 * entries * dim, 4 * entries * dim + 32 * entries


def _sparse_backward_flops(
    grad_out: Tensor, grad_stats: Tensor | None, *args: Any
) -> tuple[int, int]:
    least, most = _sparse_flops(*args)
    return 5 * least // 2, 5 * least // 2 + most - least


OPS = (
    Op("sparse_attention", sparse_reference,
       samples(_SPARSE), _sparse_errors(),
       _sparse_flops, grads=(0, 1, 2, 4), exact=False,
       public=positional(spot_ext.sparse_attention, 5, *OPTIONS),
       once_only="differentiable once", large="twelve ViT images",
       terms=lambda q, k, v, index, keep=None, scale=None, *_: largest_logit(q, k, scale),
       gpu=samples(_GPU), unread=_unread(), drawn=drawn(_DRAWN)),
    Op("sparse_attention_backward", sparse_backward_reference,
       samples(_SPARSE, "backward_args"),
       _sparse_backward_errors(), _sparse_backward_flops, exact=False,
       once_only="differentiable once", large="twelve ViT images",
       gpu=samples(_GPU, "backward_args"), unread=_unread(backward=True),
       scale64=uncertain_gradient, drawn=drawn(_DRAWN, "backward_args")),
)  # fmt: skip
