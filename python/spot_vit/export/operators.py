"""SPOT's operators as standard operators of ONNX, few and fast ones.

The definitions in `spot_ext` are written to be read; run node by node by a runtime they would cost
what pruning saves. Here row sums of an attention map follow from its softmax, sums over columns and
of squares are products with a vector, and the largest scores are a TopK, whose ties go to the lower
position by ONNX's own word. Only inference is exported: no masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from onnxscript import opset20 as op

_INT32, _INT64 = 6, 7  # as ONNX numbers its types
Value = Any  # a tensor of the graph that is being made


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What stands for each operator, as `torch.onnx.export` takes it (custom_translation_table)."""
    spot = torch.ops.spot
    return {
        spot.attention_stats.default: attention_stats,
        spot.sparse_attention.default: sparse_attention,
        spot.token_relevance.default: token_relevance,
        spot.select_tokens.default: select_tokens,
        spot.compact_tokens.default: compact_tokens,
        spot.fuse_tokens.default: fuse_tokens,
        spot.connectivity.default: connectivity,
        spot.predict_connectivity.default: predict_connectivity,
    }


# ---- attention -----------------------------------------------------------------------------------


def attention_stats(
    q: Value,
    k: Value,
    v: Value,
    keep: Value = None,
    bias: Value = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = True,
) -> tuple[Value, Value, Value]:
    """`spot::attention_stats` without a mask: output, statistics, logarithm of the sums."""
    _refuse_masks(keep)
    logits = _logits(q, k, scale)
    if bias is not None:
        logits = op.Add(logits, bias)
    return _attend(logits, v, False, int(num_prefix), class_token, need_stats)


def sparse_attention(
    q: Value,
    k: Value,
    v: Value,
    index: Value,
    keep: Value = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    need_stats: bool = False,
) -> tuple[Value, Value, Value]:
    """`spot::sparse_attention` without a mask: the other keys are hidden from a dense map."""
    _refuse_masks(keep)
    logits, tokens, prefix = _logits(q, k, scale), q.shape[1], int(num_prefix)
    rows = _slice(logits, prefix, tokens, 2) if prefix else logits
    index = op.Cast(index, to=_INT64)
    absent = op.Less(index, _ints(0))
    shown = op.Where(absent, _floats(-np.inf), _floats(0.0))  # -1 names no key
    place = op.Where(absent, _ints(0), index)
    hidden = op.Expand(_floats(-np.inf), op.Shape(rows))
    hidden = op.ScatterElements(hidden, place, shown, axis=3, reduction="max")
    rows = op.Add(rows, hidden)
    if prefix:
        rows = op.Concat(_slice(logits, 0, prefix, 2), rows, axis=2)
    return _attend(rows, v, True, prefix, class_token, need_stats)


