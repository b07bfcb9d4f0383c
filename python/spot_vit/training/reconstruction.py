"""Attention reconstruction: how far connectivity predictors are from a dense attention map.

The map of a block is consumed in tiles of queries, block by block, and computed again in the
backward pass: no tensor of tokens times tokens is ever stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.operands import Operands

TILE = 128  # queries


def reconstruction_loss(
    predictors: Mapping[int, ConnectivityPredictor],
    student: Mapping[int, Operands],
    teacher: Mapping[int, Operands],
    tile: int = TILE,
    *,
    thresholds: bool = False,
) -> Tensor:
    """Sum of squares of approx - A[P:], over images, heads, queries and keys; mean over blocks.

    As published in Sparsifiner's code (arXiv 2303.13755; METHOD B3): it grows with the batch, and
    its weight is 0.01. Differentiable in the predictors and the student's operands, not in the
    teacher's.

    Args:
        predictors: of the sparse blocks, by their index.
        student: what the predictors see: operands of these blocks, of all tokens of the grid.
        teacher: what makes the map A = softmax(scale * q k^T) to reconstruct.
        tile: queries at a time.
        thresholds: whether approx is the map that names the keys, top(coefficients) |W_up|^T with
            small entries zero, as self-distillation has it (published); otherwise coefficients
            W_up^T, as the first stage has it.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: a block without operands, or tokens that do not fit the predictor's grid.
    """
    losses = []
    for b, predictor in predictors.items():
        if b not in student or b not in teacher:
            raise ValueError(f"no operands of block {b}; was the forward pass recorded?")
        ours, goal = student[b], teacher[b]
        tokens = predictor.proj_n.shape[0]
        for name, operands in (("student", ours), ("teacher", goal)):
            if operands.k.shape[1] != tokens:
                raise ValueError(
                    f"{name}: block {b} has {operands.k.shape[1]} tokens, its predictor "
                    f"{tokens}; reconstruction wants the whole grid"
                )
        patches = slice(ours.num_prefix, None)
        pairs = zip(
            ours.q[:, patches].split(tile, dim=1),
            goal.q[:, patches].split(tile, dim=1),
            strict=True,
        )
        sums = [
            checkpoint(
                _squares,
                predictor,
                q,
                ours.k,
                goal._replace(q=seen),
                thresholds,
                use_reentrant=False,
            )
            for q, seen in pairs
        ]
        losses.append(torch.stack(sums).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def attention_seen(
    predictors: Mapping[int, ConnectivityPredictor],
    operands: Mapping[int, Operands],
    tile: int = TILE,
) -> dict[int, tuple[float, float]]:
    """How much of the dense attention of patch queries falls on the keys that are named.

    Args:
        predictors: of the sparse blocks, by their index.
        operands: of these blocks, of all tokens of the grid.
        tile: queries at a time.

    Returns:
        For each block the mean share, and the largest that as many keys can hold, from 0 to 1.
    """
    found = {}
    for b, predictor in predictors.items():
        one = operands[b]
        queries = one.q[:, one.num_prefix :]
        index = predictor(queries, one.k)
        seen = best = 0.0
        for q, named in zip(queries.split(tile, dim=1), index.split(tile, dim=2), strict=True):
            attention = _attention(one._replace(q=q))
            held = attention.gather(-1, named.clamp(min=0).long()) * (named >= 0)
            seen += held.sum().item()
            best += attention.topk(named.shape[-1]).values.sum().item()
        rows = index.shape[:3].numel()
        found[b] = seen / rows, best / rows
    return found


def _squares(
    predictor: ConnectivityPredictor, q: Tensor, k: Tensor, goal: Operands, thresholds: bool
) -> Tensor:
    """The sum for the queries q [B, tile, H, D], which in the teacher are `goal.q`."""
    approx = _thresholded(predictor, q, k) if thresholds else predictor.approx(q, k)
    return (approx.float() - _attention(goal)).square().sum()


def _thresholded(predictor: ConnectivityPredictor, q: Tensor, k: Tensor) -> Tensor:
    """The map [B, H, M, N] that names the keys, differentiable where `forward` is not."""
    coefficients = predictor.thinned(predictor.coefficients(q, k))
    _, up = predictor.weights(k.shape[1] - predictor.num_prefix)
    return coefficients @ F.threshold(up.abs(), predictor.config.basis_threshold, 0.0).mT


@torch.no_grad()
def _attention(operands: Operands) -> Tensor:
    """The dense map [B, H, M, N] of M queries, float32."""
    logits = operands.q.transpose(1, 2) @ operands.k.permute(0, 2, 3, 1)
    return (logits.float() * operands.scale).softmax(dim=-1)
