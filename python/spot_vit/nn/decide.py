"""From log-probabilities to decisions: masks in training, positions in inference."""

from __future__ import annotations

import torch
from torch import Tensor

import spot_ext


def _gumbel_like(x: Tensor) -> Tensor:
    return -torch.empty_like(x).exponential_().log()


def gumbel_mask(logp: Tensor, previous: Tensor | None, tau: float) -> Tensor:
    """Hard straight-through Gumbel-softmax draw of "keep" for every token (published).

    Args:
        logp: [B, N, 2] log-probabilities, index 0 = keep.
        previous: [B, N] mask of the tokens still alive; a dropped token stays dropped.
        tau: temperature.

    Returns:
        [B, N] of exactly 0 and 1, with the gradient of the soft draw.
    """
    soft = ((logp + _gumbel_like(logp)) / tau).softmax(dim=-1)[..., 0]
    mask = straight_through((soft > 0.5).to(soft.dtype), soft)
    return mask if previous is None else mask * previous


def topk_mask(logp: Tensor, previous: Tensor | None, num_keep: int, tau: float) -> Tensor:
    """Keeps the `num_keep` best noisy log-odds; a sigmoid around the cut is the gradient.

    Our choice: it hits budgets exactly and needs no ratio loss. As the gradient sees it, the cut
    moves with the scores so that the soft mask keeps its sum: only the order decides.

    Args:
        logp: [B, N, 2] log-probabilities, index 0 = keep.
        previous: [B, N] mask of the tokens still alive (at least `num_keep` of them), or None.
        num_keep: tokens to keep per image.
        tau: temperature of the sigmoid.

    Returns:
        [B, N] of exactly 0 and 1.
    """
    noisy = logp[..., 0] - logp[..., 1]
    noisy = (
        noisy + _gumbel_like(noisy) - _gumbel_like(noisy)
    )  # a logistic draw, as Gumbel-softmax's
    scores = noisy.detach()
    if previous is not None:
        scores = scores.masked_fill(previous.detach() < 0.5, float("-inf"))
    hard = mask_of(spot_ext.select_tokens(scores, num_keep), scores.shape[1], noisy.dtype)
    lowest_kept = scores.masked_fill(hard < 0.5, float("inf")).amin(dim=1, keepdim=True)
    highest_dropped = scores.masked_fill(hard > 0.5, float("-inf")).amax(dim=1, keepdim=True)
    cut = (lowest_kept + highest_dropped) / 2
    cut = torch.where(
        cut.isfinite(), cut, torch.zeros_like(cut)
    )  # nothing dropped, or nothing kept
    # With a cut that stood still, raising all scores would seem to keep more, without end.
    slope = ((scores - cut) / tau).sigmoid()  # 0 for those that are gone, whose score is -inf
    slope = slope * (1 - slope)
    total = slope.sum(dim=1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    moves = (slope * noisy).sum(dim=1, keepdim=True) / total
    soft = ((noisy - cut - (moves - moves.detach())) / tau).sigmoid()
    mask = straight_through(hard, soft)
    return mask if previous is None else mask * previous


def mask_of(index: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, N] mask that is 1 at the positions `index` [B, M]."""
    zeros = torch.zeros(index.shape[0], num_tokens, dtype=dtype, device=index.device)
    return zeros.scatter(1, index, 1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The exact value of `hard` with the gradient of `soft`."""
    # soft - soft is exactly 0, while hard - soft + soft can miss 0 or 1 by a rounding.
    return hard + (soft - soft.detach())
