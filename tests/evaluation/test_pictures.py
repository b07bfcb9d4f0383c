"""The picture of what is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.image import imread
from spot_vit.data.digits import ClutteredDigits
from spot_vit.evaluation.pictures import save_kept
from torch import Tensor, nn


class Fixed(nn.Module):
    """Stands for a SPOT ViT that keeps the same patches of every image."""

    def __init__(self, *kept: list[int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.kept = kept

    def forward(self, images: Tensor, aux: bool = False) -> Any:
        masks = [torch.zeros(len(images), 16) for _ in self.kept]
        for mask, kept in zip(masks, self.kept, strict=True):
            mask[:, kept] = 1
        return SimpleNamespace(logits=torch.eye(10)[: len(images)], masks=masks)


def test_the_picture_shows_survivors_and_paints_the_rest(tmp_path: Path) -> None:
    batch = ClutteredDigits("test", patch_size=16).batch(range(3))
    for name, kept in {"all": list(range(16)), "none": []}.items():
        save_kept(tmp_path / f"{name}.png", Fixed(kept), batch)
    all_kept, none_kept = (imread(tmp_path / f"{name}.png") for name in ("all", "none"))
    assert all_kept.shape == none_kept.shape
    blue = [((picture[..., 2] - picture[..., 0]) > 0.3).mean() for picture in (all_kept, none_kept)]
    assert blue[0] == 0 and blue[1] > 0.1
