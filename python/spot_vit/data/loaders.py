"""Loaders whose batches are a function of seed, epoch and number alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from spot_vit.data.fetch import Collate, Fetch, Fetched, FetchStream
from spot_vit.data.order import Order, evaluation_order, training_order
from spot_vit.data.seeded import seed_of
from spot_vit.data.workers import begin, end, started
from spot_vit.utils.errors import UserError

_ENOUGH = 1000  # samples of a stream before its share of unreadable ones says something


class Batch(NamedTuple):
    """What loaders give.

    Attributes:
        images: on the CPU, as collated: [B, C, H, W] for pictures.
        target: as collated; None where samples have none.
        indices: int64 [B], positions in the data set; in an evaluation -1 for rows that do not
            count. Of an iterable data set they are running numbers.
    """

    images: Any
    target: Any
    indices: Tensor


class _Orders:
    """A batch sampler whose batches can be set, so that workers outlive an epoch."""

    def __init__(self) -> None:
        self.orders: Iterator[Order] = iter(())

    def __iter__(self) -> Iterator[Order]:
        return self.orders


class _Loader:
    """What both loaders do: run workers, count what is unreadable, measure the waiting."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        pin: bool,
        bad_share: float,
        collate: Collate,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1} of {world} processes, got {rank}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.pin, self.bad_share, self.collate = pin, bad_share, collate
        self.iterable = isinstance(dataset, IterableDataset)
        self.unreadable: dict[str, str] = {}
        self.waited = 0.0
        self._seen = 0
        self._kept: Any = None
        self._running: WeakSet[Any] = WeakSet()
        if self.iterable and hasattr(dataset, "set_loader_cfg"):  # its length depends on it
            dataset.set_loader_cfg(workers)

    @property
    def sharded(self) -> bool:
        """Whether this process gets only its share of the samples."""
        return self.world > 1

    def _loader(self, fetch: Fetch | FetchStream, sampler: _Orders | None, persistent: bool) -> Any:
        """A DataLoader that draws its workers' seeds from a generator of its own."""
        return DataLoader(
            fetch,
            batch_size=None if sampler is None else 1,
            batch_sampler=sampler,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin,
            worker_init_fn=begin,
            generator=torch.Generator().manual_seed(seed_of(self.seed, self.rank)),
            persistent_workers=persistent and self.workers > 0,
        )

    def _stream(self, epoch: int, training: bool) -> Any:
        """Batches of an iterable data set in an epoch: workers begin it anew."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        fetch = FetchStream(
            self.dataset, self.batch_size, self.seed, epoch, self.rank, self.collate, training
        )
        return self._loader(fetch, None, False)

    def close(self) -> None:
        """Ends the workers; the next iterator starts new ones."""
        for running in list(self._running):
            end(running)
        self._kept = None

    def _fetched(self, loader: Any) -> Iterator[Fetched]:
        """The batches of a DataLoader, with the waiting measured and its errors in our words."""
        try:
            begun = time.perf_counter()
            running = started(loader)
            self._running.add(running)
            for fetched in running:
                self.waited += time.perf_counter() - begun
                self._count(fetched)
                yield fetched
                begun = time.perf_counter()
        except Exception as error:
            self.close()
            if "DataLoader worker" not in str(error) or "Traceback" in str(error):
                raise
            raise UserError(
                f"a worker process of the data loader was ended from outside ({error}); usually "
                "memory, or shared memory, is short: take fewer --workers or a smaller batch"
            ) from error
        if self.iterable:
            self._judge(self._seen)

    def _count(self, fetched: Fetched) -> None:
        self._seen += len(fetched.indices) + len(fetched.unreadable)
        self.unreadable.update(fetched.unreadable)
        if fetched.unreadable:
            total = max(self._seen, _ENOUGH) if self.iterable else len(self.dataset)
            self._judge(total, fetched.images is None and not self.iterable)

    def _judge(self, total: int, none_left: bool = False) -> None:
        """Raises where more than the allowed share is unreadable."""
        if not none_left and len(self.unreadable) <= self.bad_share * total:
            return
        named = [f"{name} ({reason})" for name, reason in self.unreadable.items()]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        raise UserError(
            f"{len(named)} of {total} pictures cannot be read, and at most "
            f"{100 * self.bad_share:.3g} % may be unreadable (--bad-share): "
            f"{', '.join(named[:10])}{more}; mend or remove them, or allow a larger share"
        )


def _as_it_is(fetched: Any) -> Any:
    return fetched


class TrainLoader(_Loader):
    """Batches for training: the same ones whatever happens around it.

    A batch is a function of data set, seed, epoch, its number, and which part of the global batch
    this process has (see ``spot_vit.data.order``); every random number that a sample's transforms
    draw is a function of seed, epoch and index. The number of workers, a restart in the middle of
    an epoch and the caller's own draws change nothing, and the caller's generators are not moved.
    A picture that cannot be read is replaced by another, counted, and named.

    An iterable data set shares itself out among processes and workers, as timm's readers do, and
    has an order of its own: its batches are the same for the same number of workers.

    Args:
        dataset: of samples in any form that `images_and_target` knows. See
            ``spot_vit.data.fetch.Fetch`` for what it may offer.
        batch_size: samples in a batch of this process.
        seed: of the run.
        rank: of this process.
        world: number of processes.
        workers: processes that make batches; 0 makes them in this one.
        pin: whether batches are in page-locked memory, for copies to a GPU.
        bad_share: share of the samples that may be unreadable.
        collate: makes one batch of a list of samples.

    Attributes:
        unreadable: reasons by name, of all samples that could not be read so far.
        waited: seconds that the caller has waited for batches.

    Raises:
        UserError: there are fewer samples than a global batch takes, or more are unreadable than
            `bad_share` allows.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        bad_share: float = 0.05,
        collate: Collate = default_collate,
    ) -> None:
        super().__init__(dataset, batch_size, seed, rank, world, workers, pin, bad_share, collate)
        self._orders = _Orders()
        if not self.iterable and len(self) < 1:
            share = f" in each of {world} processes" if self.sharded else ""
            raise UserError(
                f"{len(dataset)} pictures make no batch of {batch_size}{share}: expected at least "
                f"{batch_size * world}; take a --batch-size of at most {len(dataset) // world}"
            )

    @property
    def unknown_length(self) -> bool:
        """Whether the number of batches is unknown, so that a run must be told its steps."""
        return self.iterable and _length(self.dataset) is None

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        length = _length(self.dataset)
        if length is None:
            raise TypeError(
                "this iterable data set does not know its length: give the number of --steps"
            )
        if self.iterable:
            return length // self.batch_size  # of this process alone
        return length // (self.batch_size * self.world)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on.

        Args:
            number: of the epoch, from 0.
            start: the first batch wanted. Those before it are not made; of an iterable data set
                they are made and thrown away.
        """
        if self.iterable:
            stop = None if self.unknown_length else len(self)
            stream = self._fetched(self._stream(number, training=True))
            batches = (fetched for fetched in stream if fetched.images is not None)
            for count, fetched in enumerate(batches):
                if count >= start:
                    yield Batch(*fetched[:3])
                if count + 1 == stop:
                    return
            return
        if self._kept is None:
            fetch = Fetch(self.dataset, self.seed, self.collate, training=True)
            self._kept = self._loader(fetch, self._orders, persistent=True)
        self._orders.orders = training_order(
            len(self.dataset),
            self.batch_size,
            seed=self.seed,
            epoch=number,
            rank=self.rank,
            world=self.world,
            start=start,
        )
        for fetched in self._fetched(self._kept):
            yield Batch(*fetched[:3])


class EvalLoader(_Loader):
    """Batches for evaluation: over all processes every sample exactly once.

    All processes get equally many batches. Rows that do not count have index -1: padding, and
    copies in place of pictures that cannot be read. Random numbers that transforms draw are a
    function of the index. Of an iterable data set every process reads everything, and takes every
    `world`-th batch.

    Args:
        dataset: as in `TrainLoader`.
        batch_size: samples in a batch of this process; the last may be smaller.
        rank: of this process.
        world: number of processes.
        workers: processes that make batches; 0 makes them in this one.
        pin: whether batches are in page-locked memory, for copies to a GPU.
        bad_share: share of the samples that may be unreadable.
        collate: makes one batch of a list of samples.

    Attributes:
        unreadable: reasons by name, of all samples that could not be read so far.
        waited: seconds that the caller has waited for batches.

    Raises:
        UserError: more samples are unreadable than `bad_share` allows.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        bad_share: float = 0.05,
        collate: Collate = default_collate,
    ) -> None:
        super().__init__(dataset, batch_size, 0, rank, world, workers, pin, bad_share, collate)

    def __len__(self) -> int:
        """Batches, the same number in all processes."""
        if self.iterable:
            raise TypeError("the number of batches of an iterable data set is not known before")
        return -(-len(self.dataset) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        if self.iterable:
            return self._shared_out()
        sampler = _Orders()
        sampler.orders = evaluation_order(
            len(self.dataset), self.batch_size, rank=self.rank, world=self.world
        )
        fetch = Fetch(self.dataset, self.seed, self.collate, training=False)
        fetched = self._fetched(self._loader(fetch, sampler, persistent=False))
        return (Batch(*batch[:3]) for batch in fetched)

    def _shared_out(self) -> Iterator[Batch]:
        """Every `world`-th batch of a stream; the last round is filled up with padding."""
        stream = self._fetched(self._stream(0, training=False))
        last, own, count = None, None, 0
        for fetched in stream:
            if fetched.images is None:
                continue
            last = Batch(*fetched[:3])
            own = last if count % self.world == self.rank else own
            count += 1
            if count % self.world == 0 and own is not None:
                yield own
                own = None
        if last is not None and count % self.world:
            yield own or last._replace(indices=torch.full_like(last.indices, -1))


def _length(dataset: Any) -> int | None:
    """The length that a data set states, or None; timm's streams say 0 where they know none."""
    try:
        return len(dataset) or (None if isinstance(dataset, IterableDataset) else 0)
    except TypeError:
        return None
