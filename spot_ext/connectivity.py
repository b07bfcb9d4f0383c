"""Connectivity: which keys each query attends to, from low-rank coefficients and a sparse basis.

For each image, head and patch query i, with c the `coef_topk` largest of its coefficients (the
others zero), columns are ranked by

    approx[i, j] = sum_r c[i, r] basis[r, j]

and the `budget` largest are returned, ascending (Sparsifiner, arXiv 2303.13755; METHOD B1 from the
coefficients on). No matrix of queries times keys is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spot_ext import _check, _register

# ---- public function -----------------------------------------------------------------------------


def connectivity(
    coefficients: Tensor,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    """The `budget` best columns of each patch query.

    Ties go to the lower column, and to the lower coefficient; NaN ranks below -inf. Sums run over
    the coefficients in ascending order, in float32 (float64 for float64). The result is an index:
    nothing is differentiable.

    Args:
        coefficients: [B, H, N-P, R] float32, float64, float16 or bfloat16, any strides: one row per
            patch query. N is the number of columns in play, so that P of them are prefix tokens.
        basis: [R, columns] in the dtype of coefficients, one column per token of the full grid,
            prefix first; thresholds on it are the caller's. Finite where `coef_topk` leaves
            coefficients out: those may be skipped or multiplied by zero.
        budget: K, between 1 and N.
        columns: [B, N] int64, the basis column of each token in play, for images whose tokens were
            compacted; results are positions among them. None when all are there.
        keep: [B, N-P] float, exactly 0 or 1 per patch token: columns of dropped ones are not
            candidates. None when all are.
        coef_topk: coefficients of a row to keep, or None for all (published code: 8).
        threshold: columns must exceed it, or None (published alternative to a budget: 1e-4).

    Returns:
        [B, H, N-P, K] int32, ascending positions among the N columns in play; rows with fewer
        candidates than K end in -1.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, a budget that is not in [1, N]; on CPU also columns out
            of range or a `keep` other than 0 or 1.
    """
    args = (coefficients, basis, budget, columns, keep, coef_topk, threshold)
    if not _check.eager():
        return torch.ops.spot.connectivity(*args)
    _check_connectivity(*args)
    if _check.has_kernel("connectivity", coefficients):
        return _check.call(torch.ops.spot.connectivity, *args)
    return connectivity_reference(*args[:-2], coef_topk=coef_topk, threshold=threshold)


def predict_connectivity(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    """`connectivity` of the coefficients softmax(q keys^T + bias), which are never stored.

    Keys are few: those of a head reduced to R (METHOD B1's K_down), with whatever scales the logits
    in them. The sums are those of `connectivity` up to the rounding of the coefficients.

    Args:
        q: [B, N-P, H, D] queries of the patch tokens; float32, float64, float16 or bfloat16, any
            strides.
        keys: [B, R, H, D] as q.
        bias: [B, R, H] as q, or None.
        basis: this and all that follow as in `connectivity`.
        budget: K.
        columns: [B, N] int64, or None.
        keep: [B, N-P], or None.
        coef_topk: or None.
        threshold: or None.

    Returns:
        [B, H, N-P, K] int32, as `connectivity`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: as `connectivity`.
    """
    args = (q, keys, bias, basis, budget, columns, keep, coef_topk, threshold)
    if not _check.eager():
        return torch.ops.spot.predict_connectivity(*args)
    _check_prediction(*args)
    if _check.has_kernel("predict_connectivity", q):
        return _check.call(torch.ops.spot.predict_connectivity, *args)
    return predict_connectivity_reference(*args[:-2], coef_topk=coef_topk, threshold=threshold)


# ---- reference: the definition -------------------------------------------------------------------


def connectivity_reference(
    coefficients: Tensor,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Definition of `connectivity` in plain PyTorch, written to be read."""
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    coef, basis = coefficients.detach().to(wide), basis.detach().to(wide)
    batch, _, queries, rank = coef.shape
    if coef_topk is not None and coef_topk < rank:
        order = _ranked(coef)[..., :coef_topk]
        coef = torch.zeros_like(coef).scatter(-1, order, coef.gather(-1, order))
    in_play = basis if columns is None else basis[:, columns].transpose(0, 1)[:, None]
    approx = coef @ in_play  # [B, H, N-P, N]
    candidate = torch.ones_like(approx, dtype=torch.bool)
    if keep is not None:
        prefix = approx.shape[-1] - queries
        kept = torch.cat([keep.new_ones(batch, prefix), keep.detach()], dim=1) > 0.5
        candidate = candidate & kept[:, None, None, :]
    if threshold is not None:
        candidate = candidate & (approx > threshold)
    # All candidates before all others, each by rank.
    order = _ranked(approx)
    first = (~candidate).gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True)
    best = order.gather(-1, first)[..., :budget]
    far = approx.shape[-1]
    best = best.masked_fill(~candidate.gather(-1, best), far).sort(dim=-1).values
    return best.masked_fill(best == far, -1).to(torch.int32)


def predict_connectivity_reference(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Definition of `predict_connectivity` in plain PyTorch."""
    coefficients = _coefficients(q, keys, bias)
    return connectivity_reference(
        coefficients, basis.to(coefficients.dtype), budget, columns, keep,
        coef_topk=coef_topk, threshold=threshold,
    )  # fmt: skip


def _coefficients(q: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """[B, H, N-P, R] of at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.detach().to(wide).transpose(1, 2) @ keys.detach().to(wide).permute(0, 2, 3, 1)
    if bias is not None:
        logits = logits + bias.detach().to(wide).transpose(1, 2)[:, :, None]
    return logits.softmax(dim=-1)


def _ranked(x: Tensor) -> Tensor:
    """Positions of the last dimension from the largest to the least; NaN last, ties by position."""
    low = torch.where(x.isnan(), float("-inf"), x)
    order = low.argsort(dim=-1, descending=True, stable=True)
    last = x.isnan().gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True)
    return order.gather(-1, last)


