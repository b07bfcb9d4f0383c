"""Connectivity: which keys each query attends to, from low-rank coefficients and a sparse basis.

For each image, head and patch query i, with c the `coef_topk` largest of its coefficients (the
others zero), columns are ranked by

    approx[i, j] = sum_r c[i, r] basis[r, j]

and the `budget` largest are returned, ascending (Sparsifiner, arXiv 2303.13755; METHOD B1 from the
coefficients on). No matrix of queries times keys is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spot_ext import _check, _definitions, _register
from spot_ext._largest import largest, positions


class _Prediction(NamedTuple):
    """Arguments of `predict_connectivity`, in its order: tensors, or for FLOPs their shapes."""

    q: Any
    k: Any
    down: Any
    query_weight: Any
    query_bias: Any
    key_weight: Any
    key_bias: Any
    up: Any
    budget: int
    columns: Any = None
    keep: Any = None
    scale: float | None = None
    coef_topk: int | None = None
    basis_threshold: float | None = None
    threshold: float | None = None


# ---- public functions ----------------------------------------------------------------------------


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
    if _check.eager():
        _check_connectivity(*args)
    return _definitions.run(
        "connectivity", connectivity_reference, coefficients, args, "coef_topk", "threshold"
    )


def predict_connectivity(
    q: Tensor,
    k: Tensor,
    down: Tensor,
    up: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    coef_topk: int | None = None,
    basis_threshold: float | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Sparsifiner's predictor: `connectivity` of coefficients that are made of queries and keys.

    With q' and k' the projections of q and k to c channels (themselves without weights), and t(j)
    the token of the full grid that key j is,

        coefficients[i, r] = softmax over r of scale * q'[i] . sum_j down[t(j), r] k'[j]
        basis[r, j]        = |up[j, r]| where that exceeds basis_threshold, otherwise 0

    for each image and head (Sparsifiner, arXiv 2303.13755). The sums are those of `connectivity` up
    to the rounding of the coefficients.

    Args:
        q: [B, N-P, H, D] queries of the patch tokens; float32, float64, float16 or bfloat16, any
            strides.
        k: [B, N, H, D] keys of all tokens in play, as q.
        down: [n, R] as q: a row for each token of the full grid, prefix first.
        up: [n, R] as q.
        budget: K, between 1 and N.
        columns: [B, N] int64, the token of the full grid that each one in play is; n for those that
            are none, such as fused tokens: their basis is 0 and their keys are not added up. None
            when all are there, in order.
        keep: [B, N-P], or None, as in `connectivity`; keys of dropped patch tokens are not added up
            either.
        query_weight: [c, D] as q, shared by the heads; this and the next three all or none.
        query_bias: [c].
        key_weight: [c, D].
        key_bias: [c].
        scale: of the logits, by default c**-0.5, or D**-0.5 without weights.
        coef_topk: as in `connectivity`.
        basis_threshold: see above (published code: 2e-2); without it the basis is `up` itself,
            transposed, whatever its signs.
        threshold: as in `connectivity`.

    Returns:
        [B, H, N-P, K] int32, as `connectivity`.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: as `connectivity`; some of the projections without the others.
    """
    args = _Prediction(
        q, k, down, query_weight, query_bias, key_weight, key_bias, up, budget, columns, keep,
        scale, coef_topk, basis_threshold, threshold,
    )  # fmt: skip
    if _check.eager():
        _check_prediction(args)
    return _definitions.run(
        "predict_connectivity", predict_connectivity_reference, q, args, *_Prediction._fields
    )


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
        coef = coef.masked_fill(~largest(coef, coef_topk), 0)
    in_play = basis if columns is None else basis[:, columns].transpose(0, 1)[:, None]
    approx = coef @ in_play  # [B, H, N-P, N]
    candidate = torch.ones_like(approx, dtype=torch.bool)
    if keep is not None:
        prefix = approx.shape[-1] - queries
        kept = torch.cat([keep.new_ones(batch, prefix), keep.detach()], dim=1) > 0.5
        candidate = candidate & kept[:, None, None, :]
    if threshold is not None:
        candidate = candidate & (approx > threshold)
    best = positions(largest(approx, budget, candidate), budget)
    return best.masked_fill(best == approx.shape[-1], -1).to(torch.int32)


