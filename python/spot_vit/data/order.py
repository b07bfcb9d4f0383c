"""Which samples are in which batch of which process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spot_vit.data.seeded import seed_of


class Order(NamedTuple):
    """What a process fetches for one batch.

    Attributes:
        epoch: that the batch is of.
        indices: of samples; ``~i`` is sample i as padding, which does not count.
    """

    epoch: int
    indices: list[int]


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, int64 [length], from these numbers alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(length, generator=generator)


def training_order(
    length: int, batch_size: int, *, seed: int, epoch: int, rank: int, world: int, start: int = 0
) -> Iterator[Order]:
    """The batches of one process in an epoch of training.

    Batch s of all processes together is ``permutation[s * W * b : (s + 1) * W * b]``, and rank r
    has the r-th b of it: however many processes share a global batch, it holds the same samples.
    What is left in the end is no whole global batch and dropped.

    Args:
        length: samples in the data set.
        batch_size: b, samples in a batch of one process.
        seed: of the run.
        epoch: from 0.
        rank: of this process.
        world: W, processes.
        start: the first batch wanted, where an epoch is resumed.
    """
    order, whole = permutation(length, seed, epoch), world * batch_size
    for first in range(start * whole + rank * batch_size, length - length % whole, whole):
        yield Order(epoch, order[first : first + batch_size].tolist())


def evaluation_order(length: int, batch_size: int, *, rank: int, world: int) -> Iterator[Order]:
    """The batches of one process in an evaluation: over all of them, each sample once.

    All processes have equally many batches, and equally many rows in each: the last is as small
    as it can be, and padded with the last sample.
    """
    whole = world * batch_size
    for first in range(0, length, whole):
        rows = min(batch_size, -(-(length - first) // world))
        own = range(first + rank * rows, first + (rank + 1) * rows)
        yield Order(0, [index if index < length else ~(length - 1) for index in own])
