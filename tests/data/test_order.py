"""Which samples are in which batch of which process."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from spot_vit.data.order import evaluation_order, permutation, training_order


def rows(length: int, size: int, rank: int, world: int, **given: int) -> list[list[int]]:
    given = {"seed": 3, "epoch": 1, **given}
    orders = training_order(length, size, rank=rank, world=world, **given)  # type: ignore[arg-type]
    return [order.indices for order in orders]


def test_permutations_depend_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    first = permutation(1000, 3, 1)
    torch.manual_seed(0)
    assert torch.equal(first, permutation(1000, 3, 1))
    torch.set_rng_state(state)
    assert first.sort().values.tolist() == list(range(1000))
    for seed, epoch in ((3, 2), (4, 1), (1, 3)):
        assert not torch.equal(first, permutation(1000, seed, epoch))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_the_same_global_batches(world: int) -> None:
    size = 12 // world
    ranks = (rows(100, size, rank, world) for rank in range(world))
    together = [[*chain(*parts)] for parts in zip(*ranks, strict=True)]
    assert together == rows(100, 12, 0, 1)
    assert len(together) == 100 // 12
    assert [*chain(*together)] == permutation(100, 3, 1)[:96].tolist()


def test_an_epoch_can_begin_at_any_batch() -> None:
    for rank in range(2):
        whole = rows(103, 7, rank, 2)
        assert len(whole) == 7
        for start in range(9):
            assert rows(103, 7, rank, 2, start=start) == whole[start:]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 47])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_evaluation_sees_every_sample_once(length: int, world: int) -> None:
    orders = [list(evaluation_order(length, 8, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in orders}) == 1
    for batches in zip(*orders, strict=True):
        assert len({len(order.indices) for order in batches}) == 1
        assert 1 <= len(batches[0].indices) <= 8
    indices = [i for batches in orders for order in batches for i in order.indices]
    assert sorted(i for i in indices if i >= 0) == list(range(length))
    padding = [i for i in indices if i < 0]
    assert all(~i == length - 1 for i in padding) and len(padding) < world
    assert world > 1 or not padding
