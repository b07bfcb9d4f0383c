"""On a GPU: an index out of range is never read through, and sizes beyond 2^31."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random, random_index
from torch import Tensor

import spot_ext
from spot_ext import compact_tokens, fuse_tokens, scatter_tokens, select_tokens

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
