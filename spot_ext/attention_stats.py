"""Attention that also returns SPOT's six statistics per token and head.

For each head, with p the softmax map restricted to the kept patch tokens (n of them):

    cls_out[t]  = p[class, t]            what the class token takes from t
    cls_in[t]   = p[t, class]            what t takes from the class token
    row_mean[t] = 1/n sum_j p[t, j]      row_var[t] = 1/n sum_j (p[t, j] - row_mean[t])^2
    col_mean[t] = 1/n sum_i p[i, t]      col_var[t] = 1/n sum_i (p[i, t] - col_mean[t])^2

The six numbers are published (arXiv 2511.10488); the divisor n of the variances is our choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spot_ext import _check, _definitions, _register

NUM_STATS = 6  # cls_out, cls_in, row_mean, row_var, col_mean, col_var
MAX_HEAD_DIM = 256  # kMaxHeadDim of the kernels
OPTIONS = ("scale", "num_prefix", "class_token", "need_stats")  # by keyword only

# ---- public function -----------------------------------------------------------------------------


def attention_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool | None = None,
    need_stats: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the six statistics of its map.

    With `keep`, columns of dropped patch tokens are hidden from every row but their own (the
    self-loop of DynamicViT's masked softmax, with eps = 0), which makes masked training equal to
    compacted inference. Row maxima and sums run over the columns a row can see.

    `keep` gets a bounded straight-through gradient (our choice): for i != j
    `d out_i / d keep_j = p'_ij (v_j - out_i)`, with p'_ij = exp(s_ij - lse_i) where j is kept and
    sigmoid(s_ij - lse_i) where it is dropped; a token's own row does not depend on its mask. The
    exact derivative, exp(s_ij - lse_i) for dropped columns too, has no bound.

    Args:
        q: [B, N, H, D] float32, float64, float16 or bfloat16, any strides; D at most 256.
        k: [B, N, H, D] as q.
        v: [B, N, H, D] as q.
        keep: [B, N-P] float, exactly 0 or 1 per patch token, or None to keep all.
        bias: [1 or B, H, N, N], added to the scaled logits, or None.
        scale: factor of the logits, D**-0.5 by default.
        num_prefix: P, leading tokens that are never dropped and have no statistics.
        class_token: whether token 0 is a class token; by default when there is a prefix.
        need_stats: False skips the statistics and returns an empty tensor for them.

    Returns:
        `out` [B, N, H, D] in the dtype of q, and `stats` [B, N, H, 6] in float32 (float64 for
        float64) in the order above. Rows of prefix and dropped tokens are zero, as are the two cls
        entries without a class token. Statistics are differentiable in q, k and bias; `keep` is a
        constant in them.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit; on CPU also a `keep` other than 0 or 1.
    """
    if class_token is None:
        class_token = num_prefix > 0
    if _check.eager():
        _check.flag("class_token", class_token)
        _check.flag("need_stats", need_stats)
        if scale is not None:
            _check.number("scale", scale)
        _check_attention(q, k, v, keep, bias, num_prefix, class_token)
    args = (q, k, v, keep, bias, scale, num_prefix, class_token, need_stats)
    result = _definitions.run("attention_stats", attention_stats_reference, q, args, *OPTIONS)
    return result[0], result[1]


# ---- reference: the definition -------------------------------------------------------------------


