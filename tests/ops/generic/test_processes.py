"""Every op gives the same bits in processes that are forked or spawned after it ran."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from ops.cases import OPS
from ops.cases.base import Op
from ops.generic import elsewhere
from support.night import nightly, record


def _found(names: list[str], path: Path, threads: int, rounds: int) -> dict[str, list[str]]:
    """In a process of its own: pytest's has threads of other tests."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=elsewhere.run, args=(names, path, threads, rounds, there))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = {"all": ["the process ended"]}
    process.join()
    assert process.exitcode == 0
    return found


def test_some_ops_after_a_fork_and_in_workers(tmp_path: Path) -> None:
    names = ["compact_tokens", "attention_stats", "packed_linear"]
    found = _found(names, tmp_path / "expected.pt", 2, 1)
    assert found == {"fork": [], "spawn": [], "DataLoader": [], "afterwards": []}


@pytest.mark.nightly
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_after_a_fork_and_in_workers(op: Op, threads: int, tmp_path: Path) -> None:
    rounds = nightly(5)
    found = _found([op.name], tmp_path / "expected.pt", threads, rounds)
    record("processes", op.name, calls=15 * rounds)
    if op.weights:  # torch's matrix products split long sums among threads
        found["fork"] = found["spawn"] = found["DataLoader"] = []
    assert found == {"fork": [], "spawn": [], "DataLoader": [], "afterwards": []}
