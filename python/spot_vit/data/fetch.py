"""Makes batches of samples, in the process of the trainer or in that of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from spot_vit.data.batches import images_and_target
from spot_vit.data.order import Order
from spot_vit.data.seeded import kept_states, plant, seed_of

_ATTEMPTS = 100  # so many unreadable samples in a row are no accident


class Unreadable(Exception):
    """A sample that cannot be read; iterable data sets may give it instead of a sample.

    Attributes:
        name: of its file, or whatever else leads to it.
        reason: why it cannot be read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Fetched(NamedTuple):
    """A batch as a worker hands it over.

    Attributes:
        images: as collated; None where no sample could be read.
        target: as collated, or None.
        indices: int64 [B], positions in the data set, -1 for padding.
        unreadable: names and reasons of samples that had to be left out.
    """

    images: Any
    target: Any
    indices: Tensor
    unreadable: list[tuple[str, str]]


Collate = Callable[[list[Any]], Any]


def _collated(
    samples: list[Any], index: list[int], unreadable: list[tuple[str, str]], collate: Collate
) -> Fetched:
    images, target = images_and_target(collate(samples)) if samples else (None, None)
    return Fetched(images, target, torch.tensor(index, dtype=torch.int64), unreadable)


class Fetch(Dataset[Fetched]):
    """Whole batches of a data set, each sample with random numbers of its own.

    A sample that is ``Unreadable`` is replaced by another. In training that one counts, and is
    drawn from seed, epoch and index; in evaluation it is padding.

    Args:
        dataset: with ``__getitem__`` and ``__len__``. Where it has ``at_epoch(epoch)``, that gives
            the data set of an epoch. Where its attribute ``by_index`` is true, its samples are
            functions of their index alone, and ``__getitems__`` makes a batch at once.
        seed: of the run.
        collate: makes one batch of a list of samples.
        training: whether replacements count.
    """

    def __init__(self, dataset: Any, seed: int, collate: Collate, training: bool) -> None:
        self.dataset, self.seed = dataset, seed
        self.collate, self.training = collate, training

    def __getitems__(self, order: Order) -> Fetched:
        dataset, positions = self.dataset, [max(i, ~i) for i in order.indices]
        if hasattr(dataset, "at_epoch"):
            dataset = dataset.at_epoch(order.epoch)
        index = [max(i, -1) for i in order.indices]
        unreadable: list[tuple[str, str]] = []
        with kept_states():
            if getattr(dataset, "by_index", False):
                return _collated(dataset.__getitems__(positions), index, [], self.collate)
            samples: list[Any] = []
            for row, position in enumerate(positions):
                sample, found = self._read(dataset, order.epoch, position, unreadable)
                if found < 0:
                    samples = []
                    break
                samples.append(sample)
                if found != position:
                    index[row] = found if self.training else -1
        return _collated(samples, index, unreadable, self.collate)

    def _read(
        self, dataset: Any, epoch: int, position: int, unreadable: list[tuple[str, str]]
    ) -> tuple[Any, int]:
        """A sample and its position: at `position`, or the replacement; -1 if there is none."""
        found = position
        for attempt in range(_ATTEMPTS):
            if attempt:
                drawn = seed_of(self.seed, epoch, position, attempt)
                found = (drawn if self.training else position + attempt) % len(dataset)
            plant(seed_of(self.seed, epoch, position, found))
            try:
                return dataset[found], found
            except Unreadable as error:
                unreadable.append((error.name, error.reason))
        return None, -1


class FetchStream(IterableDataset[Fetched]):
    """Whole batches of an iterable data set, each sample with random numbers of its own.

    An index is the number of the sample in its worker, and tells samples of one worker apart.

    Args:
        dataset: an iterable of samples, or of ``Unreadable`` where one cannot be read. It shares
            itself out among the workers (``torch.utils.data.get_worker_info``).
        batch_size: samples in a batch.
        seed: of the run.
        epoch: that the stream is of.
        rank: of this process.
        collate: makes one batch of a list of samples.
        training: whether an incomplete last batch is dropped.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int,
        collate: Collate,
        training: bool,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.seed, self.epoch, self.rank = seed, epoch, rank
        self.collate, self.training = collate, training

    def __iter__(self) -> Iterator[Fetched]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples: list[Any] = []
        unreadable: list[tuple[str, str]] = []
        stream, number, ended = None, 0, False
        while not ended:
            with kept_states():
                plant(seed_of(self.seed, self.epoch, self.rank, worker, number))
                stream = iter(self.dataset) if stream is None else stream
                sample = next(stream, stream)
            number, ended = number + 1, sample is stream
            if isinstance(sample, Unreadable):
                unreadable.append((sample.name, sample.reason))
            elif not ended:
                samples.append(sample)
            if len(samples) == self.batch_size or (ended and (samples or unreadable)):
                if ended and self.training:
                    samples = []
                first = worker + workers * (number - len(samples))
                index = [first + workers * i for i in range(len(samples))]
                yield _collated(samples, index, unreadable, self.collate)
                samples, unreadable = [], []
