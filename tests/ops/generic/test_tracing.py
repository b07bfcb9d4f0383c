"""Every op under opcheck, fake tensors, torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from ops.generic.calls import large, outcome
from support.arguments import refilled, tensors, with_grad
from support.comparison import assert_close
from support.data import FLOATING
from support.slow import most_slow
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


def _traced(grads: tuple[bool, ...] = (False, True)) -> list[Any]:
    return [
        pytest.param(*p.values, grad, id=f"{p.id}-{'grad' if grad else 'plain'}")
        for p in each_sample(traced=True)
        for grad in grads
        if p.values[0].grads or not grad
    ]


@pytest.mark.parametrize(("op", "sample", "grad"), _traced())
def test_opcheck(op: Op, sample: Sample, grad: bool, device: torch.device) -> None:
    args = sample.args(device, torch.float32)
    torch.library.opcheck(op.call.default, with_grad(args, op.grads) if grad else args)


@pytest.mark.parametrize(("op", "sample"), each_sample())
def test_the_fake_says_what_comes(op: Op, sample: Sample, device: torch.device) -> None:
    for dtype in FLOATING:
        args = sample.args(device, dtype)
        with FakeTensorMode() as mode:
            fakes = tensors(op.call(*tree_map_only(Tensor, mode.from_tensor, args)))
        real = tensors(op.call(*args))
        assert len(fakes) == len(real)
        for fake, value in zip(fakes, real, strict=True):
            assert (fake.shape, fake.dtype, fake.device) == (value.shape, value.dtype, value.device)
            assert fake.stride() == value.stride()
            assert fake.is_contiguous()


def _two_of_each_op() -> list[Any]:
    """The traced samples; all but two of an op are slow."""
    found = []
    for op in OPS.values():
        found += most_slow((p for p in each_sample(traced=True) if p.values[0] is op), 2)
    return found


def _compiled_outcomes(
    op: Op, args: tuple[Any, ...], grad: bool, backend: Any, dynamic: bool
) -> tuple[list[Tensor], list[Tensor]]:
    def function(*values: Any) -> Any:
        return op.call(*values)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    args = with_grad(args, op.grads) if grad else args
    return outcome(op, args, compiled), outcome(op, args)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", most_slow([True, False]), ids=["dynamic", "static"])
@pytest.mark.parametrize(("op", "sample"), _two_of_each_op())
def test_compile(op: Op, sample: Sample, dynamic: bool, device: torch.device) -> None:
    args = sample.args(device, torch.float64)
    compiled, eager = _compiled_outcomes(op, args, bool(op.grads), "aot_eager", dynamic)
    assert_close(compiled, eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compile_with_inductor(op: Op, device: torch.device) -> None:
    dynamic = op.exact  # the other half is static
    name = {"attention_stats": "masked with bias", "select_tokens": "(2, 9, 4)"}.get(op.name)
    sample = op.sample(name) if name else op.samples[1]
    args = sample.args(device, torch.float64)
    compiled, eager = _compiled_outcomes(op, args, bool(op.grads), "inductor", dynamic)
    assert_close(compiled, eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_dynamic_sizes_compile_at_most_twice(op: Op) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: op.call(*a), fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 4, 5, 6, 7, 8):
        args = large(op)
        args = tuple(
            a if i in op.weights else tree_map_only(Tensor, lambda v: v[:batch].contiguous(), a)  # noqa: B023
            for i, a in enumerate(args)
        )
        assert_close(compiled(*args), op.call(*args), 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.public is not None], ids=lambda op: op.name
)
def test_public_functions_compile_and_export(op: Op) -> None:
    sample = op.samples[1]
    args = sample.args("cpu", torch.float64)
    expected = tensors(op.public(*args))
    compiled = torch.compile(op.public, fullgraph=True, backend="aot_eager")
    assert_close(tensors(compiled(*args)), expected)

    class Call(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return op.public(*refilled(args, values))

    exported = torch.export.export(Call(), tuple(tensors(args)))
    assert_close(tensors(exported.module()(*tensors(args))), expected)
