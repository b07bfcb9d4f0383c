"""ClutteredDigits: real handwritten digits among clutter, with known foreground patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SPLITS = ("train", "test")


class DigitBatch(NamedTuple):
    """One sample, or with a leading batch dimension several.

    Attributes:
        image: float32 [1, canvas, canvas], ink from 0 to 1 (outside of it only with noise).
        label: int64 [], the digit, 0 to 9.
        foreground: bool [num_patches], row by row: the patches that show the digit asked for.
    """

    image: Tensor
    label: Tensor
    foreground: Tensor


class ClutteredDigits(Dataset[DigitBatch]):
    """scikit-learn's handwritten digits, enlarged and placed at random among fragments of others.

    The cluttered, translated MNIST protocol (Mnih et al., arXiv 1406.6247) on data that needs no
    download. Most patches are irrelevant by construction and the relevant ones are known, so that
    token relevance itself can be scored. Every sample is a function of its index and the settings
    alone: workers, batching and order change nothing. Fragments show other source images of the
    same split; a source image belongs to one split whatever the seed.

    Args:
        split: "train" (1,437 source images) or "test" (the other 360).
        length: number of samples; by default four per source image. Sample i shows source image
            i modulo their number, so whole rounds are balanced.
        canvas: side of the image, pixels.
        digit: side of the enlarged digit, pixels.
        num_fragments: square cut-outs of other digits per image.
        fragment: side of a fragment, pixels.
        patch_size: side of the patches that ``foreground`` speaks of, pixels.
        noise: standard deviation of Gaussian noise added to the image (digit strokes reach 1).
        ramp: number of leading samples over which the clutter grows from none to all of it: a
            curriculum, for reading in order.
        seed: changes positions, fragments and noise, never the split.
        num_distractors: other whole digits in the image, at most three. If there are any, every
            digit has a quarter of the canvas to itself, and the label is the digit of the quarter
            whose inner corner holds a bright square of 4 px: which patches matter is then a
            question that the image asks, and no patch can answer it alone.
    """

    by_index = True  # whole batches by __getitems__, and nothing random besides

    def __init__(
        self,
        split: str = "train",
        length: int | None = None,
        *,
        canvas: int = 64,
        digit: int = 24,
        num_fragments: int = 6,
        fragment: int = 8,
        patch_size: int = 8,
        noise: float = 0.0,
        ramp: int = 0,
        seed: int = 0,
        num_distractors: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split: expected one of {_SPLITS}, got {split!r}")
        if not 0 < fragment <= digit <= canvas:
            raise ValueError(
                "expected 0 < fragment <= digit <= canvas, "
                f"got fragment={fragment}, digit={digit}, canvas={canvas}"
            )
        if patch_size < 1 or canvas % patch_size:
            raise ValueError(f"patch_size: expected a divisor of {canvas}, got {patch_size}")
        if num_fragments < 0 or noise < 0 or ramp < 0:
            raise ValueError("num_fragments, noise and ramp must not be negative")
        if not 0 <= num_distractors <= 3:
            raise ValueError(f"num_distractors: expected 0 to 3, got {num_distractors}")
        if num_distractors and 2 * digit > canvas:
            raise ValueError(f"num_distractors: a digit of {digit} needs a canvas of {2 * digit}")
        self.split = split
        self.canvas, self.digit, self.patch_size = canvas, digit, patch_size
        self.num_fragments, self.fragment = num_fragments, fragment
        self.noise, self.ramp, self.seed = noise, ramp, seed
        self.num_distractors = num_distractors
        self._ink, labels, self._ids = _source_images(split, digit)
        self._labels = torch.from_numpy(labels)
        self.length = 4 * len(self._ids) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> DigitBatch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[DigitBatch]:
        return [DigitBatch(*sample) for sample in zip(*self.batch(indices), strict=True)]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> DigitBatch:
        """Makes many samples at once; each equals ``self[i]`` bit for bit.

        Args:
            indices: [B] integers from 0 to ``len(self) - 1``.

        Returns:
            image float32 [B, 1, canvas, canvas], label int64 [B], foreground bool [B, num_patches].
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and not (index.min() >= 0 and index.max() < self.length):
            raise IndexError(f"index out of range for {self.length} samples")
        source = index % len(self._ids)
        draws = self.uniform(index, 2 + 5 * self.num_fragments)
        image = np.zeros((index.size, self.canvas, self.canvas), np.float32)
        room = self.canvas - self.digit + 1
        quarters = self._quarters(index) if self.num_distractors else None
        if quarters is None:
            _paste(image, self._ink[source], _scale(draws[:, 0], room), _scale(draws[:, 1], room))
        else:
            self._paste_in(image, self._ink[source], quarters[:, 0], draws[:, :2])
        foreground = self._foreground(image)
        if quarters is not None:
            self._distract(image, index, source, quarters)
        room = self.canvas - self.fragment + 1
        for i in range(self.num_fragments):
            draw = draws[:, 2 + 5 * i : 7 + 5 * i]
            cut = self._cut_out(source, draw) * self._shown(index, i, self.num_fragments)
            _paste(image, cut, _scale(draw[:, 3], room), _scale(draw[:, 4], room))
        if quarters is not None:
            self._ask(image, quarters[:, 0])
        if self.noise:
            image += self._gaussian(index, image[0].size).reshape(image.shape) * self.noise
        return DigitBatch(
            torch.from_numpy(image[:, None]),
            self._labels[torch.from_numpy(source)],
            torch.from_numpy(foreground),
        )

    def sources(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """Which of scikit-learn's 1,797 images each sample shows, int64 [B]."""
        return self._ids[np.asarray(indices, dtype=np.int64) % len(self._ids)]

    def _shown(self, index: np.ndarray, item: int, count: int) -> np.ndarray:
        """Whether that one of `count` pieces of clutter is there yet: bool [B, 1, 1]."""
        there = np.full(index.size, count)
        if self.ramp:
            there = np.minimum(index * (count + 1) // self.ramp, count)
        return (item < there)[:, None, None]

    def _quarters(self, index: np.ndarray) -> np.ndarray:
        """The quarters of the canvas in random order, int64 [B, 4]: asked for, then the others."""
        return np.argsort(self.uniform(index, 4, stream=3), axis=1, kind="stable")

    def _paste_in(
        self, image: np.ndarray, ink: np.ndarray, quarter: np.ndarray, draw: np.ndarray
    ) -> None:
        """Draws ink [B, S, S] somewhere in a quarter [B] of the canvas, as draw [B, 2] says."""
        half = self.canvas // 2
        top, left = _scale(draw, half - self.digit + 1).T
        _paste(image, ink, top + half * (quarter // 2), left + half * (quarter % 2))

    def _distract(
        self, image: np.ndarray, index: np.ndarray, source: np.ndarray, quarters: np.ndarray
    ) -> None:
        """Draws the digits that are not asked for."""
        count = len(self._ids)
        draws = self.uniform(index, 3 * self.num_distractors, stream=4)
        for i in range(self.num_distractors):
            draw = draws[:, 3 * i : 3 * i + 3]
            other = (source + 1 + _scale(draw[:, 0], count - 1)) % count
            ink = self._ink[other] * self._shown(index, i, self.num_distractors)
            self._paste_in(image, ink, quarters[:, 1 + i], draw[:, 1:])

    def _ask(self, image: np.ndarray, quarter: np.ndarray) -> None:
        """Clears the middle of the canvas but for the corner of the quarter asked for."""
        half = self.canvas // 2
        image[:, half - 4 : half + 4, half - 4 : half + 4] = 0
        square = np.ones((len(image), 4, 4), np.float32)
        _paste(image, square, half - 4 + 4 * (quarter // 2), half - 4 + 4 * (quarter % 2))

    def _cut_out(self, source: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Cuts a random square out of another digit: float32 [B, fragment, fragment]."""
        count = len(self._ids)
        other = (source + 1 + _scale(draw[:, 0], count - 1)) % count
        span = np.arange(self.fragment)
        room = self.digit - self.fragment + 1
        rows = _scale(draw[:, 1], room)[:, None] + span
        cols = _scale(draw[:, 2], room)[:, None] + span
        return self._ink[other[:, None, None], rows[:, :, None], cols[:, None, :]]

    def _foreground(self, image: np.ndarray) -> np.ndarray:
        """Patches [B, num_patches] whose ink averages above 0.05 before any clutter is added."""
        side = self.canvas // self.patch_size
        patches = image.reshape(len(image), side, self.patch_size, side, self.patch_size)
        return patches.mean(axis=(2, 4)).reshape(len(image), side * side) > 0.05

    def uniform(self, index: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
        """Numbers in [0, 1), float64 [B, count], from index, seed, split and stream alone."""
        key = np.array([self.seed, _SPLITS.index(self.split), stream], np.int64).view(np.uint64)
        state = np.zeros(1, np.uint64)
        for word in (*np.split(key, 3), index.view(np.uint64)):  # arrays wrap without a warning
            state = _mix(state + word * _GOLDEN + _GOLDEN)
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return (_mix(state[:, None] + counter) >> np.uint64(11)) * 2.0**-53

    def _gaussian(self, index: np.ndarray, count: int) -> np.ndarray:
        """Standard normal numbers, float32 [B, count] (Box-Muller)."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform(index, count, stream=1)))
        angle = 2 * np.pi * self.uniform(index, count, stream=2)
        return (radius * np.cos(angle)).astype(np.float32)


def _paste(image: np.ndarray, ink: np.ndarray, top: np.ndarray, left: np.ndarray) -> None:
    """Draws ink [B, S, S] into image [B, H, W], brighter wins, at top, left int64 [B]."""
    span = np.arange(ink.shape[-1])
    rows, cols = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    item = np.arange(len(image))[:, None, None]
    image[item, rows, cols] = np.maximum(image[item, rows, cols], ink)


def _scale(draw: np.ndarray, count: int) -> np.ndarray:
    """Turns numbers in [0, 1) into integers below count."""
    return (draw * count).astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of 64-bit words: a counter gives random bits."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@lru_cache
def _source_images(split: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ink float32 [S, size, size] in [0, 1], labels int64 [S] and original positions [S]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "ClutteredDigits needs scikit-learn: pip install 'spot-vit[demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    # Ordered by a hash: the file lists digits in turn, and NumPy's generators may change.
    order = np.argsort(_mix(np.arange(1, len(labels) + 1, dtype=np.uint64) * _GOLDEN))
    chosen = order[360:] if split == "train" else order[:360]
    ink = torch.from_numpy(images[chosen]).float().reshape(-1, 1, 8, 8) / 16
    ink = F.interpolate(ink, (size, size), mode="bilinear", align_corners=False)[:, 0]
    return ink.numpy(), labels[chosen].astype(np.int64), chosen
