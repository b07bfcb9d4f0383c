"""A start for connectivity predictors that needs little training: regions of the image."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from spot_vit.models.sparsifiner import predictors
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import attention_of

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def start_from_regions(model: M) -> M:
    """Sets the weights of all connectivity predictors by hand, and returns the model.

    Keys are averaged over regions of the image, queries meet those averages as they would meet the
    keys, and each region stands for its own columns: a coarse attention map, from which the first
    stage of training goes on. Our choice; published are small random weights, which have to find
    the regions first.

    Args:
        model: with sparse attention, see `sparsify_attention`.
    """
    for b, predictor in predictors(model).items():
        attention = attention_of(blocks_of(unwrap(model))[b])
        down, up = predictor.proj_n, predictor.proj_back_n
        region = _regions(predictor.grid, down.shape[1])
        member = torch.zeros_like(down)
        patches = torch.arange(len(region), device=down.device) + predictor.num_prefix
        member[patches, region.to(down.device)] = 1
        member = member / member.sum(dim=0).clamp(min=1)
        down.copy_(member)
        if up is not None:
            up.copy_(member)
        if predictor.proj_c_q is None or predictor.proj_c_k is None:
            continue
        # Random projections keep products on average: here those of attention, with its scale.
        channels, width = predictor.proj_c_q.weight.shape
        factor = attention.scale / predictor.scale
        weight = torch.randn(channels, width) * math.sqrt(factor / channels)
        for linear in (predictor.proj_c_q, predictor.proj_c_k):
            linear.weight.copy_(weight)
            linear.bias.zero_()
    return model


def _regions(grid: tuple[int, int], count: int) -> Tensor:
    """The region of each patch, int64 [rows * columns]: `count` of them at most, nearly square."""
    rows, columns = grid
    down = min(range(1, min(count, rows) + 1), key=lambda n: _waste(n, grid, count))
    across = min(count // down, columns)
    row = torch.arange(rows) * down // rows
    column = torch.arange(columns) * across // columns
    return (row[:, None] * across + column).flatten()


def _waste(down: int, grid: tuple[int, int], count: int) -> float:
    """How far `down` rows of regions are from square ones, and how many go unused."""
    rows, columns = grid
    across = min(count // down, columns)
    shape = abs(math.log((rows / down) / (columns / across)))
    return shape + math.log(count / (down * across))
