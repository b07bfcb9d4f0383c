"""What only a GPU has: streams, graphs, no waiting; results as on the CPU."""

from __future__ import annotations

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from ops.generic.calls import vit
from support.arguments import tensors, with_grad
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, generator
from support.gradients import gradients
from torch import Tensor
from torch.utils._pytree import tree_map_only

KERNELS = list(OPS.values())


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_side_streams(op: Op, gpu: torch.device) -> None:
    """Each of 8 streams first waits, then fills its input: work on another stream would miss it."""
    args = vit(op, device=gpu)
    expected = tensors(op.call(*args))
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                late = tree_map_only(
                    Tensor, lambda v: torch.zeros_like(v) if v.is_floating_point() else v, args
                )
                torch.cuda._sleep(2_000_000)
                for copy, value in zip(tensors(late), tensors(args), strict=True):
                    if copy is not value:
                        copy.copy_(value)
                results.append(tensors(op.call(*late)))
        torch.cuda.synchronize()
        for outputs in results:
            for mine, theirs in zip(outputs, expected, strict=True):
                assert_same_bits(mine, theirs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_graph_capture(op: Op, gpu: torch.device) -> None:
    args = op.samples[0].args(gpu, torch.float32)
    static = tree_map_only(Tensor, torch.clone, args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(op.call(*static))
    for step in range(100):
        for copy, value in zip(tensors(static), tensors(args), strict=True):
            if value.is_floating_point() and value.numel():
                noise = torch.rand(value.shape, generator=generator(f"{step}"))
                copy.copy_((value + noise.to(value)) if copy.dim() != 2 else value)
        graph.replay()
        for mine, theirs in zip(captured, tensors(op.call(*static)), strict=True):
            assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_no_call_waits_for_the_device(op: Op, gpu: torch.device) -> None:
    args = with_grad(vit(op, device=gpu), op.grads)
    gradients(op.call, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(op.call, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_cpu_says_the_same(op: Op, dtype: torch.dtype, gpu: torch.device) -> None:
    for sample in op.samples:
        there = tensors(op.call(*sample.args(gpu, dtype)))
        here = tensors(op.call(*sample.args("cpu", dtype)))
        for mine, theirs in zip(there, here, strict=True):
            if op.exact:
                assert_same_bits(mine.cpu(), theirs, sample.name)
            else:
                assert_close(mine.cpu(), theirs, 8 * torch.finfo(dtype).eps, sample.name)
