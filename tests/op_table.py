"""The op table that the generic tests are generated from.

`OPS` holds, for each op of the `spot` namespace, a plain PyTorch reference, samples, error inputs
and a FLOP count. An op that is missing here, or has a gap, fails the tests.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.arguments import to_dtype
from support.data import FLOATING, generator, random, random_index
from support.layouts import LAYOUTS, lay_out, lay_out_index
from torch import Tensor

import spot_ext
from spot_ext.sparse_attention import named_keys


@dataclass(frozen=True)
class Sample:
    """One legal call; `args(device, dtype)` builds its positional arguments anew."""

    name: str
    args: Callable[[Any, torch.dtype], tuple[Any, ...]]
    traced: bool = False  # also used by the slow tests: opcheck, compile


@dataclass(frozen=True)
class Bad:
    """One refused call; `words` are in the error of the public function and of the op alike."""

    name: str
    args: Callable[[Any], tuple[Any, ...]]
    raises: type[Exception]
    words: tuple[str, ...]
    op_words: tuple[str, ...] | None = None  # when the op says it otherwise
    op_accepts: bool = False  # Python is stricter than the schema
    values: bool = False  # seen only by looking at values: on the CPU, not when tracing
    layouts: bool = False  # no kernel for the layout: torch's own error, which fakes do not give


@dataclass(frozen=True)
class Op:
    """Everything the generic tests need to know about an op."""

    name: str
    reference: Callable[..., Any]  # plain PyTorch, the op's own positional arguments and outputs
    samples: tuple[Sample, ...]
    errors: tuple[Bad, ...]
    flops: Callable[..., tuple[int, int]]  # least and most, of the positional arguments
    grads: tuple[int, ...] = ()  # argument places with a gradient
    twice: bool = False  # whether second derivatives work
    exact: bool = True  # moves bits; otherwise computes
    public: Callable[..., Any] | None = None  # None: a backward op
    dtypes: tuple[torch.dtype, ...] = FLOATING
    once_only: str = ""  # words of the error when differentiated beyond what it can
    weights: tuple[int, ...] = ()  # argument places without a batch dimension
    roundings: int = 0  # of intermediate results, on the way to one of the outputs
    large: str = ""  # sample that is large as it is; otherwise one is repeated to be

    @property
    def call(self) -> Callable[..., Any]:
        return getattr(torch.ops.spot, self.name)

    def rounding(self, dtype: torch.dtype) -> float:
        """What 16-bit intermediate results may lose, relative to the result."""
        return self.roundings * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0

    def sample(self, name: str) -> Sample:
        return next(sample for sample in self.samples if sample.name == name)


def _unique(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} {shape}"


# What the row ops are tried on. `row` is the shape behind [B, tokens].
@dataclass(frozen=True)
class _Rows:
    name: str
    batch: int = 2
    num_tokens: int = 6
    num_keep: int = 4
    num_prefix: int = 1
    num_extra: int = 0
    row: tuple[int, ...] = (5,)
    layout: str = "contiguous"
    index_layout: str = "contiguous"
    order: str = "ascending"
    traced: bool = False

    def index(self, device: Any) -> Tensor:
        index = random_index(
            self.name, self.batch, self.num_tokens, self.num_keep, self.order, device
        )
        return lay_out_index(index, self.index_layout)

    def rows(self, what: str, count: int, dtype: torch.dtype, device: Any) -> Tensor:
        shape = (self.batch, count, *self.row)
        return lay_out(random(f"{self.name} {what}", shape, dtype, device), self.layout)


_ROWS = (
    _Rows("plain", traced=True),
    _Rows("shuffled", order="shuffled", num_extra=1, traced=True),
    _Rows("empty batch", batch=0, num_extra=2, traced=True),
    _Rows("no patches", num_tokens=0, num_keep=0, num_prefix=3),
    _Rows("no tokens", num_tokens=0, num_keep=0, num_prefix=0),
    _Rows("one token", batch=1, num_tokens=1, num_keep=1, num_prefix=0, row=(1,), traced=True),
    _Rows("keep all", num_keep=6, traced=True),
    _Rows("keep none", num_keep=0, traced=True),
    _Rows("keep none without prefix", num_keep=0, num_prefix=0),
    _Rows("five prefix tokens", num_tokens=9, num_keep=3, num_prefix=5, num_extra=2, traced=True),
    _Rows("no prefix", num_prefix=0, num_extra=3, traced=True),
    _Rows("many extra", num_tokens=3, num_keep=1, num_extra=7),
    _Rows("scalar rows", row=(), num_extra=1),
    _Rows("matrix rows", row=(3, 2), num_extra=1, traced=True),
    _Rows("no channels", row=(0,), num_extra=1),
    _Rows("odd sizes", batch=3, num_tokens=17, num_keep=11, num_prefix=2, row=(33,)),
    _Rows("odd batch", batch=7, num_tokens=5, num_keep=2, row=(3,), order="shuffled"),
    _Rows("ViT", num_tokens=196, num_keep=137, row=(64,)),
    _Rows("ViT shuffled", num_tokens=196, num_keep=98, num_extra=1, row=(48,), order="shuffled"),
    *(_Rows(f"{layout} rows", layout=layout, num_extra=2, traced=layout in ("swapped", "flat"))
      for layout in LAYOUTS[1:]),
    *(_Rows(f"{layout} matrix rows", layout=layout, row=(3, 2), num_extra=2)
      for layout in ("swapped", "reversed", "padded")),
    *(_Rows(f"{layout} index", index_layout=layout, order="shuffled", traced=layout == "stepped")
      for layout in LAYOUTS[1:-1]),
)  # fmt: skip

_PLAIN = torch.float32


def _compact_args(r: _Rows) -> Callable[[Any, torch.dtype], tuple[Any, ...]]:
    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        tokens = r.rows("tokens", r.num_prefix + r.num_tokens, dtype, device)
        extra = r.rows("extra", r.num_extra, dtype, device) if r.num_extra else None
        return tokens, r.index(device), r.num_prefix, extra

    return args


def _compact_backward_args(r: _Rows) -> Callable[[Any, torch.dtype], tuple[Any, ...]]:
    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        count = r.num_prefix + r.num_extra + r.num_keep
        grad = r.rows("grad", count, dtype, device)
        return grad, r.index(device), r.num_tokens, r.num_prefix, r.num_extra

    return args


def _scatter_args(r: _Rows) -> Callable[[Any, torch.dtype], tuple[Any, ...]]:
    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        tokens = r.rows("tokens", r.num_prefix + r.num_keep, dtype, device)
        background = None
        if r.num_extra:  # half of the samples
            background = r.rows("background", r.num_prefix + r.num_tokens, dtype, device)
        return tokens, r.index(device), r.num_tokens, r.num_prefix, background

    return args


def _weights(r: _Rows, dtype: torch.dtype, device: Any) -> Tensor:
    shape = (r.batch, r.num_tokens)
    value = random(f"{r.name} weights", shape, torch.float64).abs() + 0.1
    return lay_out(value.to(device, dtype), r.layout)


def _fuse_args(r: _Rows, normalize: bool) -> Callable[[Any, torch.dtype], tuple[Any, ...]]:
    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        tokens = r.rows("tokens", r.num_prefix + r.num_tokens, dtype, device)
        return tokens, _weights(r, dtype, device), r.index(device), r.num_prefix, normalize

    return args


def _fuse_backward_args(r: _Rows, normalize: bool) -> Callable[[Any, torch.dtype], tuple[Any, ...]]:
    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        grad = random(f"{r.name} grad", (r.batch, *r.row), dtype, device)
        return lay_out(grad, r.layout), *_fuse_args(r, normalize)(device, dtype)

    return args


def _row_samples(make: Callable[[_Rows], Any]) -> tuple[Sample, ...]:
    return tuple(Sample(r.name, make(r), r.traced) for r in _ROWS)


def _fuse_samples(make: Callable[[_Rows, bool], Any]) -> tuple[Sample, ...]:
    flat = [replace(r, num_extra=0) for r in _ROWS if len(r.row) == 1]
    return (
        *(Sample(f"{r.name}, mean", make(r, True), r.traced) for r in flat),
        *(Sample(f"{r.name}, sum", make(r, False), r.name == "plain") for r in flat),
    )


def _select_samples() -> tuple[Sample, ...]:
    def make(batch: int, num_tokens: int, num_keep: int, layout: str) -> Any:
        def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
            name = _unique("scores", (batch, num_tokens))
            return lay_out(random(name, (batch, num_tokens), dtype, device), layout), num_keep

        return args

    shapes = [
        (2, 9, 4), (1, 1, 1), (1, 1, 0), (0, 5, 2), (3, 0, 0), (2, 7, 7), (2, 7, 0), (5, 64, 63),
        (3, 65, 1), (2, 196, 137), (1, 1000, 333), (33, 3, 2),
    ]  # fmt: skip
    return (
        *(Sample(f"{s}", make(*s, "contiguous"), i < 8) for i, s in enumerate(shapes)),
        *(Sample(f"{layout}", make(4, 31, 12, layout), layout in ("swapped", "flat"))
          for layout in LAYOUTS[1:]),
    )  # fmt: skip


# -- references of the ops that are not public


def _compact_backward_reference(
    grad: Tensor, index: Tensor, num_tokens: int, num_prefix: int = 1, num_extra: int = 0
) -> Tensor:
    kept = torch.cat([grad[:, :num_prefix], grad[:, num_prefix + num_extra :]], dim=1)
    return spot_ext.scatter_tokens_reference(kept, index, num_tokens, num_prefix)


def _fuse_backward_reference(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    index: Tensor,
    num_prefix: int = 1,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    leaves = tokens.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = spot_ext.fuse_tokens_reference(*leaves, index, num_prefix, normalize)
        return torch.autograd.grad(out, leaves, grad)


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
    return out, stats, _lse(q, k, everything, keep, scale, num_prefix, bias)


@torch.no_grad()
def _lse(
    q: Tensor, k: Tensor, named: Tensor, keep: Tensor | None, scale: float | None, num_prefix: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Log-sum-exp [B, N, H] over the keys that are `named` and not hidden by `keep`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * factor
    if bias is not None:
        logits = logits + bias.to(wide)
    if keep is not None:
        kept = torch.nn.functional.pad(keep > 0.5, (num_prefix, 0), value=True)
        own = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
        named = named & (kept[:, None, None, :] | own)
    return logits.masked_fill(~named, -math.inf).logsumexp(-1).transpose(1, 2)


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
    leaves = _leaves(q, k, v, keep, bias)
    with torch.enable_grad():
        results = spot_ext.attention_stats_reference(
            *leaves, scale=scale, num_prefix=num_prefix, class_token=class_token,
            need_stats=grad_stats is not None,
        )  # fmt: skip
    asked = True, True, True, keep_grad, bias_grad
    return _gradients_of(results, (grad_out, grad_stats), leaves, asked)


def _leaves(*values: Tensor | None) -> list[Any]:
    return [x if x is None else x.detach().clone().requires_grad_() for x in values]


def _gradients_of(
    results: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    leaves: list[Any],
    asked: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v in their dtype; of the rest in a wide one, empty where not asked for."""
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    pairs = [(x, g.to(x.dtype)) for x, g in zip(results, grads, strict=True) if g is not None]
    wanted = [x for x, flag in zip(leaves, asked, strict=True) if flag]
    with torch.enable_grad():
        # A term of no weight reaches every leaf, also where the result does not depend on it.
        loss = sum((x * g).sum() for x, g in pairs) + sum(0 * x.sum() for x in wanted)
        found = list(torch.autograd.grad(loss, wanted))
    empty = leaves[0].new_empty(0, dtype=wide)
    rest = [found.pop(3).to(wide) if flag else empty for flag in asked[3:]]
    return *found, *rest


