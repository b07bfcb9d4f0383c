"""Calls of ops in other processes, as they are imported there."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from ops.cases import OPS
from ops.generic.calls import large, outcome
from support.arguments import with_grad
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_SECONDS = 120


def outcomes(name: str) -> list[Tensor]:
    """Outputs and gradients of some calls of an op, one of them large."""
    op = OPS[name]
    calls = [s.args("cpu", torch.float32) for s in op.samples if s.traced][:4]
    return [x for args in (*calls, large(op)) for x in outcome(op, with_grad(args, op.grads))]


def differ(expected: dict[str, list[Tensor]]) -> list[str]:
    """The ops whose results have other bits here."""
    return [
        name
        for name, wanted in expected.items()
        if not all(map(torch.equal, outcomes(name), wanted))
    ]


class Calls(Dataset[list[str]]):
    """Item i calls the i-th op and names it if its results differ."""

    def __init__(self, path: Path) -> None:
        self.expected = torch.load(path)

    def __len__(self) -> int:
        return len(self.expected)

    def __getitem__(self, number: int) -> list[str]:
        name = list(self.expected)[number]
        return differ({name: self.expected[name]})


def check(path: Path, told: Any) -> None:
    """Sends the ops that differ in this process."""
    torch.set_num_threads(1)  # as in DataLoader's workers: OpenMP has no threads after a fork
    told.send(differ(torch.load(path)))


def in_a_process(method: str, path: Path) -> list[str]:
    """The ops that differ in a process that `method` starts."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=check, args=(path, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(_SECONDS) else ["nothing was heard"]
    except EOFError:
        found = ["the process ended"]
    process.join(_SECONDS)
    process.kill()
    return found if process.exitcode == 0 else [*found, f"exit status {process.exitcode}"]


def in_workers(path: Path, rounds: int) -> list[str]:
    """The ops that differ in two forked workers of a DataLoader, over several epochs."""
    loader = DataLoader(Calls(path), batch_size=None, num_workers=2, timeout=_SECONDS,
                        multiprocessing_context="fork", persistent_workers=False)  # fmt: skip
    return [name for _ in range(rounds) for names in loader for name in names]


def run(names: list[str], path: Path, threads: int, rounds: int, told: Any) -> None:
    """All of that after the ops ran here with `threads` threads, and once more here behind it."""
    torch.set_num_threads(threads)
    expected = {name: outcomes(name) for name in names}
    torch.save(expected, path)
    found = {
        method: [x for _ in range(rounds) for x in in_a_process(method, path)]
        for method in ("fork", "spawn")
    }
    found["DataLoader"] = in_workers(path, rounds)
    found["afterwards"] = differ(expected)
    told.send(found)
