"""Token selection and compaction: `select`, `compact`, `scatter` and `fuse`.

Layouts are token-major. The first `num_prefix` tokens (class, distillation, registers, fused) are
never dropped; `index` counts patch tokens from 0 after them. Compaction and scattering only move
rows, so they are exact for every dtype; each is the other's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spot_ext import _check, _definitions, _register
from spot_ext._largest import largest, positions

# ---- public functions ---------------------------------------------------------------------------


def select_tokens(scores: Tensor, num_keep: int) -> Tensor:
    """Positions of the `num_keep` largest scores of each image, in ascending order.

    Ties go to the lower position; NaN ranks below -inf. Ascending order keeps the survivors in
    raster order, which helps memory locality and changes no result (our choice; the paper, arXiv
    2511.10488, leaves the order open).

    Args:
        scores: [B, N] float32, float64, float16 or bfloat16; any strides.
        num_keep: how many positions to return, between 0 and N.

    Returns:
        [B, num_keep] int64. Not differentiable.

    Raises:
        TypeError: `scores` is not a floating tensor, or `num_keep` not an int.
        ValueError: `scores` is not [B, N], or `num_keep` is out of range.
    """
    if _check.eager():
        _check_select(scores, num_keep)
    args = (scores, num_keep)
    return _definitions.run("select_tokens", select_tokens_reference, scores, args)


def compact_tokens(
    tokens: Tensor, index: Tensor, num_prefix: int = 1, extra: Tensor | None = None
) -> Tensor:
    """Keeps the prefix and the indexed patch tokens: `[prefix | extra | tokens[index]]`.

    One pass over the output, where `topk`, `sort`, `gather` and `cat` take four. Differentiable in
    `tokens` and `extra`, to any order.

    Args:
        tokens: [B, P+N, ...] of any dtype and strides (dense in the last dimensions is copy-free).
        index: [B, M] int64, distinct positions in [0, N) in any order.
        num_prefix: P, leading tokens that are always kept.
        extra: [B, E, ...] rows to insert after the prefix (fused tokens), or None.

    Returns:
        [B, P+E+M, ...] contiguous.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit; on CPU also an index out of range or repeated. On CUDA
            the row of an index out of range is NaN (0 for integers), unless SPOT_CHECK=1.
    """
    if _check.eager():
        _check_compact(tokens, index, num_prefix, extra)
    args = (tokens, index, num_prefix, extra)
    return _definitions.run("compact_tokens", compact_tokens_reference, tokens, args)


def scatter_tokens(
    tokens: Tensor,
    index: Tensor,
    num_tokens: int,
    num_prefix: int = 1,
    background: Tensor | None = None,
) -> Tensor:
    """Puts compacted tokens back on the full grid; the inverse of `compact_tokens`.

    Args:
        tokens: [B, P+M, ...] of any dtype: prefix rows, then one row per index entry.
        index: [B, M] int64, distinct positions in [0, num_tokens).
        num_tokens: N, patch tokens of the full grid.
        num_prefix: P, leading tokens that pass through.
        background: [B, P+N, ...] whose patch rows fill the positions not named; None fills zeros.
            Its prefix rows are not used.

    Returns:
        [B, P+num_tokens, ...] contiguous; differentiable in `tokens` and `background`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit; on CPU also an index out of range or repeated. On CUDA a
            repeated position gives a NaN row and one out of range a NaN image, unless SPOT_CHECK=1.
    """
    if _check.eager():
        _check_scatter(tokens, index, num_tokens, num_prefix, background)
    args = (tokens, index, num_tokens, num_prefix, background)
    return _definitions.run("scatter_tokens", scatter_tokens_reference, tokens, args)


def fuse_tokens(
    tokens: Tensor, weights: Tensor, index: Tensor, num_prefix: int = 1, normalize: bool = True
) -> Tensor:
    """Weighted mean (or sum) of the patch tokens that are *not* in `index`: one soft token.

    With r running over the removed patches, `sum_r w_r x_r / sum_r w_r`; zero where the weights sum
    to zero. SPViT and EViT sum without normalising; the mean keeps the scale (our choice; the
    paper, arXiv 2511.10488, does not say which soft method it combines with).

    Args:
        tokens: [B, P+N, C] float32, float64, float16 or bfloat16; sums run in float32 (float64).
        weights: [B, N] of the dtype of `tokens`.
        index: [B, M] int64, the kept positions, which take no part.
        num_prefix: P, leading tokens, which take no part either.
        normalize: divide by the sum of the weights.

    Returns:
        [B, C]; differentiable once in `tokens` and `weights`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit; on CPU also an index out of range or repeated.
        RuntimeError: a second derivative is asked for.
    """
    if _check.eager():
        _check_fuse(tokens, weights, index, num_prefix)
        _check.flag("normalize", normalize)
    args = (tokens, weights, index, num_prefix, normalize)
    return _definitions.run("fuse_tokens", fuse_tokens_reference, tokens, args)


# ---- references: the definitions -----------------------------------------------------------------


def select_tokens_reference(scores: Tensor, num_keep: int) -> Tensor:
    """Definition of `select_tokens` in plain PyTorch."""
    return positions(largest(scores, num_keep), num_keep)


def compact_tokens_reference(
    tokens: Tensor, index: Tensor, num_prefix: int = 1, extra: Tensor | None = None
) -> Tensor:
    """Definition of `compact_tokens` in plain PyTorch."""
    image = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    kept = tokens[:, num_prefix:][image, index]
    parts = [tokens[:, :num_prefix], *([] if extra is None else [extra]), kept]
    return torch.cat(parts, dim=1)


def scatter_tokens_reference(
    tokens: Tensor,
    index: Tensor,
    num_tokens: int,
    num_prefix: int = 1,
    background: Tensor | None = None,
) -> Tensor:
    """Definition of `scatter_tokens` in plain PyTorch."""
    image = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    if background is None:
        grid = tokens.new_zeros(tokens.shape[0], num_tokens, *tokens.shape[2:])
    else:
        grid = background[:, num_prefix:]
    grid = grid.index_put((image, index), tokens[:, num_prefix:])
    return torch.cat([tokens[:, :num_prefix], grid], dim=1)


def fuse_tokens_reference(
    tokens: Tensor, weights: Tensor, index: Tensor, num_prefix: int = 1, normalize: bool = True
) -> Tensor:
    """Definition of `fuse_tokens` in plain PyTorch."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    removed = torch.ones_like(weights, dtype=torch.bool).scatter(1, index, 0)
    w = weights.to(wide).masked_fill(~removed, 0)
    x = tokens[:, num_prefix:].to(wide).masked_fill(~removed[..., None], 0)
    total = torch.einsum("bn,bnc->bc", w, x)
    if normalize:
        mass = w.sum(dim=1, keepdim=True)
        none = mass == 0
        total = (total / mass.masked_fill(none, 1)).masked_fill(none, 0)
    return total.to(tokens.dtype)


