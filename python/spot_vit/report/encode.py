"""Pictures, arrays and JSON as an HTML page can hold them, in few bytes."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from spot_vit.report.record import Array

LEVELS = 27
"""Largest value of an attention map's pixel: 28 levels, after a square root."""

SMALL = 96 * 96  # pixels up to which a picture is stored without loss
QUALITY = 80  # of larger ones


def picture_uri(picture: Array) -> str:
    """A picture as a data URI: PNG while it is small, where a loss would show, else WebP.

    Args:
        picture: uint8 [H, W, 3].
    """
    small = picture.shape[0] * picture.shape[1] <= SMALL
    return _uri(picture, "png") if small else _uri(picture, "webp", quality=QUALITY, method=6)


def attention_uri(attention: Array) -> tuple[str, list[float]]:
    """Attention maps as one grey picture, the heads side by side, without further loss.

    A pixel is `round(LEVELS * sqrt(weight / largest))`, and at least 1 where the weight is not 0,
    so zero means that a key was not seen.

    Args:
        attention: [H, N, N], rows of queries, not negative.

    Returns:
        The data URI of a picture [N, H * N], and the largest weight of each head.
    """
    weights = attention.astype(np.float32)
    largest = np.maximum(weights.max(axis=(1, 2)), 1e-12)
    pixels = np.rint(LEVELS * np.sqrt(weights / largest[:, None, None])).astype(np.uint8)
    pixels[(pixels == 0) & (weights > 0)] = 1
    mosaic = np.concatenate(list(pixels), axis=1)
    grey = np.repeat(mosaic[:, :, None], 3, axis=2)
    return _uri(grey, "webp", lossless=True, method=4), rounded(largest)


def packed_statistics(statistics: Array) -> tuple[str, list[float], list[float]]:
    """Statistics as bytes: `low + (high - low) * (byte / 255)**2`, by statistic and head.

    Args:
        statistics: [n, H, S].

    Returns:
        Base64 of uint8 [S, H, n]; `low` and `high`, flat [S * H].
    """
    values = statistics.astype(np.float64).transpose(2, 1, 0)
    low, high = values.min(axis=2), values.max(axis=2)
    spread = np.maximum(high - low, 1e-30)
    share = (values - low[:, :, None]) / spread[:, :, None]
    packed = np.rint(255 * np.sqrt(share)).astype(np.uint8)
    return base64.b64encode(packed.tobytes()).decode(), rounded(low.ravel()), rounded(high.ravel())


def rounded(values: Array, digits: int = 3) -> list[Any]:
    """Numbers of some significant digits; None for those that are not finite."""
    return [round_one(value, digits) for value in values.tolist()]


def round_one(value: float | None, digits: int = 3) -> float | None:
    """A number of some significant digits; None for one that is not finite, and for None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def bits(mask: Array) -> str:
    """A mask as text of 0 and 1."""
    return "".join("1" if one else "0" for one in mask)


def squares_path(mask: Array) -> str:
    """An SVG path that covers the squares of a grid where the mask holds, one unit each.

    Args:
        mask: bool [rows, columns].
    """
    parts = []
    for r, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2).tolist():
            parts.append(f"M{start} {r}h{end - start}v1h{start - end}z")
    return "".join(parts)


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no character there can end it, or is markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # all ASCII: json escapes U+2028, U+2029 and marks of direction


def _uri(picture: Array, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
