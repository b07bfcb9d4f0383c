"""How much of the true foreground survives each decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.utils.modes import eval_mode


@dataclass
class ForegroundKept:
    """Shares of the foreground and of all patches that each of the K stages keeps.

    Attributes:
        foreground: share of all true foreground patches that are kept, 0 to 1.
        random: share of all patches that are kept, which is what a random choice of as many
            patches keeps of the foreground on average.
    """

    foreground: list[float]
    random: list[float]


@torch.inference_mode()
def foreground_kept(
    model: nn.Module, loader: DataLoader[Any], name: str = "foreground"
) -> ForegroundKept:
    """Scores token relevance itself, against the true foreground.

    Args:
        model: a SPOT ViT.
        loader: yields (images, labels, foreground bool [B, N]).
        name: label of the progress bar.
    """
    device = next(model.parameters()).device
    found, kept, foreground, patches = torch.zeros(()), torch.zeros(()), 0, 0
    with eval_mode(model):
        for images, _, truth in tqdm(loader, desc=name, unit="batch", mininterval=0.5):
            masks = torch.stack([m.cpu() > 0.5 for m in model(images.to(device), aux=True).masks])
            found = found + (masks & truth).sum(dim=(1, 2))
            kept = kept + masks.sum(dim=(1, 2))
            foreground += int(truth.sum())
            patches += truth.numel()
    return ForegroundKept((found / foreground).tolist(), (kept / patches).tolist())
