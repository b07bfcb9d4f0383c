"""Damage done to images at test time, to see what selection does when its evidence is disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from spot_vit.data.digits import ClutteredDigits, DigitBatch

Draw = Callable[[int], Tensor]
"""Maps a count to as many numbers in [0, 1) per image: float64 [B, count]."""


def _noise(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Adds Gaussian noise of standard deviation `strength` (Box-Muller)."""
    count = image[0].numel()
    first, second = draw(2 * count).split(count, dim=1)
    normal = (-2 * torch.log1p(-first)).sqrt() * (2 * torch.pi * second).cos()
    return image + (strength * normal).to(image.dtype).reshape(image.shape)


def _impulse(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Sets the share `strength` of the pixels to full ink."""
    hit = draw(image[0].numel()).reshape(image.shape) < strength
    return image.masked_fill(hit, 1.0)


def _contrast(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Moves every pixel the share `strength` of the way to the mean of its image."""
    return image.lerp(image.mean(dim=(1, 2, 3), keepdim=True), strength)


def _brightness(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Adds `strength` to every pixel."""
    return image + strength


def _blur(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Takes means over square windows, `strength` pixels wide (odd)."""
    side = int(strength)
    padded = F.pad(image, [side // 2] * 4, mode="replicate")
    return F.avg_pool2d(padded, side, stride=1)


def _lines(image: Tensor, draw: Draw, strength: float) -> Tensor:
    """Sets `strength` rows and as many columns to full ink."""
    side, count = image.shape[-1], int(strength)
    rows, columns = (draw(2 * count) * side).long().split(count, dim=1)
    span = torch.arange(side)
    row = (rows[:, :, None] == span).any(dim=1)[:, None, :, None]
    column = (columns[:, :, None] == span).any(dim=1)[:, None, None, :]
    return image.masked_fill(row | column, 1.0)


_KINDS: dict[str, tuple[Callable[[Tensor, Draw, float], Tensor], tuple[float, float, float]]] = {
    "noise": (_noise, (0.03, 0.06, 0.1)),
    "impulse": (_impulse, (0.005, 0.01, 0.03)),
    "contrast": (_contrast, (0.1, 0.25, 0.4)),
    "brightness": (_brightness, (0.03, 0.07, 0.12)),
    "blur": (_blur, (3, 5, 7)),
    "lines": (_lines, (1, 2, 3)),
}
CORRUPTIONS = tuple(_KINDS)
SEVERITIES = (1, 2, 3)


class CorruptedDigits(Dataset[DigitBatch]):
    """The samples of a ``ClutteredDigits`` with their images damaged.

    In the manner of ImageNet-C (arXiv 1903.12261); kinds and strengths are our choice, to suit
    small images of one channel. Labels and foreground stay. Every sample is a function of its
    index, as in the data set underneath.

    Args:
        data: what to damage.
        kind: one of ``CORRUPTIONS``.
        severity: 1, 2 or 3.
    """

    by_index = True  # whole batches by __getitems__, and nothing random besides

    def __init__(self, data: ClutteredDigits, kind: str, severity: int) -> None:
        if kind not in CORRUPTIONS:
            raise ValueError(f"kind: expected one of {CORRUPTIONS}, got {kind!r}")
        if severity not in SEVERITIES:
            raise ValueError(f"severity: expected one of {SEVERITIES}, got {severity!r}")
        self.data, self.kind, self.severity = data, kind, severity

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> DigitBatch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[DigitBatch]:
        return [DigitBatch(*sample) for sample in zip(*self.batch(indices), strict=True)]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> DigitBatch:
        """Makes many samples at once, with the shapes of ``ClutteredDigits.batch``."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        damage, strengths = _KINDS[self.kind]
        stream = 8 + CORRUPTIONS.index(self.kind)  # the data set's own draws are below

        def draw(count: int) -> Tensor:
            return torch.from_numpy(self.data.uniform(index, count, stream))

        clean = self.data.batch(index)
        return clean._replace(image=damage(clean.image, draw, strengths[self.severity - 1]))
