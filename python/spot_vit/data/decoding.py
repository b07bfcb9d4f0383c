"""From files of any kind to pictures as models take them."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def decoded(file: Any, mode: str) -> Image.Image:
    """The picture in a file, as it is meant to be seen.

    Args:
        file: a path, an open file, or a PIL image.
        mode: "RGB", or "L" for one channel.

    Returns:
        The first frame, in that mode, turned as its EXIF tag says. What is transparent shows
        white; 16 bits are scaled to 8; CMYK, palettes and grey are converted.

    Raises:
        Exception: of many kinds, as PIL's decoders raise them, where a file is no picture, is
            truncated, or would take too much memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the picture holds besides, and of its size
        image = file if isinstance(file, Image.Image) else Image.open(file)
        image.load()
        with suppress(Exception):  # a broken tag does not make the picture unreadable
            ImageOps.exif_transpose(image, in_place=True)
        return _converted(image, mode)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode[0] in "IF":
        image = _eight_bit(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey in 8 bits: whole numbers above 255 are of 16 bits, fractions up to 1 are shares."""
    values = np.asarray(image).astype(np.float64)
    largest = values.max(initial=0)
    if image.mode.startswith("I;16") or (image.mode == "I" and largest > 255):
        values = values / 257
    elif image.mode == "F" and largest <= 1:
        values = values * 255
    grey = Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8))
    return grey
