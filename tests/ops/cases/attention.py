"""What the attention ops share: how q, k, v are drawn, gradients, error inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.base import Bad
from ops.cases.errors import keep_errors, prefix_errors, t, tensor_errors
from ops.cases.strategies import batches, counts, masks, names, prefixes, scales, widths
from support.data import generator, random
from support.layouts import LAYOUTS, lay_out
from torch import Tensor

OPTIONS = ("scale", "num_prefix", "class_token", "need_stats")


@dataclass(frozen=True)
class Attention:
    """Sizes and options of a call; `bias` is for the op that has one."""

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


@st.composite
def drawn_attention(draw: Any, kind: Any, **own: Any) -> Any:
    """Cases of `kind`, whose fields `own` are strategies, or functions from tokens to one."""
    num_prefix = draw(prefixes)
    tokens = num_prefix + draw(counts)
    more = {n: draw(x(tokens) if callable(x) else x) for n, x in own.items()}
    return kind(
        draw(names), draw(batches), tokens, draw(st.sampled_from([2, 1, 3, 0])), draw(widths),
        num_prefix, num_prefix > 0 and draw(st.booleans()), draw(masks),
        scale=draw(scales), need_stats=draw(st.booleans()),
        layout=draw(st.sampled_from(["qkv", *LAYOUTS])), **more,
    )  # fmt: skip


@torch.no_grad()
def log_sum_exp(
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


def largest_logit(q: Tensor, k: Tensor, scale: float | None) -> float:
    """Of the terms of a logit the largest sum: logits are as accurate as that."""
    if not q.numel():
        return 0.0
    factor = q.shape[3] ** -0.5 if scale is None else abs(scale)
    sizes = [x.double().nan_to_num(0.0, 0.0, 0.0).abs() for x in (q, k)]
    return factor * torch.einsum("bihd,bjhd->bhij", *sizes).max().item()


def uncertain_gradient(
    grad_out: Tensor, grad_stats: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> float:
    """What a gradient of q or k may be off in float64, in units of 1e-12.

    Its terms cancel where one key has a whole softmax, and each is, relatively, as accurate as its
    logit is absolutely.
    """
    if q.dtype != torch.float64 or not q.numel():
        return 1.0
    scale = rest[5]
    factor = q.shape[3] ** -0.5 if scale is None else abs(scale)
    widest = max(x.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for x in (q, k))
    terms = 2 * factor * widest * largest_logit(grad_out, v, 1.0)
    return torch.finfo(torch.float64).eps * largest_logit(q, k, scale) * terms / 1e-12


def leaves_of(*values: Tensor | None) -> list[Any]:
    return [x if x is None else x.detach().clone().requires_grad_() for x in values]


def gradients_of(
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


def operand_errors(build: Callable[..., tuple[Any, ...]]) -> list[Bad]:
    """Wrong arguments that every attention op has; `build(device, **changes)` starts from q, k, v
    [2, 6, 2, 4]."""
    good = (2, 6, 2, 4)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    errors = []
    for name in "qkv":
        errors += tensor_errors(name, lambda d, x, n=name: build(d, **{n: x}), good, "4 dim")
        errors += [
            bad(f"{name} of rank 3", lambda d, n=name: {n: t(2, 6, 8, device=d)}, ValueError,
                (name, "4 dim", "[2, 6, 8]")),
            bad(f"{name} integer", lambda d, n=name: {n: t(*good, dtype=torch.int64, device=d)},
                TypeError, (name, "int64")),
        ]  # fmt: skip
    for name in "kv":
        errors += [
            bad(f"{name} of another {what}",
                lambda d, n=name, s=shape: {n: t(*s, device=d)}, ValueError,
                (name, str(list(shape))))
            for what, shape in {"batch": (1, 6, 2, 4), "length": (2, 5, 2, 4),
                                "number of heads": (2, 6, 1, 4), "head dim": (2, 6, 2, 5)}.items()
        ]  # fmt: skip
        errors += [
            bad(f"{name} of another dtype", lambda d, n=name: {n: t(*good, device=d).double()},
                TypeError, (name, "float32", "float64")),
            bad(f"{name} on another device", lambda d, n=name: {n: t(*good, device="meta")},
                ValueError, (name, "device")),
        ]  # fmt: skip
    errors += [
        *(bad(f"head dim {dim}",
              lambda d, size=dim: {n: t(2, 6, 2, size, device=d) for n in "qkv"}, ValueError,
              ("head dim", "between 1 and 256", f"got {dim}"))
          for dim in (0, 257)),
        *prefix_errors(lambda d, p: build(d, num_prefix=p), 6),
        bad("class token without prefix", lambda d: {"num_prefix": 0}, ValueError,
            ("class_token", "num_prefix", "0")),
        *keep_errors(lambda d, keep: build(d, keep=keep)),
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


def saved_errors(build: Callable[..., tuple[Any, ...]], asked: tuple[str, ...]) -> tuple[Bad, ...]:
    """Wrong arguments of a backward op: `build(device, **changes)` starts from q [2, 6, 2, 4], and
    its last arguments are whether gradients of `asked` are."""

    def bad(label: str, words: Any, raises: Any = ValueError, **changes: Any) -> Bad:
        return Bad(label, lambda d: build(d, **{n: make(d) for n, make in changes.items()}),
                   raises, words)  # fmt: skip

    return (
        bad("grad of rank 3", ("grad_out", "4 dim"), grad_out=lambda d: t(2, 6, 8, device=d)),
        bad("grad of other tokens", ("grad_out", "size 6"),
            grad_out=lambda d: t(2, 5, 2, 4, device=d)),
        bad("statistics of five", ("grad_stats", "size 6"),
            grad_stats=lambda d: t(2, 6, 2, 5, device=d)),
        bad("k of other heads", ("k", "size 2"), k=lambda d: t(2, 6, 1, 4, device=d)),
        bad("grad of another head dim", ("grad_out", "size 4"),
            grad_out=lambda d: t(2, 6, 2, 5, device=d)),
        bad("statistics of rank 3", ("grad_stats", "4 dim"),
            grad_stats=lambda d: t(2, 6, 2, device=d)),
        bad("out of other tokens", ("out", "size 6"), out=lambda d: t(2, 7, 2, 4, device=d)),
        bad("v of rank 3", ("v", "4 dim"), v=lambda d: t(2, 6, 8, device=d)),
        bad("lse of rank 4", ("lse", "3 dim"), lse=lambda d: t(2, 6, 2, 1, device=d)),
        bad("lse of another batch", ("lse", "size 2"), lse=lambda d: t(1, 6, 2, device=d)),
        bad("keep of rank 1", ("keep", "2 dim"), keep=lambda d: t(5, device=d)),
        bad("grad of another dtype", ("grad_out", "float32", "float64"), TypeError,
            grad_out=lambda d: t(2, 6, 2, 4, device=d).double()),
        bad("out of another dtype", ("out", "float32", "float16"), TypeError,
            out=lambda d: t(2, 6, 2, 4, device=d).half()),
        bad("lse of another dtype", ("lse", "float32", "float16"), TypeError,
            lse=lambda d: t(2, 6, 2, device=d).half()),
        bad("grad of statistics of another dtype", ("grad_stats", "float32", "bfloat16"), TypeError,
            grad_stats=lambda d: t(2, 6, 2, 6, device=d).bfloat16()),
        bad("statistics of the forward pass missing", ("stats", "4 dim", "[0]"),
            stats=lambda d: t(0, device=d)),
        bad("statistics of other tokens", ("stats", "size 6", "[2, 5, 2, 6]"),
            stats=lambda d: t(2, 5, 2, 6, device=d)),
        *(Bad(f"{name}_grad without {name}",
              lambda d, name=name: (*build(d), None, 1, True, *(n == name for n in asked)),
              ValueError, (f"{name}_grad=True needs {name}",))
          for name in asked),
        Bad("keep between 0 and 1", lambda d: build(d, keep=torch.full((2, 5), 0.5, device=d)),
            ValueError, ("keep", "0 or 1"), values=True),
    )  # fmt: skip