def predict_connectivity_reference(
    q: Tensor,
    k: Tensor,
    down: Tensor,
    up: Tensor,
    budget: int,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    coef_topk: int | None = None,
    basis_threshold: float | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Definition of `predict_connectivity` in plain PyTorch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, down, up = (x.detach().to(wide) for x in (q, k, down, up))
    if basis_threshold is not None:
        up = F.threshold(up.abs(), basis_threshold, 0)
    absent = None  # keys that are not added up, [B, N]
    if columns is None:
        down = down.expand(q.shape[0], -1, -1)
    else:
        absent = columns == down.shape[0]
        down, up = (F.pad(x, (0, 0, 0, 1)) for x in (down, up))
        down = down[columns]  # [B, N, R]
    if query_weight is not None:
        assert query_bias is not None and key_weight is not None and key_bias is not None
        q = F.linear(q, query_weight.detach().to(wide), query_bias.detach().to(wide))
        k = F.linear(k, key_weight.detach().to(wide), key_bias.detach().to(wide))
    if keep is not None:
        dropped = F.pad(keep.detach() == 0, (k.shape[1] - q.shape[1], 0))
        absent = dropped if absent is None else absent | dropped
    if absent is not None:
        k = k.masked_fill(absent[:, :, None, None], 0)
        down = down.masked_fill(absent[:, :, None], 0)
    keys = torch.einsum("bnr,bnhc->brhc", down, k)
    logits = torch.einsum("bihc,brhc->bhir", q, keys)
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5
    coefficients = (logits * scale).softmax(dim=-1)
    return connectivity_reference(
        coefficients, up.mT, budget, columns, keep,
        coef_topk=coef_topk, threshold=threshold,
    )  # fmt: skip


# ---- checks --------------------------------------------------------------------------------------


def _check_connectivity(coefficients: Tensor, basis: Tensor, *choice: Any) -> None:
    _check.tensor("coefficients", coefficients, 4)
    _check.dtype("coefficients", coefficients, _check.FLOATING)
    _check.tensor("basis", basis, 2)
    _check.same_dtype("basis", basis, "coefficients", coefficients)
    _check.device("basis", basis, "coefficients", coefficients)
    _check.size("basis", basis, 0, coefficients.shape[3], "the coefficients of a row")
    queries = coefficients.shape[2]
    grid = "basis", "columns", basis.shape[1]
    _check_choice("coefficients", coefficients, queries, grid, *choice)


def _check_prediction(args: _Prediction) -> None:
    q, k, down, up = args.q, args.k, args.down, args.up
    _check.tensor("q", q, 4)
    _check.dtype("q", q, _check.FLOATING)
    _check.tensor("k", k, 4)
    for dim, meaning in ((0, "the batch"), (2, "heads"), (3, "the head dim of q")):
        _check.size("k", k, dim, q.shape[dim], meaning)
    _check.tensor("down", down, 2)
    _check.tensor("up", up, 2)
    for dim in range(2):
        _check.size("up", up, dim, down.shape[dim], "as down has")
    projections = ("query_weight", "query_bias", "key_weight", "key_bias")
    values = {name: getattr(args, name) for name in projections}
    given = {name: value for name, value in values.items() if value is not None}
    if given and len(given) < len(values):
        absent = next(name for name in values if name not in given)
        raise ValueError(f"{absent} must be given as well as {next(iter(given))}")
    for name, value in given.items():
        _check.tensor(name, value, 2 if name.endswith("weight") else 1)
        channels = given["query_weight"].shape[0]
        _check.size(name, value, 0, channels, "the channels of query_weight")
        if name.endswith("weight"):
            _check.size(name, value, 1, q.shape[3], "the head dim of q")
    for name, value in ({"k": k, "down": down, "up": up} | given).items():
        _check.same_dtype(name, value, "q", q)
        _check.device(name, value, "q", q)
    choice = args.budget, args.columns, args.keep, args.coef_topk, args.threshold
    in_play = _check_choice("q", q, q.shape[1], ("up", "rows", up.shape[0]), *choice)
    _check.size(
        "k", k, 1, in_play, "as up has tokens" if args.columns is None else "as columns has"
    )
    for name in ("scale", "basis_threshold"):
        if (number := getattr(args, name)) is not None:
            _check.number(name, number)


def _check_choice(
    like_name: str,
    like: Tensor,
    queries: int,
    grid: tuple[str, str, int],
    budget: int,
    columns: Tensor | None,
    keep: Tensor | None,
    coef_topk: int | None,
    threshold: float | None,
) -> int:
    """Checks what both ops share: the columns, how many to choose, and among which.

    `grid` says which sizes of what are the columns of the full grid, and how many there are.
    Returns how many are in play.
    """
    name, sizes, in_play = grid
    _check_fits(name, sizes, in_play)
    if columns is not None:
        _check.tensor("columns", columns, 2)
        _check.dtype("columns", columns, torch.int64)
        _check.device("columns", columns, like_name, like)
        _check.size("columns", columns, 0, like.shape[0], "the batch")
        name, sizes, in_play = "columns", "columns", columns.shape[1]
        _check_fits(name, sizes, in_play)
    if isinstance(queries, int) and isinstance(in_play, int) and queries > in_play:
        raise ValueError(
            f"{name} must have at least {queries} {sizes}, as {like_name} has queries, "
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
        _check.size("keep", keep, 0, like.shape[0], "the batch")
        _check.size("keep", keep, 1, queries, "the patch tokens")
    return in_play


def _check_fits(name: str, sizes: str, count: int) -> None:
    """Checks that positions and one more fit int32."""
    if isinstance(count, int) and count >= 2**31 - 1:
        raise ValueError(f"{name} must have less than 2^31 - 1 {sizes}, got {count}")


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
def _(*given: Any) -> Tensor:
    args = _Prediction(*given)
    _check_prediction(args)
    batch, queries, heads = args.q.shape[:3]
    return args.q.new_empty((batch, heads, queries, args.budget), dtype=torch.int32)


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
    return (*_register.cast(dtype, args[:8]), *args[8:]), kwargs


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
    in_play = basis[1] if columns is None else columns[1]
    return _combination(batch, heads, queries, rank, in_play, coef_topk)


@_register.flops("predict_connectivity")
def _(*given: Any, **kwargs: Any) -> int:
    """The combination, and the coefficients in the order of products that costs less."""
    args = _Prediction(*given)
    batch, queries, heads, _ = args.q
    tokens, rank = args.k[1], args.down[1]
    channels = None if args.query_weight is None else args.query_weight[0]
    made = coefficient_flops(args.q, tokens, rank, channels)
    return made + _combination(batch, heads, queries, rank, tokens, args.coef_topk)


def coefficient_flops(q: Any, tokens: int, rank: int, channels: int | None) -> int:
    """FLOPs of the coefficients of all heads, in the order of products that costs less.

    Keys are projected and added up, or added up, projected and projected back.
    """
    batch, queries, heads, dim = q
    both = queries + tokens
    added_first = both * rank * dim
    if channels is not None:
        projected_first = both * channels * (dim + rank)
        added_first += rank * channels * (2 * dim + 1)
        added_first = min(added_first, projected_first)
    return 2 * batch * heads * added_first


def _combination(
    batch: int, heads: int, queries: int, rank: int, in_play: int, topk: int | None
) -> int:
    used = rank if topk is None else min(topk, rank)
    return 2 * batch * heads * queries * used * in_play
