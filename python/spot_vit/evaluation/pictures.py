"""Pictures of what a SPOT ViT keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.data.digits import DigitBatch
from spot_vit.evaluation.drawing import Kept, kept_figure, save_figure, shown
from spot_vit.utils.modes import eval_mode


@torch.inference_mode()
def save_kept(
    path: str | os.PathLike[str],
    model: nn.Module,
    images: Tensor | DigitBatch,
    labels: Sequence[int] | None = None,
) -> None:
    """Draws every image beside what survives each stage; dropped patches are blue.

    Args:
        path: the picture to write, e.g. ``kept.png``; .svg and .pdf are written as such.
        model: a SPOT ViT.
        images: [B, C, H, W] as the model takes them; or a batch of ``ClutteredDigits``, which has
            labels.
        labels: index of each image's class, if known.

    Raises:
        UserError: the file cannot be written, or has another ending.
    """
    if isinstance(images, DigitBatch):
        labels, images = images.label.tolist(), images.image
    with eval_mode(model):
        output: Any = model(images, aux=True)
    rows, columns = _grid(model, images, output.masks[0].shape[1])
    stages = [(mask > 0.5).view(-1, rows, columns).cpu().numpy() for mask in output.masks]
    found = []
    for i, picture in enumerate(shown(model, images)):
        said = int(output.logits[i].argmax())
        wrong = labels is not None and said != labels[i]
        title = f"read as {said}"
        if labels is not None:
            title = f"{labels[i]}, {title}: {'wrong' if wrong else 'right'}"
        found.append(Kept(picture, [stage[i] for stage in stages], title, wrong))
    save_figure(kept_figure(found, beside=2), path)


def _grid(model: Any, images: Tensor, patches: int) -> tuple[int, int]:
    """Rows and columns of the patches; nearest to the image's shape where the model is silent."""
    if hasattr(model, "_grid"):
        rows, columns = model._grid(*images.shape[-2:])
        return int(rows), int(columns)
    height, width = images.shape[-2:]
    rows = round((patches * height / width) ** 0.5)
    return rows, patches // rows