# ---- checks --------------------------------------------------------------------------------------


def _check_select(scores: Tensor, num_keep: int) -> None:
    _check.tensor("scores", scores, 2)
    _check.dtype("scores", scores, _check.FLOATING)
    _check.count("num_keep", num_keep, 0, scores.shape[1], " (the scored tokens)")


def _check_index(index: Tensor, like_name: str, like: Tensor) -> None:
    _check.tensor("index", index, 2)
    _check.dtype("index", index, torch.int64)
    _check.device("index", index, like_name, like)
    _check.size("index", index, 0, like.shape[0], "the batch")


def _check_tokens(name: str, tokens: Tensor, num_prefix: int) -> None:
    _check.tensor(name, tokens)
    _check.row_dtype(name, tokens)
    if tokens.dim() < 2:
        raise ValueError(f"{name} must have shape [B, tokens, ...], got {list(tokens.shape)}")
    _check.count("num_prefix", num_prefix, 0, tokens.shape[1], f" (the tokens of {name})")


def _check_same_rows(name: str, value: Tensor, tokens: Tensor) -> None:
    _check.tensor(name, value, tokens.dim())
    _check.same_dtype(name, value, "tokens", tokens)
    _check.device(name, value, "tokens", tokens)
    for dim in (0, *range(2, tokens.dim())):
        _check.size(name, value, dim, tokens.shape[dim], "as tokens has")


