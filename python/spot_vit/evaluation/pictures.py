"""Pictures of what a SPOT ViT keeps."""

from __future__ import annotations

import os

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from spot_vit.data.digits import DigitBatch
from spot_vit.utils.files import atomic_write
from spot_vit.utils.modes import eval_mode


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
