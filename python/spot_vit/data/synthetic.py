"""Random images with random labels: to try a recipe at its real size without any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spot_vit.data.seeded import seed_of


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Normal noise and labels, functions of their index alone.

    Args:
        length: number of samples.
        input_size: (C, H, W) of an image.
        num_classes: labels are below it.
        seed: of the noise.
    """

    by_index = True

    def __init__(
        self, length: int, input_size: tuple[int, int, int], num_classes: int, seed: int = 0
    ) -> None:
        self.length, self.input_size = length, tuple(input_size)
        self.num_classes, self.seed = num_classes, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, index))
        label = torch.randint(self.num_classes, (), generator=generator)
        return torch.randn(self.input_size, generator=generator), int(label)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        return [self[index] for index in indices]

    def filename(self, index: int) -> str:
        """A name for the sample."""
        return f"synthetic {index}"


class SyntheticSplit:
    """Makes ``Synthetic`` of the size that a model takes.

    Args:
        length: number of samples.
        num_classes: labels are below it.
        seed: of the noise.
    """

    def __init__(self, length: int, num_classes: int, seed: int) -> None:
        self.length, self.num_classes, self.seed = length, num_classes, seed

    def dataset(
        self, config: Mapping[str, Any], augment: Mapping[str, Any] | None = None
    ) -> Synthetic:
        """The data set for a model with this data configuration of timm's."""
        return Synthetic(self.length, tuple(config["input_size"]), self.num_classes, self.seed)