def attention_stats_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool | None = None,
    need_stats: bool = True,
) -> tuple[Tensor, Tensor]:
    """Definition of `attention_stats` in plain PyTorch, written to be read."""
    if class_token is None:
        class_token = num_prefix > 0
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, num_tokens = q.shape[:2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * scale
    if bias is not None:
        logits = logits + bias.to(wide)

    kept = q.new_ones((batch, num_tokens), dtype=torch.bool)
    if keep is not None:
        kept = torch.cat([kept[:, :num_prefix], keep.detach() > 0.5], dim=1)
    own = torch.eye(num_tokens, dtype=torch.bool, device=q.device)
    seen = kept[:, None, None, :] | own  # [B, 1, N, N]
    shown = logits.masked_fill(~seen, float("-inf"))
    lse = shown.logsumexp(dim=-1, keepdim=True)
    p = softmax_of(shown, lse)
    out = torch.einsum("bhij,bjhd->bihd", p, v.to(wide))

    if keep is not None and _definitions.differentiated(keep):
        soft = torch.where(seen, p, (logits - lse).sigmoid()).masked_fill(own, 0)
        out = with_keep_gradient(out, soft, keep, v)

    if not need_stats:
        return out.to(q.dtype), out.new_empty(0)

    return out.to(q.dtype), map_statistics(p, kept, num_prefix, class_token)


def softmax_of(logits: Tensor, lse: Tensor) -> Tensor:
    """The attention map; a logit of +inf makes its whole row NaN, as in torch's softmax."""
    return (logits - lse).exp().masked_fill(lse.isposinf(), float("nan"))


def with_keep_gradient(out: Tensor, soft: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    """`out` [B, N, H, D] as it is, with the stated formula as gradient of `keep`.

    `soft` [B, H, N, N] is p'_ij, zero for pairs without a gradient.
    """
    change = (keep - keep.detach()).to(out.dtype)
    num_prefix = v.shape[1] - keep.shape[1]
    soft, value = soft[..., num_prefix:].detach(), v[:, num_prefix:].to(out.dtype).detach()
    pulled = torch.einsum("bhij,bj,bjhd->bihd", soft, change, value)
    mass = torch.einsum("bhij,bj->bih", soft, change)
    return out + pulled - mass[..., None] * out.detach()


def map_statistics(p: Tensor, kept: Tensor, num_prefix: int, class_token: bool) -> Tensor:
    """The six statistics [B, N, H, 6] of a map p [B, H, N, N] with tokens `kept` [B, N]."""
    kept = kept[:, num_prefix:][:, None]  # [B, 1, N-P]
    n = kept.sum(-1, keepdim=True).clamp(min=1)
    hidden = ~(kept[:, :, :, None] & kept[:, :, None, :])
    patch = p[:, :, num_prefix:, num_prefix:].masked_fill(hidden, 0)
    row_mean, col_mean = patch.sum(-1) / n, patch.sum(-2) / n
    # A row without a softmax is NaN, even where it has no patch in it.
    row_mean = row_mean + 0 * p[:, :, num_prefix:, :num_prefix].sum(-1)
    row_square = (patch - row_mean[..., :, None]).masked_fill(hidden, 0) ** 2
    col_square = (patch - col_mean[..., None, :]).masked_fill(hidden, 0) ** 2
    row_var, col_var = row_square.sum(-1) / n, col_square.sum(-2) / n
    if class_token:
        cls_out, cls_in = p[:, :, 0, num_prefix:], p[:, :, num_prefix:, 0]
    else:
        cls_out = cls_in = torch.zeros_like(row_mean)
    stats = torch.stack([cls_out, cls_in, row_mean, row_var, col_mean, col_var], dim=-1)
    stats = stats.masked_fill(~kept[..., None], 0).transpose(1, 2)  # [B, N-P, H, 6]
    return torch.nn.functional.pad(stats, (0, 0, 0, 0, num_prefix, 0))


# ---- checks --------------------------------------------------------------------------------------


def check_qkv(q: Tensor, k: Tensor, v: Tensor, num_prefix: int, class_token: bool) -> None:
    """Checks the operands that every attention op has."""
    named = () if _check.alike(q, k, v) and q.dim() == 4 else (("q", q), ("k", k), ("v", v))
    for name, value in named:
        _check.tensor(name, value, 4)
        _check.dtype(name, value, _check.FLOATING)
        _check.same_dtype(name, value, "q", q)
        _check.device(name, value, "q", q)
        for dim, meaning in enumerate(("the batch", "tokens", "heads", "head dim")):
            _check.size(name, value, dim, q.shape[dim], f"{meaning} of q")
    _check.count("the head dim of q", q.shape[3], 1, MAX_HEAD_DIM)
    _check.count("num_prefix", num_prefix, 0, q.shape[1], " (the tokens)")
    if class_token and isinstance(num_prefix, int) and num_prefix == 0:
        raise ValueError("class_token=True needs num_prefix of at least 1, got 0")


def check_keep(keep: Tensor | None, q: Tensor, num_prefix: int) -> None:
    """Checks the training mask beside q [B, N, H, D]."""
    if keep is None:
        return
    _check.tensor("keep", keep, 2)
    _check.dtype("keep", keep, _check.FLOATING)
    _check.device("keep", keep, "q", q)
    _check.size("keep", keep, 0, q.shape[0], "the batch")
    _check.size("keep", keep, 1, q.shape[1] - num_prefix, "the patch tokens")


def check_grads(
    grad_out: Tensor,
    grad_stats: Tensor | None,
    q: Tensor,
    out: Tensor,
    stats: Tensor,
    lse: Tensor,
) -> None:
    """Checks gradients and saved results of a backward pass."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = tuple(q.shape[:3])
    _check.saved("grad_out", grad_out, tuple(q.shape), q.dtype, "q", q)
    _check.saved("out", out, tuple(q.shape), q.dtype, "q", q)
    _check.saved("lse", lse, heads, wide, "q", q)
    if grad_stats is not None:
        _check.saved("grad_stats", grad_stats, (*heads, NUM_STATS), wide, "q", q)
        _check.saved("stats", stats, (*heads, NUM_STATS), wide, "q", q)


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    num_prefix: int,
    class_token: bool,
) -> None:
    check_qkv(q, k, v, num_prefix, class_token)
    check_keep(keep, q, num_prefix)
    if bias is not None:
        _check.tensor("bias", bias, 4)
        _check.dtype("bias", bias, _check.FLOATING)
        _check.device("bias", bias, "q", q)
        if isinstance(bias.shape[0], int) and bias.shape[0] != 1:
            _check.size("bias", bias, 0, q.shape[0], "1 or the batch")
        _check.size("bias", bias, 1, q.shape[2], "heads")
        _check.size("bias", bias, 2, q.shape[1], "tokens")
        _check.size("bias", bias, 3, q.shape[1], "tokens")


# ---- fakes ---------------------------------------------------------------------------------------


def fake_results(q: Tensor, need_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Fake `out`, `stats` and `lse` of an attention op."""
    wide = torch.promote_types(q.dtype, torch.float32)
    stats = q.new_empty((*q.shape[:3], NUM_STATS) if need_stats else (0,), dtype=wide)
    return q.new_empty(q.shape), stats, q.new_empty(q.shape[:3], dtype=wide)


def fake_gradient(name: str, value: Tensor | None, wanted: bool, q: Tensor) -> Tensor:
    """A fake gradient of `keep` or `bias`; empty unless wanted."""
    _check.asked(name, value, wanted)
    shape = value.shape if wanted and value is not None else (0,)
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@_register.fake("attention_stats")
def _(
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
    _check_attention(q, k, v, keep, bias, num_prefix, class_token)
    return fake_results(q, need_stats)


@_register.fake("attention_stats_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_attention(q, k, v, keep, bias, num_prefix, class_token)
    check_grads(grad_out, grad_stats, q, out, stats, lse)
    dkeep = fake_gradient("keep", keep, keep_grad, q)
    dbias = fake_gradient("bias", bias, bias_grad, q)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, dkeep, dbias


# ---- autograd ------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, keep, bias, scale, num_prefix, class_token, need_stats = inputs
    out, stats, lse = output
    ctx.mark_non_differentiable(*([lse] if need_stats else [stats, lse]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, keep, bias, out, stats, lse)
    ctx.arguments = scale, num_prefix, class_token


@_register.autograd("attention_stats", _setup)
def _(
    ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None, grad_lse: None
) -> tuple[Any, ...]:
    q, k, v, keep, bias, out, stats, lse = ctx.saved_tensors
    keep_grad, bias_grad = ctx.needs_input_grad[3:5]
    if grad_out is None and grad_stats is None:
        return (None,) * 9
    grads = torch.ops.spot.attention_stats_backward(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_stats, q, k, v, keep, bias, out, stats, lse, *ctx.arguments, keep_grad, bias_grad,
    )  # fmt: skip
    dkeep = grads[3].to(keep.dtype) if keep_grad else None
    dbias = grads[4].to(bias.dtype) if bias_grad else None
    return *grads[:3], dkeep, dbias, None, None, None, None


_register.once_only("attention_stats")


# ---- autocast ------------------------------------------------------------------------------------


@_register.autocast("attention_stats")
def cast_qkv(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Casts q, k and v, which come first, and nothing else."""
    q, k, v = _register.cast(dtype, args[:3])
    return (q, k, v, *args[3:]), kwargs


# ---- FLOPs ---------------------------------------------------------------------------------------


@_register.flops("attention_stats")
def _(
    q: Any,
    k: Any,
    v: Any,
    keep: Any = None,
    bias: Any = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = True,
    **kwargs: Any,
) -> int:
    """Two matrix products, and 4 multiply-accumulates per map entry for the statistics."""
    batch, tokens, heads, dim = q
    products = 4 * batch * heads * tokens * tokens * dim
    return products + (8 * batch * heads * (tokens - num_prefix) ** 2 if need_stats else 0)


@_register.flops("attention_stats_backward")
def _(
    grad_out: Any,
    grad_stats: Any,
    q: Any,
    k: Any,
    v: Any,
    keep: Any,
    bias: Any,
    out: Any,
    stats: Any,
    lse: Any,
    scale: float | None = None,
    num_prefix: int = 1,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five matrix products, and 4 multiply-accumulates per map entry for the statistics."""
    batch, tokens, heads, dim = q
    products = 10 * batch * heads * tokens * tokens * dim
    return products + (8 * batch * heads * (tokens - num_prefix) ** 2 if grad_stats else 0)
