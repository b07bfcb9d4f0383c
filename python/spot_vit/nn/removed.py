"""Removed tokens that prefix queries go on seeing, as the public code of Sparsifiner has it.

There, queries, keys and values of removed tokens are set to zero, and the class token's row still
runs over all tokens. A removed token then has logit 0 and adds nothing but to the row's sum: with
G of them, the row is that over the tokens which are left, times S / (S + G), where S is the sum of
the exponentials of their logits. No token of zeros is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def share_of_alive(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    columns: Tensor | None,
    size: int | None,
    scale: float,
) -> Tensor:
    """S / (S + G), the share of the row of each prefix query that is on tokens which are left.

    Differentiable in q, k and `keep`: a masked token is one of the G to the extent that it is not
    kept. Where its logit is above all that are kept, its gradient is that of the highest of them.

    Args:
        q: [B, P, H, D] prefix queries.
        k: [B, N, H, D] keys of all tokens in play, P of them in front of the patches.
        keep: [B, N-P] of 0 and 1, patch tokens that are kept (training), or None.
        columns: [B, N] int64, token of the full grid that each one is, `size` for those that are
            none; None while all are there.
        size: tokens of the full grid, the model's prefix included; needed with `columns`.
        scale: of the logits.

    Returns:
        [B, H, P] float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    front = q.shape[1]
    weight = k.new_ones(k.shape[:2], dtype=wide)
    if keep is not None:
        weight = torch.cat([weight[:, :front], keep.to(wide)], dim=1)
    if columns is None:
        gone = (1 - weight).sum(dim=1)
    else:  # those that are no token of the grid, fused ones, take no removed one's place
        assert size is not None, "size is needed with columns"
        gone = size - (weight * (columns < size)).sum(dim=1)
    gone, weight = gone[:, None, None], weight[:, None, None]
    logits = torch.einsum("bphd,bnhd->bhpn", q, k).to(wide) * scale
    with torch.no_grad():  # sums are taken relative to the largest term
        top = logits.masked_fill(weight < 0.5, float("-inf")).amax(dim=-1, keepdim=True)
        top = torch.where(gone[..., None] > 0, F.relu(top), top)
    below = logits - top
    mass = (below.masked_fill(below > 0, 0).exp() * weight).sum(dim=-1)
    return mass / (mass + gone * (-F.relu(top[..., 0])).exp())
