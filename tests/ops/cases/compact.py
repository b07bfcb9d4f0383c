"""The compact slice: row ops on shapes, layouts and orders that break such code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.base import ANY, Bad, Op, Sample, Unread, no_flops, unique
from ops.cases.errors import ints, prefix_errors, t, tensor_errors
from ops.cases.strategies import batches, counts, names, orders, prefixes, widths
from support.data import ROW_DTYPES, random, random_bits, random_index
from support.layouts import LAYOUTS, lay_out, lay_out_index
from torch import Tensor

import spot_ext


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


_GPU_ROWS = tuple(
    replace(r, name=f"{r.name}, {layout}", layout=layout, num_extra=extra)
    for layout, extra in (("contiguous", 2), ("swapped", 0))
    for r in (
        _Rows("one", batch=1, num_tokens=1, num_keep=1, num_prefix=0, row=(1,), order="shuffled"),
        _Rows("none kept", num_tokens=33, num_keep=0, row=(7,), order="shuffled"),
        _Rows("ViT", batch=3, num_tokens=196, num_keep=137, num_prefix=2, row=(64,),
              order="shuffled"),
        _Rows("all kept", num_tokens=300, num_keep=300, row=(33,), order="shuffled"),
    )
)  # fmt: skip


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


def _row_samples(
    make: Callable[[_Rows], Any], rows: tuple[_Rows, ...] = _ROWS
) -> tuple[Sample, ...]:
    return tuple(Sample(r.name, make(r), r.traced) for r in rows)


def _fuse_samples(
    make: Callable[[_Rows, bool], Any], rows: tuple[_Rows, ...] = _ROWS
) -> tuple[Sample, ...]:
    flat = [replace(r, num_extra=0) for r in rows if len(r.row) == 1]
    return (
        *(Sample(f"{r.name}, mean", make(r, True), r.traced) for r in flat),
        *(Sample(f"{r.name}, sum", make(r, False), r.name == "plain") for r in flat),
    )


def _select_samples() -> tuple[Sample, ...]:
    def make(batch: int, num_tokens: int, num_keep: int, layout: str) -> Any:
        def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
            name = unique("scores", (batch, num_tokens))
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


def _select_gpu_samples() -> tuple[Sample, ...]:
    """Scores with many ties and some NaN."""

    def make(batch: int, num_tokens: int, num_keep: int) -> Any:
        def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
            scores = random(unique("ties", (batch, num_tokens)), (batch, num_tokens), torch.float64)
            scores = scores.round(decimals=1)
            scores[:, ::5] = math.nan
            return scores.to(device, dtype), num_keep

        return args

    shapes = [(1, 1, 1), (2, 33, 0), (3, 196, 137), (2, 300, 300)]
    return tuple(Sample(f"{s}", make(*s)) for s in shapes)


# -- drawn calls


@st.composite
def _drawn_rows(draw: Any) -> _Rows:
    num_tokens = draw(counts)
    return _Rows(
        draw(names), draw(batches), num_tokens, draw(st.integers(0, num_tokens)), draw(prefixes),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.one_of(widths.map(lambda n: (n,)), st.sampled_from([(), (0,), (2, 3), (2, 1, 2)]))),
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS[:-1])), draw(orders),
    )  # fmt: skip


_drawn_vectors = _drawn_rows().map(lambda r: replace(r, row=(math.prod(r.row),), num_extra=0))


def _drawn_fuse(make: Callable[[_Rows, bool], Any]) -> Any:
    return st.builds(lambda r, mean: Sample(r.name, make(r, mean)), _drawn_vectors, st.booleans())


@st.composite
def _drawn_scores(draw: Any) -> Sample:
    """Any numbers, few of them, or any bits."""
    name, batch, count = draw(names), draw(batches), draw(counts)
    kind, layout = draw(st.sampled_from(["any", "few", "bits"])), draw(st.sampled_from(LAYOUTS))
    num_keep = draw(st.integers(0, count))

    def args(device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        scores = (random_bits if kind == "bits" else random)(name, (batch, count), dtype, device)
        return lay_out(scores.round() if kind == "few" else scores, layout), num_keep

    return Sample(name, args)


def _drawn(make: Callable[[_Rows], Any]) -> Any:
    return _drawn_rows().map(lambda r: Sample(r.name, make(r)))


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


def _fuse_backward_terms(grad: Tensor, tokens: Tensor, *args: Any) -> float:
    """Of the gradient of a weight: products of gradient and token, less those of the others."""
    if not tokens.numel():
        return 0.0
    return (grad.double().abs()[:, None] * tokens.double().abs()).sum(-1).max().item()


# -- error inputs


def _good_index(device: Any) -> Tensor:
    return ints(device, [0, 3], [4, 2])


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
        bad("index of another batch", lambda d: ints(d, [0], [1], [2]), ValueError,
            ("index", "size 2", "batch", "[3, 1]")),
        bad("index too long", lambda d: torch.arange(num_tokens + 1, device=d).expand(2, -1),
            ValueError, ("index", f"{num_tokens + 1}", f"{num_tokens}")),
        bad("index on another device", lambda d: _good_index(d).to("meta"), ValueError,
            ("index", "device")),
        bad("sparse index", lambda d: _good_index(d).to_sparse(), TypeError, ("index", "sparse"),
            layouts=True),
        bad("index too large", lambda d: ints(d, [0, 3], [num_tokens, 2]), ValueError,
            ("index[1, 0]", f"{num_tokens}", "out of range"), values=True),
        bad("index negative", lambda d: ints(d, [0, -1], [4, 2]), ValueError,
            ("index[0, 1]", "-1", "out of range"), values=True),
        bad("index huge", lambda d: ints(d, [0, 3], [4, 2**62]), ValueError,
            ("index[1, 1]", "out of range"), values=True),
        bad("index repeats", lambda d: ints(d, [0, 3], [2, 2]), ValueError,
            ("index[1, 1]", "repeats position 2"), values=True),
        bad("index repeats far apart", lambda d: ints(d, [3, 0, 3], [4, 2, 1]), ValueError,
            ("index[0, 2]", "repeats position 3"), values=True),
    ]  # fmt: skip


def _select_errors() -> tuple[Bad, ...]:
    return (
        *tensor_errors("scores", lambda d, x: (x, 1), (2, 5), "2 dim"),
        Bad("scores of rank 1", lambda d: (t(5, device=d), 2), ValueError, ("scores", "2 dim")),
        Bad("scores of rank 3", lambda d: (t(2, 5, 1, device=d), 2), ValueError,
            ("scores", "2 dim", "[2, 5, 1]")),
        Bad("integer scores", lambda d: (t(2, 5, dtype=torch.int64, device=d), 2), TypeError,
            ("scores", "float32", "bfloat16", "int64")),
        Bad("bool scores", lambda d: (t(2, 5, dtype=torch.bool, device=d), 2), TypeError,
            ("scores", "bool")),
        Bad("complex scores", lambda d: (t(2, 5, dtype=torch.complex64, device=d), 2), TypeError,
            ("scores", "complex64")),
        Bad("num_keep too large", lambda d: (t(2, 5, device=d), 6), ValueError,
            ("num_keep", "between 0 and 5", "6")),
        Bad("num_keep negative", lambda d: (t(2, 5, device=d), -1), ValueError,
            ("num_keep", "between 0 and 5", "-1")),
        Bad("num_keep of no tokens", lambda d: (t(2, 0, device=d), 1), ValueError,
            ("num_keep", "between 0 and 0", "1")),
        Bad("num_keep of no images", lambda d: (t(0, 3, device=d), 4), ValueError,
            ("num_keep", "between 0 and 3", "4")),
        Bad("num_keep float", lambda d: (t(2, 5, device=d), 2.0), TypeError,
            ("num_keep", "float"), op_words=("num_keep",)),
        Bad("num_keep bool", lambda d: (t(2, 5, device=d), True), TypeError,
            ("num_keep", "bool"), op_accepts=True),
        Bad("num_keep tensor", lambda d: (t(2, 5, device=d), torch.tensor(2)), TypeError,
            ("num_keep", "Tensor"), op_accepts=True),
        Bad("num_keep huge", lambda d: (t(2, 5, device=d), 2**70), ValueError, ("num_keep",)),
    )  # fmt: skip


def _companion_errors(name: str, rows: int, build: Callable[[Any, Any], Any]) -> list[Bad]:
    """Wrong `extra` or `background` rows beside float32 tokens [2, ., 3]."""

    def bad(label: str, value: Callable[[Any], Any], raises: Any, words: Any, **more: Any) -> Bad:
        return Bad(f"{name} {label}", lambda d: build(d, value(d)), raises, words, **more)

    return [
        bad("is a list", lambda d: [1.0], TypeError, (name, "list"), op_words=(name,)),
        bad("of rank 2", lambda d: t(2, rows, device=d), ValueError, (name, f"[2, {rows}]")),
        bad("of another dtype", lambda d: t(2, rows, 3, dtype=torch.float64, device=d), TypeError,
            (name, "float32", "float64")),
        bad("of another batch", lambda d: t(3, rows, 3, device=d), ValueError,
            (name, f"[3, {rows}, 3]")),
        bad("of other channels", lambda d: t(2, rows, 4, device=d), ValueError,
            (name, f"[2, {rows}, 4]")),
        bad("on another device", lambda d: t(2, rows, 3, device="meta"), ValueError,
            (name, "device")),
        bad("sparse", lambda d: t(2, rows, 3, device=d).to_sparse(), TypeError, (name, "sparse"),
            layouts=True),
    ]  # fmt: skip


def _compact_errors() -> tuple[Bad, ...]:
    def tokens(device: Any) -> Tensor:
        return t(2, 6, 3, device=device)

    return (
        *tensor_errors("tokens", lambda d, x: (x, _good_index(d)), (2, 6, 3), "[B, tokens, ...]"),
        Bad("tokens of rank 1", lambda d: (t(6, device=d), _good_index(d)), ValueError,
            ("tokens", "[B, tokens, ...]", "[6]")),
        Bad("quantized tokens", lambda d: (_quantized(d), _good_index(d)), TypeError,
            ("tokens", "quantized"), layouts=True),
        *_index_errors(lambda d, i: (tokens(d), i)),
        *prefix_errors(lambda d, p: (tokens(d), _good_index(d), p), 6),
        Bad("prefix leaves too few", lambda d: (tokens(d), ints(d, [0, 1], [1, 0]), 5), ValueError,
            ("index", "2", "1")),
        *_companion_errors("extra", 2, lambda d, x: (tokens(d), _good_index(d), 1, x)),
    )  # fmt: skip


def _quantized(device: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t(2, 6, 3, device=device), 0.1, 0, torch.qint8)


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
        return t(2, 3, 3, device=device)

    def indexed(device: Any, index: Any) -> tuple[Any, ...]:  # as many rows as the index asks for
        columns = index.shape[1] if isinstance(index, Tensor) and index.dim() == 2 else 2
        return t(2, 1 + columns, 3, device=device), index, 5

    return (
        *tensor_errors("tokens", lambda d, x: (x, _good_index(d), 5), (2, 3, 3),
                        "[B, tokens, ...]"),
        *_index_errors(indexed),
        *prefix_errors(lambda d, p: (tokens(d), _good_index(d), 5, p), 3),
        *_count_errors("num_tokens", lambda d, n: (tokens(d), _good_index(d), n)),
        Bad("num_tokens below the index", lambda d: (tokens(d), _good_index(d), 1), ValueError,
            ("index", "2", "1")),
        Bad("rows missing", lambda d: (t(2, 2, 3, device=d), _good_index(d), 5), ValueError,
            ("tokens", "size 3", "[2, 2, 3]")),
        Bad("rows left over", lambda d: (t(2, 4, 3, device=d), _good_index(d), 5), ValueError,
            ("tokens", "size 3", "[2, 4, 3]")),
        *_companion_errors("background", 6, lambda d, x: (tokens(d), _good_index(d), 5, 1, x)),
        Bad("background too short",
            lambda d: (tokens(d), _good_index(d), 5, 1, t(2, 5, 3, device=d)), ValueError,
            ("background", "size 6", "[2, 5, 3]")),
    )  # fmt: skip


def _compact_backward_errors() -> tuple[Bad, ...]:
    def grad(device: Any) -> Tensor:
        return t(2, 4, 3, device=device)

    def indexed(device: Any, index: Any) -> tuple[Any, ...]:
        columns = index.shape[1] if isinstance(index, Tensor) and index.dim() == 2 else 2
        return t(2, 2 + columns, 3, device=device), index, 5, 1, 1

    return (
        *_index_errors(indexed),
        *prefix_errors(lambda d, p: (grad(d), _good_index(d), 5, p, 1), 4),
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
        return t(2, 6, 3, device=device)

    def weights(device: Any) -> Tensor:
        return t(2, 5, device=device)

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
            lambda d: (*lead(d), t(2, 6, device=d), weights(d), _good_index(d)),
            ValueError, ("tokens", "3 dim", "[2, 6]")),
        Bad("tokens of rank 4",
            lambda d: (*lead(d), t(2, 6, 3, 1, device=d), weights(d), _good_index(d)),
            ValueError, ("tokens", "3 dim")),
        Bad("integer tokens",
            lambda d: (*lead(d), t(2, 6, 3, dtype=torch.int32, device=d), weights(d),
                       _good_index(d)),
            TypeError, ("tokens", "float32", "int32")),
        *_index_errors(lambda d, i: (*lead(d), tokens(d), weights(d), i)),
        *prefix_errors(lambda d, p: (*lead(d), tokens(d), weights(d), _good_index(d), p), 6),
        weighted("is a list", lambda d: [1.0], TypeError, ("weights", "list"), op_accepts=True),
        weighted("of rank 1", lambda d: t(5, device=d), ValueError, ("weights", "2 dim")),
        weighted("of rank 3", lambda d: t(2, 5, 1, device=d), ValueError, ("weights", "2 dim")),
        weighted("of another dtype", lambda d: weights(d).double(), TypeError,
                 ("weights", "float32", "float64")),
        weighted("of another batch", lambda d: t(3, 5, device=d), ValueError,
                 ("weights", "size 2", "[3, 5]")),
        weighted("with the prefix", lambda d: t(2, 6, device=d), ValueError,
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
        return grad, t(2, 6, 3, device=device), t(2, 5, device=device), _good_index(device)

    return (
        *_fuse_errors(lambda d: (t(2, 3, device=d),)),
        Bad("grad of rank 3", lambda d: build(d, t(2, 1, 3, device=d)), ValueError,
            ("grad", "2 dim")),
        Bad("grad of another batch", lambda d: build(d, t(1, 3, device=d)), ValueError,
            ("grad", "size 2", "[1, 3]")),
        Bad("grad of other channels", lambda d: build(d, t(2, 4, device=d)), ValueError,
            ("grad", "size 3", "[2, 4]")),
        Bad("grad of another dtype", lambda d: build(d, t(2, 3, device=d).double()), TypeError,
            ("grad", "float32", "float64")),
    )  # fmt: skip


def _unread(
    build: Callable[[Any, Tensor], tuple[Any, ...]], marked: Callable[[Tensor], Tensor]
) -> tuple[Unread, ...]:
    """An entry of image 0 that is out of range: NaN where it is `marked`, and in no other image."""

    def holds(out: Tensor) -> bool:
        return bool(marked(out).isnan().all() and out[1].isfinite().all())

    return tuple(
        Unread(f"entry {entry}", lambda d, e=entry: build(d, ints(d, [0, e], [1, 2])), holds)
        for entry in (-1, 5, 2**40)
    )


# -- FLOPs: 2 per multiply-accumulate


def _fuse_flops(tokens: Tensor, weights: Tensor, index: Tensor, *args: Any) -> tuple[int, int]:
    count = 2 * weights.shape[0] * (weights.shape[1] - index.shape[1]) * tokens.shape[2]
    return count, count


def _fuse_backward_flops(grad: Tensor, *args: Any) -> tuple[int, int]:
    return 2 * _fuse_flops(*args)[0], 2 * _fuse_flops(*args)[1]


OPS = (
    Op("select_tokens", spot_ext.select_tokens_reference, _select_samples(), _select_errors(),
       no_flops, public=spot_ext.select_tokens, gpu=_select_gpu_samples(), drawn=_drawn_scores(),
       odd={0: ANY}),
    Op("compact_tokens", spot_ext.compact_tokens_reference, _row_samples(_compact_args),
       _compact_errors(), no_flops, grads=(0, 3), twice=True, public=spot_ext.compact_tokens,
       gpu=_row_samples(_compact_args, _GPU_ROWS),
       unread=_unread(lambda d, i: (t(2, 6, 3, device=d), i), lambda out: out[0, 2]),
       drawn=_drawn(_compact_args), drawn_dtypes=ROW_DTYPES, odd={0: ANY, 3: ANY}),
    Op("compact_tokens_backward", _compact_backward_reference,
       _row_samples(_compact_backward_args), _compact_backward_errors(), no_flops, grads=(0,),
       twice=True, gpu=_row_samples(_compact_backward_args, _GPU_ROWS),
       drawn=_drawn(_compact_backward_args), drawn_dtypes=ROW_DTYPES, odd={0: ANY}),
    Op("scatter_tokens", spot_ext.scatter_tokens_reference, _row_samples(_scatter_args),
       _scatter_errors(), no_flops, grads=(0, 4), twice=True, public=spot_ext.scatter_tokens,
       gpu=_row_samples(_scatter_args, _GPU_ROWS),
       unread=_unread(lambda d, i: (t(2, 3, 3, device=d), i, 5), lambda out: out[0, 1:]),
       drawn=_drawn(_scatter_args), drawn_dtypes=ROW_DTYPES, odd={0: ANY, 4: ANY}),
    Op("fuse_tokens", spot_ext.fuse_tokens_reference, _fuse_samples(_fuse_args), _fuse_errors(),
       _fuse_flops, grads=(0, 1), exact=False, public=spot_ext.fuse_tokens,
       once_only="differentiable once", gpu=_fuse_samples(_fuse_args, _GPU_ROWS),
       unread=_unread(lambda d, i: (t(2, 6, 3, device=d), torch.ones(2, 5, device=d), i),
                      lambda out: out[0]),
       drawn=_drawn_fuse(_fuse_args), odd={0: ANY}),
    Op("fuse_tokens_backward", _fuse_backward_reference, _fuse_samples(_fuse_backward_args),
       _fuse_backward_errors(), _fuse_backward_flops, exact=False,
       once_only="differentiable once", gpu=_fuse_samples(_fuse_backward_args, _GPU_ROWS),
       drawn=_drawn_fuse(_fuse_backward_args), terms=_fuse_backward_terms),
)  # fmt: skip
