"""Lens over maps of a sparse backbone: brings tokens that left early to where the last ones are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExitLens(nn.Module):
    """One affine map for each stage at which tokens left, and one for those that stayed.

    A token that was dropped early holds what an early block gave it, and a dense head was made for
    the last block's values. This is the tuned lens (Belrose et al., arXiv 2303.08112) over the
    positions of one map. It starts as the identity; train it with the head, or alone so that maps
    come near those of the dense model. Made for `fill="last"`: other fillings have lost what the
    dropped tokens knew.

    Args:
        dim: C, channels of the map.
        stages: K, decisions in front of the block that the map is taken of.
    """

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__()
        if dim < 1 or stages < 0:
            raise ValueError(f"expected dim >= 1 and stages >= 0, got {dim} and {stages}")
        self.stages = stages
        self.weight = nn.Parameter(torch.zeros(stages + 1, dim, dim))  # what is added to x
        self.bias = nn.Parameter(torch.zeros(stages + 1, dim))

    def forward(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """The map, adapted.

        Args:
            x: [B, C, H, W] or [B, N, C] as `forward_intermediates` gives it.
            masks: of the same pass, cumulative masks [B, N] as in `SpotOutput.masks`; of more than
                K the first K count.

        Returns:
            As `x`.

        Raises:
            ValueError: fewer masks than K, or of another grid than the map's.
        """
        if x.dim() == 4:
            return (
                self(x.flatten(2).transpose(1, 2), masks).transpose(1, 2).unflatten(2, x.shape[2:])
            )
        if len(masks) < self.stages:
            raise ValueError(f"masks must be at least {self.stages}, got {len(masks)}")
        survived = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        for k, mask in enumerate(masks[: self.stages]):
            if mask.shape != x.shape[:2]:
                raise ValueError(
                    f"masks[{k}] must have the map's grid, {list(x.shape[:2])}, got "
                    f"{list(mask.shape)}"
                )
            survived = survived + (mask.detach() > 0.5)
        change = torch.einsum("bnc,kcd->bnkd", x, self.weight) + self.bias
        stage = survived[:, :, None, None].expand(-1, -1, 1, x.shape[2])
        return x + change.gather(2, stage).squeeze(2)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.bias.shape[1]}, stages={self.stages}"
