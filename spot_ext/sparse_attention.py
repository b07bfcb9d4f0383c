"""Attention of each patch query to the keys that an index names.

Cost grows with the keys named, not with their number in all: only those are read. Prefix queries
(the class token, registers) attend to everything (Sparsifiner, arXiv 2303.13755; METHOD B2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spot_ext import _check, _definitions, _register
from spot_ext.attention_stats import (
    OPTIONS,
    cast_qkv,
    check_grads,
    check_keep,
    check_qkv,
    fake_gradient,
    fake_results,
    map_statistics,
    softmax_of,
    with_keep_gradient,
)

# ---- public function -----------------------------------------------------------------------------


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None = None,
    *,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool | None = None,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over named keys, and on request the six statistics of its sparse map.

    Patch query P+i sees the keys `index[b, h, i]`; the first P queries see all. A query that sees
    no key gives zeros. With `keep`, columns of dropped patch tokens are hidden from every row but
    their own, as in `attention_stats`; `keep` gets the same bounded straight-through gradient:
    for named j != i, `d out_i / d keep_j = p'_ij (v_j - out_i)` with p'_ij = exp(s_ij - lse_i)
    where j is kept and sigmoid(s_ij - lse_i) where it is dropped (our choice).

    Args:
        q: [B, N, H, D] float32, float64, float16 or bfloat16, any strides; D at most 256.
        k: [B, N, H, D] as q.
        v: [B, N, H, D] as q.
        index: [B, H, N-P, K] int32, distinct positions among all N tokens per row, in any order
            (ascending is fastest); a row with fewer than K ends in -1. See `connectivity`.
        keep: [B, N-P] float, exactly 0 or 1 per patch token, or None to keep all.
        scale: factor of the logits, D**-0.5 by default.
        num_prefix: P, leading tokens whose queries are dense, and that have no statistics.
        class_token: whether token 0 is a class token; by default when there is a prefix.
        need_stats: True also returns the statistics of `attention_stats`, of the sparse map:
            entries that are not named are zero, and count.

    Returns:
        `out` [B, N, H, D] in the dtype of q, and `stats` [B, N, H, 6] in float32 (float64 for
        float64), empty without `need_stats`. Statistics are differentiable in q and k.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit; on CPU also positions that are out of range, repeated or
            behind a -1, and a `keep` other than 0 or 1.
    """
    if class_token is None:
        class_token = num_prefix > 0
    if _check.eager():
        _check.flag("class_token", class_token)
        _check.flag("need_stats", need_stats)
        if scale is not None:
            _check.number("scale", scale)
        _check_attention(q, k, v, index, keep, num_prefix, class_token)
    args = (q, k, v, index, keep, scale, num_prefix, class_token, need_stats)
    result = _definitions.run("sparse_attention", sparse_attention_reference, q, args, *OPTIONS)
    return result[0], result[1]


# ---- reference: the definition -------------------------------------------------------------------


