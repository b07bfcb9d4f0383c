"""What only a GPU has: indices that are never trusted, streams, graphs, sizes beyond 2^31."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import tensors, with_grad
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, generator, random, random_index
from support.gradients import gradients
from torch import Tensor

import spot_ext
from spot_ext import compact_tokens, fuse_tokens, scatter_tokens, select_tokens

KERNELS = list(OPS.values())


def _arguments(op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    if op.large:
        return op.sample(op.large).args(device, dtype)
    plain = op.exact or op.name.startswith("attention_stats")
    name = {"select_tokens": "(2, 196, 137)"}.get(op.name, "ViT" if plain else "ViT, mean")
    return op.sample(name).args(device, dtype)


# ---- an index out of range is never read through -------------------------------------------------

BAD = [-1, 5, 2**31, -(2**31) - 7, 2**40, -(2**62), 2**63 - 1]


def _index(device: torch.device, bad: int) -> Tensor:
    return torch.tensor([[0, bad, 3], [4, 2, 1]], device=device)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64, torch.int64, torch.uint8], ids=str)
def test_compact_marks_the_row(bad: int, dtype: torch.dtype, gpu: torch.device) -> None:
    tokens = random("tokens", (2, 6, 3), dtype, gpu)
    out = compact_tokens(tokens, _index(gpu, bad))
    good = compact_tokens(tokens, _index(gpu, 1))
    rows = [0, 1, 3]
    assert_same_bits(out[0, rows], good[0, rows])
    assert_same_bits(out[1], good[1])
    if dtype.is_floating_point or dtype.is_complex:
        assert out[0, 2].isnan().all()
    else:
        assert not out[0, 2].any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_scatter_and_fuse_mark_the_image(bad: int, dtype: torch.dtype, gpu: torch.device) -> None:
    index, right = _index(gpu, bad), _index(gpu, 1)
    kept = random("kept", (2, 4, 3), dtype, gpu)
    tokens = random("tokens", (2, 6, 3), dtype, gpu)
    weights = random("weights", (2, 5), dtype, gpu).abs()
    grid = scatter_tokens(kept, index, 5)
    assert grid[0, 1:].isnan().all()
    assert_same_bits(grid[1], scatter_tokens(kept, right, 5)[1])
    fused = fuse_tokens(tokens, weights, index)
    assert fused[0].isnan().all()
    assert_same_bits(fused[1], fuse_tokens(tokens, weights, right)[1])
    for grad in torch.ops.spot.fuse_tokens_backward(fused, tokens, weights, index):
        assert grad[0].isnan().any() and not grad[1].isnan().any()


def test_a_repeated_position_is_marked_where_rows_are_sent(gpu: torch.device) -> None:
    index = torch.tensor([[0, 3, 3], [4, 2, 1]], device=gpu)
    kept = random("kept", (2, 4, 3), torch.float32, gpu)
    grid = scatter_tokens(kept, index, 5)
    assert grid[0, 4].isnan().all() and grid[0, [0, 1, 2, 3, 5]].isfinite().all()
    assert grid[1].isfinite().all()
    tokens = random("tokens", (2, 6, 3), torch.float32, gpu).requires_grad_()
    compact_tokens(tokens, index).sum().backward()
    assert tokens.grad[0, 4].isnan().all() and tokens.grad[1].isfinite().all()


def test_spot_check_names_the_entry(gpu: torch.device) -> None:
    code = """
import torch, spot_ext as s
tokens = torch.rand(2, 6, 3, device="cuda")
index = torch.tensor([[0, 3], [4, 9]], device="cuda")
calls = [lambda: s.compact_tokens(tokens, index), lambda: s.scatter_tokens(tokens[:, :3], index, 5),
         lambda: s.fuse_tokens(tokens, torch.rand(2, 5, device="cuda"), index)]
for call in calls:
    try:
        call()
    except ValueError as error:
        print(error)
"""
    folder = str(Path(spot_ext.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/",
        env=os.environ | {"SPOT_CHECK": "1", "PYTHONPATH": folder},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("index[1, 1] is 9, out of range for 5" in line for line in lines)


def test_tensors_on_two_devices_are_refused(gpu: torch.device) -> None:
    tokens = random("tokens", (2, 6, 3), torch.float32, gpu)
    index = random_index("index", 2, 5, 3)
    with pytest.raises(ValueError, match=r"index must be on the device of tokens \(cuda:0\)"):
        compact_tokens(tokens, index)
    for op_tokens, op_index in ((tokens, index), (tokens.cpu(), index.to(gpu))):
        with pytest.raises((ValueError, RuntimeError), match=r"device|CPU"):
            torch.ops.spot.compact_tokens(op_tokens, op_index)


# ---- streams and graphs --------------------------------------------------------------------------


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_side_streams(op: Op, gpu: torch.device) -> None:
    """Each of 8 streams first waits, then fills its input: work on another stream would miss it."""
    args = _arguments(op, gpu)
    expected = tensors(op.call(*args))
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                late = [torch.zeros_like(a) if isinstance(a, Tensor) and a.is_floating_point()
                        else a for a in args]  # fmt: skip
                torch.cuda._sleep(2_000_000)
                for copy, value in zip(late, args, strict=True):
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
    static = [a.clone() if isinstance(a, Tensor) else a for a in args]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(op.call(*static))
    for step in range(100):
        for copy, value in zip(static, args, strict=True):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                noise = torch.rand(value.shape, generator=generator(f"{step}"))
                copy.copy_((value + noise.to(value)) if copy.dim() != 2 else value)
        graph.replay()
        for mine, theirs in zip(captured, tensors(op.call(*static)), strict=True):
            assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_no_call_waits_for_the_device(op: Op, gpu: torch.device) -> None:
    args = with_grad(_arguments(op, gpu), op.grads)
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


# ---- sizes ---------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_elements(gpu: torch.device) -> None:
    rows = 2**31 // 64 + 100
    tokens = torch.empty((1, rows + 1, 64), dtype=torch.uint8, device=gpu)
    tokens.random_(1, 255)
    index = torch.tensor([[0, rows - 1, rows // 2, rows - 2]], device=gpu)
    out = compact_tokens(tokens, index)
    assert torch.equal(out[0, 1:], tokens[0, 1:][index[0]])
    grid = scatter_tokens(out, index, rows)
    assert torch.equal(grid[0, 1:][index[0]], out[0, 1:])
    assert int(grid[0, 1:].any(dim=1).sum()) == 4


def test_many_images_and_many_tokens(gpu: torch.device) -> None:
    for batch, num_tokens in ((70000, 3), (2, 100000)):
        scores = random("scores", (batch, num_tokens), torch.float32, gpu)
        index = select_tokens(scores, num_tokens // 2)
        expected = spot_ext.select_tokens_reference(scores, num_tokens // 2)
        assert_same_bits(index, expected)
        tokens = random("tokens", (batch, num_tokens + 1, 4), torch.float32, gpu)
        assert_same_bits(compact_tokens(tokens, index),
                         spot_ext.compact_tokens_reference(tokens, index))  # fmt: skip
        weights = scores.softmax(-1)
        assert_close(fuse_tokens(tokens, weights, index),
                     spot_ext.fuse_tokens_reference(tokens, weights, index), 1e-5)  # fmt: skip