@dataclass(frozen=True)
class _Attention:
    name: str
    batch: int = 2
    num_tokens: int = 7
    heads: int = 2
    dim: int = 4
    num_prefix: int = 1
    class_token: bool = True
    keep: str = ""  # random, all, none
    bias: int | None = None  # its batch size; -1 for the batch
    scale: float | None = None
    need_stats: bool = True
    layout: str = "qkv"
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape = (self.batch, self.num_tokens, self.heads, self.dim)
        if self.layout == "qkv":  # as a fused projection gives them
            packed = random(self.name, (*shape[:2], 3, *shape[2:]), dtype, device)
            q, k, v = packed.unbind(2)
        else:
            q, k, v = (random(f"{self.name} {x}", shape, dtype, device) for x in "qkv")
            q = lay_out(q, self.layout)
            if self.layout != "flat":  # equal keys or values would leave no gradient
                k, v = lay_out(k, self.layout), lay_out(v, self.layout)
        keep = bias = None
        if self.keep:
            keep = self.mask(device, dtype)
        if self.bias is not None:
            batch = self.batch if self.bias < 0 else self.bias
            size = (batch, self.heads, self.num_tokens, self.num_tokens)
            bias = random(f"{self.name} bias", size, dtype, device)
        return (
            q, k, v, keep, bias, self.scale, self.num_prefix, self.class_token, self.need_stats
        )  # fmt: skip

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

    def incoming(
        self, device: Any, dtype: torch.dtype, need_stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        shape = (self.batch, self.num_tokens, self.heads)
        grad = random(f"{self.name} grad", (*shape, self.dim), dtype, device)
        grad_stats = random(f"{self.name} stats", (*shape, 6), wide, device) if need_stats else None
        return lay_out(grad, "contiguous" if self.layout == "qkv" else self.layout), grad_stats

    def mask(self, device: Any, dtype: torch.dtype) -> Tensor:
        shape = (self.batch, self.num_tokens - self.num_prefix)
        seeded = generator(f"{self.name} keep")
        value = {"random": 0.6, "all": 1.0, "none": 0.0}[self.keep]
        return (torch.rand(shape, generator=seeded) < value).to(device, dtype)


_ATTENTION = (
    _Attention("plain", traced=True),
    _Attention("masked", keep="random"),
    _Attention("masked with bias", keep="random", bias=1, traced=True),
    _Attention("bias of one", bias=1),
    _Attention("bias of each", bias=-1),
    _Attention("keep all", keep="all"),
    _Attention("keep none", keep="none"),
    _Attention("no statistics", keep="random", need_stats=False, traced=True),
    _Attention("no class token", class_token=False, keep="random"),
    _Attention("no prefix", num_prefix=0, class_token=False, keep="random", traced=True),
    _Attention("no prefix, no mask", num_prefix=0, class_token=False),
    _Attention("five prefix tokens", num_tokens=9, num_prefix=5, keep="random", traced=True),
    _Attention("prefix only", num_tokens=3, num_prefix=3, keep="random"),
    _Attention("one token", num_tokens=1, traced=True),
    _Attention("one patch", num_tokens=1, num_prefix=0, class_token=False, keep="random"),
    _Attention("no tokens", num_tokens=0, num_prefix=0, class_token=False),
    _Attention("empty batch", batch=0, keep="random", traced=True),
    _Attention("no heads", heads=0, keep="random"),
    _Attention("one channel", dim=1, keep="random"),
    _Attention("scaled", scale=0.37, keep="random"),
    _Attention("negative scale", scale=-1.5, keep="random"),
    _Attention("head dim 33", dim=33, heads=3),
    _Attention("head dim 64", dim=64, num_tokens=50, keep="random"),
    _Attention("ViT", batch=1, num_tokens=197, dim=32, keep="random"),
    *(_Attention(f"{layout}", layout=layout, keep="random", traced=layout == "swapped")
      for layout in LAYOUTS),
)  # fmt: skip


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
    return out, stats, _lse(q, k, named_keys(index, q.shape[1]), keep, scale, num_prefix)


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
    leaves = _leaves(q, k, v, keep)
    with torch.enable_grad():
        results = spot_ext.sparse_attention_reference(
            *leaves[:3], index, leaves[3], scale=scale, num_prefix=num_prefix,
            class_token=class_token, need_stats=grad_stats is not None,
        )  # fmt: skip
    return _gradients_of(results, (grad_out, grad_stats), leaves, (True, True, True, keep_grad))


def random_keys(
    name: str, shape: tuple[int, int, int], num_tokens: int, named: int, order: str = "ascending"
) -> Tensor:
    """[*shape, named] int32 distinct keys of each query; "padded" rows end in -1, some are all."""
    seeded = generator(f"keys {name}")
    keys = torch.rand((*shape, num_tokens), generator=seeded).argsort(-1)[..., :named]
    if order != "shuffled":
        keys = keys.sort(-1).values
    if order == "padded":
        left = torch.randint(0, named + 1, (*shape, 1), generator=seeded)
        left[:, :, ::3] = 0
        keys = keys.masked_fill(torch.arange(named) >= left, -1)
    if order == "empty":
        keys = keys.masked_fill(keys >= 0, -1)
    return keys.to(torch.int32)


@dataclass(frozen=True)
class _Sparse(_Attention):
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


def exact_values(name: str, shape: tuple[int, ...], low: int, high: int, part: float = 1.0) -> Any:
    """Eighths between low and high, of which `part` is not 0: sums of products stay exact."""
    seeded = generator(f"exact {name}")
    value = torch.randint(low, high + 1, shape, generator=seeded).double() / 8
    return value * (torch.rand(shape, generator=seeded) < part)


@dataclass(frozen=True)
class _Connectivity:
    name: str
    batch: int = 2
    heads: int = 2
    queries: int = 9
    num_prefix: int = 1
    rank: int = 5
    budget: int = 4
    columns: int | None = None  # of the full grid, of which those in play are drawn
    keep: str = ""  # random, all, none
    coef_topk: int | None = None
    threshold: float | None = None
    part: float = 0.7  # of the basis that is not 0
    coefficients_layout: str = "contiguous"
    basis_layout: str = "contiguous"
    columns_layout: str = "contiguous"
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape = self.batch, self.heads, self.queries, self.rank
        coefficients = exact_values(f"{self.name} coefficients", shape, -4, 8)
        basis = exact_values(f"{self.name} basis", (self.rank, self.grid), 1, 6, self.part)
        return (
            lay_out(coefficients.to(device, dtype), self.coefficients_layout),
            lay_out(basis.to(device, dtype), self.basis_layout),
            *self.choice(device, dtype),
        )

    @property
    def grid(self) -> int:
        """Columns of the basis."""
        return self.queries + self.num_prefix if self.columns is None else self.columns

    def choice(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments behind the basis."""
        columns = keep = None
        if self.columns is not None:
            in_play = self.queries + self.num_prefix
            drawn = random_index(f"{self.name} columns", self.batch, self.columns, in_play)
            columns = lay_out(drawn.to(device), self.columns_layout)
        if self.keep:
            value = {"random": 0.6, "all": 1.0, "none": 0.0}[self.keep]
            flips = torch.rand((self.batch, self.queries), generator=generator(f"{self.name} keep"))
            keep = (flips < value).to(device, dtype)
        return self.budget, columns, keep, self.coef_topk, self.threshold


_CONNECTIVITY = (
    _Connectivity("plain", traced=True),
    _Connectivity("everything", columns=16, keep="random", coef_topk=3, threshold=0.3, budget=6,
                  traced=True),
    _Connectivity("columns", columns=23, traced=True),
    _Connectivity("columns of all", columns=10),
    _Connectivity("masked", keep="random", traced=True),
    _Connectivity("masked columns", keep="random", columns=15),
    _Connectivity("keep all", keep="all"),
    _Connectivity("keep none", keep="none", traced=True),
    _Connectivity("keep none, no prefix", keep="none", num_prefix=0),
    _Connectivity("threshold", threshold=0.5, budget=8, traced=True),
    _Connectivity("threshold of 0", threshold=0.0, part=0.3, budget=8),
    _Connectivity("negative threshold", threshold=-0.5, budget=8),
    _Connectivity("threshold beyond all", threshold=1e3),
    _Connectivity("topk of 1", coef_topk=1, traced=True),
    _Connectivity("topk of 3", coef_topk=3, rank=8),
    _Connectivity("topk of all", coef_topk=5),
    _Connectivity("topk beyond all", coef_topk=50),
    _Connectivity("budget of 1", budget=1),
    _Connectivity("budget of all", budget=10, traced=True),
    _Connectivity("budget of all, masked", budget=10, keep="random"),
    _Connectivity("one coefficient", rank=1, traced=True),
    _Connectivity("no coefficients", rank=0, budget=3),
    _Connectivity("no prefix", num_prefix=0, traced=True),
    _Connectivity("five prefix tokens", num_prefix=5, keep="random", traced=True),
    _Connectivity("one head", heads=1),
    _Connectivity("one column", queries=0, num_prefix=1, budget=1),
    _Connectivity("one query", queries=1, num_prefix=0, budget=1),
    _Connectivity("no queries", queries=0, num_prefix=3, budget=2),
    _Connectivity("no heads", heads=0),
    _Connectivity("empty batch", batch=0, keep="random", columns=12, traced=True),
    _Connectivity("all ties", part=0.0, keep="random"),
    _Connectivity("sparse basis", part=0.1, budget=7, queries=30, rank=9, coef_topk=4),
    _Connectivity("odd sizes", batch=3, heads=3, queries=67, num_prefix=2, rank=13, budget=19,
                  coef_topk=8, keep="random"),
    _Connectivity("ViT", queries=196, rank=32, budget=50, coef_topk=8, batch=1),
    _Connectivity("twelve ViT images", batch=12, queries=98, rank=16, budget=25, coef_topk=8,
                  columns=197, keep="random"),
    *(_Connectivity(f"{layout} coefficients", coefficients_layout=layout, keep="random",
                    traced=layout == "swapped") for layout in LAYOUTS[1:]),
    *(_Connectivity(f"{layout} basis", basis_layout=layout, columns=14) for layout in LAYOUTS[1:]),
    *(_Connectivity(f"{layout} columns", columns_layout=layout, columns=19)
      for layout in LAYOUTS[1:-1]),
)  # fmt: skip


# In the order of the op.
_PREDICTION_NAMES = (
    "q", "k", "down", "query_weight", "query_bias", "key_weight", "key_bias", "up", "budget",
    "columns", "keep", "scale", "coef_topk", "basis_threshold", "threshold",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction(_Connectivity):
    """Softmax is not exact: data are drawn until no set hangs on the rounding of a sum."""

    dim: int = 4
    channels: int | None = 8  # of the projections; None for none of them
    scale: float | None = None
    basis_threshold: float | None = None
    fused: bool = False  # one of the columns is of no token of the grid
    rows_layout: str = "qkv"  # of q and k, by default those of a fused projection
    down_layout: str = "contiguous"
    weights_layout: str = "contiguous"

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        return self.drawn(_first_clear(self, dtype), device, dtype)

    def drawn(self, number: int, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
            drawn = random(f"{self.name} {name} {number}", shape, torch.float64)
            return (scale * drawn).to(device, dtype)

        tokens = self.num_prefix + self.queries
        if self.rows_layout == "qkv":
            packed = normal("q", self.batch, tokens, 3, self.heads, self.dim)
            q, k = packed[:, self.num_prefix :, 0], packed[:, :, 1]
        else:
            q = normal("q", self.batch, self.queries, self.heads, self.dim)
            k = normal("k", self.batch, tokens, self.heads, self.dim)
            q, k = lay_out(q, self.rows_layout), lay_out(k, self.rows_layout)
        down = normal("down", self.grid, self.rank, scale=tokens**-0.5)
        projections: tuple[Any, ...] = (None,) * 4
        if self.channels is not None:
            size, share = (self.channels, self.dim), max(self.dim, 1) ** -0.5
            projections = (
                self._weight(normal("query weight", *size, scale=share)),
                self._weight(normal("query bias", 1, self.channels, scale=0.5))[0],
                self._weight(normal("key weight", *size, scale=share)),
                self._weight(normal("key bias", 1, self.channels, scale=0.5))[0],
            )
        up = normal("up", self.grid, self.rank)
        seeded = generator(f"{self.name} part {number}")
        up = up * (torch.rand(up.shape, generator=seeded) < self.part).to(device)
        budget, columns, keep, coef_topk, threshold = self.choice(device, dtype)
        if self.fused:
            columns = columns.clone()
            columns[:, self.num_prefix] = self.grid
        return (
            q, k, lay_out(down, self.down_layout), *projections, lay_out(up, self.basis_layout),
            budget, columns, keep, self.scale, coef_topk, self.basis_threshold, threshold,
        )  # fmt: skip

    def _weight(self, value: Tensor) -> Tensor:
        return lay_out(value, self.weights_layout)


@functools.cache
def _first_clear(sample: Prediction, dtype: torch.dtype) -> int:
    """Which draw of a sample is the first whose sets rounding cannot change."""
    return next(n for n in range(1000) if clear_of_rounding(*sample.drawn(n, "cpu", dtype)))


def prediction_logits(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Tensor | None,
    key_weight: Tensor | None, key_bias: Tensor | None, columns: Tensor | None,
    keep: Tensor | None, scale: float | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, N-P, R] in `dtype`, with keys projected first and with keys added up first.

    Without projections the second adds up in another order.
    """
    q, k, down = q.to(dtype), k.to(dtype), down.to(dtype)
    tokens = torch.arange(k.shape[1], device=k.device)[None] if columns is None else columns
    seen = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if keep is not None:
        seen[:, k.shape[1] - keep.shape[1] :] = keep > 0.5
    seen = seen & (tokens < down.shape[0])
    down = F.pad(down, (0, 0, 0, 1))[tokens].expand(*k.shape[:2], -1) * seen[..., None]
    k = torch.where(seen[..., None, None], k, 0)
    factor = q.shape[3] ** -0.5 if q.shape[3] else 1.0
    sums = torch.einsum("bnr,bnhd->bhrd", down, k)
    first = torch.einsum("bihd,bhrd->bhir", q, sums)
    second = torch.einsum("bihd,bnhd->bhin", q, k) @ down[:, None]
    if query_weight is not None:
        weights = (x.to(dtype) for x in (query_weight, query_bias, key_weight, key_bias))
        to_query, plus_query, to_key, plus_key = weights
        factor = to_query.shape[0] ** -0.5 if to_query.shape[0] else 1.0
        keys = torch.einsum("bnr,bnhc->bhrc", down, k @ to_key.mT + plus_key)
        first = torch.einsum("bihc,bhrc->bhir", q @ to_query.mT + plus_query, keys)
        keys = sums @ to_key.mT + down.sum(1)[:, None, :, None] * plus_key
        second = torch.einsum("bihd,bhrd->bhir", q, keys @ to_query)
        second = second + (keys @ plus_query)[:, :, None]
    factor = factor if scale is None else scale
    return factor * first, factor * second


def rounding_of_logits(*args: Any, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Exact logits, and the most that either order of products loses in `dtype`."""
    exact, other = prediction_logits(*args, dtype=torch.float64)
    orders = (other,) if dtype == torch.float64 else prediction_logits(*args, dtype=dtype)
    if not exact.numel():
        return exact, 0.0
    return exact, max((order - exact).abs().max().item() for order in orders)


def basis_of(up: Tensor, threshold: float | None) -> Tensor:
    """[R, n + 1] in float64: the last column is that of tokens that are not of the grid."""
    basis = up.double().mT
    if threshold is not None:
        basis = torch.where(basis.abs() > threshold, basis.abs(), 0.0)
    return F.pad(basis, (0, 1))


def clear_of_rounding(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Tensor | None,
    key_weight: Tensor | None, key_bias: Tensor | None, up: Tensor, budget: int,
    columns: Tensor | None, keep: Tensor | None, scale: float | None, coef_topk: int | None,
    basis_threshold: float | None, threshold: float | None,
) -> bool:  # fmt: skip
    """Whether all sets of `predict_connectivity` keep away from ties by far more than float32's
    rounding; ties of sums that are exact do not count."""
    logits, rounding = rounding_of_logits(
        q, k, down, query_weight, query_bias, key_weight, key_bias, columns, keep, scale,
        dtype=torch.float32,
    )  # fmt: skip
    margin = max(1e-5, 8 * rounding)
    coefficients, basis = logits.softmax(dim=-1), basis_of(up, basis_threshold)
    used = logits.shape[-1]
    if coef_topk is not None and coef_topk < used:
        used = coef_topk
        best, order = logits.sort(dim=-1, descending=True, stable=True)
        last, next_ = best[..., used - 1], best[..., used]
        # Of no channels, or of no keys, all logits are 0.
        if (~((last == 0) & (next_ == 0)) & (last - next_ < margin)).any():
            return False
        coefficients = coefficients.scatter(-1, order[..., used:], 0.0)
    if columns is None:
        approx = coefficients @ basis[:, :-1]
    else:
        approx = coefficients @ basis.mT[columns].mT[:, None]
    margin *= basis.abs().max().item() if basis.numel() else 1.0
    if threshold is not None:
        if ((approx != 0) & ((approx - threshold).abs() < margin)).any():
            return False
        approx = approx.masked_fill(approx <= threshold, -math.inf)
    if keep is not None:
        dropped = F.pad(keep == 0, (approx.shape[-1] - keep.shape[1], 0))
        approx = approx.masked_fill(dropped[:, None, None], -math.inf)
    if budget == approx.shape[-1]:
        return True
    best = approx.sort(dim=-1, descending=True).values
    last, next_ = best[..., budget - 1], best[..., budget]
    exact = (last == next_) & ((last == 0) | last.isinf() | (used == 1))
    return not (~exact & (last - next_ < margin)).any()


# At the default sizes keys are projected to 2 channels before they are added up, to 8 after.
_PREDICTION = (
    Prediction("plain", traced=True),
    Prediction("everything", columns=16, keep="random", coef_topk=3, threshold=0.1, budget=6,
                channels=2, scale=0.7, basis_threshold=0.5, fused=True, traced=True),
    Prediction("basis threshold", basis_threshold=0.5, traced=True),
    Prediction("basis threshold of 0", basis_threshold=0.0, coef_topk=3),
    Prediction("negative basis threshold", basis_threshold=-1.0),
    Prediction("basis threshold beyond all", basis_threshold=1e3),
    Prediction("fused token", columns=13, fused=True, traced=True),
    Prediction("fused token, projected first", columns=13, fused=True, channels=2, keep="random"),
    Prediction("fused token, no projections", columns=13, fused=True, channels=None),
    Prediction("projected first", channels=2, traced=True),
    Prediction("projected first, columns", channels=2, columns=23, coef_topk=3),
    Prediction("projected first, masked", channels=2, keep="random", traced=True),
    Prediction("no projections", channels=None, traced=True),
    Prediction("no projections, columns", channels=None, columns=23, coef_topk=3),
    Prediction("no projections, masked columns", channels=None, columns=15, keep="random"),
    Prediction("columns", columns=23, traced=True),
    Prediction("masked", keep="random", traced=True),
    Prediction("masked columns", keep="random", columns=15),
    Prediction("keep all", keep="all"),
    Prediction("keep none", keep="none"),
    Prediction("keep none, no prefix", keep="none", num_prefix=0),
    Prediction("scaled", scale=2.0),
    Prediction("scale 0", scale=0.0, coef_topk=3),
    Prediction("negative scale, no projections", scale=-1.5, channels=None),
    Prediction("threshold", threshold=0.2, budget=8, traced=True),
    Prediction("threshold of 0", threshold=0.0, part=0.3, budget=8),
    Prediction("threshold beyond all", threshold=1e3),
    Prediction("topk of 1", coef_topk=1, traced=True),
    Prediction("topk of 8", coef_topk=8, rank=12),
    Prediction("topk of all", coef_topk=5),
    Prediction("topk beyond all", coef_topk=50),
    Prediction("budget of 1", budget=1),
    Prediction("budget of all", budget=10),
    Prediction("budget of all, masked", budget=10, keep="random"),
    Prediction("one coefficient", rank=1, traced=True),
    Prediction("no coefficients", rank=0, budget=3),
    Prediction("one channel", channels=1),
    Prediction("no channels", channels=0, coef_topk=3),
    Prediction("head dim 1", dim=1),
    Prediction("head dim 1, no projections", dim=1, channels=None),
    Prediction("head dim 0", dim=0),
    Prediction("head dim 0, no projections", dim=0, channels=None, coef_topk=3),
    Prediction("33 channels", dim=33, channels=33, rank=17, coef_topk=8),
    Prediction("17 of 65 channels", dim=65, channels=17, rank=33, coef_topk=8, queries=20),
    Prediction("no prefix", num_prefix=0, traced=True),
    Prediction("five prefix tokens", num_prefix=5, keep="random"),
    Prediction("one head", heads=1),
    Prediction("one column", queries=0, num_prefix=1, budget=1),
    Prediction("one query", queries=1, num_prefix=0, budget=1),
    Prediction("no queries", queries=0, num_prefix=3, budget=2),
    Prediction("no heads", heads=0),
    Prediction("empty batch", batch=0, keep="random", columns=12, traced=True,
                rows_layout="contiguous"),  # opcheck cannot clone others
    Prediction("all ties", part=0.0, keep="random"),
    Prediction("sparse basis", part=0.1, budget=7, queries=30, rank=9, coef_topk=4),
    Prediction("odd sizes", batch=3, heads=3, queries=67, num_prefix=2, rank=13, budget=19,
                coef_topk=8, keep="random", dim=7),
    Prediction("odd sizes, projected first", batch=3, heads=3, queries=67, num_prefix=2, rank=13,
                budget=19, coef_topk=8, columns=90, dim=7, channels=3),
    *(Prediction(f"ViT, {channels} channels", batch=1, heads=1, queries=196, rank=32, budget=50,
                  coef_topk=8, dim=16, channels=channels) for channels in (None, 8, 32)),
    Prediction("twelve images", batch=12, heads=1, queries=60, rank=16, budget=15, coef_topk=8,
                columns=100, keep="random", dim=8),
    *(Prediction(f"{layout} q and k", rows_layout=layout, keep="random", columns=14,
                  channels=(None, 2, 8)[number % 3], traced=layout == "swapped")
      for number, layout in enumerate(LAYOUTS)),
    *(Prediction(f"{layout} down", down_layout=layout, columns=14) for layout in LAYOUTS[1:]),
    *(Prediction(f"{layout} weights of {channels}", weights_layout=layout, coef_topk=3,
                  channels=channels, traced=layout == "stepped" and channels == 2)
      for layout in LAYOUTS[1:] for channels in (2, 8)),
    *(Prediction(f"{layout} up", basis_layout=layout, columns=14, fused=layout == "padded",
                 basis_threshold=(None, 0.5)[number % 2])
      for number, layout in enumerate(LAYOUTS[1:-2])),
)  # fmt: skip


def relevance_reference(
    tokens: Tensor | None,
    features: Tensor | None,
    keep: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """`token_relevance_reference` with what the op leaves for its backward pass."""
    *parameters, eps = rest if len(rest) == 11 else (*rest, 1e-5)
    logits = spot_ext.token_relevance_reference(tokens, features, keep, *parameters, eps=eps)
    norm_weight, norm_bias, remap_weight, remap_bias, fc1_weight, fc1_bias, fc2_weight = parameters[
        :7
    ]
    remapped = shared = logits.new_empty(0, dtype=fc1_weight.dtype)
    once = fc1_bias
    parts, columns = [], [fc1_weight[:, :0]]
    with torch.no_grad():
        if tokens is not None:
            normed = F.layer_norm(tokens, tokens.shape[2:], norm_weight, norm_bias, eps)
            remapped = F.linear(normed, remap_weight)
            local, z = F.gelu(remapped + remap_bias).chunk(2, dim=-1)
            weight = torch.ones_like(z[..., 0]) if keep is None else keep
            weight = weight.to(logits.dtype)
            total = (z.to(logits.dtype) * weight[..., None]).sum(dim=1)
            shared = (total / weight.sum(dim=1, keepdim=True).clamp(min=1)).to(z.dtype)
            half = local.shape[2]
            once = F.linear(shared, fc1_weight[:, half : 2 * half], fc1_bias)[:, None]
            parts, columns = [local], [fc1_weight[:, :half]]
        if features is not None:
            parts.append(features)
            columns.append(fc1_weight[:, fc1_weight.shape[1] - features.shape[2] :])
        hidden1 = F.linear(torch.cat(parts, -1), torch.cat(columns, 1))
        hidden2 = F.linear(F.gelu(hidden1 + once), fc2_weight)
    return logits, remapped, shared, hidden1, hidden2


def relevance_backward_reference(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of the definition; it looks at none of the forward pass's results."""
    inputs, (eps, *wanted) = (
        args[:13],
        (*args[18:], *(1e-5, True, True, True, True)[len(args) - 18 :]),
    )
    wide = grad.dtype
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    flags = [*wanted[:2], wanted[2] and inputs[0] is not None, *[wanted[3]] * 10]
    asked = [x for x, flag in zip(leaves, flags, strict=True) if flag and x is not None]
    grads = iter(())
    if asked:
        with torch.enable_grad():
            logits = spot_ext.token_relevance_reference(*leaves, eps=eps)
            grads = iter(
                torch.autograd.grad(
                    logits, asked, grad.to(logits.dtype), allow_unused=True, materialize_grads=True
                )
            )
    empty = inputs[7].new_empty(0)
    found = [
        next(grads) if flag and x is not None else empty
        for x, flag in zip(leaves, flags, strict=True)
    ]
    found[2] = found[2].to(wide)
    return tuple(found)


@dataclass(frozen=True)
class _Relevance:
    name: str
    batch: int = 2
    num_tokens: int = 7
    channels: int | None = 5  # None: no embeddings
    remap: int = 6
    features: int | None = 3
    hidden1: int = 4
    hidden2: int = 3
    keep: str = "random"  # random, all, none, soft; "" for None
    layout: str = "contiguous"
    eps: float = 1e-5
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, True)
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        def normal(what: str, *shape: int, scale: float = 1.0) -> Tensor:
            value = random(f"{self.name} {what}", shape, torch.float64) * scale
            return value.to(device, dtype)

        def linear(what: str, rows: int, width: int) -> list[Tensor]:
            weight = normal(f"{what} weight", rows, width, scale=max(width, 1) ** -0.5)
            transposed = "reversed" if self.layout == "reversed" else "contiguous"
            return [lay_out(weight, transposed), normal(f"{what} bias", rows, scale=0.2)]

        images = self.batch, self.num_tokens
        tokens = features = keep = None
        embedding: list[Tensor | None] = [None] * 4
        width = self.features or 0
        if self.channels is not None:
            tokens = lay_out(normal("tokens", *images, self.channels), self.layout)
            scale = normal("norm weight", self.channels, scale=0.2) + 1
            shift = normal("norm bias", self.channels, scale=0.2)
            embedding = [scale, shift, *linear("remap", self.remap, self.channels)]
            width += self.remap
        if self.features is not None:
            features = lay_out(normal("features", *images, self.features), self.layout)
        if self.keep == "soft":
            keep = torch.rand(images, generator=generator(f"{self.name} keep")).to(device, dtype)
        elif self.keep:
            value = {"random": 0.6, "all": 1.0, "none": 0.0}[self.keep]
            drawn = torch.rand(images, generator=generator(f"{self.name} keep"))
            keep = lay_out((drawn < value).to(device, dtype), self.layout)
        return (
            tokens, features, keep, *embedding, *linear("fc1", self.hidden1, width),
            *linear("fc2", self.hidden2, self.hidden1), *linear("fc3", 2, self.hidden2), self.eps,
        )  # fmt: skip

    def backward_args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        *inputs, eps = self.args(device, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        grad = random(f"{self.name} grad", (self.batch, self.num_tokens, 2), wide, device)
        exact = [x.double() if isinstance(x, Tensor) else x for x in inputs]
        logits, *rest = (x.detach() for x in relevance_reference(*exact, eps))
        saved = logits.to(wide), *(x.to(dtype) for x in rest)
        return lay_out(grad, self.layout), *inputs, *saved, eps, *self.wanted


_RELEVANCE = (
    _Relevance("plain", traced=True),
    _Relevance("wider", num_tokens=9, channels=24, remap=16, features=12, hidden1=14, hidden2=7,
               traced=True),
    _Relevance("no mask", keep="", traced=True),
    _Relevance("keep all", keep="all"),
    _Relevance("keep none", keep="none"),
    _Relevance("weights between 0 and 1", keep="soft"),
    _Relevance("no features", features=None, traced=True),
    _Relevance("zero features", features=0, traced=True),
    _Relevance("no embeddings", channels=None, features=8, keep="", traced=True),
    _Relevance("no embeddings, a mask", channels=None, features=8),
    _Relevance("no remap", remap=0),
    _Relevance("empty batch", batch=0, traced=True),
    _Relevance("no tokens", num_tokens=0, keep="", traced=True),
    _Relevance("no tokens, a mask", num_tokens=0),
    # One kept token, or equal ones, would leave no gradient of keep, only rounding errors.
    _Relevance("one token", batch=1, num_tokens=1, keep="", traced=True),
    _Relevance("one token, dropped", batch=1, num_tokens=1, keep="none"),
    _Relevance("three channels", channels=3),
    _Relevance("narrow", remap=2, features=1, hidden1=1, hidden2=1),
    _Relevance("no hidden units", hidden1=0, hidden2=0),
    _Relevance("large eps", eps=0.5),
    _Relevance("odd sizes", batch=3, num_tokens=37, channels=33, remap=34, features=19, hidden1=27,
               hidden2=13),
    _Relevance("ViT", num_tokens=196, channels=48, remap=48, features=36, hidden1=42, hidden2=21),
    _Relevance("twelve ViT images", batch=12, num_tokens=196, channels=48, remap=48, features=36,
               hidden1=42, hidden2=21),
    *(_Relevance(f"{layout}", layout=layout, keep="none" if layout == "flat" else "random",
                 traced=layout == "swapped") for layout in LAYOUTS[1:]),
)  # fmt: skip
_RELEVANCE_WANTED = tuple(
    replace(_RELEVANCE[1], name=f"wanted {wanted}", wanted=wanted, traced=not any(wanted))
    for wanted in itertools.product((True, False), repeat=4)
)

# -- error inputs


def _t(*shape: int, dtype: torch.dtype = _PLAIN, device: Any = "cpu") -> Tensor:
    return random(_unique("error", shape), shape, dtype, device)


def _i(device: Any, *rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _good_index(device: Any) -> Tensor:
    return _i(device, [0, 3], [4, 2])


def _index_errors(build: Callable[[Any, Any], tuple[Any, ...]], num_tokens: int = 5) -> list[Bad]:
    """Wrong indices for an op whose arguments with an index `i` are `build(device, i)`."""

    def bad(name: str, index: Callable[[Any], Any], raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(name, lambda device: build(device, index(device)), raises, words, **more)

    return [
        bad("index is a list", lambda d: [[0, 3], [4, 2]], TypeError, ("index", "list"),
            op_accepts=True),
        bad("index int32", lambda d: _good_index(d).int(), TypeError, ("index", "int"),
            op_words=("index", "int64", "int32")),
        bad("index float", lambda d: _good_index(d).float(), TypeError, ("index", "float"),
            op_words=("index", "int64", "float32")),
        bad("index of rank 1", lambda d: _good_index(d)[0], ValueError, ("index", "2 dim", "[2]")),
        bad("index of rank 3", lambda d: _good_index(d)[None], ValueError, ("index", "2 dim")),
        bad("index of another batch", lambda d: _i(d, [0], [1], [2]), ValueError,
            ("index", "size 2", "batch", "[3, 1]")),
        bad("index too long", lambda d: torch.arange(num_tokens + 1, device=d).expand(2, -1),
            ValueError, ("index", f"{num_tokens + 1}", f"{num_tokens}")),
        bad("index on another device", lambda d: _good_index(d).to("meta"), ValueError,
            ("index", "device")),
        bad("sparse index", lambda d: _good_index(d).to_sparse(), TypeError, ("index", "sparse"),
            layouts=True),
        bad("index too large", lambda d: _i(d, [0, 3], [num_tokens, 2]), ValueError,
            ("index[1, 0]", f"{num_tokens}", "out of range"), values=True),
        bad("index negative", lambda d: _i(d, [0, -1], [4, 2]), ValueError,
            ("index[0, 1]", "-1", "out of range"), values=True),
        bad("index huge", lambda d: _i(d, [0, 3], [4, 2**62]), ValueError,
            ("index[1, 1]", "out of range"), values=True),
        bad("index repeats", lambda d: _i(d, [0, 3], [2, 2]), ValueError,
            ("index[1, 1]", "repeats position 2"), values=True),
        bad("index repeats far apart", lambda d: _i(d, [3, 0, 3], [4, 2, 1]), ValueError,
            ("index[0, 2]", "repeats position 3"), values=True),
    ]  # fmt: skip


def _prefix_errors(build: Callable[[Any, Any], tuple[Any, ...]], high: int) -> list[Bad]:
    def bad(value: Any, raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(f"num_prefix {value!r}", lambda d: build(d, value), raises, words, **more)

    return [
        bad(-1, ValueError, ("num_prefix", "-1")),
        bad(high + 1, ValueError, ("num_prefix", f"{high}", f"{high + 1}")),
        bad(2**62, ValueError, ("num_prefix", f"{2**62}")),
        bad(2**70, ValueError, ("num_prefix",), op_words=("num_prefix",)),
        bad(1.0, TypeError, ("num_prefix", "float"), op_words=("num_prefix",)),
        bad("1", TypeError, ("num_prefix", "str"), op_words=("num_prefix",)),
        bad(True, TypeError, ("num_prefix", "bool"), op_accepts=True),
        bad(None, TypeError, ("num_prefix", "NoneType"), op_words=("num_prefix",)),
    ]


def _tensor_errors(
    name: str, build: Callable[[Any, Any], tuple[Any, ...]], good: tuple[int, ...], ranks: str
) -> list[Bad]:
    """A `name` that is no tensor, or a tensor of the wrong kind."""

    def bad(label: str, value: Callable[[Any], Any], words: Any, **more: Any) -> Bad:
        return Bad(f"{name} {label}", lambda d: build(d, value(d)), TypeError, words, **more)

    return [
        bad("is None", lambda d: None, (name, "NoneType"), op_words=()),
        bad("is a list", lambda d: [1.0], (name, "list"), op_words=()),
        bad("is sparse", lambda d: _t(*good, device=d).to_sparse(), (name, "sparse"), layouts=True),
        Bad(f"{name} is a number", lambda d: build(d, torch.tensor(1.0, device=d)), ValueError,
            (name, ranks, "[]")),
    ]  # fmt: skip


def _select_errors() -> tuple[Bad, ...]:
    return (
        *_tensor_errors("scores", lambda d, x: (x, 1), (2, 5), "2 dim"),
        Bad("scores of rank 1", lambda d: (_t(5, device=d), 2), ValueError, ("scores", "2 dim")),
        Bad("scores of rank 3", lambda d: (_t(2, 5, 1, device=d), 2), ValueError,
            ("scores", "2 dim", "[2, 5, 1]")),
        Bad("integer scores", lambda d: (_t(2, 5, dtype=torch.int64, device=d), 2), TypeError,
            ("scores", "float32", "bfloat16", "int64")),
        Bad("bool scores", lambda d: (_t(2, 5, dtype=torch.bool, device=d), 2), TypeError,
            ("scores", "bool")),
        Bad("complex scores", lambda d: (_t(2, 5, dtype=torch.complex64, device=d), 2), TypeError,
            ("scores", "complex64")),
        Bad("num_keep too large", lambda d: (_t(2, 5, device=d), 6), ValueError,
            ("num_keep", "between 0 and 5", "6")),
        Bad("num_keep negative", lambda d: (_t(2, 5, device=d), -1), ValueError,
            ("num_keep", "between 0 and 5", "-1")),
        Bad("num_keep of no tokens", lambda d: (_t(2, 0, device=d), 1), ValueError,
            ("num_keep", "between 0 and 0", "1")),
        Bad("num_keep of no images", lambda d: (_t(0, 3, device=d), 4), ValueError,
            ("num_keep", "between 0 and 3", "4")),
        Bad("num_keep float", lambda d: (_t(2, 5, device=d), 2.0), TypeError,
            ("num_keep", "float"), op_words=("num_keep",)),
        Bad("num_keep bool", lambda d: (_t(2, 5, device=d), True), TypeError,
            ("num_keep", "bool"), op_accepts=True),
        Bad("num_keep tensor", lambda d: (_t(2, 5, device=d), torch.tensor(2)), TypeError,
            ("num_keep", "Tensor"), op_accepts=True),
        Bad("num_keep huge", lambda d: (_t(2, 5, device=d), 2**70), ValueError, ("num_keep",)),
    )  # fmt: skip


def _companion_errors(name: str, rows: int, build: Callable[[Any, Any], Any]) -> list[Bad]:
    """Wrong `extra` or `background` rows beside float32 tokens [2, ., 3]."""

    def bad(label: str, value: Callable[[Any], Any], raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(f"{name} {label}", lambda d: build(d, value(d)), raises, words, **more)

    return [
        bad("is a list", lambda d: [1.0], TypeError, (name, "list"), op_words=(name,)),
        bad("of rank 2", lambda d: _t(2, rows, device=d), ValueError, (name, f"[2, {rows}]")),
        bad("of another dtype", lambda d: _t(2, rows, 3, dtype=torch.float64, device=d), TypeError,
            (name, "float32", "float64")),
        bad("of another batch", lambda d: _t(3, rows, 3, device=d), ValueError,
            (name, f"[3, {rows}, 3]")),
        bad("of other channels", lambda d: _t(2, rows, 4, device=d), ValueError,
            (name, f"[2, {rows}, 4]")),
        bad("on another device", lambda d: _t(2, rows, 3, device="meta"), ValueError,
            (name, "device")),
        bad("sparse", lambda d: _t(2, rows, 3, device=d).to_sparse(), TypeError, (name, "sparse"),
            layouts=True),
    ]  # fmt: skip


def _compact_errors() -> tuple[Bad, ...]:
    def tokens(device: Any) -> Tensor:
        return _t(2, 6, 3, device=device)

    return (
        *_tensor_errors("tokens", lambda d, x: (x, _good_index(d)), (2, 6, 3), "[B, tokens, ...]"),
        Bad("tokens of rank 1", lambda d: (_t(6, device=d), _good_index(d)), ValueError,
            ("tokens", "[B, tokens, ...]", "[6]")),
        Bad("quantized tokens", lambda d: (_quantized(d), _good_index(d)), TypeError,
            ("tokens", "quantized"), layouts=True),
        *_index_errors(lambda d, i: (tokens(d), i)),
        *_prefix_errors(lambda d, p: (tokens(d), _good_index(d), p), 6),
        Bad("prefix leaves too few", lambda d: (tokens(d), _i(d, [0, 1], [1, 0]), 5), ValueError,
            ("index", "2", "1")),
        *_companion_errors("extra", 2, lambda d, x: (tokens(d), _good_index(d), 1, x)),
    )  # fmt: skip


def _quantized(device: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(_t(2, 6, 3, device=device), 0.1, 0, torch.qint8)


def _count_errors(name: str, build: Callable[[Any, Any], tuple[Any, ...]]) -> list[Bad]:
    def bad(value: Any, raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(f"{name} {value!r}", lambda d: build(d, value), raises, words, **more)

    return [
        bad(-1, ValueError, (name, "-1")),
        bad(2**70, ValueError, (name,)),
        bad(5.0, TypeError, (name, "float"), op_words=(name,)),
        bad(None, TypeError, (name, "NoneType"), op_words=(name,)),
    ]


def _scatter_errors() -> tuple[Bad, ...]:
    def tokens(device: Any) -> Tensor:
        return _t(2, 3, 3, device=device)

    def indexed(device: Any, index: Any) -> tuple[Any, ...]:  # as many rows as the index asks for
        columns = index.shape[1] if isinstance(index, Tensor) and index.dim() == 2 else 2
        return _t(2, 1 + columns, 3, device=device), index, 5

    return (
        *_tensor_errors("tokens", lambda d, x: (x, _good_index(d), 5), (2, 3, 3),
                        "[B, tokens, ...]"),
        *_index_errors(indexed),
        *_prefix_errors(lambda d, p: (tokens(d), _good_index(d), 5, p), 3),
        *_count_errors("num_tokens", lambda d, n: (tokens(d), _good_index(d), n)),
        Bad("num_tokens below the index", lambda d: (tokens(d), _good_index(d), 1), ValueError,
            ("index", "2", "1")),
        Bad("rows missing", lambda d: (_t(2, 2, 3, device=d), _good_index(d), 5), ValueError,
            ("tokens", "size 3", "[2, 2, 3]")),
        Bad("rows left over", lambda d: (_t(2, 4, 3, device=d), _good_index(d), 5), ValueError,
            ("tokens", "size 3", "[2, 4, 3]")),
        *_companion_errors("background", 6, lambda d, x: (tokens(d), _good_index(d), 5, 1, x)),
        Bad("background too short",
            lambda d: (tokens(d), _good_index(d), 5, 1, _t(2, 5, 3, device=d)), ValueError,
            ("background", "size 6", "[2, 5, 3]")),
    )  # fmt: skip


def _compact_backward_errors() -> tuple[Bad, ...]:
    def grad(device: Any) -> Tensor:
        return _t(2, 4, 3, device=device)

    def indexed(device: Any, index: Any) -> tuple[Any, ...]:
        columns = index.shape[1] if isinstance(index, Tensor) and index.dim() == 2 else 2
        return _t(2, 2 + columns, 3, device=device), index, 5, 1, 1

    return (
        *_index_errors(indexed),
        *_prefix_errors(lambda d, p: (grad(d), _good_index(d), 5, p, 1), 4),
        *_count_errors("num_tokens", lambda d, n: (grad(d), _good_index(d), n, 1, 1)),
        *_count_errors("num_extra", lambda d, n: (grad(d), _good_index(d), 5, 1, n)),
        Bad("extra rows beyond grad", lambda d: (grad(d), _good_index(d), 5, 1, 2**62), ValueError,
            ("grad",)),
        Bad("rows missing", lambda d: (grad(d), _good_index(d), 5, 1, 2), ValueError,
            ("grad", "size 5", "[2, 4, 3]")),
    )  # fmt: skip


def _fuse_errors(lead: Callable[[Any], tuple[Any, ...]] = lambda device: ()) -> tuple[Bad, ...]:
    """Errors of `fuse_tokens`; of its backward when `lead` gives the incoming gradient."""

    def tokens(device: Any) -> Tensor:
        return _t(2, 6, 3, device=device)

    def weights(device: Any) -> Tensor:
        return _t(2, 5, device=device)

    def weighted(label: str, value: Callable[[Any], Any], raises: Any, words: Any, **m: Any) -> Bad:
        return Bad(
            f"weights {label}",
            lambda d: (*lead(d), tokens(d), value(d), _good_index(d)),
            raises,
            words,
            **m,
        )

    return (
        Bad("tokens of rank 2",
            lambda d: (*lead(d), _t(2, 6, device=d), weights(d), _good_index(d)),
            ValueError, ("tokens", "3 dim", "[2, 6]")),
        Bad("tokens of rank 4",
            lambda d: (*lead(d), _t(2, 6, 3, 1, device=d), weights(d), _good_index(d)),
            ValueError, ("tokens", "3 dim")),
        Bad("integer tokens",
            lambda d: (*lead(d), _t(2, 6, 3, dtype=torch.int32, device=d), weights(d),
                       _good_index(d)),
            TypeError, ("tokens", "float32", "int32")),
        *_index_errors(lambda d, i: (*lead(d), tokens(d), weights(d), i)),
        *_prefix_errors(lambda d, p: (*lead(d), tokens(d), weights(d), _good_index(d), p), 6),
        weighted("is a list", lambda d: [1.0], TypeError, ("weights", "list"), op_accepts=True),
        weighted("of rank 1", lambda d: _t(5, device=d), ValueError, ("weights", "2 dim")),
        weighted("of rank 3", lambda d: _t(2, 5, 1, device=d), ValueError, ("weights", "2 dim")),
        weighted("of another dtype", lambda d: weights(d).double(), TypeError,
                 ("weights", "float32", "float64")),
        weighted("of another batch", lambda d: _t(3, 5, device=d), ValueError,
                 ("weights", "size 2", "[3, 5]")),
        weighted("with the prefix", lambda d: _t(2, 6, device=d), ValueError,
                 ("weights", "size 5", "[2, 6]")),
        weighted("on another device", lambda d: weights("meta"), ValueError, ("weights", "device")),
        weighted("sparse", lambda d: weights(d).to_sparse(), TypeError, ("weights", "sparse"),
                 layouts=True),
        Bad("normalize is a string",
            lambda d: (*lead(d), tokens(d), weights(d), _good_index(d), 1, "no"), TypeError,
            ("normalize", "str"), op_words=("normalize",)),
        Bad("normalize is a number",
            lambda d: (*lead(d), tokens(d), weights(d), _good_index(d), 1, 1), TypeError,
            ("normalize", "int"), op_accepts=True),
    )  # fmt: skip


def _fuse_backward_errors() -> tuple[Bad, ...]:
    def build(device: Any, grad: Any) -> tuple[Any, ...]:
        return grad, _t(2, 6, 3, device=device), _t(2, 5, device=device), _good_index(device)

    return (
        *_fuse_errors(lambda d: (_t(2, 3, device=d),)),
        Bad("grad of rank 3", lambda d: build(d, _t(2, 1, 3, device=d)), ValueError,
            ("grad", "2 dim")),
        Bad("grad of another batch", lambda d: build(d, _t(1, 3, device=d)), ValueError,
            ("grad", "size 2", "[1, 3]")),
        Bad("grad of other channels", lambda d: build(d, _t(2, 4, device=d)), ValueError,
            ("grad", "size 3", "[2, 4]")),
        Bad("grad of another dtype", lambda d: build(d, _t(2, 3, device=d).double()), TypeError,
            ("grad", "float32", "float64")),
    )  # fmt: skip


def _attention_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values = {name: _t(*good, device=device) for name in "qkv"}
        values |= {"keep": None, "bias": None, "scale": None, "num_prefix": 1}
        values |= {"class_token": True, "need_stats": True}
        return tuple((values | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    return (
        *_operand_errors(build),
        bad("bias is a list", lambda d: {"bias": [1.0]}, TypeError, ("bias", "list"),
            op_words=("bias",)),
        bad("bias of rank 3", lambda d: {"bias": _t(2, 6, 6, device=d)}, ValueError,
            ("bias", "4 dim")),
        bad("bias integer", lambda d: {"bias": _t(1, 2, 6, 6, dtype=torch.int64, device=d)},
            TypeError, ("bias", "int64")),
        *(bad(f"bias {list(shape)}", lambda d, s=shape: {"bias": _t(*s, device=d)}, ValueError,
              ("bias", str(list(shape))))
          for shape in ((3, 2, 6, 6), (1, 1, 6, 6), (1, 2, 1, 6), (1, 2, 6, 1), (2, 2, 5, 5))),
        bad("bias on another device", lambda d: {"bias": _t(1, 2, 6, 6, device="meta")},
            ValueError, ("bias", "device")),
    )  # fmt: skip


def _operand_errors(build: Callable[..., tuple[Any, ...]]) -> list[Bad]:
    """Wrong arguments that every attention op has; `build(device, **changes)` starts from q, k, v
    [2, 6, 2, 4]."""
    good = (2, 6, 2, 4)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    errors = []
    for name in "qkv":
        errors += _tensor_errors(name, lambda d, x, n=name: build(d, **{n: x}), good, "4 dim")
        errors += [
            bad(f"{name} of rank 3", lambda d, n=name: {n: _t(2, 6, 8, device=d)}, ValueError,
                (name, "4 dim", "[2, 6, 8]")),
            bad(f"{name} integer", lambda d, n=name: {n: _t(*good, dtype=torch.int64, device=d)},
                TypeError, (name, "int64")),
        ]  # fmt: skip
    for name in "kv":
        errors += [
            bad(f"{name} of another {what}",
                lambda d, n=name, s=shape: {n: _t(*s, device=d)}, ValueError,
                (name, str(list(shape))))
            for what, shape in {"batch": (1, 6, 2, 4), "length": (2, 5, 2, 4),
                                "number of heads": (2, 6, 1, 4), "head dim": (2, 6, 2, 5)}.items()
        ]  # fmt: skip
        errors += [
            bad(f"{name} of another dtype", lambda d, n=name: {n: _t(*good, device=d).double()},
                TypeError, (name, "float32", "float64")),
            bad(f"{name} on another device", lambda d, n=name: {n: _t(*good, device="meta")},
                ValueError, (name, "device")),
        ]  # fmt: skip
    errors += [
        *(bad(f"head dim {dim}",
              lambda d, size=dim: {n: _t(2, 6, 2, size, device=d) for n in "qkv"}, ValueError,
              ("head dim", "between 1 and 256", f"got {dim}"))
          for dim in (0, 257)),
        *_prefix_errors(lambda d, p: build(d, num_prefix=p), 6),
        bad("class token without prefix", lambda d: {"num_prefix": 0}, ValueError,
            ("class_token", "num_prefix", "0")),
        *_keep_errors(lambda d, keep: build(d, keep=keep)),
        bad("scale is a string", lambda d: {"scale": "1"}, TypeError, ("scale", "str"),
            op_words=("scale",)),
        bad("scale is a tensor", lambda d: {"scale": torch.tensor(1.0)}, TypeError,
            ("scale", "Tensor"), op_accepts=True),
        bad("scale is a bool", lambda d: {"scale": True}, TypeError, ("scale", "bool"),
            op_accepts=True),
        bad("class_token is a string", lambda d: {"class_token": "no"}, TypeError,
            ("class_token", "str"), op_words=("class_token",)),
        bad("need_stats is a number", lambda d: {"need_stats": 1}, TypeError,
            ("need_stats", "int"), op_accepts=True),
    ]  # fmt: skip
    return errors


def _keep_errors(build: Callable[[Any, Any], tuple[Any, ...]]) -> list[Bad]:
    """Wrong masks beside 2 images of 5 patch tokens."""

    def bad(label: str, keep: Callable[[Any], Any], words: Any, raises: Any = ValueError,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(f"keep {label}", lambda d: build(d, keep(d)), raises, words, **more)

    return [
        bad("is a list", lambda d: [1.0], ("keep", "list"), TypeError, op_words=("keep",)),
        bad("of rank 1", lambda d: _t(5, device=d), ("keep", "2 dim")),
        bad("bool", lambda d: _t(2, 5, dtype=torch.bool, device=d), ("keep", "bool"), TypeError),
        bad("of another batch", lambda d: _t(1, 5, device=d), ("keep", "size 2", "[1, 5]")),
        bad("with the prefix", lambda d: _t(2, 6, device=d), ("keep", "size 5", "[2, 6]")),
        bad("on another device", lambda d: _t(2, 5, device="meta"), ("keep", "device")),
        *(bad(label, lambda d, v=value: torch.full((2, 5), v, device=d), ("keep", "0 or 1"),
              values=True)
          for label, value in (("between 0 and 1", 0.5), ("of 2", 2.0), ("NaN", math.nan))),
    ]  # fmt: skip


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
        values: dict[str, Any] = {name: _t(2, 6, 2, 4, device=device) for name in "qkv"}
        values |= {"index": _keys(device), "keep": None, "scale": None, "num_prefix": 1}
        values |= {"class_token": True, "need_stats": False}
        return tuple((values | changes).values())

    return (
        *_operand_errors(build),
        *_keys_errors(lambda d, index: build(d, index=index)),
    )


def _sparse_backward_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"grad_out": _t(*good, device=device)}
        values["grad_stats"] = _t(2, 6, 2, 6, device=device)
        values |= {name: _t(*good, device=device) for name in "qkv"}
        values |= {"index": _keys(device), "keep": None, "out": _t(*good, device=device)}
        values |= {"stats": _t(2, 6, 2, 6, device=device), "lse": _t(2, 6, 2, device=device)}
        return tuple((values | changes).values())

    return (
        *_saved_errors(build, ("keep",)),
        *_keys_errors(lambda d, index: build(d, index=index)),
    )


def _connectivity_errors() -> tuple[Bad, ...]:
    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"coefficients": _t(2, 3, 5, 4, device=device)}
        values["basis"] = _t(4, 6, device=device)
        return tuple((values | _choice() | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: _t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    return (
        *_tensor_errors("coefficients", lambda d, x: build(d, coefficients=x), (2, 3, 5, 4),
                        "4 dim"),
        resized("coefficients", 3, 5, 4, words=("4 dim",)),
        bad("more queries than columns", lambda d: {"coefficients": _t(2, 3, 7, 4, device=d)},
            ValueError, ("basis", "7", "6")),
        bad("coefficients integer",
            lambda d: {"coefficients": _t(2, 3, 5, 4, dtype=torch.int32, device=d)}, TypeError,
            ("coefficients", "float32", "int32")),
        bad("coefficients complex",
            lambda d: {"coefficients": _t(2, 3, 5, 4, dtype=torch.complex64, device=d)}, TypeError,
            ("coefficients", "complex64")),
        *_tensor_errors("basis", lambda d, x: build(d, basis=x), (4, 6), "2 dim"),
        resized("basis", 4, 6, 1, words=("2 dim",)),
        resized("basis", 3, 6, words=("size 4",)),
        bad("basis of another dtype", lambda d: {"basis": _t(4, 6, device=d).double()}, TypeError,
            ("basis", "float32", "float64")),
        bad("basis on another device", lambda d: {"basis": _t(4, 6, device="meta")}, ValueError,
            ("basis", "device")),
        bad("basis of too many columns", lambda d: {
            "basis": _t(4, 1, device=d).expand(4, 2**31 - 1),
            "columns": _i(d, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])}, ValueError,
            ("basis", "2^31", "columns", f"{2**31 - 1}")),
        *_choice_errors(build, 6),
    )  # fmt: skip


def _prediction_errors() -> tuple[Bad, ...]:
    shapes = {
        "q": (2, 5, 3, 2), "k": (2, 6, 3, 2), "down": (6, 4), "query_weight": (7, 2),
        "query_bias": (7,), "key_weight": (7, 2), "key_bias": (7,), "up": (6, 4),
    }  # fmt: skip
    projections = tuple(shapes)[3:7]

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {n: _t(*shape, device=device) for n, shape in shapes.items()}
        values |= {"scale": None, "basis_threshold": None} | _choice() | changes
        return tuple(values[name] for name in _PREDICTION_NAMES)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: _t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    return (
        *_tensor_errors("q", lambda d, x: build(d, q=x), shapes["q"], "4 dim"),
        *_tensor_errors("k", lambda d, x: build(d, k=x), shapes["k"], "4 dim"),
        *_tensor_errors("down", lambda d, x: build(d, down=x), shapes["down"], "2 dim"),
        *_tensor_errors("up", lambda d, x: build(d, up=x), shapes["up"], "2 dim"),
        resized("q", 2, 5, 6, words=("4 dim",)),
        resized("k", 2, 6, 6, words=("4 dim",)),
        resized("k", 1, 6, 3, 2, words=("size 2", "batch")),
        resized("k", 2, 6, 1, 2, words=("size 3", "heads")),
        resized("k", 2, 6, 3, 1, words=("size 2", "head dim")),
        resized("k", 2, 5, 3, 2, words=("size 6", "as up has tokens")),
        resized("down", 6, 4, 1, words=("2 dim",)),
        bad("down of other tokens", lambda d: {"down": _t(5, 4, device=d)}, ValueError,
            ("up", "size 5", "as down has", "[6, 4]")),
        resized("up", 24, words=("2 dim",)),
        resized("up", 5, 4, words=("size 6", "as down has")),
        bad("up of too many tokens", lambda d: {
            **{name: _t(1, 4, device=d).expand(2**31 - 1, 4) for name in ("down", "up")},
            "columns": _i(d, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])}, ValueError,
            ("up", "2^31", "rows", f"{2**31 - 1}")),
        resized("up", 6, 3, words=("size 4", "as down has")),
        bad("k of all tokens beside columns",
            lambda d: {"columns": _i(d, [0, 1, 2, 3, 4], [5, 4, 3, 2, 1])}, ValueError,
            ("k", "size 5", "as columns has", "[2, 6, 3, 2]")),
        resized("query_weight", 7, words=("2 dim",)),
        resized("query_weight", 7, 3, words=("size 2", "head dim")),
        bad("query_weight of other channels", lambda d: {"query_weight": _t(6, 2, device=d)},
            ValueError, ("query_bias", "size 6", "channels of query_weight", "[7]")),
        resized("query_bias", 7, 1, words=("1 dim",)),
        resized("query_bias", 6, words=("size 7", "channels of query_weight")),
        resized("key_weight", 14, words=("2 dim",)),
        resized("key_weight", 6, 2, words=("size 7", "channels of query_weight")),
        resized("key_weight", 7, 1, words=("size 2", "head dim")),
        resized("key_bias", 1, 7, words=("1 dim",)),
        resized("key_bias", 1, words=("size 7", "channels of query_weight")),
        *(bad(f"{name} missing", lambda d, n=name: {n: None}, ValueError,
              (f"{name} must be given", "as well as"))
          for name in projections),
        *(bad(f"{name} alone", lambda d, n=name: {other: None for other in projections if
              other != n}, ValueError, ("must be given", f"as well as {name}"))
          for name in projections),
        *(bad(f"{name} is a list", lambda d, n=name: {n: [1.0]}, TypeError, (name, "list"),
              op_words=(name,))
          for name in projections),
        bad("more queries than columns", lambda d: {"q": _t(2, 7, 3, 2, device=d)}, ValueError,
            ("up", "7", "6")),
        bad("q integer", lambda d: {"q": _t(2, 5, 3, 2, dtype=torch.int32, device=d)}, TypeError,
            ("q", "float32", "int32")),
        bad("q complex", lambda d: {"q": _t(2, 5, 3, 2, dtype=torch.complex64, device=d)},
            TypeError, ("q", "complex64")),
        *(bad(f"{name} of another dtype",
              lambda d, n=name: {n: _t(*shapes[n], device=d).double()}, TypeError,
              (name, "float32", "float64"))
          for name in ("k", "down", "up", *projections)),
        *(bad(f"{name} on another device", lambda d, n=name: {n: _t(*shapes[n], device="meta")},
              ValueError, (name, "device"))
          for name in ("k", "down", "up", *projections)),
        *(bad(f"{name} is a string", lambda d, n=name: {n: "1"}, TypeError, (name, "str"),
              op_words=(name,))
          for name in ("scale", "basis_threshold")),
        *(bad(f"{name} is a tensor", lambda d, n=name: {n: torch.tensor(1.0)}, TypeError,
              (name, "Tensor"), op_accepts=True)
          for name in ("scale", "basis_threshold")),
        *(bad(f"{name} is a bool", lambda d, n=name: {n: True}, TypeError, (name, "bool"),
              op_accepts=True)
          for name in ("scale", "basis_threshold")),
        *_choice_errors(build, 7),
    )  # fmt: skip


def _choice() -> dict[str, Any]:
    """Legal arguments of either op of connectivity from the budget on."""
    return {
        "budget": 3, "columns": None, "keep": None, "coef_topk": None, "threshold": None,
    }  # fmt: skip


def _choice_errors(build: Callable[..., tuple[Any, ...]], end: int) -> list[Bad]:
    """Wrong arguments that both have; `build(device, **changes)` starts from `_choice`, for 5
    queries of 2 images, 4 coefficients and 6 columns; those in play are to be below `end`."""

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...]) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: _t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    def named(device: Any, *row: int) -> dict[str, Any]:
        return {"columns": _i(device, [0, 1, 2, 3, 4, 5], list(row))}

    def numbers(name: str, *values: int) -> list[Bad]:
        return [
            *(bad(f"{name} {value}", lambda d, v=value: {name: v}, ValueError, (name, f"{value}"))
              for value in (0, -1, -(2**62), *values)),
            bad(f"{name} huge", lambda d: {name: 2**70}, ValueError, (name,), op_words=(name,)),
            bad(f"{name} float", lambda d: {name: 2.0}, TypeError, (name, "float"),
                op_words=(name,)),
            bad(f"{name} bool", lambda d: {name: True}, TypeError, (name, "bool"),
                op_accepts=True),
            bad(f"{name} is a string", lambda d: {name: "2"}, TypeError, (name, "str"),
                op_words=(name,)),
        ]  # fmt: skip

    return [
        *numbers("budget", 7, 2**40),
        bad("budget None", lambda d: {"budget": None}, TypeError, ("budget", "NoneType"),
            op_words=("budget",)),
        bad("budget of other columns", lambda d: {
            "columns": _i(d, [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]), "budget": 6}, ValueError,
            ("budget", "between 1 and 5", "6")),
        *numbers("coef_topk"),
        bad("columns is a list", lambda d: {"columns": [1]}, TypeError, ("columns", "list"),
            op_words=("columns",)),
        bad("columns int32", lambda d: {"columns": named(d, 0, 1, 2, 3, 4, 5)["columns"].int()},
            TypeError, ("columns", "int64", "int32")),
        bad("columns of rank 1", lambda d: {"columns": torch.arange(6, device=d)}, ValueError,
            ("columns", "2 dim", "[6]")),
        bad("columns of another batch", lambda d: {"columns": torch.arange(6, device=d)[None]},
            ValueError, ("columns", "size 2", "[1, 6]")),
        bad("columns too few", lambda d: {"columns": _i(d, [0, 1, 2, 3], [5, 4, 3, 2])},
            ValueError, ("columns", "5", "4")),
        bad("columns on another device",
            lambda d: {"columns": torch.zeros(2, 6, dtype=torch.int64, device="meta")}, ValueError,
            ("columns", "device")),
        bad("too many columns",
            lambda d: {"columns": _i(d, [0], [1]).expand(2, 2**31 - 1)}, ValueError,
            ("columns", "2^31", f"{2**31 - 1}")),
        bad("columns too large", lambda d: named(d, 0, 1, 2, 3, 4, end), ValueError,
            ("columns[1, 5]", f"in [0, {end})", f"got {end}"), values=True),
        bad("columns negative", lambda d: named(d, 0, -1, 2, 3, 4, 5), ValueError,
            ("columns[1, 1]", f"in [0, {end})", "got -1"), values=True),
        bad("columns huge", lambda d: named(d, 2**62, 1, 2, 3, 4, 5), ValueError,
            ("columns[1, 0]", f"in [0, {end})", f"got {2**62}"), values=True),
        *_keep_errors(lambda d, keep: build(d, keep=keep)),
        bad("threshold is a string", lambda d: {"threshold": "1"}, TypeError,
            ("threshold", "str"), op_words=("threshold",)),
        bad("threshold is a tensor", lambda d: {"threshold": torch.tensor(1.0)}, TypeError,
            ("threshold", "Tensor"), op_accepts=True),
        bad("threshold is a bool", lambda d: {"threshold": True}, TypeError,
            ("threshold", "bool"), op_accepts=True),
    ]  # fmt: skip


# -- FLOPs: 2 per multiply-accumulate


def _no_flops(*args: Any) -> tuple[int, int]:
    return 0, 0


def _fuse_flops(tokens: Tensor, weights: Tensor, index: Tensor, *args: Any) -> tuple[int, int]:
    count = 2 * weights.shape[0] * (weights.shape[1] - index.shape[1]) * tokens.shape[2]
    return count, count


def _fuse_backward_flops(grad: Tensor, *args: Any) -> tuple[int, int]:
    return 2 * _fuse_flops(*args)[0], 2 * _fuse_flops(*args)[1]


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


def _connectivity_flops(
    coefficients: Tensor, basis: Tensor, budget: int, columns: Tensor | None, keep: Any,
    coef_topk: int | None, *args: Any,
) -> tuple[int, int]:  # fmt: skip
    """The product with the coefficients that count, as if the basis were dense."""
    in_play = basis.shape[1] if columns is None else columns.shape[1]
    rows, rank = coefficients.shape[:3].numel(), coefficients.shape[3]
    used = rank if coef_topk is None else min(rank, coef_topk)
    return 2 * rows * used * in_play, 2 * rows * used * in_play


def _prediction_flops(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Any,
    key_weight: Any, key_bias: Any, up: Tensor, budget: int, columns: Tensor | None, keep: Any,
    scale: Any, coef_topk: int | None, *args: Any,
) -> tuple[int, int]:  # fmt: skip
    """That, and the products of a head, in the order that costs less; softmax may add a few
    operations per entry."""
    (batch, queries, heads, dim), tokens, rank = q.shape, k.shape[1], down.shape[1]
    added_up, met = (rank, tokens, dim), (queries, dim, rank)
    orders = [[added_up, met]]
    if query_weight is not None:
        channels = query_weight.shape[0]
        there, back = (rank, dim, channels), (rank, channels, dim + 1)  # 1: a bias
        projected = [(queries, dim, channels), (tokens, dim, channels)]
        narrow = [(rank, tokens, channels), (queries, channels, rank)]
        orders = [[added_up, there, back, met], [*projected, *narrow]]
    products = 2 * batch * heads * min(sum(map(math.prod, order)) for order in orders)
    entries = batch * heads * queries * rank
    shape = torch.empty(batch, heads, queries, rank, device="meta")
    least, most = _connectivity_flops(shape, up.mT, budget, columns, keep, coef_topk)
    return products + least, products + most + 8 * entries


def _attention_backward_errors() -> tuple[Bad, ...]:
    good = (2, 6, 2, 4)

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {"grad_out": _t(*good, device=device)}
        values["grad_stats"] = _t(2, 6, 2, 6, device=device)
        values |= {name: _t(*good, device=device) for name in "qkv"}
        values |= {"keep": None, "bias": None, "out": _t(*good, device=device)}
        values |= {"stats": _t(2, 6, 2, 6, device=device), "lse": _t(2, 6, 2, device=device)}
        return tuple((values | changes).values())

    return (
        *_saved_errors(build, ("keep", "bias")),
        Bad("bias of other columns", lambda d: build(d, bias=_t(1, 2, 6, 5, device=d)),
            ValueError, ("bias", "size 6")),
    )  # fmt: skip


def _saved_errors(build: Callable[..., tuple[Any, ...]], asked: tuple[str, ...]) -> tuple[Bad, ...]:
    """Wrong arguments of a backward op: `build(device, **changes)` starts from q [2, 6, 2, 4], and
    its last arguments are whether gradients of `asked` are."""

    def bad(label: str, words: Any, raises: Any = ValueError, **changes: Any) -> Bad:
        return Bad(label, lambda d: build(d, **{n: make(d) for n, make in changes.items()}),
                   raises, words)  # fmt: skip

    return (
        bad("grad of rank 3", ("grad_out", "4 dim"), grad_out=lambda d: _t(2, 6, 8, device=d)),
        bad("grad of other tokens", ("grad_out", "size 6"),
            grad_out=lambda d: _t(2, 5, 2, 4, device=d)),
        bad("statistics of five", ("grad_stats", "size 6"),
            grad_stats=lambda d: _t(2, 6, 2, 5, device=d)),
        bad("k of other heads", ("k", "size 2"), k=lambda d: _t(2, 6, 1, 4, device=d)),
        bad("grad of another head dim", ("grad_out", "size 4"),
            grad_out=lambda d: _t(2, 6, 2, 5, device=d)),
        bad("statistics of rank 3", ("grad_stats", "4 dim"),
            grad_stats=lambda d: _t(2, 6, 2, device=d)),
        bad("out of other tokens", ("out", "size 6"), out=lambda d: _t(2, 7, 2, 4, device=d)),
        bad("v of rank 3", ("v", "4 dim"), v=lambda d: _t(2, 6, 8, device=d)),
        bad("lse of rank 4", ("lse", "3 dim"), lse=lambda d: _t(2, 6, 2, 1, device=d)),
        bad("lse of another batch", ("lse", "size 2"), lse=lambda d: _t(1, 6, 2, device=d)),
        bad("keep of rank 1", ("keep", "2 dim"), keep=lambda d: _t(5, device=d)),
        bad("grad of another dtype", ("grad_out", "float32", "float64"), TypeError,
            grad_out=lambda d: _t(2, 6, 2, 4, device=d).double()),
        bad("out of another dtype", ("out", "float32", "float16"), TypeError,
            out=lambda d: _t(2, 6, 2, 4, device=d).half()),
        bad("lse of another dtype", ("lse", "float32", "float16"), TypeError,
            lse=lambda d: _t(2, 6, 2, device=d).half()),
        bad("grad of statistics of another dtype", ("grad_stats", "float32", "bfloat16"), TypeError,
            grad_stats=lambda d: _t(2, 6, 2, 6, device=d).bfloat16()),
        bad("statistics of the forward pass missing", ("stats", "4 dim", "[0]"),
            stats=lambda d: _t(0, device=d)),
        bad("statistics of other tokens", ("stats", "size 6", "[2, 5, 2, 6]"),
            stats=lambda d: _t(2, 5, 2, 6, device=d)),
        *(Bad(f"{name}_grad without {name}",
              lambda d, name=name: (*build(d), None, 1, True, *(n == name for n in asked)),
              ValueError, (f"{name}_grad=True needs {name}",))
          for name in asked),
        Bad("keep between 0 and 1", lambda d: build(d, keep=torch.full((2, 5), 0.5, device=d)),
            ValueError, ("keep", "0 or 1"), values=True),
    )  # fmt: skip


_RELEVANCE_SHAPES = {
    "tokens": (2, 6, 4), "features": (2, 6, 3), "keep": (2, 6), "norm_weight": (4,),
    "norm_bias": (4,), "remap_weight": (8, 4), "remap_bias": (8,), "fc1_weight": (5, 11),
    "fc1_bias": (5,), "fc2_weight": (3, 5), "fc2_bias": (3,), "fc3_weight": (2, 3),
    "fc3_bias": (2,),
}  # fmt: skip
_RELEVANCE_SAVED = {
    "logits": (2, 6, 2), "remapped": (2, 6, 8), "shared": (2, 4), "hidden1": (2, 6, 5),
    "hidden2": (2, 6, 3),
}  # fmt: skip


def _relevance_errors(backward: bool = False) -> tuple[Bad, ...]:
    shapes = dict(_RELEVANCE_SHAPES)
    if backward:
        shapes = {"grad": (2, 6, 2), **shapes, **_RELEVANCE_SAVED}

    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {n: _t(*shape, device=device) for n, shape in shapes.items()}
        return tuple((values | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...] = ()) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: _t(*shape, device=d)}, ValueError,
                   (name, str(list(shape)), *words))  # fmt: skip

    errors = [
        resized("tokens", 2, 24, words=("3 dim",)),
        resized("features", 2, 18, words=("3 dim",)),
        resized("features", 1, 6, 3, words=("size 2", "batch")),
        resized("features", 2, 5, 3, words=("size 6", "tokens")),
        resized("keep", 12, words=("2 dim",)),
        resized("keep", 1, 6, words=("size 2", "batch")),
        resized("keep", 2, 7, words=("size 6", "tokens")),
        resized("norm_weight", 1, 4, words=("1 dim",)),
        resized("norm_weight", 5, words=("size 4",)),
        resized("norm_bias", 3, words=("size 4",)),
        resized("remap_weight", 8, words=("2 dim",)),
        resized("remap_weight", 8, 5, words=("size 4",)),
        resized("remap_weight", 7, 4, words=("even",)),
        resized("remap_bias", 7, words=("size 8",)),
        resized("fc1_weight", 5, 12, words=("size 11",)),
        resized("fc1_weight", 55, words=("2 dim",)),
        resized("fc1_bias", 6, words=("size 5",)),
        resized("fc2_weight", 3, 6, words=("size 5",)),
        resized("fc2_bias", 2, words=("size 3",)),
        resized("fc3_weight", 3, 3, words=("size 2",)),
        resized("fc3_weight", 2, 4, words=("size 3",)),
        resized("fc3_bias", 3, words=("size 2",)),
        bad("nothing to score", lambda d: {"tokens": None, "features": None}, ValueError,
            ("tokens", "features", "None")),
        *(bad(f"{name} missing", lambda d, n=name: {n: None}, ValueError, (name, "tokens", "None"))
          for name in ("norm_weight", "norm_bias", "remap_weight", "remap_bias")),
        bad("norm without tokens", lambda d: {"tokens": None}, ValueError,
            ("norm_weight", "None without tokens")),
        bad("integer tokens", lambda d: {"tokens": _t(2, 6, 4, dtype=torch.int64, device=d)},
            TypeError, ("tokens", "float32", "int64")),
        bad("keep bool", lambda d: {"keep": _t(2, 6, dtype=torch.bool, device=d)}, TypeError,
            ("keep", "bool")),
        bad("keep on another device", lambda d: {"keep": _t(2, 6, device="meta")}, ValueError,
            ("keep", "device")),
        *(bad(f"{name} of another dtype",
              lambda d, n=name: {n: _t(*shapes[n], dtype=torch.float64, device=d)}, TypeError,
              (name, "float32", "float64"))
          for name in _RELEVANCE_SHAPES if name not in ("tokens", "keep")),
        *(bad(f"{name} on another device", lambda d, n=name: {n: _t(*shapes[n], device="meta")},
              ValueError, (name, "device"))
          for name in ("features", "remap_weight", "fc2_bias", "fc3_weight")),
        bad("fc1_weight is None", lambda d: {"fc1_weight": None}, TypeError,
            ("fc1_weight", "NoneType"), op_words=("fc1_weight",)),
        bad("features is a list", lambda d: {"features": [1.0]}, TypeError, ("features", "list"),
            op_words=("features",)),
        bad("features is sparse", lambda d: {"features": _t(2, 6, 3, device=d).to_sparse()},
            TypeError, ("features", "sparse"), layouts=True),
    ]  # fmt: skip
    if not backward:
        errors += [
            Bad("eps is a string", lambda d: (*build(d), "1"), TypeError, ("eps", "str"),
                op_words=("eps",)),
            Bad("eps is a bool", lambda d: (*build(d), True), TypeError, ("eps", "bool"),
                op_accepts=True),
        ]  # fmt: skip
        return tuple(errors)
    errors += [
        resized("grad", 2, 12, words=("3 dim",)),
        resized("grad", 2, 6, 3, words=("size 2",)),
        resized("logits", 2, 5, 2, words=("size 6",)),
        resized("remapped", 2, 6, 7, words=("size 8",)),
        resized("shared", 2, 8, words=("size 4",)),
        resized("hidden1", 1, 6, 5, words=("size 2",)),
        resized("hidden2", 2, 6, 3, 1, words=("3 dim",)),
        *(bad(f"{name} of another dtype",
              lambda d, n=name: {n: _t(*shapes[n], dtype=torch.float64, device=d)}, TypeError,
              (name, "float32", "float64"))
          for name in ("grad", *_RELEVANCE_SAVED)),
    ]  # fmt: skip
    return tuple(errors)


def _relevance_flops(tokens: Tensor | None, features: Tensor | None, *rest: Any) -> tuple[int, int]:
    """The matrix products, the shared half once per image."""
    like = features if tokens is None else tokens
    rows, remap_weight, fc2_weight = like[..., 0].numel(), rest[3], rest[7]
    (hidden2, hidden1), width = fc2_weight.shape, 0
    if tokens is not None:
        width += tokens.shape[2] * remap_weight.shape[0] + remap_weight.shape[0] // 2 * hidden1
    if features is not None:
        width += features.shape[2] * hidden1
    once = 0 if tokens is None else like.shape[0] * remap_weight.shape[0] // 2 * hidden1
    count = 2 * (rows * (width + hidden1 * hidden2 + 2 * hidden2) + once)
    return count, count


def _relevance_backward_flops(grad: Tensor, *args: Any) -> tuple[int, int]:
    """Twice the forward pass at most, and the shared half a third time."""
    wanted = args[19:]
    most = _relevance_flops(*args)[1]
    return (2 * most if all(wanted) else 0), 2 * most + most // 2 + 64


def _positional(function: Callable[..., Any], places: int, *names: str) -> Callable[..., Any]:
    """`function` with the op's positional arguments, of which those behind `places` are `names`."""

    def call(*args: Any) -> Any:
        return function(*args[:places], **dict(zip(names, args[places:], strict=False)))

    return call


_ATTENTION_NAMES = ("scale", "num_prefix", "class_token", "need_stats")
_CHOICE_NAMES = ("coef_topk", "threshold")

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("select_tokens", spot_ext.select_tokens_reference, _select_samples(), _select_errors(),
           _no_flops, public=spot_ext.select_tokens),
        Op("compact_tokens", spot_ext.compact_tokens_reference, _row_samples(_compact_args),
           _compact_errors(), _no_flops, grads=(0, 3), twice=True, public=spot_ext.compact_tokens),
        Op("compact_tokens_backward", _compact_backward_reference,
           _row_samples(_compact_backward_args), _compact_backward_errors(), _no_flops, grads=(0,),
           twice=True),
        Op("scatter_tokens", spot_ext.scatter_tokens_reference, _row_samples(_scatter_args),
           _scatter_errors(), _no_flops, grads=(0, 4), twice=True, public=spot_ext.scatter_tokens),
        Op("fuse_tokens", spot_ext.fuse_tokens_reference, _fuse_samples(_fuse_args), _fuse_errors(),
           _fuse_flops, grads=(0, 1), exact=False, public=spot_ext.fuse_tokens,
           once_only="differentiable once"),
        Op("fuse_tokens_backward", _fuse_backward_reference, _fuse_samples(_fuse_backward_args),
           _fuse_backward_errors(), _fuse_backward_flops, exact=False,
           once_only="differentiable once"),
        Op("attention_stats", attention_reference,
           tuple(Sample(a.name, a.args, a.traced) for a in _ATTENTION), _attention_errors(),
           _attention_flops, grads=(0, 1, 2, 3, 4), exact=False,
           public=_positional(spot_ext.attention_stats, 5, *_ATTENTION_NAMES),
           once_only="differentiable once"),
        Op("attention_stats_backward", attention_backward_reference,
           tuple(Sample(a.name, a.backward_args, a.traced) for a in _ATTENTION),
           _attention_backward_errors(), _attention_backward_flops, exact=False,
           once_only="differentiable once"),
        Op("token_relevance", relevance_reference,
           tuple(Sample(r.name, r.args, r.traced) for r in _RELEVANCE), _relevance_errors(),
           _relevance_flops, grads=tuple(range(13)), exact=False,
           public=_positional(spot_ext.token_relevance, 13, "eps"),
           once_only="differentiable once", weights=tuple(range(3, 13)),
           roundings=8, large="twelve ViT images"),
        Op("token_relevance_backward", relevance_backward_reference,
           tuple(Sample(r.name, r.backward_args, r.traced) for r in _RELEVANCE + _RELEVANCE_WANTED),
           _relevance_errors(backward=True), _relevance_backward_flops, exact=False,
           once_only="differentiable once", weights=tuple(range(4, 14)),
           roundings=8, large="twelve ViT images"),
        Op("connectivity",
           _positional(spot_ext.connectivity_reference, 5, *_CHOICE_NAMES),
           tuple(Sample(c.name, c.args, c.traced) for c in _CONNECTIVITY), _connectivity_errors(),
           _connectivity_flops, public=_positional(spot_ext.connectivity, 5, *_CHOICE_NAMES),
           weights=(1,), large="twelve ViT images"),
        Op("predict_connectivity",
           _positional(spot_ext.predict_connectivity_reference, 0, *_PREDICTION_NAMES),
           tuple(Sample(p.name, p.args, p.traced) for p in _PREDICTION), _prediction_errors(),
           _prediction_flops,
           public=_positional(spot_ext.predict_connectivity, 0, *_PREDICTION_NAMES),
           weights=tuple(range(2, 8)), large="twelve images"),
        Op("sparse_attention", sparse_reference,
           tuple(Sample(a.name, a.args, a.traced) for a in _SPARSE), _sparse_errors(),
           _sparse_flops, grads=(0, 1, 2, 4), exact=False,
           public=_positional(spot_ext.sparse_attention, 5, *_ATTENTION_NAMES),
           once_only="differentiable once", large="twelve ViT images"),
        Op("sparse_attention_backward", sparse_backward_reference,
           tuple(Sample(a.name, a.backward_args, a.traced) for a in _SPARSE),
           _sparse_backward_errors(), _sparse_backward_flops, exact=False,
           once_only="differentiable once", large="twelve ViT images"),
    )
}  # fmt: skip


def each_sample(traced: bool = False) -> list[Any]:
    """All (op, sample) pairs as pytest parameters."""
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.name}".replace(" ", "_"))
        for op in OPS.values()
        for sample in op.samples
        if sample.traced or not traced
    ]


def each_error() -> list[Any]:
    """All (op, error input) pairs as pytest parameters."""
    return [
        pytest.param(op, bad, id=f"{op.name}-{bad.name}".replace(" ", "_"))
        for op in OPS.values()
        for bad in op.errors
    ]


def defined_ops() -> set[str]:
    """Names of the ops that the loaded libraries define."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("spot::")}
