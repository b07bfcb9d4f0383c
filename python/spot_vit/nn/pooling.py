"""Pooling over the tokens that are kept, where timm pools over all."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor


def pool_kept(
    x: Tensor,
    mask: Tensor,
    pool_type: str,
    num_prefix: int,
    *,
    include_prefix: bool = False,
    attn_pool: Any = None,
) -> Tensor:
    """Pools as timm does, over the patches in `mask` only.

    Args:
        x: [B, P+N, C] tokens.
        mask: [B, N] of 0 and 1; its gradient passes through averages.
        pool_type: timm's `global_pool`: "", "token", "avg", "max" or "avgmax".
        num_prefix: P.
        include_prefix: whether the prefix is pooled with the patches.
        attn_pool: the model's attention pooling, which then takes the place of `pool_type`.

    Returns:
        [B, C], or `x` itself for "".
    """
    if attn_pool is None and pool_type in ("", "token"):
        return x[:, 0] if pool_type else x
    if include_prefix:
        mask = torch.cat([mask.new_ones(mask.shape[0], num_prefix), mask], dim=1)
    else:
        x = x[:, num_prefix:]
    seen = mask.detach() > 0.5
    seen = seen | ~seen.any(dim=1, keepdim=True)  # nothing kept: pool over everything
    if attn_pool is not None:
        return attn_pool(x, attn_mask=seen[:, None, None])
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = mask.to(wide)
    mean = (x * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    if pool_type == "avg":
        return mean.to(x.dtype)
    largest = x.masked_fill(~seen[..., None], float("-inf")).amax(dim=1)
    return largest if pool_type == "max" else 0.5 * (largest + mean.to(x.dtype))


def refuse_attn_pool(pool: Any) -> str | None:
    """Why a model with this attention pooling cannot be converted, or None."""
    if pool is None:
        return None
    if type(pool) is not AttentionPoolLatent:
        return (
            f"its pooling {type(pool).__name__} mixes tokens in a way that has no masked form yet"
        )
    if pool.pos_embed is not None:
        return "its attention pooling adds a position embedding tied to the full grid"
    return None
