"""Figures of the report: foreground kept, paired differences, latency, the picture, the table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spot_vit.evaluation.foreground import foreground_kept
from torch import Tensor, nn
from torch.utils.data import DataLoader


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


def test_relevance_counts_foreground_patches() -> None:
    foreground = torch.zeros(3, 16, dtype=torch.bool)
    foreground[0, [0, 1, 2]] = True
    foreground[1, [0]] = True  # image 2 shows nothing
    samples = [(torch.zeros(1, 8, 8), 0, row) for row in foreground]
    model = Fixed([0, 1, 4, 5, 6, 7, 8, 9], [0, 4])
    result = foreground_kept(model, DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
    assert result.foreground == pytest.approx([3 / 4, 2 / 4])
    assert result.random == pytest.approx([8 / 16, 2 / 16])
    assert model.training
