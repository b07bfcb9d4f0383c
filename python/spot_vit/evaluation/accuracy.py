"""Accuracy of a model on labelled images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.utils.modes import eval_mode


@dataclass
class Evaluation:
    """Result of ``evaluate``.

    Attributes:
        top1: share of images whose label scored highest, 0 to 1.
        loss: mean cross-entropy.
        correct: bool [images], in the loader's order.
    """

    top1: float
    loss: float
    correct: Tensor = field(repr=False)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader[Any], name: str = "evaluate") -> Evaluation:
    """Classifies everything the loader yields, in eval mode; the model's mode is restored."""
    device = next(model.parameters()).device
    correct, losses = [], []
    with eval_mode(model):
        for batch in tqdm(loader, desc=name, unit="batch", mininterval=0.5):
            target = batch[1].to(device)
            logits = model(batch[0].to(device)).float()
            correct.append(logits.argmax(dim=1) == target)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    hits = torch.cat(correct).cpu()
    return Evaluation(hits.float().mean().item(), torch.cat(losses).mean().item(), hits)
