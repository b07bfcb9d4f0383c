"""Figures of what stages keep: pictures whose dropped patches are painted over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write

DROPPED = np.array([92, 140, 199], dtype=np.uint8)  # blue: told from most photos, by everybody
FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Kept:
    """A picture and what each stage keeps of it.

    Attributes:
        picture: uint8 [H, W, 3].
        stages: bool [rows, columns] of the grid, one for each stage.
        title: over the picture.
        wrong: whether what the title says is wrong, which is written in red.
    """

    picture: np.ndarray
    stages: Sequence[np.ndarray]
    title: str = ""
    wrong: bool = False


def kept_figure(rows: Sequence[Kept], beside: int = 1) -> Figure:
    """Every picture in a row with its stages.

    Args:
        rows: with the same number of stages.
        beside: pictures that share a row, with a gap between them.
    """
    panels = 1 + max(len(row.stages) for row in rows)
    beside = min(beside, len(rows))
    lines = -(-len(rows) // beside)
    shape = rows[0].picture.shape
    height = 1.75 * shape[0] / shape[1] + 0.25
    width = 1.6 * panels * beside + 0.2
    figure = Figure(figsize=(max(width, 4.0), height * lines + 0.2), layout="constrained")
    widths = ([1.0] * panels + [0.15]) * beside
    grid = figure.subplots(lines, len(widths), squeeze=False, width_ratios=widths)
    for axis in grid.flat:
        axis.set_axis_off()
    for at, row in enumerate(rows):
        axes = grid[at // beside, (at % beside) * (panels + 1) :]
        axes[0].imshow(row.picture)
        title = row.title.replace("$", r"\$")  # which would begin a formula
        axes[0].set_title(title, fontsize=8, color="red" if row.wrong else "black", wrap=True)
        for k, kept in enumerate(row.stages):
            axes[k + 1].imshow(painted(row.picture, kept))
            axes[k + 1].set_title(f"stage {k + 1}: {kept.sum()} of {kept.size}", fontsize=8)
    return figure


def painted(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] with the patches that `kept` [rows, columns] leaves out painted over."""
    rows, columns = kept.shape
    down = np.arange(picture.shape[0]) * rows // picture.shape[0]
    across = np.arange(picture.shape[1]) * columns // picture.shape[1]
    return np.where(kept[down][:, across, None], picture, DROPPED)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure, as PNG, SVG or PDF by the ending of `path`.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(f"{path}: expected a name that ends in .png, .svg or .pdf")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def shown(model: Any, images: Tensor) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of what a model is given, normalisation undone.

    Args:
        model: whose configuration says mean and deviation; without one pixels are from 0 to 1.
        images: [B, C, H, W]; of other than three channels the first is shown, in grey.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = images.shape[1]
    mean, spread = (
        torch.tensor(config.get(name) or (default,), device=images.device, dtype=torch.float32)
        for name, default in (("mean", 0.0), ("std", 1.0))
    )
    if len(mean) not in (1, channels) or len(spread) not in (1, channels):
        mean, spread = mean.mean(dim=0, keepdim=True), spread.mean(dim=0, keepdim=True)
    pictures = images.float() * spread[:, None, None] + mean[:, None, None]
    if channels != 3:
        pictures = pictures[:, :1].expand(-1, 3, -1, -1)
    scaled = (255 * pictures.clamp(0, 1)).round().byte().permute(0, 2, 3, 1)
    return scaled.cpu().numpy()
