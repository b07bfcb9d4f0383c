"""Ops in threads of the user: at once, during a backward pass, each with its own modes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from ops.generic.calls import DIFFERENTIABLE, outcome
from support.arguments import tensors, with_grad
from support.comparison import assert_same_bits
from torch import Tensor

THREADS = 8


def _args(op: Op) -> tuple[Any, ...]:
    return with_grad(op.samples[1].args("cpu", torch.float32), op.grads)


def _same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same_bits(mine, theirs)


def test_forward_and_backward_of_all_ops_at_once() -> None:
    """Each thread starts with another op, so that different kernels share no scratch either."""
    calls = [(op, _args(op)) for op in OPS.values()]
    expected = [outcome(op, args) for op, args in calls]
    start = threading.Barrier(THREADS)

    def work(first: int) -> None:
        start.wait()
        for step in range(3 * len(calls)):
            number = (first + step) % len(calls)
            _same(outcome(*calls[number]), expected[number])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_ops_called_from_other_threads_during_a_backward_pass(op: Op) -> None:
    """A hook of the pass starts threads that run forward and backward passes of their own."""
    args = _args(op)
    expected = outcome(op, args)
    seen: list[list[Tensor]] = []

    def hook(grad: Tensor) -> Tensor:
        with ThreadPoolExecutor(THREADS) as pool:
            others = [_args(op) for _ in range(THREADS)]
            seen.extend(pool.map(lambda own: outcome(op, own), others))
        return grad

    def call(*values: Any) -> Any:
        outputs = op.call(*values)
        tensors(outputs)[0].register_hook(hook)
        return outputs

    _same(outcome(op, args, call), expected)
    assert len(seen) == THREADS
    for found in seen:
        _same(found, expected)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_each_thread_has_its_own_grad_mode(op: Op) -> None:
    args = _args(op)
    expected = outcome(op, args)
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad] * 2
    start = threading.Barrier(THREADS)

    def work(number: int) -> None:
        start.wait()
        for _ in range(5):
            with modes[number]():
                recorded = modes[number] is torch.enable_grad
                outputs = tensors(op.call(*args))
                assert outputs[0].requires_grad == recorded
                if op.public is not None:
                    assert tensors(op.public(*args))[0].requires_grad == recorded
                if recorded:
                    _same(outcome(op, args), expected)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert tensors(op.call(*args))[0].requires_grad
