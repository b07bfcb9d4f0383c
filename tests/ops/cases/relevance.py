"""token_relevance and its backward op."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from ops.cases.base import NAN, Bad, Op, positional, samples
from ops.cases.errors import t
from ops.cases.strategies import batches, counts, drawn, names, widths
from support.data import generator, random
from support.layouts import LAYOUTS, lay_out
from torch import Tensor

import spot_ext


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

# tokens, channels (None: no embeddings), remap, features, hidden units, mask, layout
_GPU = tuple(
    _Relevance(f"[{tokens}, {channels}]", batch=3, num_tokens=tokens, channels=channels,
               remap=remap, features=features, hidden1=hidden[0], hidden2=hidden[1], keep=keep,
               layout=layout)
    for tokens, channels, remap, features, hidden, keep, layout in (
        (1, 4, 2, 0, (1, 1), "", "contiguous"),
        (7, 5, 6, 3, (4, 3), "random", "padded"),
        (33, None, 0, 9, (5, 2), "", "contiguous"),
        (64, 33, 34, 0, (17, 9), "random", "padded"),
        (196, 96, 96, 36, (66, 33), "random", "padded"),
        (300, 384, 384, 108, (246, 123), "random", "contiguous"),
        (70, 64, 600, 7, (300, 280), "random", "contiguous"),  # more columns than threads
    )
)  # fmt: skip


@st.composite
def _drawn(draw: Any) -> _Relevance:
    channels = draw(st.one_of(st.none(), widths))
    features = draw(st.one_of(st.just(0), widths))
    return _Relevance(
        draw(names), draw(batches), draw(counts), channels, 2 * draw(widths),
        None if channels is not None and draw(st.booleans()) else features,
        draw(widths), draw(widths), draw(st.sampled_from(["", "random", "all", "none", "soft"])),
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1e-5, 1e-5, 1e-6, 0.5])),
        draw(st.tuples(*[st.booleans()] * 4)),
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
        values: dict[str, Any] = {n: t(*shape, device=device) for n, shape in shapes.items()}
        return tuple((values | changes).values())

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def resized(name: str, *shape: int, words: tuple[str, ...] = ()) -> Bad:
        return bad(f"{name} {list(shape)}", lambda d: {name: t(*shape, device=d)}, ValueError,
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
        bad("integer tokens", lambda d: {"tokens": t(2, 6, 4, dtype=torch.int64, device=d)},
            TypeError, ("tokens", "float32", "int64")),
        bad("keep bool", lambda d: {"keep": t(2, 6, dtype=torch.bool, device=d)}, TypeError,
            ("keep", "bool")),
        bad("keep on another device", lambda d: {"keep": t(2, 6, device="meta")}, ValueError,
            ("keep", "device")),
        *(bad(f"{name} of another dtype",
              lambda d, n=name: {n: t(*shapes[n], dtype=torch.float64, device=d)}, TypeError,
              (name, "float32", "float64"))
          for name in _RELEVANCE_SHAPES if name not in ("tokens", "keep")),
        *(bad(f"{name} on another device", lambda d, n=name: {n: t(*shapes[n], device="meta")},
              ValueError, (name, "device"))
          for name in ("features", "remap_weight", "fc2_bias", "fc3_weight")),
        bad("fc1_weight is None", lambda d: {"fc1_weight": None}, TypeError,
            ("fc1_weight", "NoneType"), op_words=("fc1_weight",)),
        bad("features is a list", lambda d: {"features": [1.0]}, TypeError, ("features", "list"),
            op_words=("features",)),
        bad("features is sparse", lambda d: {"features": t(2, 6, 3, device=d).to_sparse()},
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
              lambda d, n=name: {n: t(*shapes[n], dtype=torch.float64, device=d)}, TypeError,
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


OPS = (
    Op("token_relevance", relevance_reference,
       samples(_RELEVANCE), _relevance_errors(),
       _relevance_flops, grads=tuple(range(13)), exact=False,
       public=positional(spot_ext.token_relevance, 13, "eps"),
       once_only="differentiable once", weights=tuple(range(3, 13)),
       roundings=8, large="twelve ViT images", gpu=samples(_GPU), drawn=drawn(_drawn()),
       odd={0: NAN, 1: NAN}),
    Op("token_relevance_backward", relevance_backward_reference,
       samples(_RELEVANCE + _RELEVANCE_WANTED, "backward_args"),
       _relevance_errors(backward=True), _relevance_backward_flops, exact=False,
       once_only="differentiable once", weights=tuple(range(4, 14)),
       roundings=8, large="twelve ViT images", gpu=samples(_GPU, "backward_args"),
       drawn=drawn(_drawn(), "backward_args")),
)  # fmt: skip
