"""`show`: what a model keeps of a few photos, as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spot_vit.evaluation.drawing import Kept, kept_figure, save_figure
from spot_vit.report.photos import read_photos
from spot_vit.report.record import ImageTrace, ModelTrace
from spot_vit.report.trace import Trace
from spot_vit.report.tracing import trace
from spot_vit.report.views import answer
from spot_vit.utils.modes import unwrap

MOST = 24
"""Photos of a figure; of more, so many evenly spread ones are drawn."""


def show(
    model: Any,
    photos: Sequence[str | Path | Image.Image] | str | Path | Image.Image,
    path: str | os.PathLike[str] = "kept.png",
) -> Trace:
    """Draws what each stage of a sparse model keeps of photos, and what it says of them.

    Args:
        model: converted by `sparsify`.
        photos: files, folders or PIL images, of any size and kind; of many, 24 are drawn.
        path: of the picture to write: .png, .svg or .pdf.

    Returns:
        The trace that was drawn.

    Raises:
        UserError: a photo cannot be read, or the picture cannot be written.
        TypeError: the model is not converted.
    """
    if isinstance(photos, str | Path | Image.Image):
        photos = [photos]
    inside = unwrap(model)
    read = read_photos(inside, photos, MOST)
    device = next(inside.parameters())
    found = trace(model, read.images.to(device), None, read.names, attention=())
    save_figure(kept_figure([kept_of(one, found.model) for one in found.images]), path)
    return found


def kept_of(one: ImageTrace, model: ModelTrace) -> Kept:
    """What the stages of a trace keep of an image, for a figure."""
    rows, columns = model.grid
    stages = []
    for stage in one.stages:
        kept = np.zeros(rows * columns, dtype=bool)
        position = stage.position[stage.kept]
        kept[position[position < rows * columns]] = True
        stages.append(kept.reshape(rows, columns))
    said, dense = answer(model, one.logits), answer(model, one.dense_logits)
    title = f"{one.name}\n{said.name} {said.percent}"
    if said.index != dense.index:
        title += f"\n(dense: {dense.name} {dense.percent})"
    return Kept(one.picture, stages, title)
