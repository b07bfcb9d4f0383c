"""The processes of a run: one, or as many as torchrun or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from spot_vit.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: its number.
        world: how many there are.
        device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(values, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.tolist()

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each number over all processes, which have the same names."""
        if self.world == 1:
            return values
        found = torch.tensor([*values.values()], dtype=torch.float64, device=self.device)
        distributed.all_reduce(found)
        return dict(zip(values, (found / self.world).tolist(), strict=True))

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def by_first(self, work: Callable[[], T]) -> T | None:
        """Lets the first process work, such as write; the others wait for it.

        Returns:
            What the work gives, on the first process; None on the others.

        Raises:
            UserError: on all processes, where the first one raised it. They end together then.
        """
        found, error = None, None
        if self.first:
            try:
                found = work()
            except UserError as caught:
                error = caught
        words = self.from_first(None if error is None else str(error))
        if words is not None:
            raise error or UserError(words)
        return found

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Averages tensors over the processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.world

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def started(device: str | None = None) -> Iterator[Processes]:
    """The processes that a launcher's environment speaks of, joined for as long as the block runs.

    Args:
        device: "cpu", "cuda" or another of torch's; None for a GPU where there is one. Each process
            of a machine takes the GPU of its own number.

    Raises:
        UserError: there is no such device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    joined = distributed.is_available() and distributed.is_initialized()
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {kind}: torch sees no GPU here; leave --device out, or say cpu")
    if joined:
        rank, world = distributed.get_rank(), distributed.get_world_size()
    else:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    else:
        own = torch.device(kind)
    if world == 1 or joined:
        yield Processes(rank, world, own)
        return
    distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, own)
    finally:
        distributed.destroy_process_group()