def named_keys(index: Tensor, num_tokens: int) -> Tensor:
    """The boolean map [B, H, N, N] of what each query may see, by `index` [B, H, N-P, K] alone."""
    batch, heads, queries, _ = index.shape
    named = torch.zeros(
        batch, heads, queries, num_tokens + 1, dtype=torch.bool, device=index.device
    )
    named = named.scatter(-1, torch.where(index < 0, num_tokens, index).long(), 1)
    prefix = named.new_ones(batch, heads, num_tokens - queries, num_tokens)
    return torch.cat([prefix, named[..., :num_tokens]], dim=2)


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None = None,
    *,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool | None = None,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Definition of `sparse_attention` in plain PyTorch, written to be read."""
    if class_token is None:
        class_token = num_prefix > 0
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, num_tokens = q.shape[:2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * scale

    named = named_keys(index, num_tokens)
    kept = q.new_ones((batch, num_tokens), dtype=torch.bool)
    if keep is not None:
        kept = torch.cat([kept[:, :num_prefix], keep.detach() > 0.5], dim=1)
    own = torch.eye(num_tokens, dtype=torch.bool, device=q.device)
    # A prefix token is never dropped, so for its dense row the diagonal changes nothing.
    seen = named & (kept[:, None, None, :] | own)
    blind = ~seen.any(dim=-1, keepdim=True)
    shown = logits.masked_fill(~seen, float("-inf")).masked_fill(blind, 0)
    lse = shown.logsumexp(dim=-1, keepdim=True)
    p = softmax_of(shown, lse).masked_fill(~seen, 0)
    out = torch.einsum("bhij,bjhd->bihd", p, v.to(wide))

    if keep is not None and _definitions.differentiated(keep):
        lse = lse.masked_fill(blind, float("-inf"))
        soft = torch.where(seen, p, (logits - lse).sigmoid()).masked_fill(own | ~named, 0)
        out = with_keep_gradient(out, soft, keep, v)

    if not need_stats:
        return out.to(q.dtype), out.new_empty(0)

    return out.to(q.dtype), map_statistics(p, kept, num_prefix, class_token)


# ---- checks --------------------------------------------------------------------------------------


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None,
    num_prefix: int,
    class_token: bool,
) -> None:
    check_qkv(q, k, v, num_prefix, class_token)
    _check.tensor("index", index, 4)
    _check.dtype("index", index, torch.int32)
    _check.device("index", index, "q", q)
    _check.size("index", index, 0, q.shape[0], "the batch")
    _check.size("index", index, 1, q.shape[2], "heads")
    _check.size("index", index, 2, q.shape[1] - num_prefix, "the patch tokens")
    named, tokens = index.shape[3], q.shape[1]
    if isinstance(named, int) and isinstance(tokens, int) and named > tokens:
        raise ValueError(
            f"index names {named} distinct keys a query, but there are only {tokens} tokens"
        )
    check_keep(keep, q, num_prefix)


# ---- fakes ---------------------------------------------------------------------------------------


@_register.fake("sparse_attention")
def _(
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
    _check_attention(q, k, v, index, keep, num_prefix, class_token)
    return fake_results(q, need_stats)


@_register.fake("sparse_attention_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_attention(q, k, v, index, keep, num_prefix, class_token)
    check_grads(grad_out, grad_stats, q, out, stats, lse)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, fake_gradient("keep", keep, keep_grad, q)


# ---- autograd ------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, index, keep, scale, num_prefix, class_token, need_stats = inputs
    out, stats, lse = output
    ctx.mark_non_differentiable(*([lse] if need_stats else [stats, lse]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, index, keep, out, stats, lse)
    ctx.arguments = scale, num_prefix, class_token


@_register.autograd("sparse_attention", _setup)
def _(
    ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None, grad_lse: None
) -> tuple[Any, ...]:
    q, k, v, index, keep, out, stats, lse = ctx.saved_tensors
    keep_grad = ctx.needs_input_grad[4]
    if grad_out is None and grad_stats is None:
        return (None,) * 9
    grads = torch.ops.spot.sparse_attention_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_stats, q, k, v, index, keep, out, stats, lse, *ctx.arguments, keep_grad,
    )  # fmt: skip
    dkeep = grads[3].to(keep.dtype) if keep_grad else None
    return *grads[:3], None, dkeep, None, None, None, None


_register.once_only("sparse_attention")


# ---- autocast ------------------------------------------------------------------------------------


_register.autocast("sparse_attention")(cast_qkv)


# ---- FLOPs ---------------------------------------------------------------------------------------


def _products(q: Any, index: Any) -> int:
    """Multiply-accumulates of one product with the sparse map."""
    batch, tokens, heads, dim = q
    patches, named = index[2:]
    return batch * heads * dim * (patches * named + (tokens - patches) * tokens)


@_register.flops("sparse_attention")
def _(
    q: Any,
    k: Any,
    v: Any,
    index: Any,
    keep: Any = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = False,
    **kwargs: Any,
) -> int:
    """Two products over the named keys, and 4 multiply-accumulates an entry for statistics."""
    batch, _, heads, _ = q
    statistics = 8 * batch * heads * index[2] * index[3] if need_stats else 0
    return 4 * _products(q, index) + statistics


@_register.flops("sparse_attention_backward")
def _(
    grad_out: Any, grad_stats: Any, q: Any, k: Any, v: Any, index: Any, *args: Any, **kwargs: Any
) -> int:
    """Five products over the named keys, and 4 multiply-accumulates an entry for statistics."""
    batch, _, heads, _ = q
    statistics = 8 * batch * heads * index[2] * index[3] if grad_stats else 0
    return 10 * _products(q, index) + statistics
