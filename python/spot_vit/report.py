"""Looking inside a SPOT ViT: how much of the foreground survives, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.data import DigitBatch
from spot_vit.train import atomic_write, eval_mode


@dataclass
class Relevance:
    """What each of the K stages keeps.

    Attributes:
        foreground: share of all true foreground patches that are kept, 0 to 1.
        random: share of all patches that are kept, which is what a random choice of as many
            patches keeps of the foreground on average.
    """

    foreground: list[float]
    random: list[float]


@torch.inference_mode()
def relevance(model: nn.Module, loader: DataLoader[Any], name: str = "relevance") -> Relevance:
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
    return Relevance((found / foreground).tolist(), (kept / patches).tolist())


@torch.inference_mode()
def save_kept(path: str | os.PathLike[str], model: nn.Module, batch: DigitBatch) -> None:
    """Draws every image of the batch beside what survives each stage; dropped patches are blue.

    Args:
        path: the picture to write, e.g. ``kept.png``.
        model: a SPOT ViT.
        batch: image [B, 1, H, W] and the rest, as ``ClutteredDigits.batch`` gives it.
    """
    with eval_mode(model):
        output = model(batch.image, aux=True)
    masks = [mask > 0.5 for mask in output.masks]
    predictions = output.logits.argmax(dim=1).tolist()
    panels, rows = 1 + len(masks), (len(predictions) + 1) // 2
    figure = Figure(figsize=(3.0 * panels, 1.75 * rows + 0.5), layout="constrained")
    # Two images a row, with a gap between them.
    widths = [1.0] * panels + [0.15] + [1.0] * panels
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        axis.set_axis_off()
    axes = np.delete(grid, panels, axis=1).reshape(-1, panels)
    for i, (row, predicted) in enumerate(zip(axes, predictions, strict=False)):
        image, label = batch.image[i, 0].clamp(0, 1), int(batch.label[i])
        row[0].imshow(_survivors(image, torch.ones_like(masks[0][i])))
        verdict, colour = ("right", "black") if predicted == label else ("wrong", "red")
        row[0].set_title(f"{label}, read as {predicted}: {verdict}", fontsize=9, color=colour)
        for stage, mask in enumerate(masks):
            row[stage + 1].imshow(_survivors(image, mask[i]))
            kept = f"{int(mask[i].sum())} of {mask.shape[1]}"
            row[stage + 1].set_title(f"stage {stage + 1}: {kept}", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _survivors(image: Tensor, mask: Tensor) -> np.ndarray:
    """Paints dropped patches of image [H, W] over: float32 [H, W, 3]; mask is bool [N]."""
    side = int(mask.numel() ** 0.5)
    zoom = image.shape[0] // side
    kept = mask.reshape(side, side).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    dropped = torch.tensor([0.36, 0.55, 0.78])
    return torch.where(kept[..., None], image[..., None], dropped).numpy()


def paired_difference(
    correct: Tensor, baseline: Tensor, groups: Sequence[int] | np.ndarray
) -> tuple[float, float]:
    """Compares two models on the same images.

    Args:
        correct: bool [images], where the model is right.
        baseline: bool [images], where the other one is.
        groups: [images], equal for images that are not independent, such as several views of one
            digit.

    Returns:
        The difference of the two accuracies and its standard error over groups, from 0 to 1.
    """
    delta = correct.double() - baseline.double()
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(group), delta - delta.mean())
    variance = sums.square().sum() * count / max(count - 1, 1)
    return delta.mean().item(), variance.sqrt().item() / len(delta)
