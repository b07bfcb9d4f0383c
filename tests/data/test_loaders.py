"""Batches that nothing around them changes, and what happens to samples that cannot be read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spot_vit.data.digits import ClutteredDigits
from spot_vit.data.fetch import Unreadable
from spot_vit.data.loaders import Batch, EvalLoader, TrainLoader
from spot_vit.data.order import permutation
from spot_vit.utils.errors import UserError
from torch.utils.data import Dataset, IterableDataset, get_worker_info

ROOT = Path(__file__).resolve().parents[2]


class Drawing(Dataset[Any]):
    """Samples whose images are drawn from all generators; some cannot be read."""

    def __init__(self, length: int = 61, bad: tuple[int, ...] = ()) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise Unreadable(f"picture {index}", "it is broken")
        drawn = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        return torch.tensor([*drawn, index]), index % 3


class Stream(IterableDataset[Any]):
    """The same samples one after another, shared out among workers; its length unknown."""

    def __init__(self, length: int = 61, bad: tuple[int, ...] = ()) -> None:
        self.samples, self.epoch = Drawing(length, bad), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        order = permutation(len(self.samples), 0, self.epoch)[first::step]
        for index in order.tolist():
            try:
                yield self.samples[index]
            except Unreadable as error:
                yield error


class Sized(Stream):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return len(self.samples)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.target, b.target)
        and torch.equal(a.indices, b.indices)
        for a, b in zip(first, second, strict=True)
    )


def train(data: Any = None, size: int = 4, epoch: int = 0, start: int = 0, **given: Any) -> Any:
    loader = TrainLoader(data or Drawing(), size, **{"seed": 2, **given})
    batches = list(loader.epoch(epoch, start))
    loader.close()
    return batches


def test_batches_are_what_the_order_says() -> None:
    batches = train()
    assert len(batches) == 15 == len(TrainLoader(Drawing(), 4))
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == permutation(61, 2, 0)[:60].tolist()
    for batch in batches:
        assert torch.equal(batch.images[:, 3].long(), batch.indices)
        assert torch.equal(batch.target, batch.indices % 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    data = Drawing(bad=(5, 17))
    assert same(train(data), train(data, workers=workers))


def test_seeds_and_epochs_change_order_and_draws() -> None:
    first, later, other = train(), train(epoch=1), train(seed=3)
    assert not same(first, later) and not same(first, other)
    drawn = {
        (index, draw)
        for batches in (first, later, other)
        for batch in batches
        for index, draw in zip(batch.indices.tolist(), batch.images[:, 0].tolist(), strict=True)
    }
    assert len(drawn) == 3 * 60  # no image comes back


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_resumed_goes_on_with_the_same_batches(workers: int) -> None:
    data = Drawing(bad=(5, 17))
    whole = train(data, epoch=3)
    for start in (0, 1, 14, 15):
        assert same(train(data, epoch=3, start=start, workers=workers), whole[start:])


def test_an_epoch_that_is_left_early_disturbs_no_later_one() -> None:
    loader = TrainLoader(Drawing(), 4, seed=2, workers=2)
    left = loader.epoch(0)
    next(left)
    assert same(list(loader.epoch(1)), train(epoch=1))
    assert same(list(loader.epoch(0)), train())
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_generators_are_not_moved(workers: int) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    loaders = [TrainLoader(Drawing(bad=(3,)), 4, workers=workers).epoch(0)]
    loaders += [iter(EvalLoader(Drawing(), 4, workers=workers))]
    loaders += [TrainLoader(Stream(), 4, workers=workers).epoch(0)]
    for loader in loaders:
        for _ in loader:
            assert states() == before
    torch.rand(3)  # nor do the caller's draws move the batches
    random.random()
    assert same(train(workers=workers), train())


@pytest.mark.parametrize("world", [2, 4])
def test_processes_have_the_samples_that_one_has(world: int) -> None:
    alone = train(Drawing(bad=(5, 17)), size=8)
    ranks = [
        train(Drawing(bad=(5, 17)), size=8 // world, rank=rank, world=world)
        for rank in range(world)
    ]
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_replaced_counted_and_named(workers: int) -> None:
    loader = TrainLoader(Drawing(bad=(5, 17)), 4, seed=2, workers=workers)
    batches = list(loader.epoch(0))
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    order = permutation(61, 2, 0)[:60].tolist()
    assert len(indices) == 60 and not {5, 17} & set(indices)
    assert [i for i in range(60) if indices[i] != order[i]] == [
        i for i in range(60) if order[i] in (5, 17)
    ]
    assert loader.unreadable == {"picture 5": "it is broken", "picture 17": "it is broken"}
    assert all(torch.equal(batch.images[:, 3].long(), batch.indices) for batch in batches)
    loader.close()


def test_more_than_the_allowed_share_ends_the_run_with_names() -> None:
    bad = tuple(range(0, 61, 8))
    assert len(train(Drawing(bad=bad), bad_share=0.14)) == 15
    with pytest.raises(UserError, match=r"of 61 pictures cannot be read.*picture \d+ \(it is"):
        train(Drawing(bad=bad), bad_share=0.1)
    with pytest.raises(UserError, match=r"\d\d of 1000 pictures cannot be read.*and \d+ more"):
        train(Drawing(1000, bad=tuple(range(1000))), bad_share=1.0)


def test_too_few_samples_for_a_batch_are_refused_early() -> None:
    with pytest.raises(UserError, match="61 pictures make no batch of 62: expected at least 62"):
        TrainLoader(Drawing(), 62)
    with pytest.raises(UserError, match=r"of 31 in each of 2 processes.*at most 30"):
        TrainLoader(Drawing(), 31, world=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"workers": -1}, "workers: expected at least 0"),
        ({"rank": 2, "world": 2}, "rank: expected 0 to 1 of 2 processes, got 2"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainLoader(Drawing(), **{"batch_size": 4, **given})


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_counts_every_sample_once(world: int, workers: int) -> None:
    ranks = []
    for rank in range(world):
        loader = EvalLoader(Drawing(bad=(5,)), 7, rank=rank, world=world, workers=workers)
        ranks.append(list(loader))
        assert len(ranks[-1]) == len(loader) and loader.sharded == (world > 1)
    seen = [
        (index, image[3].item())
        for batches in ranks
        for batch in batches
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
        if index >= 0
    ]
    assert sorted(seen) == [(i, i) for i in range(61) if i != 5]


def test_an_evaluation_draws_the_same_each_time() -> None:
    loader = EvalLoader(Drawing(bad=(5, 60)), 8)
    first = list(loader)
    assert same(first, list(loader)) and same(first, list(EvalLoader(Drawing(bad=(5, 60)), 8)))
    assert loader.unreadable.keys() == {"picture 5", "picture 60"}
    assert first[0].indices.tolist() == [0, 1, 2, 3, 4, -1, 6, 7]
    assert first[0].images[5, 3] == 6  # a copy of the next one that can be read
    assert first[-1].indices.tolist() == [56, 57, 58, 59, -1]


def test_data_sets_made_in_batches_are_fetched_in_batches() -> None:
    class Counting(ClutteredDigits):
        calls = 0

        def __getitems__(self, indices: Any) -> Any:
            Counting.calls += 1
            return super().__getitems__(indices)

    data = Counting("test", 30)
    batches = train(data, size=10)
    assert Counting.calls == 3
    assert torch.equal(batches[1].images, data.batch(batches[1].indices).image)


def test_data_sets_of_an_epoch() -> None:
    class Epochs(Drawing):
        epoch = -1

        def at_epoch(self, epoch: int) -> Drawing:
            data = Epochs(self.length)
            data.epoch = epoch
            return data

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(1), self.epoch

    loader = TrainLoader(Epochs(), 4, workers=1)
    for epoch in (0, 5, 2):
        assert {t for batch in loader.epoch(epoch) for t in batch.target.tolist()} == {epoch}
    loader.close()


@pytest.mark.parametrize("form", [dict, list])
def test_samples_may_be_mappings_or_longer(form: type) -> None:
    class Forms(Drawing):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return {"pixel_values": image, "labels": label} if form is dict else [image, label, "x"]

    assert same(train(Forms()), train())


def test_a_collate_function_of_ones_own() -> None:
    batches = train(collate=lambda samples: {"image": [s[0] for s in samples], "label": None})
    assert isinstance(batches[0].images, list) and batches[0].target is None


def test_pinned_batches_are_asked_for() -> None:
    loader = TrainLoader(Drawing(), 4, pin=True)
    assert loader._loader(None, loader._orders, False).pin_memory is True  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_repeat_for_the_same_workers(workers: int) -> None:
    first = train(Stream(), epoch=1, workers=workers)
    assert same(first, train(Stream(), epoch=1, workers=workers))
    assert not same(first, train(Stream(), epoch=2, workers=workers))
    assert same(first[3:], train(Stream(), epoch=1, start=3, workers=workers))
    samples = sorted(i for batch in first for i in batch.images[:, 3].tolist())
    assert len(set(samples)) == len(samples) == 4 * len(first)
    assert len(first) in (14, 15)


def test_streams_may_not_know_their_length() -> None:
    loader = TrainLoader(Stream(), 4)
    assert loader.unknown_length
    with pytest.raises(TypeError, match="--steps"):
        len(loader)
    sized = TrainLoader(Sized(), 4)
    assert not sized.unknown_length and len(sized) == 15 == len(list(sized.epoch(0)))
    assert not TrainLoader(Drawing(), 4).unknown_length


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_name_what_cannot_be_read(workers: int) -> None:
    loader = TrainLoader(Stream(bad=(5, 17)), 4, workers=workers)
    samples = {i for batch in loader.epoch(0) for i in batch.images[:, 3].tolist()}
    assert not {5, 17} & samples and loader.unreadable.keys() == {"picture 5", "picture 17"}
    with pytest.raises(UserError, match=r"2 of \d+ pictures cannot be read.*at most 1 %"):
        list(TrainLoader(Stream(bad=(5, 17)), 4, workers=workers, bad_share=0.01).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_of_a_stream_counts_every_sample_once(world: int, workers: int) -> None:
    ranks = [
        list(EvalLoader(Stream(bad=(5,)), 4, rank=rank, world=world, workers=workers))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [
        (i, n)
        for batches in ranks
        for batch in batches
        for i, n in zip(batch.images[:, 3].tolist(), batch.indices.tolist(), strict=True)
        if n >= 0
    ]
    assert sorted(i for i, _ in seen) == [i for i in range(61) if i != 5]
    assert len({n for _, n in seen}) == 60  # numbers tell them apart


def test_waiting_is_measured() -> None:
    class Slow(Drawing):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.005)
            return super().__getitem__(index)

    loader = TrainLoader(Slow(8), 4)
    for _ in loader.epoch(0):
        time.sleep(0.05)  # what the caller does between batches is no waiting
    assert 0.04 < loader.waited < 0.09


def test_errors_of_a_data_set_keep_their_kind() -> None:
    class Wrong(Drawing):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("label")

    for workers in (0, 1):
        with pytest.raises(KeyError, match="label"):
            train(Wrong(), workers=workers)


def test_a_worker_that_is_killed_is_a_line_with_a_cure() -> None:
    class Deadly(Drawing):
        def __getitem__(self, index: int) -> Any:
            if get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(UserError, match=r"a worker process of the data loader.*fewer --workers"):
        train(Deadly(), workers=1)


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_for_all_processes_leave_workers_alive(kind: str) -> None:
    """Ctrl-C and schedulers signal the whole group; the run saves first, and ends by itself."""
    script = f"""
        import os, signal
        from tests.data.test_loaders import Drawing, TrainLoader
        loader = TrainLoader(Drawing(), 4, workers=2)
        batches = loader.epoch(0)
        next(batches)
        signal.signal(signal.{kind}, lambda *_: print("stop"))
        os.killpg(0, signal.{kind})
        print(1 + sum(1 for batch in batches))
        other = loader.epoch(1)
        next(other)  # and an epoch that is under way holds nobody up
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["python", ".", "tests"])},
        start_new_session=True,
        timeout=60,
    )
    assert done.stdout.split() == ["stop", "15"] and done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 30