# ---- checks --------------------------------------------------------------------------------------


def _check_connectivity(coefficients: Tensor, *choice: Any) -> None:
    _check.tensor("coefficients", coefficients, 4)
    _check.dtype("coefficients", coefficients, _check.FLOATING)
    sizes = coefficients.shape[0], *coefficients.shape[2:]
    _check_choice("coefficients", coefficients, sizes, "the coefficients of a row", *choice)


def _check_prediction(q: Tensor, keys: Tensor, bias: Tensor | None, *choice: Any) -> None:
    _check.tensor("q", q, 4)
    _check.dtype("q", q, _check.FLOATING)
    _check.tensor("keys", keys, 4)
    for dim, meaning in ((0, "the batch"), (2, "heads"), (3, "the head dim of q")):
        _check.size("keys", keys, dim, q.shape[dim], meaning)
    if bias is not None:
        _check.tensor("bias", bias, 3)
        for dim in range(3):
            _check.size("bias", bias, dim, keys.shape[dim], "as keys has")
    for name, value in (("keys", keys), ("bias", bias)):
        if value is not None:
            _check.same_dtype(name, value, "q", q)
            _check.device(name, value, "q", q)
    _check_choice("q", q, (q.shape[0], q.shape[1], keys.shape[1]), "the keys", *choice)


def _check_choice(
    like_name: str,
    like: Tensor,
    sizes: tuple[int, int, int],
    rank_name: str,
    basis: Tensor,
    budget: int,
    columns: Tensor | None,
    keep: Tensor | None,
    coef_topk: int | None,
    threshold: float | None,
) -> None:
    """What both ops check besides where coefficients come from; `sizes` are B, N-P and R."""
    batch, queries, rank = sizes
    _check.tensor("basis", basis, 2)
    _check.same_dtype("basis", basis, like_name, like)
    _check.device("basis", basis, like_name, like)
    _check.size("basis", basis, 0, rank, rank_name)
    in_play = basis.shape[1]
    if columns is not None:
        _check.tensor("columns", columns, 2)
        _check.dtype("columns", columns, torch.int64)
        _check.device("columns", columns, like_name, like)
        _check.size("columns", columns, 0, batch, "the batch")
        in_play = columns.shape[1]
    if isinstance(queries, int) and isinstance(in_play, int) and queries > in_play:
        name = "basis" if columns is None else "columns"
        raise ValueError(
            f"{name} must have at least {queries} columns, as {like_name} has queries, "
            f"got {in_play}"
        )
    _check.count("budget", budget, 1, in_play, " (the columns)")
    if coef_topk is not None:
        _check.count("coef_topk", coef_topk, 1)
    if threshold is not None:
        _check.number("threshold", threshold)
    if keep is not None:
        _check.tensor("keep", keep, 2)
        _check.dtype("keep", keep, _check.FLOATING)
        _check.device("keep", keep, like_name, like)
        _check.size("keep", keep, 0, batch, "the batch")
        _check.size("keep", keep, 1, queries, "the patch tokens")


# ---- fake ----------------------------------------------------------------------------------------


@_register.fake("connectivity")
def _(
    coefficients: Tensor,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    _check_connectivity(coefficients, basis, budget, columns, keep, coef_topk, threshold)
    return coefficients.new_empty((*coefficients.shape[:3], budget), dtype=torch.int32)


@_register.fake("predict_connectivity")
def _(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Tensor:
    _check_prediction(q, keys, bias, basis, budget, columns, keep, coef_topk, threshold)
    batch, queries, heads = q.shape[:3]
    return q.new_empty((batch, heads, queries, budget), dtype=torch.int32)


# ---- autograd: an index, nothing to differentiate ------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.num_inputs = len(inputs)


def _no_gradient(ctx: Any, grad: None) -> tuple[None, ...]:
    return (None,) * ctx.num_inputs


_register.autograd("connectivity", _setup)(_no_gradient)
_register.autograd("predict_connectivity", _setup)(_no_gradient)


# ---- autocast ------------------------------------------------------------------------------------


@_register.autocast("connectivity")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    coefficients, basis = _register.cast(dtype, args[:2])
    return (coefficients, basis, *args[2:]), kwargs


@_register.autocast("predict_connectivity")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (*_register.cast(dtype, args[:4]), *args[4:]), kwargs


# ---- FLOPs ---------------------------------------------------------------------------------------


@_register.flops("connectivity")
def _(
    coefficients: Any,
    basis: Any,
    budget: int,
    columns: Any = None,
    keep: Any = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> int:
    """The combination of basis rows, as if the basis were dense."""
    batch, heads, queries, rank = coefficients
    return _combination(batch, heads, queries, rank, basis, columns, coef_topk)


@_register.flops("predict_connectivity")
def _(
    q: Any,
    keys: Any,
    bias: Any,
    basis: Any,
    budget: int,
    columns: Any = None,
    keep: Any = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> int:
    """That, and the product of queries and keys."""
    batch, queries, heads, dim = q
    product = 2 * batch * heads * queries * keys[1] * dim
    return product + _combination(batch, heads, queries, keys[1], basis, columns, coef_topk)


def _combination(
    batch: int, heads: int, queries: int, rank: int, basis: Any, columns: Any, topk: int | None
) -> int:
    in_play = basis[1] if columns is None else columns[1]
    used = rank if topk is None else min(topk, rank)
    return 2 * batch * heads * queries * used * in_play