def _check_compact(tokens: Tensor, index: Tensor, num_prefix: int, extra: Tensor | None) -> None:
    _check_tokens("tokens", tokens, num_prefix)
    _check_index(index, "tokens", tokens)
    _check.count("the number of indexed tokens", index.shape[1], 0, tokens.shape[1] - num_prefix)
    if extra is not None:
        _check_same_rows("extra", extra, tokens)


def _check_scatter(
    tokens: Tensor,
    index: Tensor,
    num_tokens: int,
    num_prefix: int,
    background: Tensor | None,
    num_extra: int = 0,
    name: str = "tokens",
) -> None:
    _check_tokens(name, tokens, num_prefix)
    _check_index(index, name, tokens)
    _check.count("num_tokens", num_tokens, 0)
    _check.count("the number of indexed tokens", index.shape[1], 0, num_tokens)
    rows = num_prefix + num_extra + index.shape[1]
    meaning = "prefix, extra and indexed tokens"
    found = tokens.shape[1]
    if isinstance(found, int) and isinstance(rows, int) and found > rows:
        meaning += "; leave fused tokens in front of the indexed out, or count them in num_prefix"
    _check.size(name, tokens, 1, rows, meaning)
    if background is not None:
        _check_same_rows("background", background, tokens)
        _check.size("background", background, 1, num_prefix + num_tokens, "num_prefix + num_tokens")


def _check_fuse(tokens: Tensor, weights: Tensor, index: Tensor, num_prefix: int) -> None:
    _check.tensor("tokens", tokens, 3)
    _check.dtype("tokens", tokens, _check.FLOATING)
    _check_compact(tokens, index, num_prefix, None)
    _check.tensor("weights", weights, 2)
    _check.same_dtype("weights", weights, "tokens", tokens)
    _check.device("weights", weights, "tokens", tokens)
    _check.size("weights", weights, 0, tokens.shape[0], "the batch")
    _check.size("weights", weights, 1, tokens.shape[1] - num_prefix, "the patch tokens")


# ---- fake kernels --------------------------------------------------------------------------------


@_register.fake("select_tokens")
def _(scores: Tensor, num_keep: int) -> Tensor:
    _check_select(scores, num_keep)
    return scores.new_empty((scores.shape[0], num_keep), dtype=torch.int64)


@_register.fake("compact_tokens")
def _(tokens: Tensor, index: Tensor, num_prefix: int = 1, extra: Tensor | None = None) -> Tensor:
    _check_compact(tokens, index, num_prefix, extra)
    rows = num_prefix + index.shape[1] + (0 if extra is None else extra.shape[1])
    return tokens.new_empty((tokens.shape[0], rows, *tokens.shape[2:]))


@_register.fake("compact_tokens_backward")
def _(
    grad: Tensor, index: Tensor, num_tokens: int, num_prefix: int = 1, num_extra: int = 0
) -> Tensor:
    _check.count("num_extra", num_extra, 0)
    _check_scatter(grad, index, num_tokens, num_prefix, None, num_extra, "grad")
    return grad.new_empty((grad.shape[0], num_prefix + num_tokens, *grad.shape[2:]))


@_register.fake("scatter_tokens")
def _(
    tokens: Tensor,
    index: Tensor,
    num_tokens: int,
    num_prefix: int = 1,
    background: Tensor | None = None,
) -> Tensor:
    _check_scatter(tokens, index, num_tokens, num_prefix, background)
    return tokens.new_empty((tokens.shape[0], num_prefix + num_tokens, *tokens.shape[2:]))


@_register.fake("fuse_tokens")
def _(
    tokens: Tensor, weights: Tensor, index: Tensor, num_prefix: int = 1, normalize: bool = True
) -> Tensor:
    _check_fuse(tokens, weights, index, num_prefix)
    return tokens.new_empty((tokens.shape[0], tokens.shape[2]))


