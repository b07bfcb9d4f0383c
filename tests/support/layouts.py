"""The same values with other strides."""

from __future__ import annotations

import torch
from support.data import random_bits
from torch import Tensor

LAYOUTS = ("contiguous", "swapped", "reversed", "stepped", "offset", "padded", "expanded", "flat")


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same values with other strides; `expanded` and `flat` repeat the first image or row."""
    if value.dim() < 2 or value.numel() == 0:
        return value
    if layout == "swapped":  # batch and tokens
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":  # last dimension slowest
        order = tuple(reversed(range(value.dim())))
        return value.permute(order).contiguous().permute(order)
    if layout == "stepped":  # every second element of the last dimension
        gaps = random_bits("gaps", tuple(value.shape), value.dtype, value.device)
        return torch.stack([value, gaps], dim=-1)[..., 0]
    if layout == "offset":  # starts one element into its memory, so it is not aligned
        flat = torch.cat([value.flatten()[:1], value.flatten()])
        return flat[1:].view(value.shape)
    if layout == "padded":  # rows with a gap after them, images too
        wide = torch.cat([value, value[:, :1]], dim=1)
        double = torch.cat([wide, wide], dim=-1)
        return double.narrow(1, 0, value.shape[1]).narrow(-1, 0, value.shape[-1])
    if layout == "expanded":  # one image for all
        return value[:1].expand(value.shape)
    if layout == "flat":  # one row for all
        return value[:, :1].expand(value.shape)
    assert layout == "contiguous", layout
    return value.contiguous()


def lay_out_index(index: Tensor, layout: str) -> Tensor:
    """As `lay_out`, but positions stay distinct: `flat` is not possible."""
    return lay_out(index, "contiguous" if layout == "flat" else layout)