def _logits(q: Value, k: Value, scale: float | None) -> Value:
    """[B, H, N, N] of operands [B, N, H, D]."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    queries = op.Mul(op.Transpose(q, perm=[0, 2, 1, 3]), _floats(scale))
    return op.MatMul(queries, op.Transpose(k, perm=[0, 2, 3, 1]))


def _attend(
    logits: Value, v: Value, blind: bool, prefix: int, class_token: bool, need_stats: bool
) -> tuple[Value, Value, Value]:
    """Output [B, N, H, D], statistics [B, N, H, 6] and logarithms [B, H, N] of logits.

    With `blind` a row may be hidden altogether: it attends to nothing.
    """
    tokens = v.shape[1]
    p = op.Softmax(logits, axis=-1)
    if blind:
        p = op.Where(op.IsNaN(p), _floats(0.0), p)
    out = op.Transpose(op.MatMul(p, op.Transpose(v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
    log_sums = op.ReduceLogSumExp(logits, _ints([3]), keepdims=0)
    if not need_stats:
        return out, _floats([]), log_sums
    return out, _statistics(p, tokens, prefix, class_token, blind), log_sums


def _statistics(p: Value, tokens: int, prefix: int, class_token: bool, blind: bool) -> Value:
    """[B, N, H, 6] of a map p [B, H, N, N]; with `blind` rows may be zero altogether.

    Variances are mean squares less squared means: what rounding leaves of n² times that is below
    1e-6, and predictors see it beside numbers around 1.
    """
    n = tokens - prefix
    weight = np.zeros(tokens)
    weight[prefix:] = 1 / n
    row, column = _floats(weight[None]), _floats(weight[:, None])

    def patches(x: Value, axis: int) -> Value:
        return _slice(x, prefix, tokens, axis) if prefix else x

    squares = op.Mul(p, p)
    to_prefix = _block(p, (prefix, tokens), (0, prefix)) if prefix else None
    if blind or not prefix:
        row_mean = patches(op.MatMul(p, column), 2)
    else:  # a row sums to 1
        mass = to_prefix if prefix == 1 else _sum(to_prefix, 3)
        row_mean = op.Mul(op.Sub(_floats(1.0), mass), _floats(1 / n))
    row_var = op.Sub(patches(op.MatMul(squares, column), 2), op.Mul(row_mean, row_mean))
    column_mean = patches(op.MatMul(row, p), 3)
    squared_mean = op.Mul(column_mean, column_mean)
    column_var = op.Sub(patches(op.MatMul(row, squares), 3), squared_mean)
    if class_token:
        first_out = _block(p, (0, 1), (prefix, tokens))
        first_in = _lying(_slice(to_prefix, 0, 1, 3))
    else:
        first_out = first_in = op.Mul(column_mean, _floats(0.0))
    parts = (
        first_out, first_in, _lying(row_mean), op.Relu(_lying(row_var)), column_mean,
        op.Relu(column_var),
    )  # fmt: skip
    stats = op.Transpose(op.Concat(*parts, axis=2), perm=[0, 3, 1, 2])  # [B, n, H, 6]
    return op.Pad(stats, _ints([0, prefix, 0, 0, 0, 0, 0, 0])) if prefix else stats


def _block(p: Value, rows: tuple[int, int], columns: tuple[int, int]) -> Value:
    """Some rows and columns of a map, without a copy of the other ones in between."""
    starts, ends = zip(rows, columns, strict=True)
    return op.Slice(p, _ints(starts), _ints(ends), _ints([2, 3]))


def _lying(x: Value) -> Value:
    """[B, H, n, 1] as [B, H, 1, n]."""
    return op.Transpose(x, perm=[0, 1, 3, 2])


# ---- relevance -----------------------------------------------------------------------------------


def token_relevance(
    tokens: Value,
    features: Value,
    keep: Value,
    norm_weight: Value,
    norm_bias: Value,
    remap_weight: Value,
    remap_bias: Value,
    fc1_weight: Value,
    fc1_bias: Value,
    fc2_weight: Value,
    fc2_bias: Value,
    fc3_weight: Value,
    fc3_bias: Value,
    eps: float = 1e-5,
) -> tuple[Value, Value, Value, Value, Value]:
    """`spot::token_relevance` without a mask.

    The first layer is one product for each part of its input: the shared half has one row an image,
    and nothing is put together in memory.
    """
    _refuse_masks(keep)
    width = fc1_weight.shape[1]
    remapped = shared = op.Identity(fc1_bias)
    total, done = fc1_bias, 0
    if tokens is not None:
        normed, *_ = op.LayerNormalization(tokens, norm_weight, norm_bias, axis=-1, epsilon=eps)
        remapped = op.Gelu(_linear(normed, remap_weight, remap_bias))
        local, rest = op.Split(remapped, axis=-1, num_outputs=2)
        shared = op.ReduceMean(rest, _ints([1]))
        done = remap_weight.shape[0]
        by_half = [_slice(fc1_weight, lo, lo + done // 2, 1) for lo in (0, done // 2)]
        total = op.Add(op.MatMul(local, _turned(by_half[0])), _linear(shared, by_half[1], fc1_bias))
        shared = op.Squeeze(shared, _ints([1]))
    if features is not None:
        seen = op.MatMul(features, _turned(_slice(fc1_weight, done, width, 1)))
        total = op.Add(seen, total)
    hidden1 = op.Gelu(total)
    hidden2 = op.Gelu(_linear(hidden1, fc2_weight, fc2_bias))
    scores = op.LogSoftmax(_linear(hidden2, fc3_weight, fc3_bias), axis=-1)
    return scores, remapped, shared, hidden1, hidden2


# ---- tokens --------------------------------------------------------------------------------------


def select_tokens(scores: Value, num_keep: int) -> Value:
    """`spot::select_tokens`: the largest, then their positions in order."""
    count = _ints([int(num_keep)])
    _, chosen = op.TopK(scores, count, axis=1)
    ascending, _ = op.TopK(chosen, count, axis=1, largest=0)
    return ascending


def compact_tokens(tokens: Value, index: Value, num_prefix: int = 1, extra: Value = None) -> Value:
    """`spot::compact_tokens`: one gather of rows."""
    prefix = int(num_prefix)
    index = op.Unsqueeze(index, _ints([2]))
    if not prefix:
        kept = op.GatherND(tokens, index, batch_dims=1)
        return kept if extra is None else op.Concat(extra, kept, axis=1)
    kept = op.GatherND(tokens, op.Add(index, _ints(prefix)), batch_dims=1)
    front = [_slice(tokens, 0, prefix, 1), *([] if extra is None else [extra])]
    return op.Concat(*front, kept, axis=1)


def fuse_tokens(
    tokens: Value, weights: Value, index: Value, num_prefix: int = 1, normalize: bool = True
) -> Value:
    """`spot::fuse_tokens`: a product with the weights, zero for tokens that stay."""
    patches = _slice(tokens, int(num_prefix), tokens.shape[1], 1) if num_prefix else tokens
    none = op.Expand(_floats(0.0), op.Shape(index))
    weights = op.ScatterElements(weights, index, none, axis=1)
    total = op.Squeeze(op.MatMul(op.Unsqueeze(weights, _ints([1])), patches), _ints([1]))
    if not normalize:
        return total
    mass = _sum(weights, 1)
    empty = op.Equal(mass, _floats(0.0))
    mean = op.Div(total, op.Where(empty, _floats(1.0), mass))
    return op.Where(empty, _floats(0.0), mean)


# ---- connectivity --------------------------------------------------------------------------------


def connectivity(
    coefficients: Value,
    basis: Value,
    budget: int,
    columns: Value = None,
    keep: Value = None,
    coef_topk: int | None = None,
    threshold: float | None = None,
) -> Value:
    """`spot::connectivity` without a mask."""
    _refuse_masks(keep)
    return _largest(coefficients, basis, basis.shape, budget, columns, coef_topk, threshold)


def _largest(
    coefficients: Value,
    basis: Value,
    sizes: Any,
    budget: int,
    columns: Value,
    coef_topk: int | None,
    threshold: float | None,
) -> Value:
    """[B, H, N-P, budget] keys; lists do not ascend, since who reads them needs no order.

    `sizes` are those of `basis` [R, N].
    """
    rank, keys = sizes
    if coef_topk is not None and coef_topk < rank:
        values, place = op.TopK(coefficients, _ints([int(coef_topk)]), axis=3)
        nothing = op.Expand(_floats(0.0), op.Shape(coefficients))
        coefficients = op.ScatterElements(nothing, place, values, axis=3)
    if columns is not None:
        keys = columns.shape[1]
        basis = op.Transpose(op.Gather(basis, columns, axis=1), perm=[1, 0, 2])  # [B, R, N]
        basis = op.Unsqueeze(basis, _ints([1]))
    approx = op.MatMul(coefficients, basis)
    count = min(int(budget), keys)
    values, best = op.TopK(approx, _ints([count]), axis=3)
    if threshold is not None:
        best = op.Where(op.Greater(values, _floats(threshold)), best, _ints(-1))
    if count < budget:
        missing = _ints([0, 0, 0, 0, 0, 0, 0, int(budget) - count])
        best = op.Pad(best, missing, _ints(-1))
    return op.Cast(best, to=_INT32)


def predict_connectivity(
    q: Value,
    k: Value,
    down: Value,
    query_weight: Value,
    query_bias: Value,
    key_weight: Value,
    key_bias: Value,
    up: Value,
    budget: int,
    columns: Value = None,
    keep: Value = None,
    scale: float | None = None,
    coef_topk: int | None = None,
    basis_threshold: float | None = None,
    threshold: float | None = None,
) -> Value:
    """`spot::predict_connectivity` without a mask."""
    _refuse_masks(keep)
    heads, channels, (grid, rank) = q.shape[2], q.shape[3], down.shape
    if basis_threshold is not None:
        size = op.Abs(up)
        up = op.Where(op.Greater(size, _floats(basis_threshold)), size, _floats(0.0))
    if columns is not None:  # those of no grid have a row of zeros
        down, up = (op.Pad(x, _ints([0, 0, 1, 0])) for x in (down, up))
        grid += 1
        down = op.Gather(down, columns, axis=0)  # [B, N, R]
    if query_weight is not None:
        channels = query_weight.shape[0]
        q, k = _linear(q, query_weight, query_bias), _linear(k, key_weight, key_bias)
    flat = op.Reshape(k, _ints([0, 0, heads * channels]))
    turned = op.Transpose(down, perm=[1, 0] if columns is None else [0, 2, 1])
    keys = op.Reshape(op.MatMul(turned, flat), _ints([0, rank, heads, channels]))
    queries = op.Transpose(q, perm=[0, 2, 1, 3])
    logits = op.MatMul(queries, op.Transpose(keys, perm=[0, 2, 3, 1]))
    scale = max(channels, 1) ** -0.5 if scale is None else scale
    coefficients = op.Softmax(op.Mul(logits, _floats(scale)), axis=-1)
    basis = op.Transpose(up, perm=[1, 0])
    sizes = rank, grid
    return _largest(coefficients, basis, sizes, budget, columns, coef_topk, threshold)


# ---- pieces --------------------------------------------------------------------------------------


def _refuse_masks(keep: Value) -> None:
    if keep is not None:
        raise ValueError("a mask of tokens is part of training, which is not exported")


def _floats(value: Any) -> Value:
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, np.float32)))


def _ints(value: Any) -> Value:
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, np.int64)))


def _slice(x: Value, start: int, end: int, axis: int) -> Value:
    return op.Slice(x, _ints([start]), _ints([end]), _ints([axis]))


def _sum(x: Value, axis: int) -> Value:
    return op.ReduceSum(x, _ints([axis]))


def _turned(weight: Value) -> Value:
    return op.Transpose(weight, perm=[1, 0])


def _linear(x: Value, weight: Value, bias: Value) -> Value:
    return op.Add(op.MatMul(x, _turned(weight)), bias)
