"""Every op gives the same whatever runs it: threads, repeats, instruction sets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from ops.generic.calls import large, outcome
from support.arguments import with_grad
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING
from support.night import nightly, record
from support.switches import isa, isa_control, threads


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_any_number_of_threads_gives_the_same_bits(op: Op) -> None:
    args = with_grad(large(op), op.grads)
    results = []
    for count in (1, 2, 3, 4):
        with threads(count):
            results.append(outcome(op, args))
    for other in results[1:]:
        if op.weights:  # torch's matrix products split long sums among threads
            assert_close(other, results[0], 1e-5)
            continue
        for mine, theirs in zip(other, results[0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    "repeats", [100, pytest.param(nightly(1000), marks=pytest.mark.nightly, id="1000")]
)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_repeat_gives_the_same_bits(op: Op, repeats: int, device: torch.device) -> None:
    args = with_grad(large(op, device=device), op.grads)
    first = outcome(op, args)
    for _ in range(repeats):
        for mine, theirs in zip(outcome(op, args), first, strict=True):
            assert torch.equal(mine, theirs)
    record("repeats", op.name, calls=repeats)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_instruction_set_gives_the_same(op: Op) -> None:
    sets = isa_control().isas()
    assert "baseline" in sets
    for sample in op.samples:
        for dtype in FLOATING:
            args = with_grad(sample.args("cpu", dtype), op.grads)
            with isa("baseline"):
                expected = outcome(op, args)
            for name in sets[1:]:
                with isa(name):
                    actual = outcome(op, args)
                if op.exact:
                    for mine, theirs in zip(actual, expected, strict=True):
                        assert_same_bits(mine, theirs, f"{sample.name} on {name}")
                else:
                    assert_close(actual, expected, 8 * torch.finfo(dtype).eps,
                                 f"{sample.name} on {name}")  # fmt: skip


@pytest.mark.parametrize(
    "number_each", [None, pytest.param(nightly(1000), marks=pytest.mark.nightly, id="1000")]
)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_eight_python_threads_at_once(op: Op, number_each: int | None) -> None:
    """By default three turns of every call."""
    calls = [with_grad(s.args("cpu", torch.float32), op.grads) for s in op.samples if s.traced]
    calls.append(with_grad(large(op), op.grads))
    number_each = number_each or 3 * len(calls)
    expected = [outcome(op, args) for args in calls]
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for step in range(number_each):
            number = (first + step) % len(calls)
            actual = outcome(op, calls[number])
            for mine, theirs in zip(actual, expected[number], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    record("Python threads", op.name, calls=8 * number_each)
