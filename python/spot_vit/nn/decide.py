"""From log-probabilities to decisions: masks in training, positions in inference."""

from __future__ import annotations

import torch
from torch import Tensor

import spot_ext


def _gumbel_like(x: Tensor) -> Tensor:
    return -torch.empty_like(x).exponential_().log()


def _none(noise: float | Tensor) -> bool:
    return not isinstance(noise, Tensor) and noise == 0


def gumbel_mask(
    logp: Tensor, previous: Tensor | None, tau: float, noise: float | Tensor = 1.0
) -> Tensor:
    """Hard straight-through Gumbel-softmax draw of "keep" for every token (published).

    Args:
        logp: [B, N, 2] log-probabilities, index 0 = keep.
        previous: [B, N] mask of the tokens still alive; a dropped token stays dropped.
        tau: temperature.
        noise: scale of the Gumbel noise; 1 draws with the stated probability (published), 0 keeps
            what is more probably kept than dropped.

    Returns:
        [B, N] of exactly 0 and 1, with the gradient of the soft draw.
    """
    noisy = logp if _none(noise) else logp + noise * _gumbel_like(logp)
    soft = (noisy / tau).softmax(dim=-1)[..., 0]
    mask = straight_through((soft > 0.5).to(soft.dtype), soft)
    return mask if previous is None else mask * previous


def topk_mask(
    logp: Tensor,
    previous: Tensor | None,
    num_keep: int | Tensor,
    tau: float,
    noise: float | Tensor = 1.0,
) -> Tensor:
    """Keeps the `num_keep` best noisy log-odds; a sigmoid around the cut is the gradient.

    Our choice: it hits budgets exactly and needs no ratio loss. As the gradient sees it, the cut
    moves with the scores so that the soft mask keeps its sum: only the order decides.

    Args:
        logp: [B, N, 2] log-probabilities, index 0 = keep.
        previous: [B, N] mask of the tokens still alive (at least `num_keep` of them), or None.
        num_keep: tokens to keep per image; a scalar tensor where a compiled graph is to serve any
            number.
        tau: temperature of the sigmoid.
        noise: scale of the noise; 1 is Gumbel-softmax's, a logistic draw of standard deviation 1.8,
            and 0 keeps what inference keeps.

    Returns:
        [B, N] of exactly 0 and 1.
    """
    odds = logp[..., 0] - logp[..., 1]
    noisy = odds if _none(noise) else odds + noise * (_gumbel_like(odds) - _gumbel_like(odds))
    scores = noisy.detach()
    if previous is not None:
        scores = scores.masked_fill(previous.detach() < 0.5, float("-inf"))
    if isinstance(num_keep, Tensor):
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        hard = (rank < num_keep).to(noisy.dtype)
    else:
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


@torch.no_grad()
def noise_share(logp: Tensor, mask: Tensor, previous: Tensor | None) -> Tensor:
    """The share of the kept tokens that noise put there: others have higher log-odds.

    Args:
        logp: [B, N, 2] log-probabilities of a stage, index 0 = keep.
        mask: [B, N] what the stage kept.
        previous: [B, N] mask of the tokens that were alive before it, or None for all.

    Returns:
        A scalar from 0 (the best of those alive are kept, as inference does) to 1.
    """
    odds = logp[..., 0] - logp[..., 1]
    if previous is not None:
        odds = odds.masked_fill(previous < 0.5, float("-inf"))
    rank = odds.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    odd = mask * (rank >= mask.sum(dim=1, keepdim=True))
    return odd.sum() / mask.sum().clamp(min=1)


def mask_of(index: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, N] mask that is 1 at the positions `index` [B, M]."""
    zeros = torch.zeros(index.shape[0], num_tokens, dtype=dtype, device=index.device)
    return zeros.scatter(1, index, 1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The exact value of `hard` with the gradient of `soft`."""
    # soft - soft is exactly 0, while hard - soft + soft can miss 0 or 1 by a rounding.
    return hard + (soft - soft.detach())
