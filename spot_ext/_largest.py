"""What definitions that choose share: the largest numbers of a row, and where they stand.

Without stable sorts, which exporters (ONNX) do not know, and without slices by the count, which
would tie dynamic sizes to each other: a threshold is found in the sorted values, and ties at it are
counted from the left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def largest(x: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Boolean map [..., N] of the `count` largest of each row x [..., N], or of all if less.

    `among` [..., N] says which are candidates. Ties go to the lower position; NaN ranks below -inf.
    """
    odd = x.isnan()
    low = x.masked_fill(odd if among is None else odd | ~among, -math.inf)
    ordered = F.pad(low.sort(dim=-1, descending=True).values, (1, 0), value=math.inf)
    cut = ordered.index_select(-1, torch.full((1,), count, device=x.device))
    above, level = low > cut, low == cut
    if among is not None:
        level = level & among
    first, last = (level & ~odd).long(), (level & odd).long()
    place = torch.where(odd, first.sum(-1, keepdim=True) + last.cumsum(-1), first.cumsum(-1))
    room = count - above.long().sum(-1, keepdim=True)
    return above | (level & (place <= room))


def positions(chosen: Tensor, count: int) -> Tensor:
    """Ascending positions [..., count] int64 of what is `chosen` [..., N], at most `count` a row.

    Rows with fewer end in N.
    """
    size = chosen.shape[-1]
    place = torch.where(chosen, chosen.long().cumsum(-1) - 1, count)  # behind the end: dropped
    found = torch.full((*chosen.shape[:-1], count + 1), size, device=chosen.device)
    everything = torch.arange(size, device=chosen.device).expand(chosen.shape)
    return found.scatter(-1, place, everything)[..., :count]