@_register.fake("fuse_tokens_backward")
def _(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor,
    index: Tensor,
    num_prefix: int = 1,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    _check_fuse(tokens, weights, index, num_prefix)
    _check.tensor("grad", grad, 2)
    _check.same_dtype("grad", grad, "tokens", tokens)
    _check.device("grad", grad, "tokens", tokens)
    _check.size("grad", grad, 0, tokens.shape[0], "the batch")
    _check.size("grad", grad, 1, tokens.shape[2], "the channels")
    return tokens.new_empty(tokens.shape), weights.new_empty(weights.shape)


# ---- autograd ------------------------------------------------------------------------------------


def _compact_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, index, num_prefix, extra = inputs
    ctx.save_for_backward(index)
    ctx.num_tokens = tokens.shape[1] - num_prefix
    ctx.num_prefix = num_prefix
    ctx.num_extra = 0 if extra is None else extra.shape[1]


@_register.autograd("compact_tokens", _compact_setup)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    tokens_grad = extra_grad = None
    if ctx.needs_input_grad[0]:
        tokens_grad = torch.ops.spot.compact_tokens_backward(
            grad, index, ctx.num_tokens, ctx.num_prefix, ctx.num_extra
        )
    if ctx.needs_input_grad[3]:
        extra_grad = grad.narrow(1, ctx.num_prefix, ctx.num_extra)
    return tokens_grad, None, None, extra_grad


def _compact_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _, ctx.num_prefix, ctx.num_extra = inputs
    ctx.save_for_backward(index)


@_register.autograd("compact_tokens_backward", _compact_backward_setup)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    # Extra rows do not reach the gradient of tokens, so theirs is zero.
    extra = grad.new_zeros((grad.shape[0], ctx.num_extra, *grad.shape[2:]))
    return (
        torch.ops.spot.compact_tokens(grad, index, ctx.num_prefix, extra),
        *(None for _ in range(4)),
    )


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.num_tokens, ctx.num_prefix, _ = inputs
    ctx.save_for_backward(index)


@_register.autograd("scatter_tokens", _scatter_setup)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    tokens_grad = background_grad = None
    if ctx.needs_input_grad[0]:
        tokens_grad = torch.ops.spot.compact_tokens(grad, index, ctx.num_prefix)
    if ctx.needs_input_grad[4]:  # grad where the background shows, zero elsewhere
        rows = ctx.num_prefix + index.shape[1]
        zeros = grad.new_zeros((grad.shape[0], rows, *grad.shape[2:]))
        background_grad = torch.ops.spot.scatter_tokens(
            zeros, index, ctx.num_tokens, ctx.num_prefix, grad
        )
    return tokens_grad, None, None, None, background_grad


def _fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weights, index, ctx.num_prefix, ctx.normalize = inputs
    ctx.save_for_backward(tokens, weights, index)


@_register.autograd("fuse_tokens", _fuse_setup)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weights, index = ctx.saved_tensors
    tokens_grad, weights_grad = torch.ops.spot.fuse_tokens_backward(
        grad, tokens, weights, index, ctx.num_prefix, ctx.normalize
    )
    return tokens_grad, weights_grad, None, None, None


_register.once_only("fuse_tokens")


# ---- autocast ------------------------------------------------------------------------------------


@_register.autocast("compact_tokens")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _widest(args, kwargs, 3, "extra")


@_register.autocast("scatter_tokens")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _widest(args, kwargs, 4, "background")


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """Promotes tokens and their optional companion to the wider of the two, as torch.cat does."""
    other = args[place] if len(args) > place else kwargs.get(name)
    if other is None:
        return args, kwargs
    tokens = args[0]
    wide = torch.promote_types(tokens.dtype, other.dtype)
    args = (tokens.to(wide), *args[1:])
    if len(args) > place:
        return (*args[:place], other.to(wide), *args[place + 1 :]), kwargs
    return args, {**kwargs, name: other.to(wide)}


@_register.autocast("fuse_tokens")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _register.cast(dtype, args), kwargs


# ---- FLOPs (2 per multiply-accumulate; moving rows is free) --------------------------------------


@_register.flops("select_tokens")
@_register.flops("compact_tokens")
@_register.flops("compact_tokens_backward")
@_register.flops("scatter_tokens")
def _(*args: Any, **kwargs: Any) -> int:
    return 0


@_register.flops("fuse_tokens")
def _(tokens: Any, weights: Any, index: Any, *args: Any, **kwargs: Any) -> int:
    batch, num_tokens = weights
    return 2 * batch * (num_tokens - index[1]) * tokens[2]


@_register.flops("fuse_tokens_backward")
def _(grad: Any, tokens: Any, weights: Any, index: Any, *args: Any, **kwargs: Any) -> int:
    batch, num_tokens = weights
    return 4 * batch * (num_tokens - index[1]) * tokens[2]
